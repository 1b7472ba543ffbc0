#include "instructions.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "memory.h"

namespace cuda_on_cpu {
namespace {

constexpr unsigned kWarp = 32;
constexpr uint32_t kAll = 0xffffffffu;

/// Calls visit(lane, record) for every lane of the mask.
template <class Record, class Visit>
void for_each(uint32_t mask, void* const* records, Visit visit) {
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1u) visit(lane, *static_cast<Record*>(records[lane]));
}

}  // namespace

void warp_barrier(uint32_t mask, const Site& site) {
  warp_collective(mask, nullptr, site, [](uint32_t lanes, void* const*) { memory_warp_barrier(current.warp, lanes); });
}

Shuffled shuffle(Shuffle mode, uint32_t mask, uint32_t value, uint32_t b, uint32_t c, const Site& site) {
  const int lane = static_cast<int>(current.lane), step = static_cast<int>(b & 31), clamp = static_cast<int>(c & 31), segment = static_cast<int>(c >> 8 & 31);
  const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
  int source = lane;
  bool in_range = false;
  switch (mode) {
    case Shuffle::up: source = lane - step, in_range = source >= last; break;
    case Shuffle::down: source = lane + step, in_range = source <= last; break;
    case Shuffle::bfly: source = lane ^ step, in_range = source <= last; break;
    case Shuffle::idx: source = first | (step & ~segment), in_range = source <= last; break;
  }
  if (!in_range) source = lane;
  struct Record {
    uint32_t value;
    int source;
    uint32_t result;
  } record{value, source, 0};
  if ((mask >> lane & 1) && !(mask >> source & 1)) violate("shuffle: " + text(site) + " reads lane " + std::to_string(source) + ", which is not in the mask");
  warp_collective(mask, &record, site, [](uint32_t lanes, void* const* records) {
    for_each<Record>(lanes, records, [&](unsigned, Record& r) { r.result = static_cast<Record*>(records[r.source])->value; });
  });
  return {record.result, in_range};
}

uint32_t ballot(uint32_t mask, bool value, const Site& site) {
  uint32_t record = value;
  warp_collective(mask, &record, site, [](uint32_t lanes, void* const* records) {
    uint32_t votes = 0;
    for_each<uint32_t>(lanes, records, [&](unsigned lane, uint32_t& r) { votes |= r << lane; });
    for_each<uint32_t>(lanes, records, [&](unsigned, uint32_t& r) { r = votes; });
  });
  return record;
}

uint32_t match(uint32_t mask, uint64_t value, bool all, const Site& site) {
  struct Record {
    uint64_t value;
    uint32_t same;
  } record{value, 0};
  warp_collective(mask, &record, site, [](uint32_t lanes, void* const* records) {
    for_each<Record>(lanes, records, [&](unsigned, Record& r) {
      for_each<Record>(lanes, records, [&](unsigned lane, Record& other) { r.same |= static_cast<uint32_t>(r.value == other.value) << lane; });
    });
  });
  return all && record.same != mask ? 0 : record.same;
}

template <class T>
T reduce(Reduction operation, uint32_t mask, T value, const Site& site) {
  struct Record {
    Reduction operation;
    T value;
  } record{operation, value};
  warp_collective(mask, &record, site, [](uint32_t lanes, void* const* records) {
    T result{};
    bool first = true;
    for_each<Record>(lanes, records, [&](unsigned, Record& r) {
      const T a = result, b = r.value;
      switch (r.operation) {
        case Reduction::add: result = static_cast<T>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); break;
        case Reduction::min: result = std::min(a, b); break;
        case Reduction::max: result = std::max(a, b); break;
        case Reduction::and_: result = a & b; break;
        case Reduction::or_: result = a | b; break;
        case Reduction::xor_: result = a ^ b; break;
      }
      if (first) result = b;
      first = false;
    });
    for_each<Record>(lanes, records, [&](unsigned, Record& r) { r.value = result; });
  });
  return record.value;
}
template uint32_t reduce(Reduction, uint32_t, uint32_t, const Site&);
template int32_t reduce(Reduction, uint32_t, int32_t, const Site&);

// ---------------------------------------------------------------------------------------------------------------------
// Matrices. In a fragment, lane 4 g + t holds four neighbouring k of row (A) or column (B) g per register, beginning at 4 t; the
// registers of A go over rows g, g + 8 first, then over k, k + 16; those of C hold columns 2 t and 2 t + 1 of rows g, g + 8.

namespace {

template <int m, int n, int k>
struct Multiplication {
  MmaTypes types;
  MmaFragments<m, n, k> in;
  std::array<uint32_t, m * n / 32> out;
};

int32_t code(uint32_t bits, int byte, bool is_signed) {
  const auto value = static_cast<uint8_t>(bits >> 8 * byte);
  return is_signed ? static_cast<int8_t>(value) : value;
}

template <int m, int n, int k>
void multiply(uint32_t lanes, void* const* records) {
  constexpr int kRowBlocks = m / 8;
  int16_t a[m][k], b[n][k];
  for_each<Multiplication<m, n, k>>(lanes, records, [&](unsigned lane, auto& r) {
    const int group = static_cast<int>(lane / 4), thread = static_cast<int>(lane % 4);
    for (int i = 0; i < m * k / 128; ++i) {
      const int row = group + 8 * (i % kRowBlocks), column = 4 * thread + 16 * (i / kRowBlocks);
      for (int byte = 0; byte < 4; ++byte) a[row][column + byte] = static_cast<int16_t>(code(r.in.a[i], byte, r.types.a_signed));
    }
    for (int i = 0; i < n * k / 128; ++i)
      for (int byte = 0; byte < 4; ++byte) b[group][4 * thread + 16 * i + byte] = static_cast<int16_t>(code(r.in.b[i], byte, r.types.b_signed));
  });
  int32_t products[m][n];
  for (int row = 0; row < m; ++row)
    for (int column = 0; column < n; ++column) {
      int32_t sum = 0;
      for (int i = 0; i < k; ++i) sum += a[row][i] * b[column][i];
      products[row][column] = sum;
    }
  for_each<Multiplication<m, n, k>>(lanes, records, [&](unsigned lane, auto& r) {
    const int group = static_cast<int>(lane / 4), thread = static_cast<int>(lane % 4);
    for (int i = 0; i < m * n / 32; ++i) {
      const int64_t sum = int64_t{static_cast<int32_t>(r.in.c[i])} + products[group + 8 * (i / 2)][2 * thread + i % 2];
      using Limits = std::numeric_limits<int32_t>;
      r.out[i] = static_cast<uint32_t>(r.types.saturate ? std::clamp<int64_t>(sum, Limits::min(), Limits::max()) : sum);
    }
  });
}

}  // namespace

