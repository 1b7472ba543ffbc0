// Argument checks of the ops: shape, dtype, device, strides of every tensor against each other. Metadata only: no value is
// read. Each error names the op, the argument, its value and what was wanted.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "../core/front_end.h"
#include "stable_abi.h"

namespace probquant::ops {

using stable::IntView;
using stable::same;
using stable::Tensor;

/// A part of an error's message: [1, 2, 3], written when the error is.
inline auto text(IntView values) {
  return [values] {
    std::string result = "[";
    for (size_t i = 0; i < values.size(); ++i) result += (i ? ", " : "") + std::to_string(values[i]);
    return result + "]";
  };
}

inline const char* dtype_name(int32_t dtype) {
  const stable::Codes& c = stable::codes();
  return dtype == c.uint8      ? "uint8"
         : dtype == c.int8     ? "int8"
         : dtype == c.int32    ? "int32"
         : dtype == c.int64    ? "int64"
         : dtype == c.float16  ? "float16"
         : dtype == c.bfloat16 ? "bfloat16"
         : dtype == c.float32  ? "float32"
         : dtype == c.float64  ? "float64"
         : dtype == c.boolean  ? "bool"
                               : "another dtype";
}

/// Dense in the given order of dimensions (outermost first); the stride of a dimension of size 1 means nothing.
inline bool is_dense(const Tensor& t, std::initializer_list<size_t> order) {
  int64_t wanted = 1;
  const IntView sizes = t.sizes(), strides = t.strides();
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return true;
  for (auto i = order.end(); i != order.begin();) {
    --i;
    if (sizes[*i] != 1 && strides[*i] != wanted) return false;
    wanted *= sizes[*i];
  }
  return true;
}
inline bool is_channels_last(const Tensor& t) { return is_dense(t, {0, 2, 3, 1}); }

/// Names an argument of an op in errors: its name, or what belongs to it.
struct Argument {
  const char* op;
  const char* name;
  const char* suffix = "";
};

/// Where a tensor lies. All tensors of an op lie on one device.
struct Device {
  int32_t type, index;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};
inline Device device_of(const Tensor& t) { return {t.device_type(), t.device_index()}; }

inline void check_device_and_dtype(Argument a, const Tensor& t, Device device, int32_t dtype) {
  require(device_of(t) == device, a.op, ": ", a.name, a.suffix, " is on another device than the op's first argument");
  require(t.dtype() == dtype, a.op, ": ", a.name, a.suffix, " has dtype ", dtype_name(t.dtype()), ", want ", dtype_name(dtype));
}

/// A dense tensor of one shape.
inline void check_dense(Argument a, const Tensor& t, Device device, int32_t dtype, IntView sizes) {
  check_device_and_dtype(a, t, device, dtype);
  require(same(t.sizes(), sizes), a.op, ": ", a.name, a.suffix, " has shape ", text(t.sizes()), ", want ", text(sizes));
  require(t.is_contiguous(), a.op, ": ", a.name, a.suffix, " must be contiguous, has strides ", text(t.strides()));
}

/// Bounds of Activation::clamp; None is infinite.
struct Bounds {
  float lo, hi;
  Bounds(const char* op, std::optional<double> min, std::optional<double> max)
      : lo(min ? static_cast<float>(*min) : -kInfinity), hi(max ? static_cast<float>(*max) : kInfinity) {
    require(lo <= hi, op, ": activation_min ", lo, " must not be above activation_max ", hi);
  }
};

inline Strategy check_strategy(const char* op, int64_t strategy) {
  require(strategy >= 0 && strategy <= static_cast<int64_t>(Strategy::channel), op, ": strategy ", strategy,
          ", want 0 (none), 1 (fixed), 2 (dynamic), 3 (gaussian), 4 (gaussian_channel), 5 (probe) or 6 (channel)");
  return static_cast<Strategy>(strategy);
}

inline Activation check_activation(const char* op, int64_t activation) {
  require(activation >= 0 && activation <= static_cast<int64_t>(Activation::sigmoid), op, ": activation ", activation,
          ", want 0 (clamp), 1 (silu), 2 (gelu), 3 (hardswish) or 4 (sigmoid)");
  return static_cast<Activation>(activation);
}

/// Below the core's limit, so that no size computed from them overflows.
inline void check_extents(Argument a, const std::vector<int64_t>& v) {
  for (const int64_t value : v) require(value <= kMaxExtent, a.op, ": ", a.name, " ", text(v), ", want at most ", kMaxExtent);
}

/// [height, width], or one value for both.
struct Pair {
  int64_t height, width;
  Pair(Argument a, const std::vector<int64_t>& v) : height(0), width(0) {
    require(v.size() == 1 || v.size() == 2, a.op, ": ", a.name, " ", text(v), ", want one or two values");
    check_extents(a, v);
    height = v.front();
    width = v.back();
  }
};

/// [top, bottom, left, right], [height, width], or one value for all.
struct Padding {
  int64_t top, bottom, left, right;
  Padding(const char* op, const std::vector<int64_t>& v) : top(0), bottom(0), left(0), right(0) {
    require(v.size() == 1 || v.size() == 2 || v.size() == 4, op, ": padding ", text(v), ", want one, two or four values");
    check_extents({op, "padding"}, v);
    top = v[0];
    bottom = v[v.size() == 4 ? 1 : 0];
    left = v[v.size() == 4 ? 2 : v.size() - 1];
    right = v.back();
  }
};

}  // namespace probquant::ops
