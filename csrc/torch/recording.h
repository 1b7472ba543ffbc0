// Replays a recording: the ops of a network in one call. Between them there is no Python, no dispatcher and, but for what leaves the
// recording, no tensor of torch's, which is what a small layer's call otherwise costs: ten times its checks and its predictions.
// Every op is the one that torch.ops.probquant would have called, with the same checks; but for flatten, which is torch's, and stands between the
// convolutions and the last layer of a network, where it would cut the recording in two.
//
// A recording is a text, so that traces and exported programs hold it as they hold any option, and Python's fake can read it. It stands for whole
// numbers (read_numbers below), which probquant/recording.py writes:
//   number of op names, then each as its length and characters
//   number of results, then each as the number of a value
//   bytes of the inputs for one image, number of ops, then for each: how many numbers it takes below, whether its results of an image depend on that
//   image alone, bytes that it reads and writes for one image, of activations that live on behind it for one image, and of its weights (stretches.h)
//   ops to the end, each: its name's number, whether its results leave the recording, the packed weight that a layer reads behind it or -1,
//   the residual whose memory its output takes or -1, its arguments in the order of the schema, the number of values that no one reads any more, and these
// Values are numbered: the inputs, the constants, then the results of every op in turn. Arguments are written as
//   Tensor    a value                   Tensor?   a value or -1               Tensor[], int[]   a length, then the elements
//   int, bool itself                    float     the bits of a double        float?            0, or 1 and the float
// Anything else is an error, as is a number that names nothing: a damaged recording cannot do harm.
//
// Whoever replays one often holds it with its constants first (HeldRecordings): a plain call of a QuantizedModel passes its inputs alone.
//
// A layer reads an element of its residual once, in front of writing the same of its output, and so does LayerNorm of its sum. Where no one else
// reads the residual, the output takes its place: a block of ResNet-50 then moves 0.8 MB less through an L2 of 2 MB.
//
// Images are what the first dimension of every input counts. A stretch of ops whose activations outgrow L2 together runs group of images by group of
// images: no result of an image depends on the others. What lives on behind the stretch is then put together.
#pragma once
#include <probquant/ops.h>

#include <array>
#include <mutex>
#include <string_view>
#include <unordered_map>

#include "checks.h"
#include "stretches.h"

namespace probquant::ops {

class Replay;
using RecordedOp = void (*)(Replay&);

/// The numbers that a recording's text stands for, as base64 variable-length quantities: five bits a character, the lowest first, +32 if another
/// character follows, of n << 1 for n >= 0 and else of ~(n << 1).
inline std::vector<int64_t> read_numbers(const std::string& recording) {
  static constexpr auto kValues = [] {
    constexpr std::string_view kAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::array<uint8_t, 256> values{};
    for (uint8_t& value : values) value = 0xFF;
    for (size_t i = 0; i < kAlphabet.size(); ++i) values[static_cast<uint8_t>(kAlphabet[i])] = static_cast<uint8_t>(i);
    return values;
  }();
  std::vector<int64_t> numbers;
  numbers.reserve(recording.size());
  uint64_t number = 0;
  unsigned shift = 0;
  for (const char c : recording) {
    const uint8_t value = kValues[static_cast<uint8_t>(c)];
    require(value < 64 && shift < 64 && (shift < 60 || value < 16), "run: behind ", numbers.size(), " numbers the recording has what is none");
    number |= static_cast<uint64_t>(value & 31) << shift;
    shift += 5;
    if (value >= 32) continue;
    numbers.push_back(static_cast<int64_t>((number >> 1) ^ (0 - (number & 1))));
    number = 0;
    shift = 0;
  }
  require(shift == 0, "run: the recording ends within a number");
  return numbers;
}

/// The numbers of a recording, or of a part of it, in order.
class Numbers {
 public:
  Numbers(const int64_t* begin, const int64_t* end) : next_(begin), end_(end) {}

  bool done() const { return next_ == end_; }
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
  /// The next so many, which are then behind.
  Numbers part(size_t count) {
    require(count <= static_cast<size_t>(end_ - next_), "run: the recording ends within an op");
    next_ += count;
    return {next_ - count, next_};
  }

