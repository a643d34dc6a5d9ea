// Sixteen lanes of AVX-512 F, DQ.
#pragma once

#include <immintrin.h>

#include "../storage.h"

namespace noisepolicy::cpu::NOISEPOLICY_ISA {

constexpr int kWidth = 16;
using Vector = __m512;
using Words = __m512i;

inline Vector broadcast(float value) { return _mm512_set1_ps(value); }
inline Vector load(const float* source) { return _mm512_loadu_ps(source); }
inline void store(float* target, Vector value) { _mm512_storeu_ps(target, value); }
inline __mmask16 lanes_below(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
inline Vector load_partial(const float* source, int64_t count) {
  return _mm512_maskz_loadu_ps(lanes_below(count), source);
}
inline void store_partial(float* target, Vector value, int64_t count) {
  _mm512_mask_storeu_ps(target, lanes_below(count), value);
}
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector clamp(Vector value, float low, float high) {
  return _mm512_min_ps(broadcast(high), _mm512_max_ps(broadcast(low), value));  // NaN stays: it is the second operand
}
inline double sum(Vector value) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(value));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(value, 1));
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}
inline Vector round(Vector value) { return _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// By the integer in the low bits of `n`.
inline Vector add_to_exponent(Vector value, Vector n) {
  const Words shifted = _mm512_slli_epi32(_mm512_castps_si512(n), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value), shifted));
}
inline Vector subtract_from_exponent(Vector value, Vector n) {
  const Words shifted = _mm512_slli_epi32(_mm512_castps_si512(n), 23);
  return _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(value), shifted));
}

inline Words load_words(const uint32_t* source) { return _mm512_loadu_si512(reinterpret_cast<const Words*>(source)); }
inline void store_words(uint32_t* target, Words words) { _mm512_storeu_si512(reinterpret_cast<Words*>(target), words); }

// Box-Muller takes the top 24 bits of each word.
inline Vector top_bits(Words words) { return _mm512_cvtepi32_ps(_mm512_srli_epi32(words, 8)); }
inline Vector square_root(Vector value) { return _mm512_sqrt_ps(value); }
inline void split_float(Vector value, Vector& mantissa, Vector& exponent) {
  const Words bits = _mm512_castps_si512(value);
  const Words power = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3F3504F3)), 23);
  mantissa = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(power, 23)));
  exponent = _mm512_cvtepi32_ps(power);
}
// Turns (cosine, sine) of the rest by `quarters` quarter turns.
inline void turn(Vector quarters, Vector& cosine, Vector& sine) {
  const Words count = _mm512_cvtps_epi32(quarters), sign = _mm512_set1_epi32(INT32_MIN);
  const __mmask16 is_odd = _mm512_test_epi32_mask(count, _mm512_set1_epi32(1));
  const Words next = _mm512_add_epi32(count, _mm512_set1_epi32(1));
  const Vector c = _mm512_mask_blend_ps(is_odd, cosine, sine), s = _mm512_mask_blend_ps(is_odd, sine, cosine);
  cosine = _mm512_xor_ps(c, _mm512_castsi512_ps(_mm512_and_si512(_mm512_slli_epi32(next, 30), sign)));
  sine = _mm512_xor_ps(s, _mm512_castsi512_ps(_mm512_and_si512(_mm512_slli_epi32(count, 30), sign)));
}

// Philox on 64-bit lanes: a multiplication reads the low half of a lane and fills both, so nothing is ever unpacked.
// What lies in the high half of a word is never read.
struct Philox {
  Words x, y, z, w;

  explicit Philox(Words counters) : x(counters), y(_mm512_srli_epi64(counters, 32)), z(_mm512_setzero_si512()), w(z) {}

  void round(uint32_t key0, uint32_t key1) {
    constexpr int kXor3 = 0x96;
    const Words product0 = _mm512_mul_epu32(x, _mm512_set1_epi64(0xD2511F53));
    const Words product1 = _mm512_mul_epu32(z, _mm512_set1_epi64(0xCD9E8D57));
    x = _mm512_ternarylogic_epi32(_mm512_srli_epi64(product1, 32), y, _mm512_set1_epi32(key0), kXor3);
    z = _mm512_ternarylogic_epi32(_mm512_srli_epi64(product0, 32), w, _mm512_set1_epi32(key1), kXor3);
    y = product1;
    w = product0;
  }
};

inline Words first_counters(uint64_t counter) {
  return _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(counter)),
                          _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0));
}
constexpr int kCountersBetween = 1;  // even counters in one Philox, odd ones in the other: `pack` puts them in order
inline Words pack(Words even, Words odd) { return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)); }
inline Words next_counters(Words counters) { return _mm512_add_epi64(counters, _mm512_set1_epi64(kCountersBetween)); }

// Lane i of the four vectors becomes elements 4i to 4i + 3.
inline void store_interleaved(Vector n0, Vector n1, Vector n2, Vector n3, float* out) {
  const Vector low01 = _mm512_unpacklo_ps(n0, n1), high01 = _mm512_unpackhi_ps(n0, n1);
  const Vector low23 = _mm512_unpacklo_ps(n2, n3), high23 = _mm512_unpackhi_ps(n2, n3);
  const Vector a = _mm512_shuffle_ps(low01, low23, 0x44), b = _mm512_shuffle_ps(low01, low23, 0xEE);
  const Vector c = _mm512_shuffle_ps(high01, high23, 0x44), d = _mm512_shuffle_ps(high01, high23, 0xEE);
  const Vector low_ab = _mm512_shuffle_f32x4(a, b, 0x44), high_ab = _mm512_shuffle_f32x4(a, b, 0xEE);
  const Vector low_cd = _mm512_shuffle_f32x4(c, d, 0x44), high_cd = _mm512_shuffle_f32x4(c, d, 0xEE);
  store(out, _mm512_shuffle_f32x4(low_ab, low_cd, 0x88));
  store(out + 16, _mm512_shuffle_f32x4(low_ab, low_cd, 0xDD));
  store(out + 32, _mm512_shuffle_f32x4(high_ab, high_cd, 0x88));
  store(out + 48, _mm512_shuffle_f32x4(high_ab, high_cd, 0xDD));
}

inline Vector widen(const Half* source) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}
inline void narrow(Vector value, Half* target) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace noisepolicy::cpu::NOISEPOLICY_ISA
