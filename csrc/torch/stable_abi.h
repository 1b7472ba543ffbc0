// Owns everything that probquant knows of torch in C++: a small typed layer over the stable C ABI (torch >= 2.10), so that
// the op library needs no torch to build and loads under any later torch.
//
//   Tensor            a tensor handle and its metadata
//   Scratch           tensors that live inside one op
//   empty, empty_strided
//   Library, Boxed    registration of schemas and kernels; conversion of the boxed argument stack
//   torch_executor    torch's thread pool as a probquant::Executor
//   DeviceGuard, current_cuda_stream
//
// Ownership on the boxed stack: a kernel's arguments belong to the kernel, which Boxed therefore takes and frees; what it
// returns are handles that belong to torch. Tensor is move-only, so a handle is made or freed exactly once.
// Errors: kernels throw; Boxed lets exceptions pass to torch, which makes a RuntimeError with the same message of them.
#pragma once
#include <dlfcn.h>
#include <probquant/types.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "stable_symbols.h"

#define PROBQUANT_DECLARE(result, name, parameters) extern "C" result name parameters;
PROBQUANT_TORCH_SYMBOLS(PROBQUANT_DECLARE)
#undef PROBQUANT_DECLARE

namespace probquant::stable {

/// The ABI that the conversions below speak, in torch's encoding: 2.10.
inline constexpr uint64_t kAbiVersion = (uint64_t{2} << 56) | (uint64_t{10} << 48);

/// One slot of the boxed stack.
using Slot = uint64_t;

// ---------------------------------------------------------------------------------------------------------------------
// Errors

[[noreturn]] inline void throw_torch_error(const char* call) {
#define PROBQUANT_POINTER(result, name, parameters) using What = result(*) parameters;
  PROBQUANT_TORCH_2_13_SYMBOLS(PROBQUANT_POINTER)
#undef PROBQUANT_POINTER
  std::string message = std::string("torch refused ") + call;
  const auto what = reinterpret_cast<What>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  if (what != nullptr && what() != nullptr) message += std::string(": ") + what();
  throw Error(message);
}

/// Throws if a call of the C ABI failed.
#define PROBQUANT_TORCH_CHECK(call)                                                  \
  do {                                                                               \
    if (__builtin_expect((call) != 0, 0)) ::probquant::stable::throw_torch_error(#call); \
  } while (false)

// ---------------------------------------------------------------------------------------------------------------------
// Codes that torch hands out at run time

struct Codes {
  int32_t cpu = aoti_torch_device_type_cpu();
  int32_t cuda = aoti_torch_device_type_cuda();
  int32_t boolean = aoti_torch_dtype_bool();
  int32_t uint8 = aoti_torch_dtype_uint8();
  int32_t int8 = aoti_torch_dtype_int8();
  int32_t int32 = aoti_torch_dtype_int32();
  int32_t int64 = aoti_torch_dtype_int64();
  int32_t float16 = aoti_torch_dtype_float16();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t float32 = aoti_torch_dtype_float32();
  int32_t float64 = aoti_torch_dtype_float64();

  /// Of an element of the dtypes that ops know; 0 for others.
  size_t known_bytes(int32_t dtype) const {
    if (dtype == uint8 || dtype == int8 || dtype == boolean) return 1;
    if (dtype == float16 || dtype == bfloat16) return 2;
    if (dtype == float32 || dtype == int32) return 4;
    if (dtype == int64 || dtype == float64) return 8;
    return 0;
  }
  /// The same; others are an error.
  size_t item_bytes(int32_t dtype) const {
    const size_t bytes = known_bytes(dtype);
    if (bytes == 0) throw Error("a tensor of a dtype that no op knows");
    return bytes;
  }
};

/// Codes of device types and dtypes, asked for once.
inline const Codes& codes() {
  static const Codes result;
  return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensors

/// Sizes or strides, borrowed.
class IntView {
 public:
  IntView(const int64_t* data, size_t size) : data_(data), size_(size) {}
  IntView(std::initializer_list<int64_t> values) : IntView(values.begin(), values.size()) {}
  IntView(const std::vector<int64_t>& values) : IntView(values.data(), values.size()) {}

  const int64_t* begin() const { return data_; }
  const int64_t* end() const { return data_ + size_; }
  const int64_t* data() const { return data_; }
  size_t size() const { return size_; }
  int64_t operator[](size_t i) const { return data_[i]; }

 private:
  const int64_t* data_;
  size_t size_;
};
inline bool same(IntView a, IntView b) { return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()); }

class Scratch;

inline constexpr size_t kMaxRank = 16;  // of tensors that ops make

/// A tensor: one of torch's, by an owned handle, or one in a Scratch. Its metadata is asked for once, when it is made.
/// Move-only, and moving is free; borrow() makes a second one, which must not outlive the first.
class Tensor {
 public:
  explicit Tensor(AtenTensorOpaque* owned) : Tensor(owned, nullptr) {  // delegates, so that an error below still frees the handle
    int64_t *sizes, *strides;
    PROBQUANT_TORCH_CHECK(aoti_torch_get_data_ptr(owned, &data_));
    PROBQUANT_TORCH_CHECK(aoti_torch_get_dim(owned, &rank_));
    PROBQUANT_TORCH_CHECK(aoti_torch_get_sizes(owned, &sizes));
    PROBQUANT_TORCH_CHECK(aoti_torch_get_strides(owned, &strides));
    PROBQUANT_TORCH_CHECK(aoti_torch_get_dtype(owned, &dtype_));
    PROBQUANT_TORCH_CHECK(aoti_torch_get_device_type(owned, &device_type_));
    PROBQUANT_TORCH_CHECK(aoti_torch_get_device_index(owned, &device_index_));
    sizes_ = sizes, strides_ = strides;
  }
  Tensor(Tensor&& other) noexcept : Tensor(static_cast<const Tensor&>(other)) { other.handle_ = nullptr; }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    copy_view(other);
    return *this;
  }
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  Tensor borrow() const {
    Tensor view(*this);
    view.handle_ = nullptr;
    return view;
  }
  /// The handle, given away: of a tensor that is torch's.
  AtenTensorOpaque* release() {
    if (handle_ == nullptr || scratch_ != nullptr) throw Error("a tensor that is not torch's cannot be given to it");
    return std::exchange(handle_, nullptr);
  }
  Scratch* scratch() const { return scratch_; }

  /// The first element, unchecked: T must fit dtype().
  template <class T = void>
  T* data() const {
    return static_cast<T*>(data_);
  }
  int64_t dim() const { return rank_; }
  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes()) count *= size;
    return count;
  }
  /// Valid while the tensor lives and keeps its shape.
  IntView sizes() const { return {sizes_, static_cast<size_t>(rank_)}; }
  IntView strides() const { return {strides_, static_cast<size_t>(rank_)}; }
  /// Size of dimension i; a negative i counts from the end. Out of range is an error.
  int64_t size(int64_t i) const {
    const int64_t wrapped = i < 0 ? i + rank_ : i;
    if (wrapped < 0 || wrapped >= rank_) {
      throw Error("dimension " + std::to_string(i) + " of a tensor with " + std::to_string(rank_) + " dimensions");
    }
    return sizes_[wrapped];
  }
  int32_t dtype() const { return dtype_; }
  int32_t device_type() const { return device_type_; }
  int32_t device_index() const { return device_index_; }
  /// Whether the elements lie without gaps in the order of the dimensions; what has no elements does.
  bool is_contiguous() const {
    bool dense = true;
    int64_t count = 1;
    for (int64_t i = rank_; i-- > 0;) {
      dense = dense && (sizes_[i] == 1 || strides_[i] == count);
      count *= sizes_[i];
    }
    return dense || count == 0;
  }

 private:
  friend class Scratch;
  Tensor(AtenTensorOpaque* owned, Scratch* scratch) noexcept : handle_(owned), data_(nullptr), scratch_(scratch) {}
  Tensor(const Tensor& other) noexcept : handle_(other.handle_) { copy_view(other); }
  void copy_view(const Tensor& other) noexcept {
    data_ = other.data_, scratch_ = other.scratch_, sizes_ = other.sizes_, strides_ = other.strides_, rank_ = other.rank_;
    dtype_ = other.dtype_, device_type_ = other.device_type_, device_index_ = other.device_index_;
  }

  AtenTensorOpaque* handle_;  // null: borrowed, or in a chunk of the scratch
  void* data_;
  Scratch* scratch_;
  const int64_t *sizes_, *strides_;
  int64_t rank_;
  int32_t dtype_, device_type_, device_index_;
};

