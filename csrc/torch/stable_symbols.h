// Owns the list of LibTorch C functions that probquant calls: the subset of torch's stable C ABI, all of it present
// since torch 2.10. No torch header is included anywhere; tests/test_stable_abi.py holds each line below against the
// headers of the installed torch. Three readers: stable_abi.h (declarations), libtorch_cpu_stub.cpp (names to link
// against) and that test.
#pragma once
#include <cstddef>
#include <cstdint>

struct AtenTensorOpaque;
class TorchLibraryOpaque;
struct StableListOpaque;
struct StringOpaque;
struct DeviceGuardOpaque;

// X(return type, name, parameters). Functions return 0 for success unless they return a code or a version.

/// In libtorch_cpu.so, linked.
#define PROBQUANT_TORCH_SYMBOLS(X)                                                                                     \
  X(uint64_t, aoti_torch_abi_version, ())                                                                              \
  X(int32_t, aoti_torch_library_init_fragment, (const char*, const char*, uint32_t, TorchLibraryOpaque**))             \
  X(int32_t, aoti_torch_library_init_impl, (const char*, const char*, const char*, uint32_t, TorchLibraryOpaque**))    \
  X(int32_t, aoti_torch_library_def, (TorchLibraryOpaque*, const char*))                                               \
  X(int32_t, torch_library_impl,                                                                                       \
    (TorchLibraryOpaque*, const char*, void (*)(uint64_t*, uint64_t, uint64_t), uint64_t))                             \
  X(int32_t, aoti_torch_delete_tensor_object, (AtenTensorOpaque*))                                                     \
  X(int32_t, aoti_torch_empty_strided,                                                                                 \
    (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, AtenTensorOpaque**))                          \
  X(int32_t, aoti_torch_get_data_ptr, (AtenTensorOpaque*, void**))                                                     \
  X(int32_t, aoti_torch_get_dim, (AtenTensorOpaque*, int64_t*))                                                        \
  X(int32_t, aoti_torch_get_sizes, (AtenTensorOpaque*, int64_t**))                                                     \
  X(int32_t, aoti_torch_get_strides, (AtenTensorOpaque*, int64_t**))                                                   \
  X(int32_t, aoti_torch_get_dtype, (AtenTensorOpaque*, int32_t*))                                                      \
  X(int32_t, aoti_torch_get_device_type, (AtenTensorOpaque*, int32_t*))                                                \
  X(int32_t, aoti_torch_get_device_index, (AtenTensorOpaque*, int32_t*))                                               \
  X(int32_t, aoti_torch_device_type_cpu, ())                                                                           \
  X(int32_t, aoti_torch_device_type_cuda, ())                                                                          \
  X(int32_t, aoti_torch_dtype_bool, ())                                                                                \
  X(int32_t, aoti_torch_dtype_uint8, ())                                                                               \
  X(int32_t, aoti_torch_dtype_int8, ())                                                                                \
  X(int32_t, aoti_torch_dtype_int32, ())                                                                               \
  X(int32_t, aoti_torch_dtype_int64, ())                                                                               \
  X(int32_t, aoti_torch_dtype_float16, ())                                                                             \
  X(int32_t, aoti_torch_dtype_bfloat16, ())                                                                            \
  X(int32_t, aoti_torch_dtype_float32, ())                                                                             \
  X(int32_t, aoti_torch_dtype_float64, ())                                                                             \
  X(int32_t, torch_new_list_reserve_size, (size_t, StableListOpaque**))                                                \
  X(int32_t, torch_list_push_back, (StableListOpaque*, uint64_t))                                                      \
  X(int32_t, torch_list_size, (StableListOpaque*, size_t*))                                                            \
  X(int32_t, torch_list_get_item, (StableListOpaque*, size_t, uint64_t*))                                              \
  X(int32_t, torch_delete_list, (StableListOpaque*))                                                                   \
  X(int32_t, torch_string_length, (StringOpaque*, size_t*))                                                            \
  X(int32_t, torch_string_c_str, (StringOpaque*, const char**))                                                        \
  X(int32_t, torch_delete_string, (StringOpaque*))                                                                     \
  X(int32_t, torch_parallel_for, (int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*))                \
  X(int32_t, torch_get_num_threads, (uint32_t*))                                                                       \
  X(int32_t, torch_get_thread_idx, (uint32_t*))                                                                        \
  X(int32_t, aoti_torch_create_device_guard, (int32_t, DeviceGuardOpaque**))                                           \
  X(int32_t, aoti_torch_delete_device_guard, (DeviceGuardOpaque*))

/// Looked up at run time: in libtorch_cuda.so, which a CPU-only torch lacks.
#define PROBQUANT_TORCH_CUDA_SYMBOLS(X) X(int32_t, aoti_torch_get_current_cuda_stream, (int32_t, void**))

/// Looked up at run time: since torch 2.13.
#define PROBQUANT_TORCH_2_13_SYMBOLS(X) X(const char*, torch_exception_get_what_without_backtrace, ())
