#include "fibers.h"

#include "instructions.h"
#include "memory.h"

#include <sys/mman.h>

#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kWarp = 32;

// ---------------------------------------------------------------------------------------------------------------------
// Switching stacks

/// A place to continue from: the stack pointer below the saved registers, or a ucontext where there is no assembly for it.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

#if defined(__x86_64__)
extern "C" void cuda_on_cpu_switch(void** save, void* to);
asm(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

/// Leaves `from`, to be continued later, for `to`. A fiber that ends leaves for good.
void switch_context(Context& from, Context& to, bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
  (void)for_good;
#if defined(__x86_64__)
  cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void fiber_main();

/// Points the context at the beginning of fiber_main on an empty stack.
void prepare(Context& context, uint8_t* stack) {
  context.stack_bottom = stack;
  context.stack_bytes = kStackBytes;
  context.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
#if defined(__x86_64__)
  auto* top = reinterpret_cast<uintptr_t*>(stack + kStackBytes - 64);  // 16-byte aligned at the call that `ret` stands for
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = 0;
  context.stack_pointer = top;
#else
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStackBytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, fiber_main, 0);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// A block

enum class State { runnable, at_barrier, at_collective, ended };

struct Fiber {
  Identity identity;
  Context context;
  State state = State::runnable;
  Site site{"", 0};  ///< where it waits
};

/// Lanes of a warp that have arrived at one collective.
struct Collective {
  unsigned warp;
  uint32_t mask, arrived;
  Site site;
  void* records[kWarp];
};

bool same(const Site& a, const Site& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0 && std::strcmp(a.what, b.what) == 0; }

class Block {
 public:
  Block(const char* kernel, Size grid, Size block, const std::function<void()>& thread, uint64_t seed)
      : kernel_(kernel), thread_(thread), random_(seed), fibers_(block.x * block.y * block.z) {
    stacks_ = shared_stacks(fibers_.size());
    unsigned i = 0;
    for (unsigned z = 0; z < block.z; ++z)
      for (unsigned y = 0; y < block.y; ++y)
        for (unsigned x = 0; x < block.x; ++x, ++i) fibers_[i].identity = {{x, y, z}, {}, block, grid, i % kWarp, i / kWarp};
  }

  void run(Size index) {
    running_ = this;
    runnable_.clear();
    at_barrier_ = ended_ = 0;
    memory_block_begins(threads(), random_);
    copies_block_begins(threads());
    for (size_t i = 0; i < fibers_.size(); ++i) {
      fibers_[i].identity.block = index;
      fibers_[i].state = State::runnable;
      prepare(fibers_[i].context, stacks_ + i * kStackBytes);
      runnable_.push_back(&fibers_[i]);
    }
    while (!runnable_.empty() && violation_.empty()) {
      now_ = pick();
      current = now_->identity;
      switch_context(main_, now_->context);
    }
    running_ = nullptr;
    now_ = nullptr;
    if (violation_.empty() && ended_ < fibers_.size()) violation_ = deadlock();
    if (!violation_.empty()) throw Violation(std::string(kernel_) + ", block " + std::to_string(index.x) + ": " + violation_);
  }

  static Block& running() {
    if (running_ == nullptr) throw Violation("device code outside of a kernel");
    return *running_;
  }
  void fiber_body() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &main_.stack_bottom, &main_.stack_bytes);  // fibers start from the main stack
#endif
    thread_();
    copies_thread_ends();
    now_->state = State::ended;
    ++ended_;
    if (at_barrier_ > 0) fail("a thread ends while " + std::to_string(at_barrier_) + " wait at " + text(barrier_site_));
    for (const Collective& c : collectives_)
      if (c.warp == now_->identity.warp && (c.mask >> now_->identity.lane & 1u))
        fail("a lane ends that the collective at " + text(c.site) + " names");
    switch_context(now_->context, main_, true);
  }

  unsigned barrier(const Site& site, bool value) {
    if (ended_ > 0) fail_here("__syncthreads at " + text(site) + " after " + std::to_string(ended_) + " threads of the block have ended");
    if (at_barrier_ > 0 && !same(site, barrier_site_))
      fail_here("a barrier in divergent code: threads are at " + text(barrier_site_) + " and at " + text(site));
    barrier_site_ = site;
    barrier_count_ += value;
    if (++at_barrier_ < fibers_.size()) {
      wait(State::at_barrier, site);
      return barrier_result_;
    }
    at_barrier_ = 0;
    barrier_result_ = barrier_count_;
    barrier_count_ = 0;
    memory_barrier();
    for (Fiber& fiber : fibers_)
      if (fiber.state == State::at_barrier) wake(fiber);
    yield();
    return barrier_result_;
  }

  void collective(uint32_t mask, void* record, const Site& site, Combine combine) {
    const unsigned lane = now_->identity.lane, warp = now_->identity.warp;
    if (!(mask >> lane & 1u)) fail_here("lane " + std::to_string(lane) + " is not in its own mask at " + text(site));
    for (unsigned other = 0; other < kWarp; ++other)
      if ((mask >> other & 1u) && (warp * kWarp + other >= fibers_.size() || fiber(warp, other).state == State::ended))
        fail_here("the mask at " + text(site) + " names lane " + std::to_string(other) + ", which has ended or does not exist");
    auto c = collectives_.begin();
    while (c != collectives_.end() && !(c->warp == warp && c->mask == mask && same(c->site, site))) ++c;
    if (c == collectives_.end()) c = collectives_.insert(c, Collective{warp, mask, 0, site, {}});
    c->arrived |= 1u << lane;
    c->records[lane] = record;
    if (c->arrived != mask) return wait(State::at_collective, site);
    combine(mask, c->records);
    collectives_.erase(c);
    for (unsigned other = 0; other < kWarp; ++other)
      if ((mask >> other & 1u) && fiber(warp, other).state == State::at_collective) wake(fiber(warp, other));
    yield();
  }

  unsigned threads() const { return static_cast<unsigned>(fibers_.size()); }
  Stack stack() const {
    const uint8_t* begin = stacks_ + static_cast<size_t>(now_ - fibers_.data()) * kStackBytes;
    return {begin, begin + kStackBytes};
  }
  /// The block goes no further: run() throws, on its own stack.
  [[noreturn]] void fail_here(const std::string& what) {
    fail(what);
    switch_context(now_->context, main_);
    __builtin_unreachable();
  }
  std::string who() const {
    const Size& t = now_->identity.thread;
    return "thread " + std::to_string(t.x) + (t.y || t.z ? "," + std::to_string(t.y) + "," + std::to_string(t.z) : "");
  }

 private:
  /// One mapping for all blocks of all launches; it grows and is never given back.
  static uint8_t* shared_stacks(size_t count) {
    static uint8_t* stacks = nullptr;
    static size_t bytes = 0;
    if (bytes < count * kStackBytes) {
      if (stacks != nullptr) munmap(stacks, bytes);
      bytes = count * kStackBytes;
      void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (mapped == MAP_FAILED) throw std::bad_alloc();
      stacks = static_cast<uint8_t*>(mapped);
    }
    return stacks;
  }

  Fiber& fiber(unsigned warp, unsigned lane) { return fibers_[warp * kWarp + lane]; }

  Fiber* pick() {
    size_t i = 0;
    if (options().order == Order::backward) i = runnable_.size() - 1;
    if (options().order == Order::random) i = next_random(random_) % runnable_.size();
    std::swap(runnable_[i], i == 0 ? runnable_.front() : runnable_.back());
    Fiber* fiber = i == 0 ? runnable_.front() : runnable_.back();
    i == 0 ? runnable_.pop_front() : runnable_.pop_back();
    return fiber;
  }
  void wake(Fiber& fiber) {
    fiber.state = State::runnable;
    runnable_.push_back(&fiber);
  }
  void wait(State state, Site site) {
    now_->state = state;
    now_->site = site;
    switch_context(now_->context, main_);
  }
  void yield() {
    runnable_.push_back(now_);
    switch_context(now_->context, main_);
  }
  void fail(const std::string& what) {
    if (violation_.empty()) violation_ = what;
  }
  std::string deadlock() const {
    for (const Fiber& f : fibers_)
      if (f.state == State::at_barrier || f.state == State::at_collective)
        return "deadlock: thread " + std::to_string(f.identity.thread.x) + " waits at " + text(f.site) + " for threads that never come";
    return "deadlock";
  }

  static Block* running_;
  const char* kernel_;
  const std::function<void()>& thread_;
  uint64_t random_;
  std::vector<Fiber> fibers_;
  uint8_t* stacks_;
  std::deque<Fiber*> runnable_;
  std::vector<Collective> collectives_;
  Context main_;
  Fiber* now_ = nullptr;
  size_t at_barrier_ = 0, ended_ = 0;
  unsigned barrier_count_ = 0, barrier_result_ = 0;
  Site barrier_site_{"", 0};
  std::string violation_;
};

