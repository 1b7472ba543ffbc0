// Memory of a kernel. Everything has internal linkage: of the standard library's owners, functions that are compiled with an instruction set's flags
// could be what the linker takes for all files that use them.
#pragma once
#include <cstdint>
#include <new>

namespace probquant {
namespace {

/// Memory on a cache line, which goes with this object; not initialised.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(); }

  /// So many values at least; what was there before may be gone.
  template <class T = uint8_t>
  T* at_least(int64_t count) {
    const int64_t wanted = count * static_cast<int64_t>(sizeof(T));
    if (wanted > bytes) {
      free();
      data = nullptr, bytes = 0;
      data = ::operator new(static_cast<size_t>(wanted), kLine);
      bytes = wanted;
    }
    return get<T>();
  }
  /// What at_least() gave last.
  template <class T = uint8_t>
  T* get() const {
    return static_cast<T*>(data);
  }

 private:
  static constexpr std::align_val_t kLine{64};
  void free() { ::operator delete(data, kLine); }

  void* data = nullptr;
  int64_t bytes = 0;
};

}  // namespace
}  // namespace probquant