 protected:
  const int64_t *next_, *end_;
};

/// Runs ops of a recording over the whole batch, or over a group of its images (see run_in_groups).
class Replay : public Numbers {
 public:
  Replay(const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants, const std::vector<int64_t>& recording)
      : Numbers(recording.data(), recording.data() + recording.size()),
        like_(inputs.empty() ? constants[0] : inputs[0]),
        inputs_(inputs.size()),
        given_(inputs.size() + constants.size()),
        scratch_(like_) {
    values_.reserve(given_ + recording.size() / 8);
    for (const auto* given : {&inputs, &constants})
      for (const Tensor& t : *given) values_.emplace_back(scratch_.adopt(t));
  }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;
  ~Replay() { upcoming() = {}; }

  /// Of the op that runs, in this thread.
  static Upcoming& upcoming() {
    thread_local Upcoming of_thread;
    return of_thread;
  }

  std::vector<Tensor> run(const std::unordered_map<std::string, RecordedOp>& ops) {
    std::vector<RecordedOp> named(length());
    for (RecordedOp& op : named) {
      const std::string name = text();
      const auto found = ops.find(name);
      require(found != ops.end(), "run: the recording has an op ", name, ", which there is not");
      op = found->second;
    }
    const auto wanted = take<std::vector<int64_t>>();
    for (auto [ops_of_stretch, groups] : plan()) {
      if (groups > 1) {
        run_in_groups(named, wanted, ops_of_stretch, groups);
      } else {
        run_ops(named, ops_of_stretch);
      }
    }
    return results(wanted);
  }

  /// The next argument (Call's source).
  template <class T>
  T take() {
    if constexpr (std::is_same_v<T, Tensor>) {
      return value(index(first_ + values_.size(), "value"));
    } else if constexpr (std::is_same_v<T, double>) {
      return bits<double>(integer());
    } else if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(integer());
    } else {
      return take_into(static_cast<T*>(nullptr));
    }
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

 private:
  /// A group of `whole`'s images, in a stretch that begins where that stands.
  Replay(const Replay& whole, int64_t image, int64_t images)
      : Numbers(nullptr, nullptr),
        like_(whole.like_),
        inputs_(whole.inputs_),
        given_(whole.given_),
        whole_(&whole),
        first_(whole.values_.size()),
        image_(image),
        images_(images),
        scratch_(whole.like_) {}

  // -------------------------------------------------------------------------------------------------------------------
  // The plan

  /// Images of a batch that all inputs have; 1 if they differ.
  int64_t batch() const {
    int64_t images = 1;
    for (size_t i = 0; i < inputs_; ++i) {
      const Tensor& input = *values_[i];
      if (input.dim() == 0 || (i > 0 && input.size(0) != images)) return 1;
      images = input.size(0);
    }
    return images;
  }

