// Depthwise layers: every output channel sees one input channel. A thread takes 4 neighbouring output channels and walks over
// positions; for every column of the kernel it turns 4 rows of 4 channels around (8 byte permutations), so that one dp4a meets 4
// taps of a channel. Outside of the image it takes the sample's zero point, so padding needs no correction.
//
// Where the output's parameters take a few flops or are those of a range that a launch before has measured, one thread of every block finds
// them, in front of everything; the sample's first block writes them. Stats as in parts.cuh.
//
// Launch: a Partition of [batch, output positions, ceil(O / 4)], so a block belongs to one sample; up to 256 threads, at most 128
// registers (2 blocks per multiprocessor), 8,460 bytes of static shared memory. Reads each input byte kernel_height * kernel_width / strides times,
// nearly all from the L1 cache; about 20 instructions per kernel column and 110 for the epilogue of 4 outputs: bound by those, not
// by memory.
#include "epilogue.cuh"
#include "ptx.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

constexpr int kWidth = 4;  // channels of a thread

struct Geometry {
  int32_t in_height, in_width, in_channels, sample_rows, out_width, out_channels;
  int32_t kernel_height, kernel_width, stride_height, stride_width, padding_top, padding_left, dilation_height, dilation_width;
  int32_t multiplier;  ///< output channels per input channel
  int32_t column_steps;
  int64_t block_bytes;
  bool vectors;         ///< see WarpEpilogue
  bool input_vectors;   ///< 4 input channels of a pixel are one aligned word, and belong to the 4 output channels
};

/// Codes of the thread's channels at one pixel, a byte each.
__device__ uint32_t load_pixel(const Geometry& g, const uint8_t* pixel, int32_t channel, int32_t count) {
  if (g.input_vectors) return *reinterpret_cast<const uint32_t*>(pixel + channel);
  uint32_t word = 0;
#pragma unroll
  for (int v = 0; v < kWidth; ++v)
    if (v < count) word |= static_cast<uint32_t>(pixel[(channel + v) / g.multiplier]) << 8 * v;
  return word;
}