template <int m, int n, int k>
std::array<uint32_t, m * n / 32> mma(MmaTypes types, const MmaFragments<m, n, k>& fragments, const Site& site) {
  Multiplication<m, n, k> record{types, fragments, {}};
  warp_collective(kAll, &record, site, multiply<m, n, k>);
  return record.out;
}
template std::array<uint32_t, 2> mma(MmaTypes, const MmaFragments<8, 8, 16>&, const Site&);
template std::array<uint32_t, 4> mma(MmaTypes, const MmaFragments<16, 8, 16>&, const Site&);
template std::array<uint32_t, 4> mma(MmaTypes, const MmaFragments<16, 8, 32>&, const Site&);

std::array<uint32_t, 4> load_matrix(int count, bool transposed, uint32_t address, const Site& site) {
  struct Record {
    uint16_t row[8];
    int count;
    bool transposed;
    std::array<uint32_t, 4> out;
  } record{{}, count, transposed, {}};
  if (static_cast<int>(current.lane) < 8 * count) std::memcpy(record.row, shared_at(address, 16, Access::read, site), 16);
  warp_collective(kAll, &record, site, [](uint32_t lanes, void* const* records) {
    const auto row = [&](unsigned i) { return static_cast<Record*>(records[i])->row; };
    for_each<Record>(lanes, records, [&](unsigned lane, Record& r) {
      for (int matrix = 0; matrix < r.count; ++matrix) {
        const unsigned first = 8 * static_cast<unsigned>(matrix), i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = r.transposed ? row(first + j)[i] : row(first + i)[j], high = r.transposed ? row(first + j + 1)[i] : row(first + i)[j + 1];
        r.out[static_cast<size_t>(matrix)] = low | high << 16;
      }
    });
  });
  return record.out;
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies

namespace {

struct Copy {
  uint32_t to;
  unsigned bytes, read_bytes;
  uint32_t group;
  const uint8_t* from;
};
struct Copies {
  std::vector<Copy> under_way;
  uint32_t groups = 0;  ///< committed so far
};
std::vector<Copies> copies_of_thread;
uint64_t random_state = 1;

void write(const Copy& copy) {
  uint8_t* const to = shared_memory() + copy.to;
  std::memcpy(to, copy.from, copy.read_bytes);
  std::memset(to + copy.read_bytes, 0, copy.bytes - copy.read_bytes);
}

Copies& mine() { return copies_of_thread[current.warp * kWarp + current.lane]; }

}  // namespace

void copy_async(uint32_t to, uint64_t from, unsigned bytes, uint32_t read_bytes, const Site& site) {
  if (read_bytes > bytes) violate("asynchronous copy: " + text(site) + " reads " + std::to_string(read_bytes) + " of " + std::to_string(bytes) + " bytes");
  if (from % bytes != 0) violate("misaligned: " + text(site) + " copies " + std::to_string(bytes) + " bytes from an address that is not a multiple of it");
  const uint8_t* source = nullptr;
  const uint32_t piece = read_bytes == bytes ? bytes : 1;  // any number of bytes may be read
  for (uint32_t i = 0; i < read_bytes; i += piece) {
    const uint8_t* at = global_at(from + i, piece, Access::read, site);
    if (i == 0) source = at;
  }
  begin_pending(to, bytes, site);
  const Copy copy{to, bytes, read_bytes, mine().groups, source};
  // Hardware may copy at once or as late as the wait. Garbage until then shows who does not wait, copying at once who is
  // still reading what is overwritten.
  if (options().order == Order::backward || (options().order == Order::random && next_random(random_state) % 2)) {
    write(copy);
  } else {
    std::memset(shared_memory() + to, 0xa5, bytes);
  }
  mine().under_way.push_back(copy);
}

void commit_copies() { ++mine().groups; }

void wait_copies(uint32_t groups) {
  Copies& copies = mine();
  const auto done = [&](const Copy& copy) { return copy.group + groups < copies.groups; };
  for (const Copy& copy : copies.under_way)
    if (done(copy)) write(copy), end_pending(copy.to, copy.bytes);
  copies.under_way.erase(std::remove_if(copies.under_way.begin(), copies.under_way.end(), done), copies.under_way.end());
}

void copies_block_begins(unsigned threads) {
  copies_of_thread.assign(threads, {});
  random_state = options().seed;
}

void copies_thread_ends() {
  if (!mine().under_way.empty()) violate("asynchronous copy: the thread ends without waiting for its copies");
}

}  // namespace cuda_on_cpu
