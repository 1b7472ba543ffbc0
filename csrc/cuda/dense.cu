// Dense layers on the tensor cores: implicit GEMM over NHWC codes. Rows are output positions, columns output channels of one
// group, K the receptive field in the packed weight's order (packed_weight.h). Linear layers are its 1x1 case.
//
// A block computes Tile::kRows x kColumns outputs, all of K. Its threads copy k blocks of 64 bytes per row from global to
// shared memory, several stages ahead (cp.async); each thread keeps one place within the k block and so walks over the kernel's
// taps once for all of its rows. A bit per row and tap says whether that lies in the image. Outside of it a copy reads the sample's
// zero point instead, so that padding needs no correction. Warps read fragments (ldmatrix, swizzled, no bank conflicts) and multiply (mma).
// Then the accumulators pass through shared memory, kPassRows rows at a time, into whole rows of channels (epilogue.cuh).
//
// Before that every block finds what it needs of the samples that have rows in its tile, one to all of its rows: a warp for each, or, where they are
// more than warps, a thread. Where the output's parameters are given, follow from one law over the input's stats, or from the ranges that the blocks of a
// launch before have left, that thread finds them (predict.cuh), about a microsecond of doubles on a GeForce. It does so here and not in front of the main loop,
// because the copies then start at once, other blocks of the multiprocessor multiply meanwhile, and all 48 KiB of shared memory belong to the
// stages until now. The sample's first block writes the parameters.
//
// Stats: warps add up a sample's codes in registers, then in shared memory; the block leaves a part for the sample's last block (parts.cuh). With
// stats of channels, codes go back to where their sums lay, and a thread walks down a column: no registers or atomics per lane and channel. A sample's
// parts are those of all tiles that have rows of it.
//
// `unit`: bytes of x that are copied at once: 16 where the channels of a group are a multiple of that, and aligned; 8 likewise (the 24 and
// 40 channels of mobile networks). 1 is for all others, above all an image's 3 channels, where a pixel begins at any byte, which no
// cp.async can read. There x is gathered through registers, six k blocks at a time, in front of their products: a chunk within a row is
// five words and four shifts, and only at the image's border it is put together byte by byte. The weights' copies run under it. A pixel of
// 24 bytes begins and ends within a sector, and the five words are five loads: what is read twice comes from L1.
// Two kinds of stores to shared memory take a turn more than their bytes ask for, neither in the main loop: 16 bytes per lane at the image's border,
// where lanes part and what is left of two quarters of a warp counts as one, and a few of the accumulators' in front of the epilogue, which nvcc takes apart.
//
// Instructions per thread and two k blocks (large: one) on an sm_80, mma and others: large 64 and 100, medium 32 and 100, small 32 and 94,
// with units of 8 bytes 32 and 128; gathered 32 and 53, in front of which 114 gather: 5.2 per mma in all. Registers: 229, 128, 162, 133 and 130,
// which let 2, 3, 3, 3 and 3 blocks run; shared memory as in heuristics.h. Bound by the tensor cores where K is long, by the epilogue's
// arithmetic where it is short, by issuing instructions where x is gathered.
#include "epilogue.cuh"
#include "ptx.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

/// Sizes and steps in the units of the kernel's walk: bytes along a pixel row, which is in_width * in_channels long.
struct Geometry {
  int32_t rows, rows_per_sample;  ///< that are visited; see visited_position
  int32_t sample_rows, out_width, out_channels;
  int32_t in_height, row_bytes;
  int32_t stride_height, stride_bytes, padding_top, padding_bytes, dilation_height, dilation_bytes;
  int32_t kernel_height, kernel_width;
  int32_t group_inputs, group_channels, group_blocks, column_tiles, groups;
  int32_t row_k, segment_k;          ///< bytes of K per kernel row, and per segment of the walk
  uint32_t segment_reciprocal;       ///< 2^32 / segment_k, rounded up; 0 where a row has one segment
  int32_t step_k, step_rows;         ///< how far one stage moves along K: kernel rows and bytes
  int32_t segment_inputs, k_blocks;
  int64_t block_bytes;
  int64_t x_bytes;
  bool words;    ///< x is aligned to words, and a segment's bytes lie in a row as they lie in the segment
  bool vectors;  ///< see WarpEpilogue
};

/// One thread's place along K: a kernel row and a byte of its share of K.
struct Walk {
  int32_t ky, k;

  __device__ Walk(const Geometry& g, int32_t all) : ky(all / g.row_k), k(all - ky * g.row_k) {}
  __device__ void advance(const Geometry& g) {
    k += g.step_k, ky += g.step_rows;
    if (k >= g.row_k) k -= g.row_k, ++ky;
  }
  /// Of the kernel row. Exact: see check_extents of layer_api.cpp.
  __device__ int32_t segment(const Geometry& g) const { return static_cast<int32_t>(static_cast<uint64_t>(static_cast<uint32_t>(k)) * g.segment_reciprocal >> 32); }
};

/// A chunk of every zero point: what a copy reads where the image has nothing. A store of the value would do, but stores among
/// asynchronous copies make ptxas order them with dummy loads.
struct alignas(kChunk) Padding {
  uint8_t chunks[256][kChunk];
  constexpr Padding() : chunks{} {
    for (int z = 0; z < 256; ++z)
      for (int i = 0; i < kChunk; ++i) chunks[z][i] = static_cast<uint8_t>(z);
  }
};
__device__ const Padding padding;

