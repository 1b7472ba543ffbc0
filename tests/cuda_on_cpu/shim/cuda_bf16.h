// Stands for CUDA's cuda_bf16.h on the CPU: conversions by the library's own rounding (csrc/core/float_formats.h).
#pragma once
#include "core/float_formats.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 h) { return probquant::bfloat16_to_float(h.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return {probquant::float_to_bfloat16(f)}; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