/// Tensors on the CPU that no one outside of an op sees. Small ones and all metadata lie in chunks that go with the Scratch, larger
/// ones in memory of torch's that goes with the tensor, so that torch's profiler sees what an op takes. What is made `like` a
/// tensor of the scratch lies there, too.
class Scratch {
 public:
  explicit Scratch(const Tensor& like) : like_(like.borrow()) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  /// Another view of a tensor, whose likes are in this scratch.
  Tensor adopt(const Tensor& t) {
    Tensor view = t.borrow();
    view.scratch_ = this;
    return view;
  }
  /// Of a tensor's first dimension the elements [begin, begin + count), which must be there, as a view of it.
  Tensor narrow(const Tensor& t, int64_t begin, int64_t count);
  /// While true, new tensors are torch's.
  void set_outside(bool outside) { outside_ = outside; }
  /// Until withdraw(), the first new tensor that is shaped like t takes its memory; t stays a view of it.
  void offer(Tensor&& t) { offered_.emplace(std::move(t)); }
  void withdraw() { offered_.reset(); }

  Tensor empty_strided(IntView sizes, IntView strides, int32_t dtype);

 private:
  static constexpr size_t kAlignment = 64, kSmall = 1024, kChunk = 4096;

  char* allocate(size_t bytes);
  void set_geometry(Tensor& t, IntView sizes, IntView strides);