  /// The ops of every stretch, and in how many groups it runs.
  std::vector<std::pair<Numbers, int64_t>> plan() {
    const auto recorded_bytes = static_cast<double>(integer());
    std::vector<OpTraffic> traffic(length());
    std::vector<size_t> numbers(traffic.size());
    const int64_t images = batch();
    double bytes = 0;
    bool known = true;  // or an op will say what it wanted
    for (size_t i = 0; i < inputs_ && images > 1; ++i) {
      const size_t item = codes().known_bytes(values_[i]->dtype());
      known = known && item > 0;
      bytes += static_cast<double>(values_[i]->numel()) * static_cast<double>(item);
    }
    const double larger = known && recorded_bytes > 0 ? bytes / static_cast<double>(images) / recorded_bytes : 0;  // than when it was recorded, images are
    for (size_t i = 0; i < traffic.size(); ++i) {
      numbers[i] = length();
      const bool by_image = integer() != 0;
      const double activations = larger * static_cast<double>(integer()), behind = larger * static_cast<double>(integer());
      traffic[i] = {activations, behind, static_cast<double>(integer()), by_image};
    }
    std::vector<std::pair<Numbers, int64_t>> stretches;
    images_ = images;
    if (images <= 1 || larger == 0) {
      stretches.emplace_back(part(static_cast<size_t>(end_ - next_)), 1);
      return stretches;
    }
    size_t op = 0;
    for (const Stretch& stretch : StretchPlanner{images, stable::torch_executor().threads, l2_bytes()}.plan(traffic)) {
      size_t count = 0;
      for (; op < stretch.end; ++op) count += numbers[op];
      stretches.emplace_back(part(count), stretch.groups);
    }
    require(done(), "run: the recording's ops do not end where it says");
    return stretches;
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Ops

  void run_ops(const std::vector<RecordedOp>& named, Numbers ops) {
    static_cast<Numbers&>(*this) = ops;
    while (!done()) {
      const RecordedOp op = named[index(named.size(), "op")];
      leaves_ = integer() != 0 && whole_ == nullptr;
      scratch_.set_outside(leaves_);
      const auto weight = take<std::optional<Tensor>>();
      upcoming() = weight ? Upcoming{weight->data(), weight->numel()} : Upcoming{};
      const int64_t place = integer();
      require(place >= -1 && place < static_cast<int64_t>(first_ + values_.size()), "run: the recording names value ", place, " of ", first_ + values_.size());
      const bool own = place >= static_cast<int64_t>(first_);  // else a group's residual is a part of it
      const size_t residual = own ? static_cast<size_t>(place) - first_ : 0;
      if (own && values_[residual]) scratch_.offer(std::move(*values_[residual]));
      op(*this);
      scratch_.withdraw();
      if (own) values_[residual].reset();
      for (size_t n = length(); n > 0; --n) {
        const size_t i = index(first_ + values_.size(), "value");
        if (i < first_) unread_.push_back(i);
        else values_[i - first_].reset();
      }
    }
  }

  /// Every group of images goes through all the ops; what is then left of it comes into tensors of the whole batch.
  void run_in_groups(const std::vector<RecordedOp>& named, const std::vector<int64_t>& wanted, Numbers ops, int64_t groups) {
    std::vector<std::optional<Tensor>> joined;
    std::vector<size_t> unread;
    std::mutex mutex;
    parallel_for(stable::torch_executor(), groups, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = images_ * i / groups;
        Replay group(*this, image, images_ * (i + 1) / groups - image);
        group.run_ops(named, ops);
        {
          const std::lock_guard<std::mutex> lock(mutex);
          joined.resize(group.values_.size());
          for (size_t v = 0; v < joined.size(); ++v)
            if (group.values_[v] && !joined[v]) joined[v] = of_all_images(*group.values_[v], is_wanted(wanted, values_.size() + v));
          unread = std::move(group.unread_);
        }
        for (size_t v = 0; v < joined.size(); ++v)
          if (group.values_[v]) group.copy_to(*joined[v], *group.values_[v]);
      }
    });
    for (std::optional<Tensor>& t : joined) {
      if (!t || t->scratch() != nullptr) {
        values_.push_back(std::move(t));
        continue;
      }
      values_.emplace_back(scratch_.adopt(*t));
      leaving_.emplace(values_.size() - 1, std::move(*t));
    }
    for (const size_t i : unread) values_[i].reset();
  }