/// One row of a tile: where its receptive field begins. Rows beyond the last are copies of it, which nobody stores.
struct Field {
  int64_t offset;  ///< of its first byte in x; means nothing outside of the image
  int32_t y, x;    ///< row, and byte of that row
  const uint8_t* outside;

  __device__ Field(const Geometry& g, const LayerArguments& a, int32_t row, int32_t group) {
    row = row < g.rows ? row : g.rows - 1;
    const auto sample = static_cast<int32_t>(static_cast<uint32_t>(row) / static_cast<uint32_t>(g.rows_per_sample));
    const int32_t position = visited_position(row - sample * g.rows_per_sample, g.rows_per_sample, g.sample_rows);
    const auto oy = static_cast<int32_t>(static_cast<uint32_t>(position) / static_cast<uint32_t>(g.out_width));
    const int32_t ox = position - oy * g.out_width;
    y = oy * g.stride_height - g.padding_top;
    x = ox * g.stride_bytes - g.padding_bytes + group * g.group_inputs;
    offset = (static_cast<int64_t>(sample) * g.in_height + y) * g.row_bytes + x;
    outside = padding.chunks[clamp_zero_point(a.x.zero_point[sample])];
  }
  __device__ bool holds(const Geometry& g, int32_t dy, int32_t dx) const {
    return static_cast<uint32_t>(y + dy) < static_cast<uint32_t>(g.in_height) && static_cast<uint32_t>(x + dx) < static_cast<uint32_t>(g.row_bytes);
  }

  /// Bit ky: that kernel row lies outside of the image, or beyond the kernel; bit kColumnBit + kx: that column does.
  static constexpr int kColumnBit = 16;
  __device__ uint32_t outside_taps(const Geometry& g) const {
    uint32_t bits = (0xffffu << g.kernel_height & 0xffffu) | 0xffffu << (kColumnBit + g.kernel_width);
#pragma unroll 1
    for (int32_t ky = 0; ky < g.kernel_height; ++ky)
      bits |= static_cast<uint32_t>(static_cast<uint32_t>(y + ky * g.dilation_height) >= static_cast<uint32_t>(g.in_height)) << ky;
#pragma unroll 1
    for (int32_t kx = 0; kx < g.kernel_width; ++kx)
      bits |= static_cast<uint32_t>(static_cast<uint32_t>(x + kx * g.dilation_bytes) >= static_cast<uint32_t>(g.row_bytes)) << (kColumnBit + kx);
    return bits;
  }
};

/// Where the fields of several rows begin, at least and at most.
struct Fields {
  int32_t min_y, max_y, min_x, max_x;
  int32_t room;  ///< bytes of x behind the first one of any field, less those of a chunk's words; as far as 32 bits go

  __device__ Fields(const Geometry& g, const Field& f)
      : min_y(f.y), max_y(f.y), min_x(f.x), max_x(f.x), room(g.words ? clamp_room(g.x_bytes - (kChunk + 4) - f.offset) : INT32_MIN) {}
  __device__ void add(const Fields& f) {
    min_y = min(min_y, f.min_y), max_y = max(max_y, f.max_y), min_x = min(min_x, f.min_x), max_x = max(max_x, f.max_x), room = min(room, f.room);
  }
  /// Whether a chunk, from `byte` of a segment on, lies in one image row in each of them, as it lies in the segment, and the words around
  /// it in x. Bytes without weights need not lie in the row.
  __device__ bool hold_chunk(const Geometry& g, int32_t byte, int32_t dy, int32_t dx) const {
    const bool rows = static_cast<uint32_t>(min_y + dy) < static_cast<uint32_t>(g.in_height) && static_cast<uint32_t>(max_y + dy) < static_cast<uint32_t>(g.in_height);
    return rows && min_x + dx >= 0 && max_x + dx <= g.row_bytes - min(g.segment_inputs - byte, kChunk) && dy * g.row_bytes + dx <= room;
  }

 private:
  static __device__ int32_t clamp_room(int64_t v) { return static_cast<int32_t>(min(max(v, int64_t{INT32_MIN}), int64_t{INT32_MAX})); }
};
/// Row tiles that have rows of one sample, at most: a sample may begin at any row of a tile.
constexpr int64_t most_row_tiles(int64_t rows_per_sample, int64_t tile_rows) { return (rows_per_sample + tile_rows - 2) / tile_rows + 1; }

constexpr int64_t kMostTaps = 12;  ///< along an axis: a walk may go on for 64 bytes behind the last one, which are up to 4 rows of 16

/// What the epilogue wants to know of a row of the tile, and of a sample that has any of them.
struct TileRow {
  int32_t sample;  ///< of the tile
  int32_t output_row;
};
struct TileSample {
  SampleEpilogue epilogue;
  uint32_t seen[kStatsSample];  ///< of its codes, in the order of stats; or keys of -lo and hi of its values' range
};