  Tensor like_;
  std::vector<Tensor> chunks_;
  size_t used_ = 0;
  bool outside_ = false;
  std::optional<Tensor> offered_;
};

inline Tensor torch_empty_strided(IntView sizes, IntView strides, int32_t dtype, const Tensor& like) {
  AtenTensorOpaque* handle;
  PROBQUANT_TORCH_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                                 like.device_type(), like.device_index(), &handle));
  return Tensor(handle);
}

/// An uninitialised tensor on the device of `like`, and in its scratch.
inline Tensor empty_strided(IntView sizes, IntView strides, int32_t dtype, const Tensor& like) {
  if (sizes.size() != strides.size()) throw Error("empty_strided wants as many strides as sizes");
  return like.scratch() != nullptr ? like.scratch()->empty_strided(sizes, strides, dtype) : torch_empty_strided(sizes, strides, dtype, like);
}

/// The same, contiguous.
inline Tensor empty(IntView sizes, int32_t dtype, const Tensor& like) {
  if (sizes.size() > kMaxRank) throw Error("a tensor of more than 16 dimensions");
  int64_t strides[kMaxRank];
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return empty_strided(sizes, {strides, sizes.size()}, dtype, like);
}

inline char* Scratch::allocate(size_t bytes) {
  if (chunks_.empty() || used_ + bytes > kChunk) {
    chunks_.push_back(torch_empty_strided({static_cast<int64_t>(kChunk)}, {1}, codes().uint8, like_));
    used_ = 0;
  }
  char* result = chunks_.back().data<char>() + used_;
  used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return result;
}

inline void Scratch::set_geometry(Tensor& t, IntView sizes, IntView strides) {
  auto* numbers = reinterpret_cast<int64_t*>(allocate(2 * sizes.size() * sizeof(int64_t)));
  std::copy(sizes.begin(), sizes.end(), numbers);
  std::copy(strides.begin(), strides.end(), numbers + sizes.size());
  t.sizes_ = numbers, t.strides_ = numbers + sizes.size();
  t.rank_ = static_cast<int64_t>(sizes.size());
}

