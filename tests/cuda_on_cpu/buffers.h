// What the kernel tests share: device memory that the host can use, random values, failures, and the command line.
#pragma once
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "fibers.h"

namespace cuda_on_cpu {

inline int failures = 0;

inline void fail(const std::string& what) {
  if (++failures <= 20) std::printf("failed: %s\n", what.c_str());
}

/// Device memory of exactly `bytes` bytes, which the host can use, too; filled with garbage, so that a value nobody wrote differs
/// between two runs.
class Buffer {
 public:
  Buffer(int64_t bytes, uint8_t garbage) : bytes_(static_cast<size_t>(bytes)) {
    void* data = nullptr;
    if (cudaMalloc(&data, bytes_) != cudaSuccess) throw std::bad_alloc();
    data_.reset(static_cast<uint8_t*>(data));
    std::memset(data, garbage, bytes_);
  }
  /// A copy; null of null.
  template <class T>
  Buffer(const T* values, int64_t count) : Buffer(values ? count * static_cast<int64_t>(sizeof(T)) : 0, uint8_t{0}) {
    if (values) {
      std::memcpy(data_.get(), values, bytes_);
    } else {
      data_.reset();
    }
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }
  void fill(uint8_t garbage) { if (data_ != nullptr) std::memset(data_.get(), garbage, bytes_); }
  bool same(const Buffer& other) const { return bytes_ == 0 || std::memcmp(as<char>(), other.as<char>(), bytes_) == 0; }

 private:
  struct Free {
    void operator()(uint8_t* data) const { cudaFree(data); }
  };
  size_t bytes_;
  std::unique_ptr<uint8_t, Free> data_;
};

inline uint32_t random_bits() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}
inline float random_float() { return static_cast<float>(static_cast<int32_t>(random_bits())) / 1e9f; }

/// Arguments [forward|backward|random] [seed].
inline void set_order(int argument_count, char** arguments) {
  const std::string order = argument_count > 1 ? arguments[1] : "forward";
  options().order = order == "random" ? Order::random : order == "backward" ? Order::backward : Order::forward;
  if (argument_count > 2) options().seed = static_cast<uint64_t>(std::atoll(arguments[2]));
}

/// Prints how many cases there were; the exit status.
inline int summary(int cases) {
  const Counters& c = counters();
  std::printf("%d cases, %d failures; %lld launches, %lld blocks, %lld threads\n", cases, failures, static_cast<long long>(c.launches),
              static_cast<long long>(c.blocks), static_cast<long long>(c.threads));
  return failures == 0 ? 0 : 1;
}

}  // namespace cuda_on_cpu
