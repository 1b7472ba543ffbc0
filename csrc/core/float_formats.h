// Reading and writing float32, float16 and bfloat16 by element. Narrowing rounds half to even; a NaN stays a (quiet) NaN.
#pragma once
#include <probquant/types.h>

#include <cstring>

namespace probquant {

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

inline float bfloat16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

inline uint16_t float_to_bfloat16(float f) {
  const uint32_t bits = float_to_bits(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float float16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 5.960464477539063e-8f;  // subnormal: mantissa * 2^-24, exact
  return sign ? -magnitude : magnitude;
}

inline uint16_t float_to_float16(float f) {
  const uint32_t bits = float_to_bits(f), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and above
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24 in the low mantissa bits
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) & 0x7ffu));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

inline float load_float(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::float16: return float16_to_float(static_cast<const uint16_t*>(data)[index]);
    case DType::bfloat16: return bfloat16_to_float(static_cast<const uint16_t*>(data)[index]);
    case DType::float32: break;
  }
  return static_cast<const float*>(data)[index];
}

inline void store_float(void* data, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::float16: static_cast<uint16_t*>(data)[index] = float_to_float16(value); return;
    case DType::bfloat16: static_cast<uint16_t*>(data)[index] = float_to_bfloat16(value); return;
    case DType::float32: break;
  }
  static_cast<float*>(data)[index] = value;
}

}  // namespace probquant
