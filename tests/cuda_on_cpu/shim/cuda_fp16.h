// Stands for CUDA's cuda_fp16.h on the CPU: conversions by the library's own rounding (csrc/core/float_formats.h).
#pragma once
#include "core/float_formats.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half h) { return probquant::float16_to_float(h.bits); }
inline __half __float2half_rn(float f) { return {probquant::float_to_float16(f)}; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
