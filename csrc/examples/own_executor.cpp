// Running the library on your own threads, and what an error looks like.
//
// The library starts no thread unless you ask for probquant::default_executor(). To put it on the pool your program has
// already, fill a probquant::Executor: parallel_for must call body(argument, begin, end) on ranges that are disjoint and cover
// [0, count), and return when all are done. The bytes that come out do not depend on the split.
#include <atomic>
#include <cstdio>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "network.h"

namespace {

/// Starts three threads for each call: stands in for your pool. It counts what it was asked to do.
class Threads {
 public:
  /// What the library takes. `this` must outlive it.
  probquant::Executor executor() { return {&Threads::parallel_for, this, kThreads}; }
  int calls() const { return calls_; }

 private:
  static constexpr int kThreads = 3;

  static void parallel_for(void* self, std::int64_t count, void (*body)(void*, std::int64_t, std::int64_t), void* argument) {
    ++static_cast<Threads*>(self)->calls_;
    std::mutex mutex;
    std::exception_ptr failure;  // an exception may not leave a thread: the first one is thrown again in the caller
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i)
      threads.emplace_back([=, &mutex, &failure] {
        const std::int64_t begin = count * i / kThreads, end = count * (i + 1) / kThreads;
        try {
          if (begin < end) body(argument, begin, end);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(mutex);
          if (!failure) failure = std::current_exception();
        }
      });
    for (std::thread& thread : threads) thread.join();
    if (failure) std::rethrow_exception(failure);
  }

  std::atomic<int> calls_{0};
};

/// Every function checks sizes and throws probquant::Error, a std::runtime_error, before anything is written.
bool an_error_is_caught(const probquant::Executor& executor) {
  example::Activation x(1, 4), y(1, 2);
  const example::Weights weights({2, 1, 1, 4, 1}, example::noise(8, 1), example::noise(2, 2), 3.0f, 3.0f);
  probquant::LayerArguments arguments;
  arguments.x = x.input();
  arguments.packed_weight = weights.packed.data();
  arguments.activation_max = 6;  // ReLU6
  arguments.strategy = probquant::Strategy::gaussian;
  arguments.predictor = weights.predictor.data();
  arguments.predictor_size = 2;  // wrong: the gaussian strategy wants seven values
  arguments.y = y.output();
  try {
    probquant::conv2d(probquant::linear_shape(1, 1, 4, 2), arguments, executor);
  } catch (const probquant::Error& error) {
    std::printf("as it should be: %s\n", error.what());
    return std::string(error.what()).find("predictor") != std::string::npos;
  } catch (const std::exception& error) {
    std::printf("not a probquant::Error: %s\n", error.what());
    return false;
  }
  std::printf("a predictor of the wrong size went unnoticed\n");
  return false;
}

/// An exception that your executor throws comes back through the library to the caller.
bool an_executors_exception_passes() {
  const probquant::Executor failing{
      [](void*, std::int64_t, void (*)(void*, std::int64_t, std::int64_t), void*) { throw std::logic_error("no threads left"); }, nullptr, 2};
  try {
    example::run_network(failing);
  } catch (const std::logic_error& error) {
    std::printf("as it should be: %s\n", error.what());
    return true;
  }
  std::printf("the executor's exception was lost\n");
  return false;
}

}  // namespace

int main() {
  Threads threads;
  const probquant::Executor mine = threads.executor();
  const bool same = example::run_network(mine) == example::run_network(probquant::serial_executor());
  std::printf("%d calls of parallel_for, %s\n", threads.calls(), same ? "the same bytes as without threads" : "OTHER BYTES than without threads");
  return same && threads.calls() > 0 && an_error_is_caught(mine) && an_executors_exception_passes() ? 0 : 1;
}
