// Storage types a kernel reads and writes: float, IEEE half and bfloat16. Arithmetic is always in float. The
// conversions are plain integer arithmetic, so host, device and emulation share them; rounding is to nearest even.
#pragma once

#include "arguments.h"
#include "philox.h"

namespace noisepolicy {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

NP_HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

NP_HD uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

NP_HD float to_float(float value) { return value; }

NP_HD float to_float(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

NP_HD float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1Fu, fraction = value.bits & 0x3FFu;
  if (exponent == 31) return float_from_bits(sign | 0x7F800000u | (fraction << 13));
  if (exponent != 0) return float_from_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float subnormal = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // fraction * 2^-24
  return sign ? -subnormal : subnormal;
}

NP_HD void from_float(float value, float& out) { out = value; }

NP_HD void from_float(float value, BFloat16& out) {
  const uint32_t bits = bits_from_float(value);
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out.bits = static_cast<uint16_t>(is_nan ? 0x7FC0u : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

NP_HD void from_float(float value, Half& out) {
  const uint32_t bits = bits_from_float(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;  // NaN
  } else if (magnitude >= 0x477FF000u) {
    half = 0x7C00u;  // rounds to infinity
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  } else {
    // Subnormal: adding 0.5 leaves the rounded value, in units of 2^-24, in the low bits.
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3F000000u;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

// Calls `body` with a null pointer of the storage's element type, to carry the type.
template <typename Body>
void dispatch_storage(Storage storage, Body body) {
  switch (storage) {
    case Storage::kFloat32:
      body(static_cast<float*>(nullptr));
      break;
    case Storage::kFloat16:
      body(static_cast<Half*>(nullptr));
      break;
    case Storage::kBFloat16:
      body(static_cast<BFloat16*>(nullptr));
      break;
  }
}

}  // namespace noisepolicy
