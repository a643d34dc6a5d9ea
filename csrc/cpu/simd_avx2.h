// Eight lanes of AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "../storage.h"

namespace noisepolicy::cpu::NOISEPOLICY_ISA {

constexpr int kWidth = 8;
using Vector = __m256;
using Words = __m256i;

inline Vector broadcast(float value) { return _mm256_set1_ps(value); }
inline Vector load(const float* source) { return _mm256_loadu_ps(source); }
inline void store(float* target, Vector value) { _mm256_storeu_ps(target, value); }
inline Words lanes_below(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vector load_partial(const float* source, int64_t count) {
  return _mm256_maskload_ps(source, lanes_below(count));
}
inline void store_partial(float* target, Vector value, int64_t count) {
  _mm256_maskstore_ps(target, lanes_below(count), value);
}
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector clamp(Vector value, float low, float high) {
  return _mm256_min_ps(broadcast(high), _mm256_max_ps(broadcast(low), value));  // NaN stays: it is the second operand
}
inline double sum(Vector value) {
  const __m256d pairs =
      _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(value)), _mm256_cvtps_pd(_mm256_extractf128_ps(value, 1)));
  const __m128d halves = _mm_add_pd(_mm256_castpd256_pd128(pairs), _mm256_extractf128_pd(pairs, 1));
  return _mm_cvtsd_f64(_mm_add_sd(halves, _mm_unpackhi_pd(halves, halves)));
}
inline Vector round(Vector value) { return _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// By the integer in the low bits of `n`.
inline Vector add_to_exponent(Vector value, Vector n) {
  const Words shifted = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), shifted));
}
inline Vector subtract_from_exponent(Vector value, Vector n) {
  const Words shifted = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
  return _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(value), shifted));
}

inline Words load_words(const uint32_t* source) { return _mm256_loadu_si256(reinterpret_cast<const Words*>(source)); }
inline void store_words(uint32_t* target, Words words) { _mm256_storeu_si256(reinterpret_cast<Words*>(target), words); }

// Box-Muller takes the top 24 bits of each word.
inline Vector top_bits(Words words) { return _mm256_cvtepi32_ps(_mm256_srli_epi32(words, 8)); }
inline Vector square_root(Vector value) { return _mm256_sqrt_ps(value); }
inline void split_float(Vector value, Vector& mantissa, Vector& exponent) {
  const Words bits = _mm256_castps_si256(value);
  const Words power = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3F3504F3)), 23);
  mantissa = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(power, 23)));
  exponent = _mm256_cvtepi32_ps(power);
}
// Turns (cosine, sine) of the rest by `quarters` quarter turns.
inline void turn(Vector quarters, Vector& cosine, Vector& sine) {
  const Words count = _mm256_cvtps_epi32(quarters);
  const Vector is_odd = _mm256_castsi256_ps(_mm256_slli_epi32(count, 31)), sign = broadcast(-0.0f);
  const Words next = _mm256_add_epi32(count, _mm256_set1_epi32(1));
  const Vector c = _mm256_blendv_ps(cosine, sine, is_odd), s = _mm256_blendv_ps(sine, cosine, is_odd);
  cosine = _mm256_xor_ps(c, _mm256_and_ps(_mm256_castsi256_ps(_mm256_slli_epi32(next, 30)), sign));
  sine = _mm256_xor_ps(s, _mm256_and_ps(_mm256_castsi256_ps(_mm256_slli_epi32(count, 30)), sign));
}

// Philox on 64-bit lanes: a multiplication reads the low half of a lane and fills both, so nothing is ever unpacked.
// What lies in the high half of a word is never read.
struct Philox {
  Words x, y, z, w;

  explicit Philox(Words counters) : x(counters), y(_mm256_srli_epi64(counters, 32)), z(_mm256_setzero_si256()), w(z) {}

  void round(uint32_t key0, uint32_t key1) {
    const Words product0 = _mm256_mul_epu32(x, _mm256_set1_epi64x(0xD2511F53));
    const Words product1 = _mm256_mul_epu32(z, _mm256_set1_epi64x(0xCD9E8D57));
    x = _mm256_xor_si256(_mm256_srli_epi64(product1, 32), _mm256_xor_si256(y, _mm256_set1_epi32(key0)));
    z = _mm256_xor_si256(_mm256_srli_epi64(product0, 32), _mm256_xor_si256(w, _mm256_set1_epi32(key1)));
    y = product1;
    w = product0;
  }
};

inline Words first_counters(uint64_t counter) {
  return _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(counter)), _mm256_setr_epi64x(0, 2, 4, 6));
}
constexpr int kCountersBetween = 1;  // even counters in one Philox, odd ones in the other: `pack` puts them in order
inline Words pack(Words even, Words odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
inline Words next_counters(Words counters) { return _mm256_add_epi64(counters, _mm256_set1_epi64x(kCountersBetween)); }

// Lane i of the four vectors becomes elements 4i to 4i + 3.
inline void store_interleaved(Vector n0, Vector n1, Vector n2, Vector n3, float* out) {
  const Vector low01 = _mm256_unpacklo_ps(n0, n1), high01 = _mm256_unpackhi_ps(n0, n1);
  const Vector low23 = _mm256_unpacklo_ps(n2, n3), high23 = _mm256_unpackhi_ps(n2, n3);
  const Vector a = _mm256_shuffle_ps(low01, low23, 0x44), b = _mm256_shuffle_ps(low01, low23, 0xEE);
  const Vector c = _mm256_shuffle_ps(high01, high23, 0x44), d = _mm256_shuffle_ps(high01, high23, 0xEE);
  store(out, _mm256_permute2f128_ps(a, b, 0x20));
  store(out + 8, _mm256_permute2f128_ps(c, d, 0x20));
  store(out + 16, _mm256_permute2f128_ps(a, b, 0x31));
  store(out + 24, _mm256_permute2f128_ps(c, d, 0x31));
}

inline Vector widen(const Half* source) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
inline void narrow(Vector value, Half* target) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                   _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace noisepolicy::cpu::NOISEPOLICY_ISA