inline Tensor Scratch::narrow(const Tensor& t, int64_t begin, int64_t count) {
  if (t.dim() == 0 || static_cast<size_t>(t.dim()) > kMaxRank || begin < 0 || count < 0 || begin > t.size(0) || count > t.size(0) - begin) {
    throw Error("a tensor has not the images " + std::to_string(begin) + " to " + std::to_string(begin + count));
  }
  int64_t sizes[kMaxRank];
  std::copy(t.sizes().begin(), t.sizes().end(), sizes);
  sizes[0] = count;
  Tensor view = adopt(t);
  set_geometry(view, {sizes, t.sizes().size()}, t.strides());
  view.data_ = t.data<char>() + static_cast<size_t>(begin * t.strides()[0]) * codes().item_bytes(t.dtype());
  return view;
}

inline Tensor Scratch::empty_strided(IntView sizes, IntView strides, int32_t dtype) {
  if (outside_) return torch_empty_strided(sizes, strides, dtype, like_);
  if (offered_ && offered_->handle_ != nullptr && offered_->dtype_ == dtype && same(offered_->sizes(), sizes) && same(offered_->strides(), strides)) {
    Tensor t = std::move(*offered_);
    offered_.reset();
    return t;
  }
  if (sizes.size() > kMaxRank) throw Error("a tensor of more than 16 dimensions");
  size_t elements = 1;  // as far as the last one; no stride is below what makes the sizes dense
  bool overflow = false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    size_t step;
    overflow |= __builtin_mul_overflow(static_cast<size_t>(sizes[i] - 1), static_cast<size_t>(strides[i]), &step);
    overflow |= __builtin_add_overflow(elements, step, &elements);
  }
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) {
    elements = 0;
  } else if (overflow || elements > size_t{1} << 48) {
    throw Error("a tensor of more than 2^48 elements");
  }
  const size_t bytes = elements * codes().item_bytes(dtype);
  Tensor t = like_.borrow();
  set_geometry(t, sizes, strides);
  if (bytes <= kSmall) {
    t.data_ = allocate(bytes);
  } else {
    Tensor memory = torch_empty_strided({static_cast<int64_t>(bytes)}, {1}, codes().uint8, like_);
    t.data_ = memory.data();
    t.handle_ = memory.release();
  }
  t.scratch_ = this;
  t.dtype_ = dtype;
  return t;
}

// ---------------------------------------------------------------------------------------------------------------------
// The boxed stack

/// Converts one slot. take() consumes what the slot owns, give() makes a slot that owns its value.
template <class T>
struct Convert {
  static_assert(std::is_arithmetic_v<T>, "no conversion for this argument type");
  static T take(Slot slot) {
    T value;
    std::memcpy(&value, &slot, sizeof value);  // little-endian, as every platform of this library
    return value;
  }
  static Slot give(T value) {
    Slot slot = 0;
    std::memcpy(&slot, &value, sizeof value);
    return slot;
  }
};

template <>
struct Convert<Tensor> {
  static Tensor take(Slot slot) { return Tensor(reinterpret_cast<AtenTensorOpaque*>(slot)); }
  static Slot give(Tensor&& tensor) { return reinterpret_cast<Slot>(tensor.release()); }
};

template <class T>
struct Convert<std::optional<T>> {
  static std::optional<T> take(Slot slot) {
    const std::unique_ptr<Slot> inner(reinterpret_cast<Slot*>(slot));  // from new, in this ABI version
    if (inner == nullptr) return std::nullopt;
    return Convert<T>::take(*inner);
  }
};

template <class T>
struct Convert<std::vector<T>> {
  static std::vector<T> take(Slot slot) {
    struct Free {
      void operator()(StableListOpaque* list) const { torch_delete_list(list); }
    };
    const std::unique_ptr<StableListOpaque, Free> list(reinterpret_cast<StableListOpaque*>(slot));
    size_t size;
    PROBQUANT_TORCH_CHECK(torch_list_size(list.get(), &size));
    std::vector<T> result;
    result.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      Slot item;
      PROBQUANT_TORCH_CHECK(torch_list_get_item(list.get(), i, &item));
      result.push_back(Convert<T>::take(item));
    }
    return result;
  }
  static Slot give(std::vector<T>&& values) {
    StableListOpaque* list;
    PROBQUANT_TORCH_CHECK(torch_new_list_reserve_size(values.size(), &list));
    for (T& value : values) PROBQUANT_TORCH_CHECK(torch_list_push_back(list, Convert<T>::give(std::move(value))));
    return reinterpret_cast<Slot>(list);
  }
};