template <class Tile, int unit>
class Dense {
  static constexpr int kThreads = Tile::kThreads, kDepth = Tile::kDepth, kSlices = Tile::kSlices;
  static constexpr bool kGathers = unit < 8;                                  ///< x through registers, in front of its products
  static constexpr int kCopied = kGathers ? kChunk : unit;                    ///< bytes of x that a thread moves at once
  static constexpr int kRowUnits = kBlockK / kCopied;                         ///< of a row of a k block
  static constexpr int kUnitRows = kThreads / (kRowUnits * kDepth);           ///< rows that the block copies at once
  static constexpr int kFields = Tile::kRows / kUnitRows;                     ///< rows per thread and stage
  static constexpr int kColumnBlocks = Tile::kColumns / kBlockChannels;
  static constexpr int kChunkRows = kThreads / (kBlockK / kChunk * kDepth);   ///< the same for the weights
  static constexpr int kWeightChunks = kBlockChannels / kChunkRows;           ///< per thread, stage and 64 channels
  static constexpr int kGatheredBytes = kGathers ? Tile::kStages * Tile::kStageXBytes : 0;  ///< what all stages have for x lies in front of them
  static constexpr int kStageXBytes = kGathers ? 0 : Tile::kStageXBytes;
  static constexpr int kStageBytes = kStageXBytes + Tile::kStageBytes - Tile::kStageXBytes;
  static constexpr int kRowTiles = Tile::kWarpRows / 16, kColumnTiles = Tile::kWarpColumns / 8;
  static constexpr int kRowWarps = Tile::kRows / Tile::kWarpRows, kColumnWarps = Tile::kColumns / Tile::kWarpColumns;
  static constexpr int kWidth = Tile::kColumns / 32;  ///< channels of a lane in the epilogue
  static constexpr int kPitch = Tile::kColumns + 8;   ///< int32 per row there: fragments are stored without bank conflicts
  static constexpr int kPassRows = Tile::kRows < 64 ? Tile::kRows : 64;
  static constexpr int kAccumulatorBytes = kSlices * kPassRows * kPitch * 4;
  static_assert(kAccumulatorBytes + Tile::kRows * static_cast<int>(sizeof(TileRow) + sizeof(TileSample)) <= Tile::kSharedBytes, "the epilogue reuses the stages");
  static_assert(Tile::kRows * Tile::kColumns * 255 * 255 < int64_t{1} << 32 && Tile::kColumns <= kThreads,
                "a tile's squares of codes are summed in 32 bits, a channel by a thread");
  static_assert(kChunkRows % 8 == 0 && kUnitRows % 8 == 0, "a thread's chunks are swizzled alike");

 public:
  __device__ Dense(const Geometry& g, const LayerArguments& a, const LayerPlan& plan)
      : g_(g), a_(a), plan_(plan), shared_(dynamic_shared()), lane_(static_cast<int32_t>(threadIdx.x % 32)), warp_(static_cast<int32_t>(threadIdx.x / 32)) {
    const auto block = static_cast<int32_t>(blockIdx.x);
    column_tile_ = block % g.column_tiles;
    group_ = block / g.column_tiles % g.groups;
    first_row_ = block / (g.column_tiles * g.groups) * Tile::kRows;
  }

  __device__ void run() {
    main_loop();
    epilogue();
  }

 private:
  __device__ const uint8_t* weight_block(int32_t i) const {
    int32_t block = column_tile_ * kColumnBlocks + i;
    if (block >= g_.group_blocks) block = g_.group_blocks - 1;  // columns that do not exist: any weights will do
    return a_.packed_weight + (static_cast<int64_t>(group_) * g_.group_blocks + block) * g_.block_bytes;
  }

