// What the C++ that ptx.py writes is made of: registers as bits, typed operations on them, memory, and the table of kernels.
// Operations are those of the PTX ISA; floating-point ones round to nearest even, and their NaNs are the GPU's.
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>

#include "instructions.h"
#include "memory.h"

namespace cuda_on_cpu {

// ---------------------------------------------------------------------------------------------------------------------
// Kernels and variables of a module

struct Parameter {
  unsigned offset, bytes;
};
struct Kernel {
  const char* name;
  void (*run)(uint8_t* parameters);
  const Parameter* parameters;
  unsigned parameter_count, parameter_bytes;
  unsigned static_shared_bytes, most_threads;
};
/// A __device__ or __constant__ variable; the table ends with a null name.
struct Variable {
  const char* name;
  uint8_t** where;
  size_t bytes;
  const uint8_t* initial;
};
void register_module(const Kernel* kernels, size_t count, const Variable* variables);

// ---------------------------------------------------------------------------------------------------------------------
// Registers

template <size_t bytes>
using Bits = std::conditional_t<bytes == 1, uint8_t, std::conditional_t<bytes == 2, uint16_t, std::conditional_t<bytes == 4, uint32_t, uint64_t>>>;

/// The low bits of `value` as a T.
template <class T, class From>
constexpr T as(From value) {
  static_assert(sizeof(T) <= sizeof(From), "an operand narrower than the instruction's type");
  return std::bit_cast<T>(static_cast<Bits<sizeof(T)>>(std::bit_cast<Bits<sizeof(From)>>(value)));
}

/// Registers may be wider than the value: it is extended by its sign.
template <class Register, class T>
constexpr void set(Register& to, T value) {
  static_assert(sizeof(Register) >= sizeof(T), "a result wider than its register");
  if constexpr (std::is_same_v<Register, bool>) {
    to = value;
  } else if constexpr (std::is_floating_point_v<T>) {
    to = std::bit_cast<Bits<sizeof(T)>>(value);
  } else {
    to = static_cast<Register>(value);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

enum class Space { generic_, global_, const_, shared_, local_ };
enum class Strength { weak, strong, constant };
template <class T, int count>
using Vector = std::array<T, count>;

[[noreturn]] inline void violate_at(const char* what, const Site& site) { violate(std::string(what) + ": " + text(site)); }
inline void fence() {}

inline uint8_t* memory_at(Space space, uint64_t address, unsigned bytes, Access access, const Site& site) {
  switch (space) {
    case Space::shared_: return shared_at(address, bytes, access, site);
    case Space::local_: return local_at(address, bytes, access, site);
    case Space::generic_: return generic_at(address, bytes, access, site);
    case Space::const_:
    case Space::global_: return global_at(address, bytes, access, site);
  }
  __builtin_unreachable();
}

template <class T, int count>
Vector<T, count> load(Space space, uint64_t address, Strength strength, const Site& site) {
  const Access access = strength == Strength::weak ? Access::read : strength == Strength::strong ? Access::strong_read : Access::constant_read;
  Vector<T, count> value;
  std::memcpy(&value, memory_at(space, address, sizeof value, access, site), sizeof value);
  return value;
}

template <class T, int count>
void store(Space space, uint64_t address, const Vector<T, count>& value, Strength strength, const Site& site) {
  std::memcpy(memory_at(space, address, sizeof value, strength == Strength::weak ? Access::write : Access::strong_write, site), &value, sizeof value);
}

template <class T, int count>
Vector<T, count> load_param(uint64_t address) {
  Vector<T, count> value;
  std::memcpy(&value, reinterpret_cast<const void*>(address), sizeof value);
  return value;
}
template <class T, int count>
void store_param(uint64_t address, const Vector<T, count>& value) {
  std::memcpy(reinterpret_cast<void*>(address), &value, sizeof value);
}

inline uint64_t shared_to_generic(uint64_t offset) { return reinterpret_cast<uint64_t>(shared_memory()) + offset; }
inline bool in_space(Space space, uint64_t address) {
  const bool in_shared = address - shared_to_generic(0) < kSharedArena;
  const Stack stack = current_stack();
  const bool in_local = address >= reinterpret_cast<uint64_t>(stack.begin) && address < reinterpret_cast<uint64_t>(stack.end);
  return space == Space::shared_ ? in_shared : space == Space::local_ ? in_local : space == Space::global_ && !in_shared && !in_local;
}
inline uint64_t generic_to_shared(uint64_t address, const Site& site) {
  if (!in_space(Space::shared_, address)) violate_at("not an address of shared memory", site);
  return address - shared_to_generic(0);
}

enum class Atomic { add, min, max, exch, cas, and_, or_, xor_, inc, dec };

template <class T>
T atomic(Atomic operation, Space space, uint64_t address, const Site& site, T value, T other = T{}) {
  uint8_t* const at = memory_at(space, address, sizeof(T), Access::atomic, site);
  T old, result{};
  std::memcpy(&old, at, sizeof old);
  using B = Bits<sizeof(T)>;
  const B a = std::bit_cast<B>(old), b = std::bit_cast<B>(value);
  switch (operation) {
    case Atomic::add:
      if constexpr (std::is_floating_point_v<T>) {
        result = old + value;
      } else {
        result = static_cast<T>(static_cast<B>(a + b));
      }
      break;
    case Atomic::min: result = std::min(old, value); break;
    case Atomic::max: result = std::max(old, value); break;
    case Atomic::exch: result = value; break;
    case Atomic::cas: result = a == b ? other : old; break;
    case Atomic::and_: result = std::bit_cast<T>(static_cast<B>(a & b)); break;
    case Atomic::or_: result = std::bit_cast<T>(static_cast<B>(a | b)); break;
    case Atomic::xor_: result = std::bit_cast<T>(static_cast<B>(a ^ b)); break;
    case Atomic::inc: result = old >= value ? T{} : static_cast<T>(old + 1); break;
    case Atomic::dec: result = old == T{} || old > value ? value : static_cast<T>(old - 1); break;
  }
  std::memcpy(at, &result, sizeof result);
  return old;
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers

inline void check_threads(uint32_t threads, const Site& site) {
  if (threads != 0 && threads != block_threads()) violate_at("a barrier of part of the block, which is not emulated", site);
}
inline void barrier(uint32_t id, uint32_t threads, const Site& site) {
  if (id > 15) violate_at("a barrier beyond the 16th", site);
  check_threads(threads, site);
  block_barrier(site);
}
inline unsigned barrier_count(uint32_t id, uint32_t threads, bool value, const Site& site) {
  if (id > 15) violate_at("a barrier beyond the 16th", site);
  check_threads(threads, site);
  return block_barrier_count(value, site);
}

// ---------------------------------------------------------------------------------------------------------------------
// Integers

template <class Wide, class T>
Wide multiply_wide(T a, T b) {
  return static_cast<Wide>(static_cast<Wide>(a) * static_cast<Wide>(b));
}
template <class T>
T multiply_lo(T a, T b) {
  using Unsigned = std::make_unsigned_t<std::common_type_t<T, int>>;  // no signed overflow, in int neither
  return static_cast<T>(static_cast<Unsigned>(a) * static_cast<Unsigned>(b));
}
template <class T>
T multiply_hi(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> 8 * sizeof(T));
}
template <class T>
T negate(T a) {
  return static_cast<T>(-static_cast<uint64_t>(a));
}
template <class T>
T absolute(T a) {
  return a < 0 ? negate(a) : a;
}
template <class T>
T divide(T a, T b, const Site& site) {
  if (b == 0) violate_at("division by zero", site);
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return negate(a);
  return static_cast<T>(a / b);
}
template <class T>
T remainder(T a, T b, const Site& site) {
  if (b == 0) violate_at("division by zero", site);
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return static_cast<T>(a % b);
}
template <class T>
T shift_left(T a, uint32_t n) {
  return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << n);
}
template <class T>
T shift_right(T a, uint32_t n) {
  return static_cast<T>(a >> std::min<uint32_t>(n, 8 * sizeof(T) - 1)) & (n < 8 * sizeof(T) || a < 0 ? static_cast<T>(-1) : T{0});
}
inline uint32_t funnel_left(uint32_t a, uint32_t b, uint32_t n, bool wrap) {
  n = wrap ? n & 31 : std::min(n, 32u);
  return static_cast<uint32_t>((uint64_t{b} << 32 | a) << n >> 32);
}
inline uint32_t funnel_right(uint32_t a, uint32_t b, uint32_t n, bool wrap) {
  n = wrap ? n & 31 : std::min(n, 32u);
  return static_cast<uint32_t>((uint64_t{b} << 32 | a) >> n);
}
template <class T>
T extract_bits(T a, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  constexpr uint32_t last = 8 * sizeof(T) - 1;
  using B = Bits<sizeof(T)>;
  const bool sign = std::is_signed_v<T> && length > 0 && (static_cast<B>(a) >> std::min(position + length - 1, last) & 1u);
  B result = 0;
  for (uint32_t i = 0; i <= last; ++i) {
    const bool bit = i < length && position + i <= last ? (static_cast<B>(a) >> (position + i) & 1u) != 0 : sign;
    result |= static_cast<B>(bit) << i;
  }
  return static_cast<T>(result);
}
template <class T>
T insert_bits(T a, T b, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  for (uint32_t i = 0; i < length && position + i < 8 * sizeof(T); ++i) {
    const T bit = static_cast<T>(T{1} << (position + i));
    b = static_cast<T>(a >> i & 1u ? b | bit : b & ~bit);
  }
  return b;
}
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t select = selector >> 4 * i & 15u;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (select & 7u)) & 255u;
    if (select & 8u) byte = byte & 128u ? 255u : 0u;
    result |= byte << 8 * i;
  }
  return result;
}
inline uint32_t logic3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (uint32_t row = 0; row < 8; ++row)
    if (table >> row & 1u) result |= (row & 4u ? a : ~a) & (row & 2u ? b : ~b) & (row & 1u ? c : ~c);
  return result;
}
template <class T>
uint32_t leading_zeros(T a) {
  return static_cast<uint32_t>(std::countl_zero(a));
}
template <class T>
T reverse_bits(T a) {
  T result = 0;
  for (size_t i = 0; i < 8 * sizeof(T); ++i) result = static_cast<T>(result << 1 | (a >> i & 1u));
  return result;
}
template <class T>
uint32_t find_bit(T a, bool shift_amount) {
  const auto bits = static_cast<Bits<sizeof(T)>>(a < 0 ? ~a : a);
  if (bits == 0) return 0xffffffffu;
  const uint32_t position = 8 * sizeof(T) - 1 - static_cast<uint32_t>(std::countl_zero(bits));
  return shift_amount ? 8 * sizeof(T) - 1 - position : position;
}
template <bool a_signed, bool b_signed>
uint32_t dot4(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 4; ++i) {
    const auto x = static_cast<uint8_t>(a >> 8 * i), y = static_cast<uint8_t>(b >> 8 * i);
    c += static_cast<uint32_t>((a_signed ? static_cast<int8_t>(x) : x) * (b_signed ? static_cast<int8_t>(y) : y));
  }
  return c;
}
/// Two 16-bit values of a times the lower or the upper two bytes of b.
template <bool a_signed, bool b_signed>
uint32_t dot2(uint32_t a, uint32_t b, uint32_t c, bool upper) {
  for (int i = 0; i < 2; ++i) {
    const auto x = static_cast<uint16_t>(a >> 16 * i);
    const auto y = static_cast<uint8_t>(b >> (8 * i + (upper ? 16 : 0)));
    c += static_cast<uint32_t>((a_signed ? static_cast<int16_t>(x) : x) * (b_signed ? static_cast<int8_t>(y) : y));
  }
  return c;
}
template <class To, class From>
To saturate(From value) {
  const __int128 low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
  return static_cast<To>(std::clamp<__int128>(value, low, high));
}

