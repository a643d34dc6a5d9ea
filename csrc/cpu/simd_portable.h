// One lane of plain C++: what runs where no vector instructions are known.
#pragma once

#include "../storage.h"

namespace noisepolicy::cpu::NOISEPOLICY_ISA {

constexpr int kWidth = 1;
using Vector = float;

inline Vector broadcast(float value) { return value; }
inline Vector load(const float* source) { return *source; }
inline Vector load_partial(const float*, int64_t) { return 0.0f; }
inline void store(float* target, Vector value) { *target = value; }
inline void store_partial(float*, Vector, int64_t) {}
inline Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
inline Vector clamp(Vector value, float low, float high) {
  return value < low ? low : value > high ? high : value;  // NaN stays
}
inline double sum(Vector value) { return value; }
// By the integer in the low bits of `n`.
inline Vector add_to_exponent(Vector value, Vector n) {
  return float_from_bits(bits_from_float(value) + (bits_from_float(n) << 23));
}
inline Vector subtract_from_exponent(Vector value, Vector n) {
  return float_from_bits(bits_from_float(value) - (bits_from_float(n) << 23));
}

struct Keys {
  uint64_t seed;
  explicit Keys(uint64_t value) : seed(value) {}
};

inline void store_words(const Keys& keys, uint64_t counter, uint32_t* out) {
  const Uint4 words =
      philox4x32(counter_words(counter), static_cast<uint32_t>(keys.seed), static_cast<uint32_t>(keys.seed >> 32));
  out[0] = words.x;
  out[1] = words.y;
  out[2] = words.z;
  out[3] = words.w;
}

inline void store_normals(const uint32_t* words, float* out) {
  box_muller(words[0], words[1], out[0], out[1]);
  box_muller(words[2], words[3], out[2], out[3]);
}

template <typename T>
void convert(const T* source, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(source[i]);
}

template <typename T>
void convert_back(const float* source, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) from_float(source[i], out[i]);
}

}  // namespace noisepolicy::cpu::NOISEPOLICY_ISA