template <>
struct Convert<std::string> {
  static std::string take(Slot slot) {
    struct Free {
      void operator()(StringOpaque* string) const { torch_delete_string(string); }
    };
    const std::unique_ptr<StringOpaque, Free> string(reinterpret_cast<StringOpaque*>(slot));
    size_t length;
    const char* characters;
    PROBQUANT_TORCH_CHECK(torch_string_length(string.get(), &length));
    PROBQUANT_TORCH_CHECK(torch_string_c_str(string.get(), &characters));
    return {characters, length};
  }
};

/// Calls a kernel with arguments from a source, whose take<T>() gives the next one, of type T.
template <auto Kernel>
struct Call;

template <class R, class... Arguments, R (*Kernel)(Arguments...)>
struct Call<Kernel> {
  using Result = R;
  static constexpr uint64_t kArguments = sizeof...(Arguments);

  template <class Source>
  static Result with(Source& source) {
    return with(source, std::index_sequence_for<Arguments...>());
  }

 private:
  template <class T>
  using Held = std::remove_cv_t<std::remove_reference_t<T>>;

  template <class Source, size_t... I>
  static Result with(Source& source, std::index_sequence<I...>) {
    std::tuple<Held<Arguments>...> arguments{source.template take<Held<Arguments>>()...};  // braces: in order
    return Kernel(static_cast<Arguments&&>(std::get<I>(arguments))...);
  }
};

/// The boxed stack as a source of arguments.
struct StackSource {
  Slot* next;

  template <class T>
  T take() {
    return Convert<T>::take(*next++);
  }
};

/// Boxed<&kernel>::call is `kernel` in torch's calling convention. Schema type and C++ type of an argument:
///   Tensor  const Tensor&          Tensor?  const std::optional<Tensor>&     Tensor[]  const std::vector<Tensor>&
///   int     int64_t                float    double                           bool      bool
///   int[]   const std::vector<int64_t>&                 ScalarType  int32_t (see Codes)      str  const std::string&
/// and optionals of these. It returns a Tensor, a std::tuple or a std::vector of them, or a number.
template <auto Kernel>
struct Boxed {
  static void call(Slot* stack, uint64_t argument_count, uint64_t result_count) {
    using Result = typename Call<Kernel>::Result;
    if (argument_count != Call<Kernel>::kArguments || result_count != Results<Result>::count) {
      throw Error("an op's schema and its kernel differ: " + std::to_string(argument_count) + " and " +
                  std::to_string(Call<Kernel>::kArguments) + " arguments, " + std::to_string(result_count) + " and " +
                  std::to_string(Results<Result>::count) + " results");
    }
    StackSource arguments{stack};
    Results<Result>::give(stack, Call<Kernel>::with(arguments));
  }

 private:
  template <class T>
  struct Results {
    static constexpr uint64_t count = 1;
    static void give(Slot* stack, T&& result) { stack[0] = Convert<T>::give(std::move(result)); }
  };
  template <class... T>
  struct Results<std::tuple<T...>> {
    static constexpr uint64_t count = sizeof...(T);
    static void give(Slot* stack, std::tuple<T...>&& results) {
      std::apply([stack](T&... result) mutable { ((*stack++ = Convert<T>::give(std::move(result))), ...); }, results);
    }
  };
};

// ---------------------------------------------------------------------------------------------------------------------
// Registration

