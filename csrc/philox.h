// Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller, the one source of noise for every backend.
//
// Element d of row r takes normal d % 4 of the four that counter `offset + r * ceil(D / 4) + d / 4` gives, so a value
// depends on nothing but seed, offset and place. Logarithm and sine are polynomials: the library functions of
// different devices differ in their last bits, these do not.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define NP_HD __host__ __device__ __forceinline__
#else
#define NP_HD inline
#endif

namespace noisepolicy {

struct Uint4 {
  uint32_t x, y, z, w;
};

struct Float4 {
  float x, y, z, w;
};

NP_HD uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

NP_HD Uint4 philox4x32(Uint4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
    const uint32_t high1 = multiply_high(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
    counter = {high1 ^ counter.y ^ key0, low1, high0 ^ counter.w ^ key1, low0};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// -2 ln(u) for u in [2^-24, 1], after Cephes' logf: u = m * 2^e with m in [sqrt(1/2), sqrt(2)).
NP_HD float minus_two_log(float u) {
  uint32_t bits;
  memcpy(&bits, &u, sizeof bits);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  bits -= static_cast<uint32_t>(exponent) << 23;
  float mantissa;
  memcpy(&mantissa, &bits, sizeof mantissa);
  const float f = mantissa - 1.0f, square = f * f, e = static_cast<float>(exponent);
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float tail = f * square * p - 2.12194440e-4f * e - 0.5f * square;
  return -2.0f * (0.693359375f * e + (f + tail));
}

// cos and sin of 2 pi u for u in [0, 1): the nearest quarter turn is taken off, a polynomial does the rest.
NP_HD void cos_sin_turn(float u, float& cosine, float& sine) {
  const float turns = 4.0f * u;
  const int32_t quarter = static_cast<int32_t>(turns + 0.5f);
  const float r = (turns - static_cast<float>(quarter)) * 1.5707963267948966f, r2 = r * r;
  const float s = r + r * r2 * (-1.6666654611e-1f + r2 * (8.3321608736e-3f - r2 * 1.9515295891e-4f));
  const float c =
      1.0f - 0.5f * r2 + r2 * r2 * (4.166664568298827e-2f + r2 * (-1.388731625493765e-3f + r2 * 2.443315711809948e-5f));
  const bool is_odd = quarter & 1;
  cosine = is_odd ? s : c;
  sine = is_odd ? c : s;
  if ((quarter + 1) & 2) cosine = -cosine;
  if (quarter & 2) sine = -sine;
}

// Two independent standard normals; 24 bits of each word, so every step up to the polynomials is exact.
NP_HD void box_muller(uint32_t a, uint32_t b, float& first, float& second) {
  const float radius = sqrtf(minus_two_log((static_cast<float>(a >> 8) + 1.0f) * 5.9604644775390625e-8f));
  cos_sin_turn(static_cast<float>(b >> 8) * 5.9604644775390625e-8f, first, second);
  first *= radius;
  second *= radius;
}

NP_HD Uint4 counter_words(uint64_t counter) {
  return {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0u, 0u};
}

// The four standard normals of one counter.
NP_HD Float4 normal4(uint64_t seed, uint64_t counter) {
  const Uint4 words =
      philox4x32(counter_words(counter), static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  Float4 normals;
  box_muller(words.x, words.y, normals.x, normals.y);
  box_muller(words.z, words.w, normals.z, normals.w);
  return normals;
}

}  // namespace noisepolicy
