// How the blocks of one launch add up what they have seen of a sample, without anything that somebody must have cleared before.
//
// A block leaves a Part: its sums, behind a fence the launch's signature, behind another fence it looks for everybody else's signatures.
// Fences of sequential consistency (__threadfence is one) have one order, so whose comes last sees all of them. Several may; who swaps the
// first part's signature for 0 adds up and writes the stats: exactly one does. It wipes the other signatures, too, so that a CUDA graph,
// whose launches carry the same signature in every replay, finds none of them. Sums are integers: no order shows.
//
// Why not a counter of the blocks that have come: it must start at 0. A memset in front of every launch costs as much as a small layer.
// Memory that is zeroed once, and zero again behind each launch (CUTLASS's semaphores, Marlin's locks), has to belong to one launch at a
// time: to a stream, and to every captured graph, since graphs captured on one stream may run at once on others. Here the memory is the launch's own
// workspace, as it comes from the allocator. What it holds has the signature of no launch of the process: those are all different. Of
// anything else 8 bytes are the signature, a 64-bit random number, once in 2^64, and it takes a part whose block is the last to come.
//
// Most blocks look at one batch of signatures, of the blocks that start last, and go: 8 bytes of a sector each, from L2. Parts are sectors all
// the same, so that leaving one touches a single sector and the last block reads whole ones.
#pragma once
#include "reduce.cuh"