  __device__ void main_loop() {
    // A thread copies always the same unit of the same k block of a stage. Neighbours copy 2 whole rows: all banks, once.
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const int32_t column = thread % kRowUnits * kCopied, depth = thread / (2 * kRowUnits) % kDepth;
    const int32_t row = thread / kRowUnits % 2 + thread / (2 * kRowUnits * kDepth) * 2;
    Walk walk(g_, depth * kBlockK + column);
    int64_t offsets[kFields];
    uint32_t outside_taps[kFields];
    const uint8_t* outside[kFields];
    Fields fields(g_, Field(g_, a_, first_row_ + row, group_));
#pragma unroll
    for (int i = 0; i < kFields; ++i) {
      const Field field(g_, a_, first_row_ + row + i * kUnitRows, group_);
      fields.add(Fields(g_, field));
      offsets[i] = field.offset, outside[i] = field.outside, outside_taps[i] = kGathers ? 0 : field.outside_taps(g_);
    }
    const int32_t to_x = depth * (Tile::kRows * kBlockK) + swizzle(row, column / kChunk) + column % kChunk;
    const int32_t linear = (thread % (2 * kRowUnits) + thread / (2 * kRowUnits * kDepth) * (2 * kRowUnits)) * kChunk;  // within a k block of weights
    const int32_t to_weight = kStageXBytes + depth * kTileBytes + linear;
    const uint8_t* weight[kColumnBlocks];
#pragma unroll
    for (int i = 0; i < kColumnBlocks; ++i) weight[i] = weight_block(i) + sizeof(BlockHeader) + depth * kTileBytes + linear;

    const auto copy_stage = [&](uint32_t stage, int32_t k_block) {
      if (k_block + depth >= g_.k_blocks) return;
      if constexpr (!kGathers) {
        copy_fields(walk, offsets, outside_taps, outside, stage + to_x);
        walk.advance(g_);
      }
#pragma unroll
      for (int i = 0; i < kColumnBlocks; ++i) {
#pragma unroll
        for (int c = 0; c < kWeightChunks; ++c)
          cp_async<kChunk>(stage + to_weight + i * kDepth * kTileBytes + c * kChunkRows * kBlockK, weight[i] + c * kChunkRows * kBlockK);
        weight[i] += kDepth * kTileBytes;
      }
    };

    // Stages by their address in shared memory. One group of copies per stage, empty ones too, so that "all but the latest kStages - 2" is
    // always the stage that is read next.
    const uint32_t shared = shared_address(shared_), begin = shared + kGatheredBytes, end = shared + Tile::kSharedBytes;
#pragma unroll
    for (int s = 0; s < Tile::kStages - 1; ++s) {
      copy_stage(begin + s * kStageBytes, s * kDepth);
      cp_async_commit();
    }
    const uint32_t first_x = shared + (warp_slice() * Tile::kRows + warp_row()) * kBlockK + swizzle(lane_ % 16, lane_ / 16);
    uint32_t x = first_x;
    const int32_t of_block = warp_column() % kBlockChannels * kBlockK + swizzle(lane_ % 8 + lane_ / 16 * 8, lane_ / 8 % 2);
    uint32_t weights = begin + kStageXBytes + (warp_column() / kBlockChannels * kDepth + warp_slice()) * kTileBytes + of_block;
    uint32_t reading = begin, writing = end - kStageBytes;
    const auto multiply_block = [&](int d) { multiply(x + d * kSlices * Tile::kRows * kBlockK, weights + d * kSlices * kTileBytes); };
    int32_t k_block = 0, until = g_.k_blocks;
    do {
      if constexpr (kGathers) {
        if (k_block > 0) __syncthreads();  // everybody has read what was gathered before
        until = k_block + Tile::kStages * kDepth;
        if (until > g_.k_blocks) until = g_.k_blocks;
#pragma unroll 1
        for (int32_t to = to_x, k = k_block + depth; k < until; k += kDepth, to += Tile::kStageXBytes, walk.advance(g_)) gather(walk, row, fields, offsets, to);
        x = first_x;
      }
#pragma unroll 1
      for (; k_block + kDepth <= until; k_block += kDepth) {
        cp_async_wait<Tile::kStages - 2>();
        __syncthreads();  // everybody's copies have arrived, and nobody reads the stage that is overwritten next
        copy_stage(writing, k_block + (Tile::kStages - 1) * kDepth);
        cp_async_commit();
#pragma unroll
        for (int d = 0; d < kDepth / kSlices; ++d) multiply_block(d);
        writing = reading;  // x and weights go with it as variables of their own: nvcc would compute them anew in every round
        reading = reading + kStageBytes == end ? begin : reading + kStageBytes;
        x += kGathers ? Tile::kStageXBytes : reading - writing;
        weights += reading - writing;
      }
    } while (until < g_.k_blocks);
    cp_async_wait<0>();
    if (kDepth == 1 || k_block == g_.k_blocks) return;
    __syncthreads();  // the last k blocks, fewer than a stage has
#pragma unroll
    for (int d = 0; d < kDepth / kSlices; ++d)
      if (k_block + warp_slice() + d * kSlices < g_.k_blocks) multiply_block(d);
  }

  __device__ void copy_fields(const Walk& walk, const int64_t (&offsets)[kFields], const uint32_t (&outside_taps)[kFields],
                              const uint8_t* const (&outside)[kFields], uint32_t to) const {
    const int32_t kx = walk.segment(g_), input = walk.k - kx * g_.segment_k;
    const int64_t offset = walk.ky * g_.dilation_height * g_.row_bytes + kx * g_.dilation_bytes + input;
    // Where a tap's channels are no multiple of a chunk, its last unit has neither weights nor channels: the column behind the kernel.
    const bool weighted = kCopied == kChunk || input < g_.group_inputs;
    const uint32_t taps = 1u << walk.ky | 1u << (Field::kColumnBit + (weighted ? kx : g_.kernel_width));
#pragma unroll
    for (int i = 0; i < kFields; ++i) {
      const uint8_t* const inside = a_.x.q + (offsets[i] + offset);
      cp_async<kCopied>(to + i * kUnitRows * kBlockK, (outside_taps[i] & taps) == 0 ? inside : outside[i]);
    }
  }

  /// The chunks of x at one place of K, of rows row, row + kUnitRows, ... Those behind K's end have no weights: what they hold does not
  /// matter, only that it is there.
  __device__ void gather(const Walk& walk, int32_t row, const Fields& fields, const int64_t (&offsets)[kFields], int32_t to) const {
    const int32_t ky = walk.ky < g_.kernel_height ? walk.ky : g_.kernel_height - 1, segment = walk.segment(g_);
    const int32_t byte = walk.k - segment * g_.segment_k, dy = ky * g_.dilation_height, dx = segment * g_.dilation_bytes + byte;
    const int64_t offset = dy * g_.row_bytes + dx;
    if (fields.hold_chunk(g_, byte, dy, dx)) {
#pragma unroll
      for (int i = 0; i < kFields; ++i) *chunk_at(to + i * kUnitRows * kBlockK) = unaligned_chunk(offsets[i] + offset);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kFields; ++i) {
      const Field field(g_, a_, first_row_ + row + i * kUnitRows, group_);  // anew: in registers all of them would be kept for this
      *chunk_at(to + i * kUnitRows * kBlockK) =
          Fields(g_, field).hold_chunk(g_, byte, dy, dx) ? unaligned_chunk(field.offset + offset) : gathered_chunk(field, byte, dy, segment);
    }
  }

  __device__ uint4* chunk_at(int32_t offset) const { return reinterpret_cast<uint4*>(shared_ + offset); }

