// Sums over the receptive fields of every gamma-th output position (surrogate.h): what the Gaussian surrogate reads of a
// layer's input. Exact integers. The block that comes last to a sample then predicts (predict.cuh): one launch for both.
//
// Launch: batch x parts blocks of 256 threads, at most 80 registers (three blocks on a multiprocessor), 6,216 bytes of static shared memory. Two ways to share out the fields of one
// sample. field_per_warp: a warp takes a field of one group and runs over its rows, lane by lane; for dense layers.
// group_per_lane: a lane takes a group and runs over its field alone; for depthwise ones, whose channels lie side by side.
// Reads 1 / gamma^2 of the layer's receptive fields; 3 atomics per warp (per lane with sums of every group).
#include <algorithm>

#include "predict.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

constexpr int kThreads = kPredictThreads, kWarps = kThreads / 32;

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

/// Sums of one lane over several fields.
struct FieldSums {
  int64_t sum = 0, squares = 0, sum_of_squared = 0;

  /// A field of `count` codes with these sums; below 2^32, since a field has fewer than 66,000 weights.
  __device__ void add(uint32_t codes, uint32_t squared_codes, int64_t count, int64_t zero_point) {
    const int64_t centred = int64_t{codes} - count * zero_point;
    sum += centred;
    squares += int64_t{squared_codes} - 2 * zero_point * int64_t{codes} + count * zero_point * zero_point;
    sum_of_squared += centred * centred;
  }
  __device__ void add_to(PatchSums* sums) const {
    using Sum = unsigned long long;
    atomicAdd(reinterpret_cast<Sum*>(&sums->sum), static_cast<Sum>(sum));
    atomicAdd(reinterpret_cast<Sum*>(&sums->squares), static_cast<Sum>(squares));
    atomicAdd(reinterpret_cast<Sum*>(&sums->sum_of_squared), static_cast<Sum>(sum_of_squared));
  }
};

/// The block's share of its sample's sums, [batch] or [batch][groups] with `per_group`.
template <bool group_per_lane>
__device__ void sum_fields(const Conv2dShape& s, const PatchGrid& grid, int64_t sample, const uint8_t* x, const int32_t* zero_points, bool per_group, PatchSums* sums) {
  const int32_t inputs = static_cast<int32_t>(s.in_channels / s.groups), lane = threadIdx.x % 32;
  const int64_t warp = blockIdx.x % grid.parts * kWarps + threadIdx.x / 32;
  const int64_t zero_point = clamp_zero_point(zero_points[sample]), units = group_per_lane ? (s.groups + 31) / 32 : s.groups;
  x += sample * s.in_height * s.in_width * s.in_channels;
  sums += sample * (per_group ? s.groups : 1);
  FieldSums mine;
  int64_t last_group = -1;  // of the fields in `mine`
  const auto flush = [&] {
    if (last_group < 0) return;
    mine.add_to(sums + (per_group ? last_group : 0));
    mine = FieldSums{};
    last_group = -1;
  };
  // fields of one group are neighbours, so that a warp changes its group seldom
  const int64_t begin = warp * grid.per_warp, end = begin + grid.per_warp < units * grid.fields ? begin + grid.per_warp : units * grid.fields;
  int64_t unit = begin / grid.fields, row = begin % grid.fields / grid.columns, column = begin % grid.fields % grid.columns;
  const int64_t grid_rows = grid.fields / grid.columns;
  const auto next = [&] {
    if (++column < grid.columns) return;
    column = 0;
    if (++row < grid_rows) return;
    row = 0, ++unit;
  };
  for (int64_t i = begin; i < end; ++i, next()) {
    const Taps rows(row * grid.gamma, s.stride_height, s.padding_top, s.dilation_height, s.kernel_height, s.in_height);
    const Taps columns(column * grid.gamma, s.stride_width, s.padding_left, s.dilation_width, s.kernel_width, s.in_width);
    const int64_t group = group_per_lane ? unit * 32 + lane : unit;
    if (per_group && group != last_group) flush();
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
    if (group >= s.groups || (!group_per_lane && lane != 0)) continue;
    mine.add(codes, squared, int64_t{rows.end - rows.begin} * (columns.end - columns.begin) * inputs, zero_point);
    last_group = group;
  }
  flush();
}

/// The grid is [batch][parts] blocks. The sums' counts, which are known, count blocks instead. Writes laws, or y's parameters where that is null.
template <bool group_per_lane>
__global__ void __launch_bounds__(kThreads, 3) patch_sums_kernel(const Conv2dShape s, const PatchGrid grid, const PredictProblem p, const LayerArguments a, float* laws) {
  const int64_t sample = blockIdx.x / grid.parts;
  auto* sums = static_cast<PatchSums*>(a.workspace);
  sum_fields<group_per_lane>(s, grid, sample, a.x.q, a.x.zero_point, p.sums_per_group, sums);
  PatchSums& first = sums[sample * (p.sums_per_group ? s.groups : 1)];
  if (!last_block(reinterpret_cast<unsigned long long*>(&first.count), grid.parts)) return;
  if (laws == nullptr) predict(p, a, sample);
  else write_laws(p, a, sample, laws);
}

}  // namespace

void launch_patch_sums(const Conv2dShape& s, const PredictProblem& problem, const LayerArguments& a, float* laws, void* stream) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const bool group_per_lane = s.groups > 1 && s.in_channels / s.groups < 32;
  PatchGrid grid{};
  grid.gamma = a.gamma;
  grid.columns = divide_up(s.out_width(), a.gamma);
  grid.fields = divide_up(s.out_height(), a.gamma) * grid.columns;
  const int64_t units = (group_per_lane ? divide_up(s.groups, 32) : s.groups) * grid.fields;
  // as many blocks as the device holds, at most one field per warp
  grid.parts = std::max<int64_t>(1, std::min(divide_up(units, kWarps), kWantedBlocks / s.batch));
  grid.per_warp = divide_up(units, grid.parts * kWarps);
  launch(laws == nullptr ? "conv2d" : "surrogate_law", group_per_lane ? patch_sums_kernel<true> : patch_sums_kernel<false>, {s.batch * grid.parts, kThreads}, stream, s,
         grid, problem, a, laws);
}

}  // namespace probquant::cuda
