#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <new>
#include <set>
#include <tuple>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t kGlobalArena = size_t{512} << 20;
constexpr size_t kGranule = 256;  // allocations start at multiples of it, with at least one unused granule between two
constexpr uint8_t kGarbage = 0xa5;
constexpr unsigned kWarp = 32;

// ---------------------------------------------------------------------------------------------------------------------
// Shadow memory
//
// Time is counted in epochs: a new one begins with every launch, block and block barrier. Inside of an epoch, a warp has a clock
// that its __syncwarps advance, and a lane knows up to which time it is ordered after each other lane of its warp.

/// What is known of one byte. Epoch 0: never.
struct Cell {
  const Site *write_site, *read_site;
  uint32_t write_epoch, write_time;
  uint32_t read_epoch, read_time;  ///< of the last reader
  uint32_t first_read_epoch;       ///< of the launch, in which block ever
  uint32_t read_lanes;             ///< of read_warp, in read_epoch
  uint16_t writer;
  uint8_t read_warp;
  bool other_warps : 1;  ///< than read_warp have read it in read_epoch
  bool strong : 1;       ///< the last write was atomic or strong
  bool pending : 1;      ///< an asynchronous copy is to write it
};

template <class T>
T* map_lazily(size_t count) {
  void* mapped = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  return static_cast<T*>(mapped);
}

struct Global {
  uint8_t* const base = map_lazily<uint8_t>(kGlobalArena);
  Cell* const cells = map_lazily<Cell>(kGlobalArena);
  uint16_t* const valid = map_lazily<uint16_t>(kGlobalArena / kGranule);  ///< bytes of each granule that are allocated
  std::map<size_t, size_t> allocations;                                  ///< offset to bytes
};
Global& global() {
  static Global result;
  return result;
}

struct Shared {
  uint8_t* const base = map_lazily<uint8_t>(kSharedArena);
  Cell* const cells = map_lazily<Cell>(kSharedArena);
  unsigned static_bytes = 0, dynamic_bytes = 0;
  unsigned bytes() const { return static_bytes + dynamic_bytes; }
};
Shared& shared() {
  static Shared result;
  return result;
}

const uint8_t* parameters = nullptr;
unsigned parameter_bytes = 0;

uint32_t epoch = 1, block_epoch = 1, launch_epoch = 1;
std::vector<uint32_t> clocks;                       // by warp
std::vector<uint32_t> known;                        // by thread and lane: that lane's accesses before this time are ordered before the thread
unsigned self() { return current.warp * kWarp + current.lane; }

/// Whether an access by `thread` at that time happens before everything that the running thread does now.
bool ordered(uint32_t at_epoch, uint32_t time, unsigned thread) {
  if (at_epoch < launch_epoch) return true;
  if (at_epoch < block_epoch) return false;
  if (at_epoch < epoch || thread == self()) return true;
  return thread / kWarp == current.warp && time < known[self() * kWarp + thread % kWarp];
}