  /// 16 bytes of x from any byte on: the five words that have them, shifted.
  __device__ uint4 unaligned_chunk(int64_t offset) const {
    const auto* words = reinterpret_cast<const uint32_t*>(a_.x.q + (offset & ~int64_t{3}));
    const uint32_t w[5] = {words[0], words[1], words[2], words[3], words[4]}, shift = 8 * static_cast<uint32_t>(offset);  // modulo 32
    return {__funnelshift_r(w[0], w[1], shift), __funnelshift_r(w[1], w[2], shift), __funnelshift_r(w[2], w[3], shift), __funnelshift_r(w[3], w[4], shift)};
  }

  /// 16 bytes put together one by one, from `byte` of the segment on: at the borders of the image.
  __device__ uint4 gathered_chunk(const Field& field, int32_t byte, int32_t dy, int32_t segment) const {
    const int32_t skipped = byte / g_.group_inputs;  // taps of a joined row before it
    int32_t tap = segment + skipped, input = byte - skipped * g_.group_inputs;
    uint32_t words[4] = {};
#pragma unroll 1
    for (int b = 0; b < kChunk; ++b) {
      const int32_t dx = tap * g_.dilation_bytes + input;
      const bool inside = byte + b < g_.segment_inputs && field.holds(g_, dy, dx);
      const uint32_t code = inside ? a_.x.q[field.offset + dy * g_.row_bytes + dx] : *field.outside;
      words[0] = __funnelshift_r(words[0], words[1], 8), words[1] = __funnelshift_r(words[1], words[2], 8);  // a queue of 16 bytes
      words[2] = __funnelshift_r(words[2], words[3], 8), words[3] = words[3] >> 8 | code << 24;
      if (++input == g_.group_inputs) input = 0, ++tap;
    }
    return {words[0], words[1], words[2], words[3]};
  }

  __device__ int32_t warp_slice() const { return warp_ / (kRowWarps * kColumnWarps); }
  __device__ int32_t warp_row() const { return warp_ % kRowWarps * Tile::kWarpRows; }
  __device__ int32_t warp_column() const { return warp_ / kRowWarps % kColumnWarps * Tile::kWarpColumns; }

  /// The warp's outputs over one k block of 64 bytes, two mma deep. Addresses in shared memory of what this lane's ldmatrix
  /// reads: rows 0-7, 8-15 of x, then both again 16 bytes on; channels 0-7, the same 16 bytes on, channels 8-15 of the weight.
  __device__ void multiply(uint32_t x, uint32_t weight) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {  // chunks 0 and 1, then 2 and 3: their swizzled places differ in one bit
      uint32_t a[kRowTiles][4], b[kColumnTiles / 2][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) ldmatrix_x4(a[i], (x ^ (k * 2 * kChunk)) + i * 16 * kBlockK);
#pragma unroll
      for (int j = 0; j < kColumnTiles / 2; ++j) ldmatrix_x4(b[j], (weight ^ (k * 2 * kChunk)) + j * 16 * kBlockK);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) mma_m16n8k32<int8_t>(accumulators_[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }

  __device__ void epilogue() {
    using Ints = typename Vector<kWidth>::Ints;
    auto* staged = reinterpret_cast<int32_t*>(shared_);  // [slices][kPassRows][kPitch]
    const int32_t column = lane_ * kWidth, in_group = column_tile_ * Tile::kColumns + column;
    const int32_t existing = g_.group_channels - in_group;
    const auto& header = *reinterpret_cast<const BlockHeader*>(weight_block(column / kBlockChannels));
    WarpEpilogue<kWidth> rows(a_, plan_.output, g_.out_channels, header, column % kBlockChannels, group_ * g_.group_channels + in_group, existing, g_.vectors);
    first_sample_ = first_row_ / g_.rows_per_sample;
    samples_ = ((first_row_ + Tile::kRows < g_.rows ? first_row_ + Tile::kRows : g_.rows) - 1) / g_.rows_per_sample - first_sample_ + 1;
    __syncthreads();  // the last stage has been read
    for (int32_t r = static_cast<int32_t>(threadIdx.x); r < Tile::kRows && first_row_ + r < g_.rows; r += kThreads) {
      const int32_t sample = (first_row_ + r) / g_.rows_per_sample;
      const int32_t position = visited_position(first_row_ + r - sample * g_.rows_per_sample, g_.rows_per_sample, g_.sample_rows);
      tile_rows()[r] = {sample - first_sample_, sample * g_.sample_rows + position};
    }
    for_each_sample([&](int32_t s, int32_t lane, int32_t lanes) { start_sample(s, lane, lanes); });
    const bool channel_stats = plan_.output == LayerOutput::codes && a_.y.channel_stats;
    int32_t current = -1;          // sample of the tile that the warp's rows belong to
    Moments of_channel;            // that the thread has seen, of the sample `of_sample`
    int32_t of_sample = -1;
#pragma unroll 1
    for (int32_t pass = 0; pass < Tile::kRows / kPassRows; ++pass) {
      if (pass > 0) __syncthreads();
      if (warp_row() / kPassRows == pass) store_fragments(staged + (warp_slice() * kPassRows + warp_row() % kPassRows) * kPitch + warp_column());
      __syncthreads();
      constexpr int kWarpPassRows = kPassRows / Tile::kWarps;
#pragma unroll 1
      for (int32_t i = 0; i < kWarpPassRows; ++i) {
        const int32_t r = warp_ * kWarpPassRows + i, in_tile = pass * kPassRows + r;
        if (first_row_ + in_tile >= g_.rows) break;
        int32_t sums[kWidth] = {};
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
          const Ints part = *reinterpret_cast<const Ints*>(staged + (s * kPassRows + r) * kPitch + column);
          add_to(sums, part);
        }
        const TileRow row = tile_rows()[in_tile];
        if (row.sample != current) flush(rows, current);
        current = row.sample;
        const uint32_t codes = rows.store(row.output_row, tile_samples()[row.sample].epilogue, sums);
        if (!channel_stats) continue;
        __syncwarp();  // the row's sums have been read, and its codes take their place
        *(reinterpret_cast<typename Vector<kWidth>::Codes*>(staged + r * kPitch) + lane_) = static_cast<typename Vector<kWidth>::Codes>(codes);
      }
      if (channel_stats) {
        __syncthreads();
        add_channel(reinterpret_cast<const uint8_t*>(staged), pass * kPassRows, of_channel, of_sample);
      }
    }
    flush(rows, current);
    if (channel_stats) leave_channel(of_channel, of_sample);
    if (plan_.output == LayerOutput::floats) return;
    __syncthreads();
    for_each_sample([&](int32_t s, int32_t lane, int32_t lanes) { finish_sample(s, lane, lanes); });
    if (!channel_stats) return;
    __syncthreads();
    for (int32_t s = 0; s < samples_; ++s) {
      const int32_t sample = first_sample_ + s, tiles = row_tiles(sample);
      if (tiles > 1 && tile_samples()[s].seen[0] != 0)
        write_channels(channel_parts(sample), tiles, g_.out_channels, stats_row(a_.y, sample, g_.out_channels));
    }
  }

