// The serial executor and the default pool of threads.
#include <probquant/types.h>

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>
#include <sched.h>

namespace probquant {
namespace {

/// CPUs this process may run on.
int available_cpus() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

/// A fork-join pool: the caller takes the first range, worker i the range i + 1. One job at a time; a call from inside a
/// body, or while another thread's job runs, is done by its caller alone.
class ThreadPool {
 public:
  ThreadPool() : threads_(available_cpus()) {
    for (int i = 1; i < threads_; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~ThreadPool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    start_.notify_all();
    for (std::thread& t : workers_) t.join();
  }
  int threads() const { return threads_; }

  void run(int64_t count, void (*body)(void*, int64_t, int64_t), void* argument) {
    if (inside_ || threads_ == 1) return body(argument, 0, count);
    std::unique_lock<std::mutex> job(job_, std::try_to_lock);
    if (!job.owns_lock()) return body(argument, 0, count);
    inside_ = true;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      count_ = count, body_ = body, argument_ = argument, failure_ = nullptr;
      running_ = threads_ - 1;
      ++generation_;
    }
    start_.notify_all();
    run_part(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    inside_ = false;
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void run_part(int index) {
    const int64_t begin = count_ * index / threads_, end = count_ * (index + 1) / threads_;
    if (begin == end) return;
    try {
      body_(argument_, begin, end);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      failure_ = std::current_exception();
    }
  }
  void work(int index) {
    inside_ = true;
    for (int64_t seen = 0;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return stop_ || generation_ != seen; });
        if (stop_) return;
        seen = generation_;
      }
      run_part(index);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  static thread_local bool inside_;
  const int threads_;
  std::vector<std::thread> workers_;
  std::mutex job_, mutex_;
  std::condition_variable start_, done_;
  bool stop_ = false;
  int64_t generation_ = 0, count_ = 0;
  int running_ = 0;
  void (*body_)(void*, int64_t, int64_t) = nullptr;
  void* argument_ = nullptr;
  std::exception_ptr failure_;
};

thread_local bool ThreadPool::inside_ = false;

}  // namespace

const Executor& serial_executor() {
  static const Executor executor{
      [](void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* argument) {
        if (count > 0) body(argument, 0, count);
      },
      nullptr, 1};
  return executor;
}

const Executor& default_executor() {
  static ThreadPool pool;
  static const Executor executor{
      [](void* self, int64_t count, void (*body)(void*, int64_t, int64_t), void* argument) {
        if (count > 0) static_cast<ThreadPool*>(self)->run(count, body, argument);
      },
      &pool, pool.threads()};
  return executor;
}

}  // namespace probquant
