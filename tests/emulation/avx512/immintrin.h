// The AVX-512 intrinsics that csrc/cpu uses, written out lane by lane after Intel's Intrinsics Guide, so that the
// sixteen-lane kernels run on any processor. Found before the compiler's own header by the test that compiles them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "storage.h"

typedef float __m512 __attribute__((vector_size(64)));
typedef float __m256 __attribute__((vector_size(32)));
typedef double __m512d __attribute__((vector_size(64)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef uint16_t __mmask16;
constexpr int _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8;

namespace avx512 {

typedef int32_t Int16 __attribute__((vector_size(64)));
typedef uint32_t Word16 __attribute__((vector_size(64)));
typedef uint64_t Wide8 __attribute__((vector_size(64)));

template <typename To, typename From>
To cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename V, typename Lane>
V lanes(Lane lane) {
  V out;
  for (size_t i = 0; i < sizeof(V) / sizeof(out[0]); ++i) out[i] = lane(i);
  return out;
}

// A shuffle of `groups` within each 128 bits: two picks from a, then two from b.
inline __m512 shuffle4(__m512 a, __m512 b, int control) {
  return lanes<__m512>([=](size_t i) {
    const size_t pick = control >> (2 * (i % 4)) & 3;
    return i % 4 < 2 ? a[i / 4 * 4 + pick] : b[i / 4 * 4 + pick];
  });
}

}  // namespace avx512

inline __m512 _mm512_set1_ps(float v) {
  return avx512::lanes<__m512>([=](size_t) { return v; });
}
inline __m512 _mm512_loadu_ps(const void* p) {
  __m512 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void _mm512_storeu_ps(void* p, __m512 v) { std::memcpy(p, &v, sizeof v); }
inline __m512i _mm512_loadu_si512(const void* p) { return avx512::cast<__m512i>(_mm512_loadu_ps(p)); }
inline void _mm512_storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, sizeof v); }
inline __m256i _mm256_loadu_si256(const __m256i* p) {
  __m256i v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void _mm256_storeu_si256(__m256i* p, __m256i v) { std::memcpy(p, &v, sizeof v); }
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  const float* source = static_cast<const float*>(p);
  return avx512::lanes<__m512>([=](size_t i) { return mask >> i & 1 ? source[i] : 0.0f; });
}
inline void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 v) {
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) static_cast<float*>(p)[i] = v[i];
  }
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return avx512::lanes<__m512>([=](size_t i) { return std::fma(a[i], b[i], c[i]); });
}
// Where either is NaN the second operand is the result.
inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
  return avx512::lanes<__m512>([=](size_t i) { return a[i] < b[i] ? a[i] : b[i]; });
}
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return avx512::lanes<__m512>([=](size_t i) { return a[i] > b[i] ? a[i] : b[i]; });
}
inline __m512 _mm512_sqrt_ps(__m512 a) {
  return avx512::lanes<__m512>([=](size_t i) { return std::sqrt(a[i]); });
}
inline __m512 _mm512_roundscale_ps(__m512 a, int) {
  return avx512::lanes<__m512>([=](size_t i) { return std::nearbyint(a[i]); });
}
inline __m256 _mm512_castps512_ps256(__m512 a) {
  return avx512::lanes<__m256>([=](size_t i) { return a[i]; });
}
inline __m256 _mm512_extractf32x8_ps(__m512 a, int half) {
  return avx512::lanes<__m256>([=](size_t i) { return a[8 * half + i]; });
}
inline __m512d _mm512_cvtps_pd(__m256 a) {
  return avx512::lanes<__m512d>([=](size_t i) { return static_cast<double>(a[i]); });
}
inline __m512d _mm512_add_pd(__m512d a, __m512d b) { return a + b; }
inline double _mm512_reduce_add_pd(__m512d a) {
  double total = 0.0;
  for (int i = 0; i < 8; ++i) total += a[i];
  return total;
}
inline __m512i _mm512_set1_epi32(int v) {
  return avx512::cast<__m512i>(avx512::lanes<avx512::Int16>([=](size_t) { return v; }));
}
inline __m512i _mm512_set1_epi64(long long v) {
  return avx512::lanes<__m512i>([=](size_t) { return v; });
}
inline __m512i _mm512_set_epi64(long long h, long long g, long long f, long long e, long long d, long long c,
                                long long b, long long a) {
  return __m512i{a, b, c, d, e, f, g, h};
}
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return avx512::cast<__m512i>(avx512::cast<avx512::Word16>(a) + avx512::cast<avx512::Word16>(b));
}
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
  return avx512::cast<__m512i>(avx512::cast<avx512::Word16>(a) - avx512::cast<avx512::Word16>(b));
}
inline __m512i _mm512_add_epi64(__m512i a, __m512i b) {
  return avx512::cast<__m512i>(avx512::cast<avx512::Wide8>(a) + avx512::cast<avx512::Wide8>(b));
}
inline __m512i _mm512_srli_epi32(__m512i a, int n) {
  return avx512::cast<__m512i>(avx512::cast<avx512::Word16>(a) >> n);
}
inline __m512i _mm512_slli_epi32(__m512i a, int n) {
  return avx512::cast<__m512i>(avx512::cast<avx512::Word16>(a) << n);
}
inline __m512i _mm512_srai_epi32(__m512i a, int n) {
  return avx512::cast<__m512i>(avx512::cast<avx512::Int16>(a) >> n);
}
inline __m512i _mm512_srli_epi64(__m512i a, int n) {
  return avx512::cast<__m512i>(avx512::cast<avx512::Wide8>(a) >> n);
}
inline __m512i _mm512_slli_epi64(__m512i a, int n) {
  return avx512::cast<__m512i>(avx512::cast<avx512::Wide8>(a) << n);
}
// The low halves of the 64-bit lanes, multiplied.
inline __m512i _mm512_mul_epu32(__m512i a, __m512i b) {
  return avx512::lanes<__m512i>([=](size_t i) {
    return static_cast<long long>(uint64_t{static_cast<uint32_t>(a[i])} * static_cast<uint32_t>(b[i]));
  });
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  __m512i out{};
  for (int row = 0; row < 8; ++row) {
    if (table >> row & 1) out |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  }
  return out;
}
inline __mmask16 _mm512_test_epi32_mask(__m512i a, __m512i b) {
  const avx512::Word16 both = avx512::cast<avx512::Word16>(a & b);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(both[i] != 0) << i;
  return static_cast<__mmask16>(mask);
}
inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
  return avx512::lanes<__m512>([=](size_t i) { return mask >> i & 1 ? b[i] : a[i]; });
}
inline __m512i _mm512_mask_blend_epi32(__mmask16 mask, __m512i a, __m512i b) {
  return avx512::cast<__m512i>(_mm512_mask_blend_ps(mask, avx512::cast<__m512>(a), avx512::cast<__m512>(b)));
}
inline __m512 _mm512_xor_ps(__m512 a, __m512 b) {
  return avx512::cast<__m512>(avx512::cast<__m512i>(a) ^ avx512::cast<__m512i>(b));
}
inline __m512 _mm512_castsi512_ps(__m512i a) { return avx512::cast<__m512>(a); }
inline __m512i _mm512_castps_si512(__m512 a) { return avx512::cast<__m512i>(a); }
inline __m512i _mm512_cvtps_epi32(__m512 a) {
  return avx512::cast<__m512i>(
      avx512::lanes<avx512::Int16>([=](size_t i) { return static_cast<int32_t>(std::nearbyint(a[i])); }));
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  const avx512::Int16 values = avx512::cast<avx512::Int16>(a);
  return avx512::lanes<__m512>([=](size_t i) { return static_cast<float>(values[i]); });
}
inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  return avx512::lanes<__m512>([=](size_t i) { return (i & 1 ? b : a)[i / 4 * 4 + i % 4 / 2]; });
}
inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  return avx512::lanes<__m512>([=](size_t i) { return (i & 1 ? b : a)[i / 4 * 4 + 2 + i % 4 / 2]; });
}
inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int control) { return avx512::shuffle4(a, b, control); }
// Whole 128-bit parts: two picks from a, then two from b.
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int control) {
  return avx512::lanes<__m512>([=](size_t i) {
    const size_t part = control >> (2 * (i / 4)) & 3;
    return (i / 4 < 2 ? a : b)[4 * part + i % 4];
  });
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
  noisepolicy::Half halves[16];
  std::memcpy(halves, &a, sizeof halves);
  return avx512::lanes<__m512>([&](size_t i) { return noisepolicy::to_float(halves[i]); });
}
inline __m256i _mm512_cvtps_ph(__m512 a, int) {
  noisepolicy::Half halves[16];
  for (int i = 0; i < 16; ++i) noisepolicy::from_float(a[i], halves[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves));
}
