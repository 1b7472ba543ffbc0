// Owns the Python module probquant._native: what needs no tensor. Ops on tensors are in csrc/torch.
#include <probquant/cuda.h>
#include <probquant/info.h>
#include <probquant/ops.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

namespace py = pybind11;

namespace {

py::dict build_info() {
  const probquant::BuildInfo info = probquant::build_info();
  py::dict result;
  result["version"] = info.version;
  result["cuda"] = info.cuda;
  result["cuda_archs"] = info.cuda_archs;
  result["cuda_compiler"] = info.cuda_compiler;
  result["compiler"] = info.compiler;
  result["build_type"] = info.build_type;
  result["isas"] = info.isas;
  return result;
}

py::dict cpu_info() {
  const probquant::CpuInfo info = probquant::cpu_info();
  py::dict features;
  for (const auto& [name, present] : info.features) features[py::str(name)] = present;
  py::dict result;
  result["model"] = info.model;
  result["isa_detected"] = info.isa_detected;
  result["isa_compiled"] = info.isa_compiled;
  result["isa_used"] = info.isa_used;
  result["features"] = features;
  return result;
}

/// Whether every dictionary still holds this value, the same object, by this name. Nothing else of the values is looked at. Where a network's weights
/// went through the caches since the last time, dictionaries take the time that memory does: they are fetched some ahead, and then their tables.
bool are_held(const py::tuple& holders, const py::tuple& names, const py::tuple& values) {
  constexpr Py_ssize_t kAhead = 8;
  const Py_ssize_t count = PyTuple_GET_SIZE(holders.ptr());
  if (PyTuple_GET_SIZE(names.ptr()) != count || PyTuple_GET_SIZE(values.ptr()) != count) throw py::value_error("want as many names and values as holders");
  const auto dictionary = [&](Py_ssize_t i) { return reinterpret_cast<PyDictObject*>(PyTuple_GET_ITEM(holders.ptr(), i)); };
  for (Py_ssize_t i = 0; i < std::min(2 * kAhead, count); ++i) __builtin_prefetch(dictionary(i));
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (i + 2 * kAhead < count) __builtin_prefetch(dictionary(i + 2 * kAhead));
    if (i + kAhead < count) {
      const char* table = reinterpret_cast<const char*>(dictionary(i + kAhead)->ma_keys);
      __builtin_prefetch(table), __builtin_prefetch(table + 64);
    }
    if (PyDict_GetItemWithError(PyTuple_GET_ITEM(holders.ptr(), i), PyTuple_GET_ITEM(names.ptr(), i)) == PyTuple_GET_ITEM(values.ptr(), i)) continue;
    if (PyErr_Occurred()) throw py::error_already_set();
    return false;
  }
  return true;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Build and CPU information of probquant's native code.";
  module.def("build_info", &build_info, "What this build contains: version, compilers, CUDA, CPU kernel families.");
  module.def("cpu_info", &cpu_info, "This processor's features, and the kernel family that is used.");
  module.def(
      "packed_weight_bytes",
      [](int64_t out_channels, int64_t kernel_height, int64_t kernel_width, int64_t in_channels_per_group, int64_t groups, bool cuda) {
        const probquant::WeightShape shape{out_channels, kernel_height, kernel_width, in_channels_per_group, groups};
        return cuda ? probquant::cuda::packed_weight_bytes(shape) : probquant::packed_weight_bytes(shape);
      },
      py::arg("out_channels"), py::arg("kernel_height"), py::arg("kernel_width"), py::arg("in_channels_per_group"), py::arg("groups"),
      py::arg("cuda") = false, "Bytes that torch.ops.probquant.pack_weight returns for a weight of these sizes, on the CPU or on CUDA.");
  module.def("probe_rows", &probquant::probe_rows, py::arg("rows"),
             "Output positions [(begin, end), ...] of a sample that the probe strategy computes first, out of `rows`.");
  module.def("are_held", &are_held, py::arg("holders"), py::arg("names"), py::arg("values"),
             "Whether each of the dictionaries `holders` still has, by its name, the very object of `values`.");
}
