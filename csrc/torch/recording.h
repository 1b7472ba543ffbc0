// Replays a recording: the ops of a network in one call. Between them there is no Python, no dispatcher and, but for what leaves the
// recording, no tensor of torch's, which is what a small layer's call otherwise costs: ten times its checks and its predictions.
// Every op is the one that torch.ops.probquant would have called, with the same checks.
//
// A recording is an int64 tensor, which probquant/recording.py writes:
//   number of op names, then each as its length and characters
//   number of results, then each as the number of a value
//   ops to the end, each: its name's number, whether its results leave the recording, the packed weight that a layer reads behind it or -1,
//   its arguments in the order of the schema, the number of values that no one reads any more, and these
// Values are numbered: the inputs, the constants, then the results of every op in turn. Arguments are written as
//   Tensor    a value                   Tensor?   a value or -1               Tensor[], int[]   a length, then the elements
//   int, bool itself                    float     the bits of a double        float?            0, or 1 and the float
// Anything else is an error, as is a number that names nothing: a damaged recording cannot do harm.
#pragma once
#include <probquant/ops.h>

#include <unordered_map>

#include "checks.h"

namespace probquant::ops {

class Replay {
 public:
  Replay(const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants, const Tensor& recording)
      : next_(recording.data<const int64_t>()), end_(next_ + recording.numel()), scratch_(recording) {
    values_.reserve(inputs.size() + constants.size() + static_cast<size_t>(recording.numel()) / 8);
    for (const auto* given : {&inputs, &constants})
      for (const Tensor& t : *given) values_.emplace_back(scratch_.adopt(t));
  }

  ~Replay() { upcoming() = {}; }

  bool done() const { return next_ == end_; }

  /// Of the op that runs, in this thread.
  static Upcoming& upcoming() {
    thread_local Upcoming of_thread;
    return of_thread;
  }

  int64_t integer() {
    require(next_ != end_, "run: the recording ends within an op");
    return *next_++;
  }
  /// A number from 0 to below `limit`.
  size_t index(size_t limit, const char* of) {
    const int64_t i = integer();
    require(i >= 0 && static_cast<uint64_t>(i) < limit, "run: the recording names ", of, " ", i, " of ", limit);
    return static_cast<size_t>(i);
  }
  /// How many of something follow: no more than there are numbers left.
  size_t length() { return index(static_cast<size_t>(end_ - next_) + 1, "a length"); }
  std::string text() {
    std::string result(length(), ' ');
    for (char& c : result) {
      const int64_t code = integer();
      require(code > 32 && code < 127, "run: the recording's op names are not text");
      c = static_cast<char>(code);
    }
    return result;
  }

  /// The next argument (Call's source).
  template <class T>
  T take() {
    if constexpr (std::is_same_v<T, Tensor>) {
      const size_t i = index(values_.size(), "value");
      require(values_[i].has_value(), "run: the recording reads value ", i, " after its last use");
      return values_[i]->borrow();
    } else if constexpr (std::is_same_v<T, double>) {
      return bits<double>(integer());
    } else if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(integer());
    } else {
      return take_into(static_cast<T*>(nullptr));
    }
  }

  void begin() {
    leaves_ = integer() != 0;
    scratch_.set_outside(leaves_);
    const auto weight = take<std::optional<Tensor>>();
    upcoming() = weight ? Upcoming{weight->data(), weight->numel()} : Upcoming{};
  }
  void add_result(Tensor&& t) {
    if (!leaves_) {
      values_.emplace_back(std::move(t));
      return;
    }
    values_.emplace_back(scratch_.adopt(t));
    leaving_.emplace(values_.size() - 1, std::move(t));
  }
  template <class... T>
  void add_result(std::tuple<T...>&& results) {
    std::apply([this](T&... t) { (add_result(std::move(t)), ...); }, results);
  }
  void end() {
    for (size_t n = length(); n > 0; --n) values_[index(values_.size(), "value")].reset();
  }

  std::vector<Tensor> results(const std::vector<int64_t>& wanted) {
    std::vector<Tensor> found;
    for (const int64_t i : wanted) {
      const auto at = leaving_.find(static_cast<size_t>(i));
      require(at != leaving_.end(), "run: the recording returns value ", i, ", which does not leave it, or twice");
      found.push_back(std::move(at->second));
      leaving_.erase(at);
    }
    return found;
  }

 private:
  template <class T>
  static T bits(int64_t from) {
    T value;
    std::memcpy(&value, &from, sizeof value);
    return value;
  }
  std::optional<Tensor> take_into(std::optional<Tensor>*) {
    if (done() || *next_ != -1) return take<Tensor>();
    ++next_;
    return std::nullopt;
  }
  template <class T>
  std::optional<T> take_into(std::optional<T>*) {
    if (index(2, "an optional of kind") == 0) return std::nullopt;
    return take<T>();
  }
  template <class T>
  std::vector<T> take_into(std::vector<T>*) {
    std::vector<T> result;
    const size_t size = length();
    result.reserve(size);
    for (size_t i = 0; i < size; ++i) result.push_back(take<T>());
    return result;
  }

  const int64_t *next_, *end_;
  stable::Scratch scratch_;
  std::vector<std::optional<Tensor>> values_;
  std::unordered_map<size_t, Tensor> leaving_;
  bool leaves_ = false;
};

using RecordedOp = void (*)(Replay&);

template <auto Kernel>
void replay_op(Replay& replay) {
  replay.add_result(stable::Call<Kernel>::with(replay));
}

inline std::vector<Tensor> replay(const std::unordered_map<std::string, RecordedOp>& ops, const std::vector<Tensor>& inputs,
                                  const std::vector<Tensor>& constants, const Tensor& recording) {
  check_device_and_dtype({"run", "recording"}, recording, device_of(recording), stable::codes().int64);
  require(recording.dim() == 1 && recording.is_contiguous(), "run: recording has shape ", text(recording.sizes()), ", want one contiguous dimension");
  Replay replay(inputs, constants, recording);
  std::vector<RecordedOp> named(replay.length());
  for (RecordedOp& op : named) {
    const std::string name = replay.text();
    const auto found = ops.find(name);
    require(found != ops.end(), "run: the recording has an op ", name, ", which there is not");
    op = found->second;
  }
  const auto wanted = replay.take<std::vector<int64_t>>();
  while (!replay.done()) {
    const RecordedOp op = named[replay.index(named.size(), "op")];
    replay.begin();
    op(replay);
    replay.end();
  }
  return replay.results(wanted);
}

}  // namespace probquant::ops