namespace probquant::cuda {

using Sum = unsigned long long;

/// Leaves a part, by one thread. What others of its block have written for the last block to read must lie behind a barrier.
__device__ inline void leave_part(Part* to, Sum sum, Sum squares, Sum clipped, uint64_t signature) {
  volatile Part& part = *to;
  part.sum = sum;
  part.squares = squares;
  part.clipped = clipped;
  __threadfence();
  part.signature = signature;
  __threadfence();
}

/// Whether all `count` parts are there and this is who takes them. By a whole warp (lanes = 32) or by one thread (lanes = 1), behind its
/// block's leave_part.
__device__ inline bool take_parts(Part* parts, int32_t count, uint64_t signature, int32_t lane, int32_t lanes) {
  for (int32_t first = count - 1; first >= 0; first -= lanes) {
    const int32_t i = first - lane;
    const bool there = i < 0 || const_cast<volatile Part*>(parts)[i].signature == signature;
    if (lanes == 1 ? !there : !__all_sync(0xffffffffu, there)) return false;
  }
  bool mine = false;
  if (lane == 0) mine = atomicCAS(reinterpret_cast<Sum*>(&parts->signature), Sum{signature}, Sum{0}) == signature;
  if (lanes > 1) mine = __any_sync(0xffffffffu, mine);
  if (lanes > 1) __syncwarp();  // votes order no memory: a lane's reads of signatures come before any lane's fence
  __threadfence();
  return mine;
}

/// Sums over parts that were taken, and wipes their signatures: in lane 0.
__device__ inline void add_parts(Part* parts, int32_t count, int32_t lane, int32_t lanes, Sum (&sums)[kStatsSample]) {
  for (Sum& sum : sums) sum = 0;
#pragma unroll 2
  for (int32_t i = lane; i < count; i += lanes) {
    volatile Part& part = parts[i];
    sums[kStatsSum] += part.sum, sums[kStatsSquares] += part.squares, sums[kStatsClipped] += part.clipped;
    part.signature = 0;
  }
  if (lanes == 1) return;
  for (Sum& sum : sums) sum = warp_reduce(sum, [](Sum a, Sum b) { return a + b; });
}

/// A channel's sums over at most 65,536 codes, in one word, and into a row of stats.
__device__ inline uint64_t pack_moments(uint32_t sum, uint32_t squares) { return uint64_t{squares} << 32 | sum; }
__device__ inline void write_channel(int64_t* row, int64_t channels, int64_t channel, Sum sum, Sum squares) {
  row[kStatsSample + channel] = static_cast<int64_t>(sum);
  row[kStatsSample + channels + channel] = static_cast<int64_t>(squares);
}

/// The channels' stats from the parts of a sample that the block has taken, [rows][channels]; by all of its threads.
__device__ inline void write_channels(const uint64_t* of_sample, int32_t rows, int64_t channels, int64_t* row, Sum times = 1) {
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    Sum sum = 0, squares = 0;
#pragma unroll 4
    for (int32_t r = 0; r < rows; ++r) {
      const uint64_t both = const_cast<const volatile uint64_t*>(of_sample)[r * channels + c];
      sum += both & 0xffffffffu, squares += both >> 32;
    }
    write_channel(row, channels, c, sum * times, squares * times);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks of a Partition, which belong to one sample

/// The sample's first block writes the stats of an invalid sample, which no other does.
__device__ inline void write_invalid(const Place& place, const QuantizedOutput& y, int64_t channels) {
  if (!place.first_block) return;
  int64_t* row = stats_row(y, place.sample, channels);
  const int64_t columns = kStatsSample + (y.channel_stats ? 2 * channels : 0);
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) row[i] = i == kStatsClipped ? -1 : 0;
}

/// The sample's first block writes its parameters, and what an invalid sample has of stats.
__device__ inline void start_output(const Place& place, const QuantizedOutput& y, int64_t channels, bool valid, float scale, int32_t zero_point) {
  if (place.first_block && threadIdx.x == 0) {
    y.scale[place.sample] = valid ? scale : kNan;
    y.zero_point[place.sample] = valid ? zero_point : 0;
  }
  if (!valid) write_invalid(place, y, channels);
}

/// Writes the stats of a sample: the last of its blocks does. A thread has `width` of the `channels`, from width * place.channel on; each
/// value counts `times` times. Once per kernel, by all threads.
template <int width>
__device__ void write_stats(const Partition& p, const Place& place, const Moments (&moments)[width], const QuantizedOutput& y, int64_t channels,
                            const Parts& parts, int64_t times = 1) {
  __shared__ Sum of_warp[kStatsSample][kMaxWarps];
  __shared__ uint32_t of_thread[2][width][kMaxThreads];  // by [position_lane][channel_lane]
  __shared__ bool taken;
  Sum totals[kStatsSample] = {};
#pragma unroll
  for (int v = 0; v < width; ++v) totals[kStatsSum] += moments[v].sum, totals[kStatsSquares] += moments[v].squares, totals[kStatsClipped] += moments[v].clipped;
#pragma unroll
  for (int column = 0; column < kStatsSample; ++column) {
    totals[column] = warp_reduce(totals[column], [](Sum a, Sum b) { return a + b; });
    if (threadIdx.x % 32 == 0) of_warp[column][threadIdx.x / 32] = totals[column];
  }
  if (y.channel_stats) {
#pragma unroll
    for (int v = 0; v < width; ++v) of_thread[0][v][threadIdx.x] = moments[v].sum, of_thread[1][v][threadIdx.x] = moments[v].squares;
  }
  __syncthreads();
  int64_t* const row = stats_row(y, place.sample, channels);
  uint64_t* const of_sample = parts.channels + place.sample * p.position_parts * channels;
  if (y.channel_stats && place.position_lane == 0 && place.channel < p.channels) {
#pragma unroll
    for (int v = 0; v < width; ++v) {
      const int64_t channel = place.channel * width + v;
      if (channel >= channels) break;
      uint32_t sum = 0, squares = 0;  // of a part, whose positions are few enough
      for (int lane = 0; lane < p.position_lanes; ++lane) {
        sum += of_thread[0][v][lane * p.channel_lanes + place.channel_lane];
        squares += of_thread[1][v][lane * p.channel_lanes + place.channel_lane];
      }
      if (p.position_parts == 1) write_channel(row, channels, channel, sum * static_cast<Sum>(times), squares * static_cast<Sum>(times));
      else const_cast<volatile uint64_t*>(of_sample)[place.part * channels + channel] = pack_moments(sum, squares);
    }
  }
  const auto count = static_cast<int32_t>(p.blocks_per_sample()), lane = static_cast<int32_t>(threadIdx.x);
  if (count > 1) __syncthreads();
  if (lane < 32) {
    for (int column = 0; column < kStatsSample; ++column) {
      totals[column] = 0;
      for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) totals[column] += of_warp[column][warp];
    }
    bool last = count == 1;
    if (!last) {
      Part* const of_sample_parts = parts.parts + place.sample * count;
      if (lane == 0) leave_part(of_sample_parts + place.block, totals[kStatsSum], totals[kStatsSquares], totals[kStatsClipped], parts.signature);
      __syncwarp();
      last = take_parts(of_sample_parts, count, parts.signature, lane, 32);
      if (last) add_parts(of_sample_parts, count, lane, 32, totals);
    }
    const Sum mine = lane == kStatsSum ? totals[kStatsSum] : lane == kStatsSquares ? totals[kStatsSquares] : totals[kStatsClipped];
    if (last && lane < kStatsSample) row[lane] = static_cast<int64_t>(mine * static_cast<Sum>(times));
    if (lane == 0) taken = last;
  }
  if (!y.channel_stats || p.position_parts == 1) return;
  __syncthreads();
  if (!taken) return;
  write_channels(of_sample, static_cast<int32_t>(p.position_parts), channels, row, static_cast<Sum>(times));
}

}  // namespace probquant::cuda