__global__ void __launch_bounds__(kMaxThreads, 2)
    depthwise_kernel(const Partition p, const Geometry g, const LayerArguments a, const LayerPlan plan) {
  const Place place(p);
  const SampleEpilogue inputs = epilogue_inputs(a, place.sample);
  __shared__ QParams qparams;
  const Range measured = plan.predicts && plan.ranges != nullptr ? sample_range(plan.ranges + place.sample * plan.range_count, plan.range_count) : Range{};
  if (plan.output == LayerOutput::codes) {
    if (threadIdx.x == 0) qparams = output_qparams(a, plan, place.sample, inputs, measured, place.first_block);
    __syncthreads();
  }
  const SampleEpilogue epilogue = sample_epilogue(a, plan.output, inputs, plan.output == LayerOutput::codes ? qparams : QParams{});
  const uint32_t outside = static_cast<uint32_t>(epilogue.x_zero_point) * 0x01010101u;
  const auto channel = static_cast<int32_t>(place.channel) * kWidth;
  const int32_t count = place.channel < p.channels ? g.out_channels - channel : 0;
  const int32_t existing = count > 0 ? channel : 0;  // threads without channels read those of the first
  const uint8_t* block = a.packed_weight + existing / kBlockChannels * g.block_bytes;
  const auto* weights = reinterpret_cast<const uint4*>(block + sizeof(BlockHeader)) + existing % kBlockChannels / kWidth;
  WarpEpilogue<kWidth> rows(a, plan.output, g.out_channels, *reinterpret_cast<const BlockHeader*>(block), existing % kBlockChannels, channel, count, g.vectors);
  const uint8_t* x = a.x.q + place.sample * g.in_height * g.in_width * g.in_channels;
  for (int64_t i = place.position; i < place.end; i += p.position_lanes) {
    const int32_t position = visited_position(static_cast<int32_t>(i), static_cast<int32_t>(p.positions), g.sample_rows);
    const auto oy = static_cast<int32_t>(static_cast<uint32_t>(position) / static_cast<uint32_t>(g.out_width));
    const int32_t ox = position - oy * g.out_width;
    const int32_t top = oy * g.stride_height - g.padding_top, left = ox * g.stride_width - g.padding_left;
    int32_t accumulators[kWidth] = {};
    for (int32_t kx = 0; kx < g.kernel_width; ++kx) {
      const int32_t ix = left + kx * g.dilation_width;
      const bool column_inside = static_cast<uint32_t>(ix) < static_cast<uint32_t>(g.in_width);
      for (int32_t step = 0; step < g.column_steps; ++step) {
        uint32_t taps[4];
#pragma unroll
        for (int tap = 0; tap < 4; ++tap) {
          const int32_t ky = 4 * step + tap, iy = top + ky * g.dilation_height;
          taps[tap] = outside;
          if (ky < g.kernel_height && column_inside && static_cast<uint32_t>(iy) < static_cast<uint32_t>(g.in_height))
            taps[tap] = load_pixel(g, x + (static_cast<int64_t>(iy) * g.in_width + ix) * g.in_channels, channel, count);
        }
        // [tap][channel] to [channel][tap]
        const uint32_t low01 = __byte_perm(taps[0], taps[1], 0x5140), low23 = __byte_perm(taps[2], taps[3], 0x5140);
        const uint32_t high01 = __byte_perm(taps[0], taps[1], 0x7362), high23 = __byte_perm(taps[2], taps[3], 0x7362);
        const uint4 w = weights[(kx * g.column_steps + step) * (kBlockChannels / kWidth)];
        accumulators[0] = dp4a_u8_s8(__byte_perm(low01, low23, 0x5410), w.x, accumulators[0]);
        accumulators[1] = dp4a_u8_s8(__byte_perm(low01, low23, 0x7632), w.y, accumulators[1]);
        accumulators[2] = dp4a_u8_s8(__byte_perm(high01, high23, 0x5410), w.z, accumulators[2]);
        accumulators[3] = dp4a_u8_s8(__byte_perm(high01, high23, 0x7632), w.w, accumulators[3]);
      }
    }
    rows.store(place.sample * g.sample_rows + position, epilogue, accumulators);
  }
  if (plan.output == LayerOutput::codes) {
    if (epilogue.valid) write_stats(p, place, rows.moments, a.y, g.out_channels, plan.parts);
    else write_invalid(place, a.y, g.out_channels);
  }
  if (plan.output != LayerOutput::range) return;
  const Range r = block_range(rows.range);
  if (threadIdx.x == 0) plan.ranges[blockIdx.x] = r;
}

}  // namespace

Partition depthwise_partition(const Conv2dShape& s, int64_t rows_per_sample, bool channel_stats) {
  return make_partition(s.batch, rows_per_sample, (s.out_channels + kWidth - 1) / kWidth, channel_stats);
}

void launch_depthwise(const Conv2dShape& s, const LayerArguments& a, const LayerPlan& plan, void* stream) {
  const PackedLayout layout(weight_shape(s));
  const auto int32 = [](int64_t v) { return static_cast<int32_t>(v); };
  Geometry g{};
  g.in_height = int32(s.in_height), g.in_width = int32(s.in_width), g.in_channels = int32(s.in_channels);
  g.sample_rows = int32(s.out_height() * s.out_width()), g.out_width = int32(s.out_width()), g.out_channels = int32(s.out_channels);
  g.kernel_height = int32(s.kernel_height), g.kernel_width = int32(s.kernel_width);
  g.stride_height = int32(s.stride_height), g.stride_width = int32(s.stride_width);
  g.padding_top = int32(s.padding_top), g.padding_left = int32(s.padding_left);
  g.dilation_height = int32(s.dilation_height), g.dilation_width = int32(s.dilation_width);
  g.multiplier = int32(s.out_channels / s.groups);
  g.column_steps = int32(layout.column_steps), g.block_bytes = layout.block_bytes;
  g.vectors = s.out_channels % kWidth == 0 && aligned(a.y.q, kWidth) && aligned(a.residual.q, kWidth) && aligned(a.y_float, 4 * kWidth);
  g.input_vectors = s.in_channels % kWidth == 0 && g.multiplier == 1 && aligned(a.x.q, kWidth);
  const Partition p = depthwise_partition(s, visited_rows(s, a.strategy, plan.output), plan.output == LayerOutput::codes && a.y.channel_stats);
  launch("conv2d", depthwise_kernel, {p.blocks(), p.threads}, stream, p, g, a, plan);
}

}  // namespace probquant::cuda