Block* Block::running_ = nullptr;

void fiber_main() { Block::running().fiber_body(); }

}  // namespace

Identity current;

Options& options() {
  static Options result;
  return result;
}

Counters& counters() {
  static Counters result;
  return result;
}

std::string text(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return (*site.what ? std::string(site.what) + " at " : "") + (slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

uint64_t next_random(uint64_t& state) {  // splitmix64
  uint64_t z = state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

void violate(const std::string& what) { Block::running().fail_here(Block::running().who() + ": " + what); }

void block_barrier(const Site& site) { Block::running().barrier(site, false); }

unsigned block_barrier_count(bool value, const Site& site) { return Block::running().barrier(site, value); }

void warp_collective(uint32_t mask, void* record, const Site& site, Combine combine) { Block::running().collective(mask, record, site, combine); }

unsigned block_threads() { return Block::running().threads(); }

Stack current_stack() { return Block::running().stack(); }

void run_grid(const char* kernel, Size grid, Size block, const std::function<void()>& thread) {
  Block runner(kernel, grid, block, thread, options().seed);
  memory_launch_begins();
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  uint64_t random = options().seed ^ 0x5bd1e995u;
  for (uint64_t i = 0; i + 1 < blocks; ++i) {
    if (options().order == Order::backward && i < blocks / 2) std::swap(order[i], order[blocks - 1 - i]);
    if (options().order == Order::random) std::swap(order[i], order[i + next_random(random) % (blocks - i)]);
  }
  for (const uint32_t i : order) runner.run({i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y});
  counters().launches += 1;
  counters().blocks += static_cast<int64_t>(blocks);
  counters().threads += static_cast<int64_t>(blocks * block.x * block.y * block.z);
}

}  // namespace cuda_on_cpu