/// Schemas of a namespace, or its kernels for one dispatch key. What is registered stays so until the process ends.
class Library {
 public:
  static Library fragment(const char* name_space) {
    Library library;
    PROBQUANT_TORCH_CHECK(aoti_torch_library_init_fragment(name_space, __FILE__, __LINE__, &library.handle_));
    return library;
  }
  static Library kernels(const char* name_space, const char* dispatch_key) {
    Library library;
    PROBQUANT_TORCH_CHECK(aoti_torch_library_init_impl(name_space, dispatch_key, __FILE__, __LINE__, &library.handle_));
    return library;
  }
  void define(const char* schema) const { PROBQUANT_TORCH_CHECK(aoti_torch_library_def(handle_, schema)); }
  template <auto Kernel>
  void implement(const char* op) const {
    PROBQUANT_TORCH_CHECK(torch_library_impl(handle_, op, &Boxed<Kernel>::call, kAbiVersion));
  }

 private:
  TorchLibraryOpaque* handle_ = nullptr;
};

/// Runs `register_ops` when the library is loaded: a file-scope object of the op library. A failure is printed, since an
/// exception could only end the process there; the ops are then missing.
struct RegisterAtLoad {
  explicit RegisterAtLoad(void (*register_ops)()) noexcept {
    try {
      if (aoti_torch_abi_version() < kAbiVersion) throw Error("torch >= 2.10 is wanted");
      register_ops();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: torch.ops.probquant stays empty\n", error.what());
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Threads and devices

/// One parallel_for on torch's pool. An exception of the body must not cross the C ABI: the first one is kept and thrown
/// again in the caller; ranges that start after it are skipped.
class ParallelCall {
 public:
  /// Whether this thread runs a body.
  static bool& inside() {
    thread_local bool of_thread = false;
    return of_thread;
  }
  static void run(int64_t count, void (*body)(void*, int64_t, int64_t), void* argument) {
    ParallelCall call{body, argument};
    PROBQUANT_TORCH_CHECK(torch_parallel_for(0, count, 1, &ParallelCall::range, &call));
    if (call.error_) std::rethrow_exception(call.error_);
  }

 private:
  ParallelCall(void (*body)(void*, int64_t, int64_t), void* argument) : body_(body), argument_(argument) {}

  static void range(int64_t begin, int64_t end, void* self) noexcept {
    auto& call = *static_cast<ParallelCall*>(self);
    if (call.failed_.load(std::memory_order_relaxed)) return;
    const bool was_inside = std::exchange(inside(), true);
    try {
      call.body_(call.argument_, begin, end);
    } catch (...) {
      if (!call.failed_.exchange(true)) call.error_ = std::current_exception();
    }
    inside() = was_inside;
  }

  void (*body_)(void*, int64_t, int64_t);
  void* argument_;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

/// torch's thread pool, as many threads as torch.get_num_threads() says now. Inside a body the work runs in its thread, undivided.
inline Executor torch_executor() {
  if (ParallelCall::inside()) return serial_executor();
  uint32_t threads;
  PROBQUANT_TORCH_CHECK(torch_get_num_threads(&threads));
  const auto parallel_for = [](void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* argument) {
    ParallelCall::run(count, body, argument);
  };
  return {parallel_for, nullptr, static_cast<int>(threads)};
}

/// Makes a CUDA device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device_index) {
    PROBQUANT_TORCH_CHECK(aoti_torch_create_device_guard(device_index, &guard_));
  }
  ~DeviceGuard() { aoti_torch_delete_device_guard(guard_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  DeviceGuardOpaque* guard_;
};

/// torch's current stream of a CUDA device: a cudaStream_t.
inline void* current_cuda_stream(int32_t device_index) {
#define PROBQUANT_POINTER(result, name, parameters) using CurrentStream = result(*) parameters;
  PROBQUANT_TORCH_CUDA_SYMBOLS(PROBQUANT_POINTER)
#undef PROBQUANT_POINTER
  static const auto ask = []() -> CurrentStream {
    constexpr const char* name = "aoti_torch_get_current_cuda_stream";
    void* symbol = dlsym(RTLD_DEFAULT, name);
    if (symbol == nullptr) {
      if (void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) symbol = dlsym(torch_cuda, name);
    }
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  if (ask == nullptr) throw Error("this torch was built without CUDA");
  void* stream;
  PROBQUANT_TORCH_CHECK(ask(device_index, &stream));
  return stream;
}

}  // namespace probquant::stable
