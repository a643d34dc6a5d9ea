// Noise and exp on the vectors of one instruction set; the same formulas as philox.h, kWidth counters at a time.
#pragma once

#ifdef NOISEPOLICY_SIMD
#include NOISEPOLICY_SIMD
#else
#include "simd_portable.h"
#endif

namespace noisepolicy::cpu::NOISEPOLICY_ISA {

// Added to a number below 2^22 in size, rounds it to an integer, which is then in the low bits of the sum.
constexpr float kRounding = 12582912.0f;

// value = n log(2) + rest; returns n + kRounding.
inline Vector take_powers_of_two(Vector value, Vector& rest) {
  const Vector rounded = fma(value, broadcast(1.44269504088896341f), broadcast(kRounding));
  const Vector n = rounded - broadcast(kRounding);
  rest = fma(n, broadcast(-0.693359375f), value);
  rest = fma(n, broadcast(2.12194440e-4f), rest);
  return rounded;
}

// exp, after Cephes' expf, to an ulp or two; exactly 1 at 0. Constant beyond +-86.5.
inline Vector exponential(Vector value) {
  Vector r;
  const Vector n = take_powers_of_two(clamp(value, -86.5f, 86.5f), r);
  Vector p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  return add_to_exponent(fma(p, r * r, r) + broadcast(1.0f), n);
}

// exp(value) and exp(-value) for little more than one of them, from cosh and sinh of the rest (minimax polynomials).
inline void exponentials(Vector value, Vector& positive, Vector& negative) {
  Vector r;
  const Vector n = take_powers_of_two(clamp(value, -86.5f, 86.5f), r), r2 = r * r;
  Vector even = fma(r2, broadcast(1.39474385e-3f), broadcast(4.16662462e-2f));
  even = fma(fma(even, r2, broadcast(0.5f)), r2, broadcast(1.0f));
  const Vector odd = fma(fma(r2, broadcast(8.36939056e-3f), broadcast(1.66665136e-1f)), r2 * r, r);
  positive = add_to_exponent(even + odd, n);
  negative = subtract_from_exponent(even - odd, n);
}

#ifdef NOISEPOLICY_SIMD

inline Vector minus_two_log(Vector u) {
  Vector mantissa, exponent;
  split_float(u, mantissa, exponent);
  const Vector f = mantissa - broadcast(1.0f), square = f * f;
  Vector p = broadcast(7.0376836292e-2f);
  p = fma(p, f, broadcast(-1.1514610310e-1f));
  p = fma(p, f, broadcast(1.1676998740e-1f));
  p = fma(p, f, broadcast(-1.2420140846e-1f));
  p = fma(p, f, broadcast(1.4249322787e-1f));
  p = fma(p, f, broadcast(-1.6668057665e-1f));
  p = fma(p, f, broadcast(2.0000714765e-1f));
  p = fma(p, f, broadcast(-2.4999993993e-1f));
  p = fma(p, f, broadcast(3.3333331174e-1f));
  Vector tail = fma(f * square, p, exponent * broadcast(-2.12194440e-4f));
  tail = fma(broadcast(-0.5f), square, tail);
  return broadcast(-2.0f) * fma(exponent, broadcast(0.693359375f), f + tail);
}

inline void box_muller(Words a, Words b, Vector& first, Vector& second) {
  constexpr float kStep = 5.9604644775390625e-8f;  // 2^-24
  const Vector radius = square_root(minus_two_log(fma(top_bits(a), broadcast(kStep), broadcast(kStep))));
  const Vector turns = top_bits(b) * broadcast(4.0f * kStep), quarters = round(turns);
  const Vector r = (turns - quarters) * broadcast(1.5707963267948966f), r2 = r * r;
  Vector s = fma(r2, broadcast(-1.9515295891e-4f), broadcast(8.3321608736e-3f));
  s = fma(r2, s, broadcast(-1.6666654611e-1f));
  s = fma(r * r2, s, r);
  Vector c = fma(r2, broadcast(2.443315711809948e-5f), broadcast(-1.388731625493765e-3f));
  c = fma(r2, c, broadcast(4.166664568298827e-2f));
  c = fma(r2 * r2, c, fma(broadcast(-0.5f), r2, broadcast(1.0f)));
  turn(quarters, c, s);
  first = radius * c;
  second = radius * s;
}

// The round keys of a seed.
struct Keys {
  uint32_t words[20];

  explicit Keys(uint64_t seed) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int i = 0; i < 10; ++i) {
      words[2 * i] = key0;
      words[2 * i + 1] = key1;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
  }
};

// The words of kWidth counters: all their x, then y, z and w. 4 * kWidth of them.
inline void store_words(const Keys& keys, uint64_t counter, uint32_t* out) {
  const Words even_counters = first_counters(counter);
  Philox even(even_counters), odd(next_counters(even_counters));
  for (int i = 0; i < 10; ++i) {
    even.round(keys.words[2 * i], keys.words[2 * i + 1]);
    odd.round(keys.words[2 * i], keys.words[2 * i + 1]);
  }
  store_words(out, pack(even.x, odd.x));
  store_words(out + kWidth, pack(even.y, odd.y));
  store_words(out + 2 * kWidth, pack(even.z, odd.z));
  store_words(out + 3 * kWidth, pack(even.w, odd.w));
}

// The 4 * kWidth standard normals of `store_words`' words, in the counters' order.
inline void store_normals(const uint32_t* words, float* out) {
  Vector n0, n1, n2, n3;
  box_muller(load_words(words), load_words(words + kWidth), n0, n1);
  box_muller(load_words(words + 2 * kWidth), load_words(words + 3 * kWidth), n2, n3);
  store_interleaved(n0, n1, n2, n3, out);
}

inline void convert(const Half* source, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, widen(source + i));
  for (; i < count; ++i) out[i] = to_float(source[i]);
}

inline void convert_back(const float* source, int64_t count, Half* out) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) narrow(load(source + i), out + i);
  for (; i < count; ++i) from_float(source[i], out[i]);
}

inline void convert(const BFloat16* source, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(source[i]);
}

inline void convert_back(const float* source, int64_t count, BFloat16* out) {
  for (int64_t i = 0; i < count; ++i) from_float(source[i], out[i]);
}

#endif

}  // namespace noisepolicy::cpu::NOISEPOLICY_ISA