// ---------------------------------------------------------------------------------------------------------------------
// Floating point

/// Results that are not a number have these bits on a GPU.
inline float canonical(float value) { return value != value ? std::bit_cast<float>(0x7fffffffu) : value; }
inline double canonical(double value) { return value != value ? std::bit_cast<double>(0xfff8000000000000ull) : value; }

template <class T>
bool is_unordered(T a, T b) {
  return a != a || b != b;
}
/// -0 is less than +0; of a number and a NaN the number counts, unless NaNs are to be kept.
template <class T>
T min_float(T a, T b, bool keep_nan) {
  if (is_unordered(a, b)) return canonical(keep_nan ? a + b : a != a ? b : a);
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T>
T max_float(T a, T b, bool keep_nan) {
  if (is_unordered(a, b)) return canonical(keep_nan ? a + b : a != a ? b : a);
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}

enum class Rounding { rni, rzi, rmi, rpi };
template <class T>
T round_whole(T value, Rounding rounding) {
  switch (rounding) {
    case Rounding::rni: return std::nearbyint(value);
    case Rounding::rzi: return std::trunc(value);
    case Rounding::rmi: return std::floor(value);
    case Rounding::rpi: return std::ceil(value);
  }
  __builtin_unreachable();
}
template <class To, class T>
To to_integer(T value, Rounding rounding) {
  using Limits = std::numeric_limits<To>;
  if (value != value) return sizeof(T) == 8 || sizeof(To) == 8 ? static_cast<To>(uint64_t{1} << (8 * sizeof(To) - 1)) : To{0};
  const T whole = round_whole(value, rounding);
  if (whole >= std::ldexp(T{1}, Limits::digits)) return Limits::max();
  if (whole <= static_cast<T>(Limits::min())) return Limits::min();
  return static_cast<To>(whole);
}
template <class T>
T saturate_float(T value) {
  return value != value || value <= 0 ? T{0} : std::min(value, T{1});
}

struct Half {
  static constexpr int kMantissa = 10, kLeast = -14, kMost = 15;
};
struct Bfloat16 {
  static constexpr int kMantissa = 7, kLeast = -126, kMost = 127;
};

template <class Format>
float widen(uint16_t bits) {
  const int mantissa = bits & ((1 << Format::kMantissa) - 1), exponent = (bits & 0x7fff) >> Format::kMantissa;
  float value;
  if (exponent == Format::kMost - Format::kLeast + 2) {
    value = mantissa == 0 ? std::numeric_limits<float>::infinity() : std::bit_cast<float>(0x7fffffffu);
  } else {
    const int one = exponent == 0 ? 0 : 1 << Format::kMantissa;
    value = std::ldexp(static_cast<float>(one + mantissa), std::max(exponent, 1) - 1 + Format::kLeast - Format::kMantissa);
  }
  return bits & 0x8000 && value == value ? -value : value;
}

/// To the nearest, ties to even.
template <class Format>
uint16_t narrow(float value) {
  constexpr uint16_t infinity = static_cast<uint16_t>((Format::kMost - Format::kLeast + 2) << Format::kMantissa);
  if (value != value) return 0x7fff;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(double{value});
  if (size == 0) return sign;
  if (std::isinf(size)) return sign | infinity;
  const int exponent = std::max(std::ilogb(size), Format::kLeast);
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, Format::kMantissa - exponent)));  // up to 2^(kMantissa + 1)
  const uint32_t bits = (static_cast<uint32_t>(exponent - Format::kLeast) << Format::kMantissa) + steps;  // a carry moves the exponent
  return static_cast<uint16_t>(sign | std::min<uint32_t>(bits, infinity));
}

}  // namespace cuda_on_cpu