  __device__ TileRow* tile_rows() const { return reinterpret_cast<TileRow*>(shared_ + kAccumulatorBytes); }
  __device__ TileSample* tile_samples() const { return reinterpret_cast<TileSample*>(tile_rows() + Tile::kRows); }

  // Parts of a sample: [row tiles that have some of its rows][groups][column tiles].
  __device__ int32_t first_tile(int32_t sample) const { return sample * g_.rows_per_sample / Tile::kRows; }
  __device__ int32_t row_tiles(int32_t sample) const { return ((sample + 1) * g_.rows_per_sample - 1) / Tile::kRows - first_tile(sample) + 1; }
  __device__ int32_t tile_of(int32_t sample) const { return first_row_ / Tile::kRows - first_tile(sample); }
  __device__ int32_t columns() const { return g_.groups * g_.column_tiles; }
  __device__ int32_t part_of(int32_t sample) const { return tile_of(sample) * columns() + group_ * g_.column_tiles + column_tile_; }
  __device__ uint64_t* channel_parts(int32_t sample) const { return plan_.parts.channels + static_cast<int64_t>(sample) * plan_.parts.rows * g_.out_channels; }

  /// visit(sample of the tile, lane, lanes): by a warp each where there are few of them, else by a thread each.
  template <class Visit>
  __device__ void for_each_sample(Visit visit) const {
    const int32_t lanes = samples_ <= Tile::kWarps ? 32 : 1;
    for (int32_t s = static_cast<int32_t>(threadIdx.x) / lanes; s < samples_; s += kThreads / lanes) visit(s, static_cast<int32_t>(threadIdx.x) % lanes, lanes);
  }

  __device__ void start_sample(int32_t s, int32_t lane, int32_t lanes) const {
    const int32_t sample = first_sample_ + s;
    const SampleEpilogue inputs = epilogue_inputs(a_, sample);
    Range measured{kInfinity, -kInfinity};
    if (plan_.predicts && plan_.ranges != nullptr) {
      const Range* of_sample = plan_.ranges + static_cast<int64_t>(sample) * plan_.range_count;
#pragma unroll 4
      for (int32_t i = lane; i < plan_.range_count; i += lanes) measured = join(measured, of_sample[i]);
      if (lanes > 1) {
        measured.lo = warp_reduce(measured.lo, [](float a, float b) { return min_f(a, b); });
        measured.hi = warp_reduce(measured.hi, [](float a, float b) { return max_f(a, b); });
      }
    }
    if (lane != 0) return;
    const bool writes = column_tile_ == 0 && group_ == 0 && tile_of(sample) == 0;
    const QParams y = plan_.output == LayerOutput::codes ? output_qparams(a_, plan_, sample, inputs, measured, writes) : QParams{};
    tile_samples()[s] = {sample_epilogue(a_, plan_.output, inputs, y), {}};
  }

  /// What the warp has seen of a sample, to that of the block. All lanes call together.
  __device__ void flush(WarpEpilogue<kWidth>& rows, int32_t s) const {
    if (s < 0) return;
    uint32_t* const seen = tile_samples()[s].seen;
    if (plan_.output == LayerOutput::codes) {
      Moments all;
#pragma unroll
      for (const Moments& m : rows.moments) all.sum += m.sum, all.squares += m.squares, all.clipped += m.clipped;
      const auto add = [](uint32_t a, uint32_t b) { return a + b; };
      all.sum = warp_reduce(all.sum, add), all.squares = warp_reduce(all.squares, add), all.clipped = warp_reduce(all.clipped, add);
      if (lane_ == 0) atomicAdd(seen + kStatsSum, all.sum), atomicAdd(seen + kStatsSquares, all.squares), atomicAdd(seen + kStatsClipped, all.clipped);
    } else if (plan_.output == LayerOutput::range) {
      const uint32_t lo = range_key(-warp_reduce(rows.range.lo, [](float a, float b) { return min_f(a, b); }));
      const uint32_t hi = range_key(warp_reduce(rows.range.hi, [](float a, float b) { return max_f(a, b); }));
      if (lane_ == 0) atomicMax(seen, lo), atomicMax(seen + 1, hi);
    }
    rows.reset();
  }