  /// For a value of a group the like of it for the batch; torch's, if it leaves the recording.
  Tensor of_all_images(const Tensor& t, bool leaves) {
    require(t.dim() > 0, "run: the recording keeps a value without a dimension of images");
    std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
    sizes[0] = images_;
    scratch_.set_outside(leaves);
    return scratch_.empty_strided(sizes, t.strides(), t.dtype());
  }
  /// From this group into the place of its images.
  void copy_to(const Tensor& all, const Tensor& t) {
    const Tensor mine = scratch_.narrow(all, image_, images_);
    require(same(mine.sizes(), t.sizes()) && mine.dtype() == t.dtype() && (t.numel() == 0 || t.strides()[0] * images_ == t.numel()),
            "run: the recording keeps a value of shape ", ops::text(t.sizes()), " for ", images_, " images");
    if (t.numel() > 0) std::memcpy(mine.data(), t.data(), static_cast<size_t>(t.numel()) * codes().item_bytes(t.dtype()));
  }
  static bool is_wanted(const std::vector<int64_t>& wanted, size_t value) {
    return std::find(wanted.begin(), wanted.end(), static_cast<int64_t>(value)) != wanted.end();
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Values

  Tensor value(size_t i) {
    const std::optional<Tensor>& found = i < first_ ? whole_->values_[i] : values_[i - first_];
    require(found.has_value(), "run: the recording reads value ", i, " after its last use");
    if (i >= first_) return found->borrow();
    return i >= inputs_ && i < given_ ? scratch_.adopt(*found) : scratch_.narrow(*found, image_, images_);
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

  const Tensor& like_;                   // on whose device all is
  const size_t inputs_, given_;          // how many inputs there are, and with the constants behind them
  const Replay* const whole_ = nullptr;  // what this is a group of
  const size_t first_ = 0;               // the first value that is this group's own
  int64_t image_ = 0, images_ = 1;
  stable::Scratch scratch_;
  std::vector<std::optional<Tensor>> values_;  // from first_ on
  std::vector<size_t> unread_;           // values before first_ that no one reads any more
  std::unordered_map<size_t, Tensor> leaving_;
  bool leaves_ = false;
};

template <auto Kernel>
void replay_op(Replay& replay) {
  replay.add_result(stable::Call<Kernel>::with(replay));
}

/// x.flatten(start_dim, end_dim), as a copy: a value of a recording owns what it holds.
inline Tensor flatten(const Tensor& x, int64_t start_dim, int64_t end_dim) {
  const int64_t rank = x.dim(), first = start_dim < 0 ? start_dim + rank : start_dim, last = end_dim < 0 ? end_dim + rank : end_dim;
  require(rank <= static_cast<int64_t>(stable::kMaxRank), "flatten: x has ", rank, " dimensions, want at most ", stable::kMaxRank);
  require(0 <= first && first <= last && last < rank, "flatten: dimensions ", start_dim, " to ", end_dim, " of x, which has ", rank);
  Ints sizes(x.sizes().begin(), x.sizes().begin() + first);
  sizes.push_back(1);
  for (int64_t i = first; i < rank; ++i) i <= last ? static_cast<void>(sizes.back() *= x.size(i)) : sizes.push_back(x.size(i));
  Tensor y = stable::empty({sizes.data(), sizes.size()}, x.dtype(), x);
  const size_t item = codes().item_bytes(x.dtype());
  auto* to = y.data<char>();
  if (x.is_contiguous()) {
    if (x.numel() > 0) std::memcpy(to, x.data(), static_cast<size_t>(x.numel()) * item);
    return y;
  }
  int64_t at[stable::kMaxRank] = {}, from = 0;
  for (int64_t n = x.numel(); n > 0; --n, to += item) {
    std::memcpy(to, x.data<const char>() + static_cast<size_t>(from) * item, item);
    for (int64_t i = rank; i-- > 0;) {  // the next element, in the order of the dimensions
      from += x.strides()[i];
      if (++at[i] < x.size(i)) break;
      from -= at[i] * x.strides()[i];
      at[i] = 0;
    }
  }
  return y;
}

inline std::vector<Tensor> replay(const std::unordered_map<std::string, RecordedOp>& ops, const std::vector<Tensor>& inputs,
                                  const std::vector<Tensor>& constants, const std::vector<int64_t>& recording) {
  require(!inputs.empty() || !constants.empty(), "run: inputs and constants are empty, want a tensor");
  return Replay(inputs, constants, recording).run(ops);
}

/// A recording and its constants, which then come with no call: a network's hundred tensors cost more on their way from Python than its checks.
struct HeldRecording {
  std::vector<Tensor> constants;
  std::vector<int64_t> numbers;
};

/// Held recordings, by the number that stands for each until it is released; calls that run it then go to their end.
class HeldRecordings {
 public:
  int64_t add(HeldRecording&& recording) {
    auto shared = std::make_shared<const HeldRecording>(std::move(recording));
    const std::lock_guard<std::mutex> lock(mutex_);
    by_number_.emplace(++last_, std::move(shared));
    return last_;
  }
  std::shared_ptr<const HeldRecording> find(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = by_number_.find(number);
    require(found != by_number_.end(), "run_held: held ", number, " is no recording that is held");
    return found->second;
  }
  /// How many are left.
  int64_t release(int64_t number) {
    const std::shared_ptr<const HeldRecording> last = find(number);  // goes without the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    by_number_.erase(number);
    return static_cast<int64_t>(by_number_.size());
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const HeldRecording>> by_number_;
  int64_t last_ = 0;
};

}  // namespace probquant::ops
