// The least that a call of torch.ops.probquant.conv2d can cost: an op of the same schema in the same calling convention that frees its
// arguments and returns four of them. What remains is Python, torch's dispatcher, and the conversion of each argument for the stable ABI.
#include "../csrc/torch/layer_ops.h"
#include "../csrc/torch/schemas.h"

namespace probquant {

Error::Error(const std::string& message) : std::runtime_error(message) {}
Error::~Error() = default;

namespace {

using stable::Slot;

template <class T>
struct Free {
  static void slot(Slot) {}
};
template <>
struct Free<stable::Tensor> {
  static void slot(Slot slot) { aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorOpaque*>(slot)); }
};
template <class T>
struct Free<std::optional<T>> {
  static void slot(Slot slot) {
    const std::unique_ptr<Slot> inner(reinterpret_cast<Slot*>(slot));
    if (inner) Free<T>::slot(*inner);
  }
};
template <class T>
struct Free<std::vector<T>> {
  static void slot(Slot slot) { torch_delete_list(reinterpret_cast<StableListOpaque*>(slot)); }
};

/// Returns its first four arguments, which are tensors.
template <class R, class... Arguments>
void call(R (*)(Arguments...), Slot* stack) {
  Slot* next = stack;
  (..., (next - stack < 4 ? void(++next) : Free<std::remove_cv_t<std::remove_reference_t<Arguments>>>::slot(*next++)));
}

struct NoBackend {};

void conv2d(Slot* stack, uint64_t, uint64_t) { call(static_cast<decltype(&ops::conv2d<NoBackend>)>(nullptr), stack); }

const stable::RegisterAtLoad register_at_load{[] {
  const auto library = stable::Library::fragment("probquant_floor");
  for (const char* schema : kSchemas)
    if (std::string_view(schema).substr(0, 7) == "conv2d(") library.define(schema);
  TorchLibraryOpaque* kernels;
  PROBQUANT_TORCH_CHECK(aoti_torch_library_init_impl("probquant_floor", "CPU", __FILE__, __LINE__, &kernels));
  PROBQUANT_TORCH_CHECK(torch_library_impl(kernels, "conv2d", &conv2d, stable::kAbiVersion));
}};

}  // namespace
}  // namespace probquant