  /// A thread's channel in the rows of a pass, whose codes lie where their sums did.
  __device__ void add_channel(const uint8_t* codes, int32_t first, Moments& of_channel, int32_t& of_sample) const {
    if (!has_channel()) return;
    for (int32_t r = 0; r < kPassRows && first_row_ + first + r < g_.rows; ++r) {
      const int32_t s = tile_rows()[first + r].sample;
      if (s != of_sample) leave_channel(of_channel, of_sample);
      of_sample = s;
      of_channel.add(codes[r * kPitch * 4 + static_cast<int32_t>(threadIdx.x)]);
    }
  }
  __device__ bool has_channel() const {
    const auto channel = static_cast<int32_t>(threadIdx.x);
    return channel < Tile::kColumns && column_tile_ * Tile::kColumns + channel < g_.group_channels;
  }
  __device__ void leave_channel(Moments& seen, int32_t s) const {
    if (s < 0) return;
    const int32_t sample = first_sample_ + s, channel = group_ * g_.group_channels + column_tile_ * Tile::kColumns + static_cast<int32_t>(threadIdx.x);
    if (row_tiles(sample) == 1) write_channel(stats_row(a_.y, sample, g_.out_channels), g_.out_channels, channel, seen.sum, seen.squares);
    else
      const_cast<volatile uint64_t*>(channel_parts(sample))[static_cast<int64_t>(tile_of(sample)) * g_.out_channels + channel] = pack_moments(seen.sum, seen.squares);
    seen = Moments{};
  }

  /// The block's part of a sample; its stats where that is the last one.
  __device__ void finish_sample(int32_t s, int32_t lane, int32_t lanes) const {
    const int32_t sample = first_sample_ + s, tiles = row_tiles(sample), count = tiles * columns();
    uint32_t* const seen = tile_samples()[s].seen;
    if (plan_.output == LayerOutput::range) {
      Range* const to = plan_.ranges + static_cast<int64_t>(sample) * plan_.range_count;
      if (lane == 0) to[part_of(sample)] = {-key_value(seen[0]), key_value(seen[1])};
      if (tile_of(sample) == tiles - 1)  // no row is in the tiles that other samples of the same size may have
        for (int32_t i = part_of(sample) + (lane + 1) * columns(); i < plan_.range_count; i += lanes * columns()) to[i] = {kInfinity, -kInfinity};
      return;
    }
    Sum sums[kStatsSample] = {};
    if (lane == 0) sums[kStatsSum] = seen[kStatsSum], sums[kStatsSquares] = seen[kStatsSquares], sums[kStatsClipped] = seen[kStatsClipped];
    bool last = count == 1;
    if (!last) {
      Part* const of_sample = plan_.parts.parts + static_cast<int64_t>(sample) * plan_.parts.count;
      if (lane == 0) leave_part(of_sample + part_of(sample), sums[kStatsSum], sums[kStatsSquares], sums[kStatsClipped], plan_.parts.signature);
      if (lanes > 1) __syncwarp();
      last = take_parts(of_sample, count, plan_.parts.signature, lane, lanes);
      if (last) add_parts(of_sample, count, lane, lanes, sums);
    }
    if (lane != 0) return;
    if (last) {
      int64_t* const row = stats_row(a_.y, sample, g_.out_channels);
      row[kStatsSum] = static_cast<int64_t>(sums[kStatsSum]), row[kStatsSquares] = static_cast<int64_t>(sums[kStatsSquares]);
      row[kStatsClipped] = tile_samples()[s].epilogue.valid ? static_cast<int64_t>(sums[kStatsClipped]) : -1;
    }
    seen[0] = last;
  }

  static __device__ void add_to(int32_t (&sums)[2], int2 part) { sums[0] += part.x, sums[1] += part.y; }
  static __device__ void add_to(int32_t (&sums)[4], int4 part) { sums[0] += part.x, sums[1] += part.y, sums[2] += part.z, sums[3] += part.w; }

  __device__ void store_fragments(int32_t* to) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<int2*>(to + (i * 16 + half * 8 + lane_ / 4) * kPitch + j * 8 + lane_ % 4 * 2) = {accumulators_[i][j][2 * half],
                                                                                                            accumulators_[i][j][2 * half + 1]};
  }

  const Geometry& g_;
  const LayerArguments& a_;
  const LayerPlan& plan_;
  uint8_t* const shared_;
  const int32_t lane_, warp_;
  int32_t column_tile_, group_, first_row_;
  int32_t first_sample_, samples_;  ///< that have rows in the tile; since the epilogue
  int32_t accumulators_[kRowTiles][kColumnTiles][4] = {};
};

template <class Tile, int unit>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) dense_kernel(const Geometry geometry, const LayerArguments arguments, const LayerPlan plan) {
  Dense<Tile, unit>(geometry, arguments, plan).run();
}

