// Sums over the receptive fields of every gamma-th output position (surrogate.h): what the Gaussian surrogate reads of a
// layer's input. Exact integers. The block that comes last to a sample (parts.cuh) then predicts (predict.cuh): one launch for both.
//
// Launch: batch x parts blocks of 256 threads, at most 80 registers (three blocks on a multiprocessor), 6,444 bytes of static shared memory. Two
// ways to share out the fields of one sample. field_per_warp: a warp takes a field of one group and runs over its rows, lane by lane; for dense
// layers. group_per_lane: a lane takes a group and runs over its field alone; for depthwise ones, whose channels lie side by side.
// Reads 1 / gamma^2 of the layer's receptive fields, which begin at any byte of a sector; leaves a sector per block, and with sums of every group 24 bytes per group and chunk of fields:
// at most kMostGroupBytes per sample, which the last block reads again, so there are fewer chunks where there are many groups.
#include <algorithm>

#include "parts.cuh"
#include "predict.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

constexpr int kThreads = kPredictThreads, kWarps = kThreads / 32;
constexpr int64_t kMostGroupBytes = 256 << 10;

bool has_group_per_lane(const Conv2dShape& s) { return s.groups > 1 && s.in_channels / s.groups < 32; }

/// One axis of a field cut to the input: taps [begin, end), tap t at first + t * dilation.
struct Taps {
  int64_t first;
  int32_t begin, end;

  // Extents are below 2^31, so what is divided is below 2^32: a 64-bit division would take registers that the kernel has not.
  __device__ Taps(int64_t position, int64_t stride, int64_t padding, int64_t dilation, int64_t kernel, int64_t size) : first(position * stride - padding) {
    const auto step = static_cast<uint32_t>(dilation);
    const uint32_t from = first < 0 ? (static_cast<uint32_t>(-first) - 1) / step + 1 : 0;
    const uint32_t to = first >= size ? 0 : static_cast<uint32_t>(size - first - 1) / step + 1;
    end = static_cast<int32_t>(to < kernel ? to : kernel);
    begin = static_cast<int32_t>(from < static_cast<uint32_t>(end) ? from : end);
  }
};

/// Adds a field of `count` codes with these sums; below 2^32, since a field has fewer than 66,000 weights.
__device__ void add_field(FieldSums& to, uint32_t codes, uint32_t squared_codes, int64_t count, int64_t zero_point) {
  const int64_t centred = int64_t{codes} - count * zero_point;
  to.sum += centred;
  to.squares += int64_t{squared_codes} - 2 * zero_point * int64_t{codes} + count * zero_point * zero_point;
  to.sum_of_squared += centred * centred;
}

/// Sums over a warp's share of the fields: of lane's group (group_per_lane), or of one group in lane 0.
template <bool group_per_lane>
__device__ FieldSums sum_fields(const Conv2dShape& s, const PatchGrid& grid, const uint8_t* x, int64_t zero_point, int64_t unit, int64_t chunk) {
  const int32_t inputs = static_cast<int32_t>(s.in_channels / s.groups), lane = threadIdx.x % 32;
  const int64_t group = group_per_lane ? unit * 32 + lane : unit;
  const int64_t begin = chunk * grid.chunk_fields, end = begin + grid.chunk_fields < grid.fields ? begin + grid.chunk_fields : grid.fields;
  int64_t row = begin / grid.columns, column = begin % grid.columns;
  FieldSums sums{};
  for (int64_t i = begin; i < end; ++i) {
    const Taps rows(row * grid.gamma, s.stride_height, s.padding_top, s.dilation_height, s.kernel_height, s.in_height);
    const Taps columns(column * grid.gamma, s.stride_width, s.padding_left, s.dilation_width, s.kernel_width, s.in_width);
    if (++column == grid.columns) column = 0, ++row;
    uint32_t codes = 0, squared = 0;
    if (group < s.groups) {
      const bool joined = s.groups == 1 && s.dilation_width == 1;  // a kernel row is contiguous
      const int32_t segments = joined ? 1 : columns.end - columns.begin, segment = joined ? (columns.end - columns.begin) * inputs : inputs;
      for (int32_t ky = rows.begin; ky < rows.end; ++ky) {
        const uint8_t* taps = x + ((rows.first + ky * s.dilation_height) * s.in_width + columns.first + columns.begin * s.dilation_width) * s.in_channels + group * inputs;
        for (int32_t j = 0; j < segments; ++j, taps += s.dilation_width * s.in_channels)
          for (int32_t k = group_per_lane ? 0 : lane; k < segment; k += group_per_lane ? 1 : 32) {
            const uint32_t q = taps[k];
            codes += q, squared += q * q;
          }
      }
    }
    if (!group_per_lane) {
      const auto add = [](uint32_t a, uint32_t b) { return a + b; };
      codes = warp_reduce(codes, add), squared = warp_reduce(squared, add);
    }
    if (group < s.groups && (group_per_lane || lane == 0))
      add_field(sums, codes, squared, int64_t{rows.end - rows.begin} * (columns.end - columns.begin) * inputs, zero_point);
  }
  return sums;
}