std::string bytes_text(unsigned bytes) { return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes"); }

std::string thread_text(uint32_t at_epoch, unsigned thread) {
  return at_epoch < block_epoch ? std::string("another block") : "thread " + std::to_string(thread) + " of the block";
}

void report_race(const char* kind, uint32_t at_epoch, unsigned thread, const char* other, const Site* other_site, const Site& site) {
  violate(std::string("a race (") + kind + "): " + text(site) + " and " + thread_text(at_epoch, thread) + ", " + other + " at " +
          text(*other_site) + ", with no barrier between them");
}

void check_read(Cell& cell, Access access, bool is_shared, const Site& site) {
  if (cell.pending) violate("asynchronous copy: " + text(site) + " reads what " + text(*cell.write_site) + " copies and nobody has waited for");
  const bool strong = access == Access::strong_read;
  if (is_shared && cell.write_epoch < block_epoch) violate("uninitialised shared memory: " + text(site) + " reads what no thread of the block has written");
  if (!ordered(cell.write_epoch, cell.write_time, cell.writer) && !(strong && cell.strong))
    report_race("read after write", cell.write_epoch, cell.writer, "which writes", cell.write_site, site);
  if (access == Access::constant_read && cell.write_epoch >= launch_epoch)
    violate("read-only data: " + text(site) + " reads with ld.global.nc what " + text(*cell.write_site) + " wrote in the same launch");
  if (strong) return;
  const uint32_t now = clocks[current.warp], bit = 1u << current.lane;
  if (cell.read_epoch < launch_epoch) cell.first_read_epoch = epoch;
  if (cell.read_epoch != epoch) {
    cell.read_warp = static_cast<uint8_t>(current.warp);
    cell.read_lanes = bit;
    cell.other_warps = false;
  } else if (cell.read_warp == current.warp) {
    if (cell.read_time != now)  // forget those whose read is ordered before this one
      for (unsigned lane = 0; lane < kWarp; ++lane)
        if (cell.read_time < known[self() * kWarp + lane]) cell.read_lanes &= ~(1u << lane);
    cell.read_lanes |= bit;
  } else {
    cell.other_warps = true;
  }
  cell.read_epoch = epoch;
  cell.read_time = now;
  cell.read_site = &site;
}

void check_write(Cell& cell, Access access, const Site& site) {
  if (cell.pending) violate("asynchronous copy: " + text(site) + " writes where " + text(*cell.write_site) + " copies and nobody has waited for");
  const bool strong = access != Access::write;
  if (!ordered(cell.write_epoch, cell.write_time, cell.writer) && !(strong && cell.strong))
    report_race("write after write", cell.write_epoch, cell.writer, "which writes", cell.write_site, site);
  if (cell.read_epoch >= launch_epoch) {
    const unsigned reader = cell.read_warp * kWarp + static_cast<unsigned>(__builtin_ctz(cell.read_lanes | 1u << 31));
    if (cell.first_read_epoch < block_epoch) report_race("write after read", cell.first_read_epoch, 0, "which reads", cell.read_site, site);
    if (cell.read_epoch == epoch) {
      bool race = cell.other_warps || cell.read_warp != current.warp;
      for (uint32_t lanes = cell.read_lanes & ~(1u << current.lane); lanes && !race; lanes &= lanes - 1)
        race = cell.read_time >= known[self() * kWarp + static_cast<unsigned>(__builtin_ctz(lanes))];
      if (race) report_race("write after read", cell.read_epoch, reader, "which reads", cell.read_site, site);
    }
  }
  cell.write_epoch = epoch;
  cell.write_time = clocks[current.warp];
  cell.writer = static_cast<uint16_t>(self());
  cell.write_site = &site;
  cell.strong = strong;
}

void check_cells(Cell* cell, unsigned bytes, Access access, bool is_shared, const Site& site) {
  for (Cell* const end = cell + bytes; cell != end; ++cell) {
    if (access == Access::read || access == Access::strong_read || access == Access::constant_read) {
      check_read(*cell, access, is_shared, site);
    } else {
      if (access == Access::atomic && is_shared && cell->write_epoch < block_epoch)
        violate("uninitialised shared memory: " + text(site) + " updates what no thread of the block has written");
      check_write(*cell, access, site);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Profile: the accesses of a warp's lanes that are the n-th of their lane at a place belong to one request

struct Request {
  unsigned bytes = 0;
  bool is_shared = false;
  std::vector<uint64_t> addresses;
};
struct Totals {
  unsigned bytes = 0;
  uint64_t requests = 0, done = 0, needed = 0;
};
bool profiling = false;  // this block
std::map<std::tuple<const Site*, bool, unsigned>, unsigned> turns;                 // by place, space and thread: cp.async has both spaces
std::map<std::tuple<const Site*, bool, unsigned, unsigned>, Request> requests;     // by place, space, warp and turn
std::map<std::tuple<std::string, int, std::string, bool>, Totals> profile;         // by file, line, instruction and space

void note(const Site& site, uint64_t address, unsigned bytes, bool is_shared) {
  Request& request = requests[{&site, is_shared, current.warp, turns[{&site, is_shared, self()}]++}];
  request.bytes = bytes;
  request.is_shared = is_shared;
  request.addresses.push_back(address);
}

void add_to_profile(const Site& site, const Request& request) {
  Totals& totals = profile[{site.file, site.line, site.what, request.is_shared}];
  totals.bytes = request.bytes;
  totals.requests += 1;
  if (!request.is_shared) {
    std::set<uint64_t> sectors, distinct;
    for (const uint64_t address : request.addresses)
      for (unsigned i = 0; i < request.bytes; ++i) sectors.insert((address + i) / 32), distinct.insert(address + i);
    totals.done += sectors.size();
    totals.needed += (distinct.size() + 31) / 32;
    return;
  }
  // 32 banks of 4 bytes; a warp's 8-byte accesses go in two halves, its 16-byte ones in four quarters.
  const size_t lanes = request.bytes >= 16 ? 8 : request.bytes == 8 ? 16 : 32;
  for (size_t begin = 0; begin < request.addresses.size(); begin += lanes) {
    std::set<uint64_t> words_of_bank[32];
    for (size_t i = begin; i < std::min(begin + lanes, request.addresses.size()); ++i)
      for (uint64_t word = request.addresses[i] / 4; word <= (request.addresses[i] + request.bytes - 1) / 4; ++word)
        words_of_bank[word % 32].insert(word);
    size_t most = 1;
    for (const auto& words : words_of_bank) most = std::max(most, words.size());
    totals.done += most;
    totals.needed += 1;
  }
}

void end_profiled_block() {
  for (const auto& [key, request] : requests) add_to_profile(*std::get<0>(key), request);
  turns.clear();
  requests.clear();
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Accesses

uint8_t* global_at(uint64_t address, unsigned bytes, Access access, const Site& site) {
  Global& g = global();
  const uint64_t offset = address - reinterpret_cast<uint64_t>(g.base);
  if (address % bytes != 0) violate("misaligned: " + text(site) + " of " + bytes_text(bytes) + " at a global address that is " + std::to_string(address % bytes) + " past a multiple of it");
#if defined(__SANITIZE_ADDRESS__)
  if (offset >= kGlobalArena) return reinterpret_cast<uint8_t*>(address);  // heap memory, which AddressSanitizer checks
#endif
  if (offset >= kGlobalArena) violate("out of bounds: " + text(site) + " of " + bytes_text(bytes) + " at an address that is not device memory");
  if (offset % kGranule + bytes > g.valid[offset / kGranule]) {
    std::string where;
    if (const auto after = g.allocations.upper_bound(offset); after != g.allocations.begin()) {
      const auto& [begin, size] = *std::prev(after);
      where = ", " + bytes_text(static_cast<unsigned>(offset + bytes - begin - size)) + " past the end of an allocation of " + std::to_string(size);
    }
    violate("out of bounds: " + text(site) + " of " + bytes_text(bytes) + " of global memory" + where);
  }
  if (profiling) note(site, offset, bytes, false);
  if (options().check) check_cells(g.cells + offset, bytes, access, false, site);
  return g.base + offset;
}

uint8_t* shared_at(uint64_t offset, unsigned bytes, Access access, const Site& site) {
  Shared& s = shared();
  if (offset % bytes != 0) violate("misaligned: " + text(site) + " of " + bytes_text(bytes) + " at shared address " + std::to_string(offset));
  if (offset + bytes > s.bytes() || offset > s.bytes())
    violate("out of bounds: " + text(site) + " of " + bytes_text(bytes) + " at shared address " + std::to_string(offset) + ", the block has " + bytes_text(s.bytes()));
  if (profiling) note(site, offset, bytes, true);
  if (options().check) check_cells(s.cells + offset, bytes, access, true, site);
  return s.base + offset;
}

uint8_t* local_at(uint64_t address, unsigned bytes, Access, const Site& site) {
  const Stack stack = current_stack();
  auto* at = reinterpret_cast<uint8_t*>(address);
  if (address % bytes != 0) violate("misaligned: " + text(site) + " of " + bytes_text(bytes) + " of local memory");
  if (at < stack.begin || at + bytes > stack.end) violate("out of bounds: " + text(site) + " of " + bytes_text(bytes) + " outside of local memory");
  return at;
}

uint8_t* generic_at(uint64_t address, unsigned bytes, Access access, const Site& site) {
  if (const uint64_t offset = address - reinterpret_cast<uint64_t>(shared_memory()); offset < kSharedArena) return shared_at(offset, bytes, access, site);
  const Stack stack = current_stack();
  auto* at = reinterpret_cast<uint8_t*>(address);
  if (at >= stack.begin && at < stack.end) return local_at(address, bytes, access, site);
  if (at >= parameters && at + bytes <= parameters + parameter_bytes && access == Access::read) return at;
  return global_at(address, bytes, access, site);
}

uint8_t* shared_memory() { return shared().base; }

void set_shared_memory(unsigned static_bytes, unsigned dynamic_bytes) { shared().static_bytes = static_bytes, shared().dynamic_bytes = dynamic_bytes; }

unsigned dynamic_shared_bytes() { return shared().dynamic_bytes; }

void set_parameters(const uint8_t* data, unsigned bytes) { parameters = data, parameter_bytes = bytes; }

void begin_pending(uint64_t offset, unsigned bytes, const Site& site) {
  shared_at(offset, bytes, Access::write, site);
  if (options().check)
    for (unsigned i = 0; i < bytes; ++i) shared().cells[offset + i].pending = true;
}

void end_pending(uint64_t offset, unsigned bytes) {
  if (!options().check) return;
  for (Cell* cell = shared().cells + offset; bytes > 0; --bytes, ++cell) {
    cell->pending = false;
    cell->write_epoch = epoch;
    cell->write_time = clocks[current.warp];
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Allocations

void* device_allocate(size_t bytes) {
  Global& g = global();
  size_t offset = kGranule;
  for (const auto& [begin, size] : g.allocations) {
    if (offset + bytes + kGranule <= begin) break;
    offset = (begin + size + kGranule - 1) / kGranule * kGranule + kGranule;
  }
  if (offset + bytes + kGranule > kGlobalArena) return nullptr;
  g.allocations[offset] = std::max<size_t>(bytes, 1);
  for (size_t done = 0; done < bytes; done += kGranule) g.valid[(offset + done) / kGranule] = static_cast<uint16_t>(std::min(kGranule, bytes - done));
  std::memset(g.base + offset, kGarbage, bytes);
  return g.base + offset;
}

bool device_free(void* pointer) {
  Global& g = global();
  const auto found = g.allocations.find(static_cast<size_t>(static_cast<uint8_t*>(pointer) - g.base));
  if (found == g.allocations.end()) return false;
  const auto [offset, bytes] = *found;
  std::fill(g.valid + offset / kGranule, g.valid + (offset + bytes + kGranule - 1) / kGranule, uint16_t{0});
  g.allocations.erase(found);
  return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Time

void memory_launch_begins() {
  launch_epoch = ++epoch;
  profiling = false;
}

void memory_block_begins(unsigned threads, uint64_t& random) {
  if (options().profile && profiling) end_profiled_block();
  profiling = options().profile && epoch == launch_epoch;
  block_epoch = ++epoch;
  clocks.assign((threads + kWarp - 1) / kWarp, 1);
  known.assign(size_t{threads} * kWarp, 0);
  // What a block finds in its shared memory is somebody else's.
  std::memset(shared().base, options().order == Order::random ? static_cast<int>(next_random(random) & 0xff) : kGarbage, shared().bytes());
  if (options().check)
    for (unsigned i = 0; i < shared().bytes(); ++i) shared().cells[i] = Cell{};
}

void memory_barrier() { ++epoch; }

void memory_warp_barrier(unsigned warp, uint32_t mask) {
  const uint32_t now = clocks[warp]++;
  uint32_t merged[kWarp] = {};
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    const uint32_t* of_lane = &known[(warp * kWarp + lane) * kWarp];
    for (unsigned other = 0; other < kWarp; ++other) merged[other] = std::max(merged[other], of_lane[other]);
  }
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1u) merged[lane] = now + 1;
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1u) std::copy(merged, merged + kWarp, &known[(warp * kWarp + lane) * kWarp]);
}

void print_profile(std::FILE* file) {
  end_profiled_block();
  std::fprintf(file, "%-56s %-6s %5s %9s %9s %9s %6s\n", "place", "space", "bytes", "requests", "done", "needed", "ratio");
  for (const auto& [key, t] : profile) {
    const auto& [name, line, what, shared] = key;
    std::fprintf(file, "%-56s %-6s %5u %9llu %9llu %9llu %6.2f\n", text({name.c_str(), line, what.c_str()}).c_str(), shared ? "shared" : "global", t.bytes,
                 static_cast<unsigned long long>(t.requests), static_cast<unsigned long long>(t.done), static_cast<unsigned long long>(t.needed),
                 static_cast<double>(t.done) / static_cast<double>(t.needed));
  }
}

}  // namespace cuda_on_cpu