Geometry make_geometry(const Conv2dShape& s, const PackedLayout& layout, int64_t rows_per_sample, int64_t tile_columns, int64_t stage_k, bool by_tap) {
  const auto int32 = [](int64_t v) { return static_cast<int32_t>(v); };
  const int64_t row_k = layout.row_segments * layout.segment_bytes, segment_k = by_tap && layout.joined_rows ? layout.inputs : layout.segment_bytes;
  Geometry g{};
  g.rows = int32(s.batch * rows_per_sample), g.rows_per_sample = int32(rows_per_sample);
  g.sample_rows = int32(s.out_height() * s.out_width()), g.out_width = int32(s.out_width()), g.out_channels = int32(s.out_channels);
  g.in_height = int32(s.in_height), g.row_bytes = int32(s.in_width * s.in_channels);
  g.stride_height = int32(s.stride_height), g.stride_bytes = int32(s.stride_width * s.in_channels);
  g.padding_top = int32(s.padding_top), g.padding_bytes = int32(s.padding_left * s.in_channels);
  g.dilation_height = int32(s.dilation_height), g.dilation_bytes = int32(s.dilation_width * s.in_channels);
  g.group_inputs = int32(layout.inputs), g.group_channels = int32(layout.group_channels), g.group_blocks = int32(layout.group_blocks);
  g.column_tiles = int32((layout.group_channels + tile_columns - 1) / tile_columns), g.groups = int32(s.groups);
  g.kernel_height = int32(s.kernel_height), g.kernel_width = int32(s.kernel_width);
  g.row_k = int32(row_k), g.segment_k = int32(segment_k);
  g.segment_reciprocal = row_k == segment_k ? 0 : static_cast<uint32_t>(((int64_t{1} << 32) + segment_k - 1) / segment_k);
  g.step_k = int32(stage_k % row_k), g.step_rows = int32(stage_k / row_k);
  g.segment_inputs = int32(layout.segment_inputs), g.k_blocks = int32(layout.k_blocks), g.block_bytes = layout.block_bytes;
  return g;
}

template <class Tile, int unit = kChunk>
void launch_tile(const Conv2dShape& shape, const PackedLayout& layout, const LayerArguments& a, const LayerPlan& plan, void* stream) {
  constexpr int64_t kWidth = Tile::kColumns / 32;
  Geometry g = make_geometry(shape, layout, visited_rows(shape, a.strategy, plan.output), Tile::kColumns, Tile::kDepth * kBlockK, unit > 1);
  g.x_bytes = shape.batch * shape.in_height * int64_t{g.row_bytes};
  g.words = aligned(a.x.q, 4) && (!layout.joined_rows || shape.dilation_width == 1);
  g.vectors = layout.group_channels % kWidth == 0 && aligned(a.y.q, kWidth) && aligned(a.residual.q, kWidth) && aligned(a.y_float, 4 * kWidth);
  const int64_t row_tiles = (int64_t{g.rows} + Tile::kRows - 1) / Tile::kRows;
  launch("conv2d", dense_kernel<Tile, unit>, {row_tiles * g.groups * g.column_tiles, Tile::kThreads, Tile::kSharedBytes}, stream, g, a, plan);
}

/// Whether x can be copied in units of so many bytes.
bool copies(const Conv2dShape& s, const LayerArguments& a, int64_t unit) {
  return s.in_channels / s.groups % unit == 0 && aligned(a.x.q, unit) && s.kernel_height <= kMostTaps && s.kernel_width <= kMostTaps;
}

int64_t most_parts(const Conv2dShape& s, int64_t rows_per_sample, int64_t tile_rows, int64_t tile_columns) {
  const int64_t group_channels = s.out_channels / s.groups;
  return most_row_tiles(rows_per_sample, tile_rows) * s.groups * ((group_channels + tile_columns - 1) / tile_columns);
}

}  // namespace

PartsLayout dense_parts(const Conv2dShape& s, bool channel_stats) {
  const int64_t rows = s.out_height() * s.out_width();
  return {s.batch, most_parts(s, rows, SmallTile::kRows, SmallTile::kColumns), most_row_tiles(rows, SmallTile::kRows), channel_stats ? s.out_channels : 0};
}

int64_t dense_range_count(const Conv2dShape& s, const LayerArguments& a, int64_t rows_per_sample, DenseTile tile) {
  if (!copies(s, a, kChunk)) tile = DenseTile::medium;
  switch (tile) {
    case DenseTile::large: return most_parts(s, rows_per_sample, LargeTile::kRows, LargeTile::kColumns);
    case DenseTile::medium: return most_parts(s, rows_per_sample, MediumTile::kRows, MediumTile::kColumns);
    case DenseTile::small: return most_parts(s, rows_per_sample, SmallTile::kRows, SmallTile::kColumns);
  }
  return 0;
}

void launch_dense(const Conv2dShape& shape, const LayerArguments& a, const LayerPlan& plan, DenseTile tile, void* stream) {
  const PackedLayout layout(weight_shape(shape));
  if (!copies(shape, a, kChunk))
    return copies(shape, a, 8) ? launch_tile<MediumTile, 8>(shape, layout, a, plan, stream) : launch_tile<MediumTile, 1>(shape, layout, a, plan, stream);
  switch (tile) {
    case DenseTile::large: return launch_tile<LargeTile>(shape, layout, a, plan, stream);
    case DenseTile::medium: return launch_tile<MediumTile>(shape, layout, a, plan, stream);
    case DenseTile::small: return launch_tile<SmallTile>(shape, layout, a, plan, stream);
  }
}

}  // namespace probquant::cuda