/// The grid is [batch][parts] blocks, a sample's warps are [units][chunks]. Writes laws, or y's parameters where that is null.
template <bool group_per_lane>
__global__ void __launch_bounds__(kThreads, 3)
    patch_sums_kernel(const Conv2dShape s, const PatchGrid grid, const PredictProblem p, const LayerArguments a, FieldSums* of_groups,
                      const Parts parts, float* laws) {
  __shared__ Sum of_warp[3][kWarps];
  __shared__ SampledFields sampled;
  __shared__ bool taken;
  const int64_t sample = blockIdx.x / grid.parts, block = blockIdx.x % grid.parts, warp = block * kWarps + threadIdx.x / 32;
  const int64_t unit = warp / grid.chunks, chunk = warp % grid.chunks;
  const auto lane = static_cast<int32_t>(threadIdx.x % 32);
  FieldSums mine{};
  if (unit < grid.units)
    mine = sum_fields<group_per_lane>(s, grid, a.x.q + sample * s.in_height * s.in_width * s.in_channels, clamp_zero_point(a.x.zero_point[sample]), unit, chunk);
  if (of_groups != nullptr) of_groups += sample * grid.chunks * s.groups;
  if (of_groups != nullptr && unit < grid.units) {
    const int64_t group = group_per_lane ? unit * 32 + lane : unit;
    if (group < s.groups && (group_per_lane || lane == 0)) {
      volatile FieldSums& to = of_groups[chunk * s.groups + group];
      to.sum = mine.sum;
      to.squares = mine.squares;
      to.sum_of_squared = mine.sum_of_squared;
    }
  }
  const auto add = [](Sum a, Sum b) { return a + b; };
  const Sum totals[3] = {warp_reduce(static_cast<Sum>(mine.sum), add), warp_reduce(static_cast<Sum>(mine.squares), add),
                         warp_reduce(static_cast<Sum>(mine.sum_of_squared), add)};
  if (lane == 0)
    for (int i = 0; i < 3; ++i) of_warp[i][threadIdx.x / 32] = totals[i];
  __syncthreads();
  if (threadIdx.x < 32) {
    Part* const of_sample = parts.parts + sample * grid.parts;
    Sum sums[kStatsSample] = {};
    for (int i = 0; i < 3; ++i)
      for (int w = 0; w < kWarps; ++w) sums[i] += of_warp[i][w];
    bool last = grid.parts == 1;
    if (!last) {
      if (lane == 0) leave_part(of_sample + block, sums[0], sums[1], sums[2], parts.signature);
      __syncwarp();
      last = take_parts(of_sample, static_cast<int32_t>(grid.parts), parts.signature, lane, 32);
      if (last) add_parts(of_sample, static_cast<int32_t>(grid.parts), lane, 32, sums);
    }
    if (lane == 0) taken = last, sampled = {{static_cast<int64_t>(sums[0]), static_cast<int64_t>(sums[1]), static_cast<int64_t>(sums[2])}, of_groups, grid.chunks};
  }
  __syncthreads();
  if (!taken) return;
  if (laws == nullptr) predict(p, a, sample, &sampled);
  else write_laws(p, a, sample, laws, &sampled);
}

PartsLayout parts_of(const Conv2dShape& s, const PatchGrid& grid) { return {s.batch, grid.parts, 1, 0}; }

}  // namespace

PatchGrid patch_grid(const Conv2dShape& s, int64_t gamma, bool sums_per_group) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  PatchGrid grid{};
  grid.gamma = gamma;
  grid.columns = divide_up(s.out_width(), gamma);
  grid.fields = divide_up(s.out_height(), gamma) * grid.columns;
  grid.units = has_group_per_lane(s) ? divide_up(s.groups, 32) : s.groups;
  // as many blocks as the device holds, at most one field per warp
  int64_t chunks = kWantedBlocks * kWarps / std::max<int64_t>(1, s.batch * grid.units);
  if (sums_per_group) chunks = std::min(chunks, kMostGroupBytes / (s.groups * static_cast<int64_t>(sizeof(FieldSums))));
  grid.chunk_fields = divide_up(grid.fields, std::max<int64_t>(1, std::min(chunks, grid.fields)));
  grid.chunks = divide_up(grid.fields, grid.chunk_fields);
  grid.parts = divide_up(grid.units * grid.chunks, kWarps);
  return grid;
}

int64_t patch_workspace_bytes(const Conv2dShape& s, const PatchGrid& grid, bool sums_per_group) {
  return parts_of(s, grid).bytes() + (sums_per_group ? s.batch * grid.chunks * s.groups * static_cast<int64_t>(sizeof(FieldSums)) : 0);
}

void launch_patch_sums(const Conv2dShape& s, const PredictProblem& problem, const LayerArguments& a, float* laws, void* stream) {
  const PatchGrid grid = patch_grid(s, a.gamma, problem.sums_per_group);
  const PartsLayout layout = parts_of(s, grid);
  auto* of_groups = problem.sums_per_group ? reinterpret_cast<FieldSums*>(static_cast<uint8_t*>(a.workspace) + layout.bytes()) : nullptr;
  launch(laws == nullptr ? "conv2d" : "surrogate_law", has_group_per_lane(s) ? patch_sums_kernel<true> : patch_sums_kernel<false>,
         {s.batch * grid.parts, kThreads}, stream, s, grid, problem, a, of_groups, layout.at(a.workspace), laws);
}

}  // namespace probquant::cuda
