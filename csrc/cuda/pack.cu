// pack_weight: canonical weight to the packed one (packed_weight.h), on the device, without reading a value on the host.
//
// Launch: one block of 256 threads per 64 output channels, at most 64 registers, no shared memory; a warp takes a channel at a
// time: zeros, then its weights, each once, and their sum. Then one block for the trailer, 64 bytes of shared memory. Run at load time
// only: clear rather than fast, a byte at a time.
#include "packed_weight.h"
#include "reduce.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    pack_kernel(const PackedLayout layout, const int8_t* weight, const float* weight_scale, const float* bias, const float* output_profile,
                uint8_t* packed) {
  const int64_t group = blockIdx.x / layout.group_blocks, first = blockIdx.x % layout.group_blocks * kBlockChannels;
  uint8_t* block = packed + blockIdx.x * layout.block_bytes;
  for (int64_t i = threadIdx.x; i < layout.block_bytes / 4; i += kThreads) reinterpret_cast<uint32_t*>(block)[i] = 0;
  __syncthreads();
  auto* header = reinterpret_cast<BlockHeader*>(block);
  uint8_t* stream = block + sizeof(BlockHeader);
  const int64_t taps = layout.kernel_height * layout.kernel_width, weights = taps * layout.inputs;
  for (int32_t channel = threadIdx.x / 32; channel < kBlockChannels && first + channel < layout.group_channels; channel += kThreads / 32) {
    const int64_t o = group * layout.group_channels + first + channel;
    int32_t sum = 0;
    for (int64_t i = threadIdx.x % 32; i < weights; i += 32) {
      const int8_t w = weight[o * weights + i];
      const int64_t tap = i / layout.inputs;
      stream[layout.weight_offset(channel, tap / layout.kernel_width, tap % layout.kernel_width, i % layout.inputs)] = static_cast<uint8_t>(w);
      sum += w;
    }
    sum = warp_reduce(sum, [](int32_t a, int32_t b) { return a + b; });
    if (threadIdx.x % 32 == 0) {
      const float profile = output_profile != nullptr ? output_profile[o] : 1.0f, inverse_profile = 1.0f / profile;
      header->weight_sum[channel] = sum;
      header->scale[channel] = weight_scale[o] * inverse_profile;
      header->bias[channel] = bias != nullptr ? bias[o] * inverse_profile : 0.0f;
      header->profile[channel] = profile;
      header->inverse_profile[channel] = inverse_profile;
    }
  }
}

/// The trailer: the extremes of the inverse profile.
__global__ void __launch_bounds__(kThreads) pack_trailer_kernel(const int64_t out_channels, const float* output_profile, PackedTrailer* trailer) {
  Range inverse{kInfinity, 0.0f};
  for (int64_t o = threadIdx.x; o < out_channels; o += kThreads) {
    const float value = output_profile != nullptr ? 1.0f / output_profile[o] : 1.0f;
    inverse = join(inverse, {value, value});
  }
  inverse = block_range(inverse);
  if (threadIdx.x == 0) *trailer = PackedTrailer{{inverse.lo, inverse.hi}, {}};
}

}  // namespace

void launch_pack(const PackedLayout& layout, const int8_t* weight, const float* weight_scale, const float* bias, const float* output_profile,
                 uint8_t* packed, void* stream) {
  launch("pack_weight", pack_kernel, {layout.blocks(), kThreads}, stream, layout, weight, weight_scale, bias, output_profile, packed);
  launch("pack_weight", pack_trailer_kernel, {1, kThreads}, stream, layout.out_channels, output_profile,
         reinterpret_cast<PackedTrailer*>(packed + layout.trailer_offset()));
}

}  // namespace probquant::cuda
