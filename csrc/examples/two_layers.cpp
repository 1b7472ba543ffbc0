// A small int8 network with predicted scales, without torch: network.h is the part to copy.
//
//   two_layers           runs it with the library's thread pool and serially, and compares every byte with what is stored
//                        in two_layers_expected.h; exit status 0 if all are equal
//   two_layers --print   writes that file's contents:
//                        PROBQUANT_ISA=reference ./two_layers --print > two_layers_expected.h
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "network.h"
#include "two_layers_expected.h"

namespace {

template <class T>
void print(const char* format, const char* type, const char* name, const char* part, const std::vector<T>& values) {
  std::printf("inline constexpr %s %s_%s[] = {", type, name, part);
  for (std::size_t i = 0; i < values.size(); ++i) {
    std::printf(i % 24 == 0 ? "\n    " : " ");
    std::printf(format, values[i]);
    std::printf(",");
  }
  std::printf("\n};\n");
}

void print(const char* name, const example::Activation& a) {
  print("%" PRIu8, "std::uint8_t", name, "q", a.q);
  print("%af", "float", name, "scale", a.scale);
  print("%" PRId32, "std::int32_t", name, "zero_point", a.zero_point);
  print("%" PRId64, "std::int64_t", name, "stats", a.stats);
}

template <class T, std::size_t size>
bool equal(const char* name, const std::vector<T>& got, const T (&wanted)[size]) {
  const bool same = got.size() == size && std::memcmp(got.data(), wanted, sizeof wanted) == 0;
  if (!same) std::printf("%s differs from the stored bytes\n", name);
  return same;
}

bool matches_stored_bytes(const example::Results& r) {
  using namespace expected;
  return equal("x.q", r.x.q, x_q) & equal("x.scale", r.x.scale, x_scale) & equal("x.zero_point", r.x.zero_point, x_zero_point) &
         equal("x.stats", r.x.stats, x_stats) & equal("hidden.q", r.hidden.q, hidden_q) & equal("hidden.scale", r.hidden.scale, hidden_scale) &
         equal("hidden.zero_point", r.hidden.zero_point, hidden_zero_point) & equal("hidden.stats", r.hidden.stats, hidden_stats) &
         equal("logits.q", r.logits.q, logits_q) & equal("logits.scale", r.logits.scale, logits_scale) &
         equal("logits.zero_point", r.logits.zero_point, logits_zero_point) & equal("logits.stats", r.logits.stats, logits_stats) &
         equal("float_logits", r.float_logits, float_logits);
}

}  // namespace

int main(int argument_count, char** arguments) try {
  const example::Results serial = example::run_network(probquant::serial_executor());
  if (argument_count == 2 && std::strcmp(arguments[1], "--print") == 0) {
    std::printf(
        "// What two_layers computes, made by\n"
        "//   PROBQUANT_ISA=reference ./two_layers --print > two_layers_expected.h\n"
        "// The scalar reference kernels define these bytes; every other instruction set and every number of threads must give them.\n"
        "#pragma once\n#include <cstdint>\n\nnamespace expected {\n\n");
    print("x", serial.x);
    print("hidden", serial.hidden);
    print("logits", serial.logits);
    std::printf("inline constexpr float float_logits[] = {");
    for (std::size_t i = 0; i < serial.float_logits.size(); ++i)
      std::printf("%s%af,", i % 8 == 0 ? "\n    " : " ", static_cast<double>(serial.float_logits[i]));
    std::printf("\n};\n\n}  // namespace expected\n");
    return 0;
  }

  const example::Results pooled = example::run_network(probquant::default_executor());
  for (std::int64_t image = 0; image < example::kImages; ++image) {
    const std::size_t n = static_cast<std::size_t>(image);
    std::printf("image %d: scale in %.6f, hidden %.6f, out %.6f; logits", static_cast<int>(image), static_cast<double>(serial.x.scale[n]),
                static_cast<double>(serial.hidden.scale[n]), static_cast<double>(serial.logits.scale[n]));
    for (std::int64_t c = 0; c < example::kClasses; ++c)
      std::printf(" %.2f", static_cast<double>(serial.float_logits[static_cast<std::size_t>(image * example::kClasses + c)]));
    std::printf("; %" PRId64 " clipped\n", serial.logits.stats[n * probquant::kStatsSample + probquant::kStatsClipped]);
  }
  if (!(pooled == serial)) std::printf("the thread pool gives other bytes than the calling thread alone\n");
  return pooled == serial && matches_stored_bytes(serial) ? 0 : 1;
} catch (const probquant::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
