// Storage types a kernel reads: float, IEEE half and bfloat16. Arithmetic is always in float.
#pragma once

#include <cstdint>
#include <cstring>

namespace noisepolicy {

enum class Storage : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1Fu, fraction = value.bits & 0x3FFu;
  if (exponent == 31) return float_from_bits(sign | 0x7F800000u | (fraction << 13));
  if (exponent != 0) return float_from_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float subnormal = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // fraction * 2^-24
  return sign ? -subnormal : subnormal;
}

// Calls `body` with a null pointer of the storage's element type, to carry the type.
template <typename Body>
void dispatch_storage(Storage storage, Body body) {
  switch (storage) {
    case Storage::kFloat32: body(static_cast<const float*>(nullptr)); break;
    case Storage::kFloat16: body(static_cast<const Half*>(nullptr)); break;
    case Storage::kBFloat16: body(static_cast<const BFloat16*>(nullptr)); break;
  }
}

}  // namespace noisepolicy
