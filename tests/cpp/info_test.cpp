// build_info and cpu_info, and that PROBQUANT_ISA lowers the instruction set and never raises it. One argument: the value
// the environment variable has, "unset", or "error" where an error that names it is wanted.
#include <probquant/info.h>

#include <algorithm>
#include <cstdio>
#include <string>

namespace {

int rank(const std::string& isa) { return isa == "amx" ? 3 : isa == "avx512vnni" ? 2 : isa == "avx2" ? 1 : 0; }

bool expect(bool condition, const char* what) {
  if (!condition) std::fprintf(stderr, "failed: %s\n", what);
  return condition;
}

bool check_error() {
  try {
    probquant::cpu_info();
  } catch (const probquant::Error& error) {
    const std::string message = error.what();
    return expect(message.find("PROBQUANT_ISA is 'sse9'") != std::string::npos, "the error names variable and value") &
           expect(message.find("reference, avx2, avx512vnni or amx") != std::string::npos, "the error names what was wanted");
  }
  return expect(false, "an unknown PROBQUANT_ISA is an error");
}

bool check(const std::string& requested) {
  const probquant::BuildInfo build = probquant::build_info();
  const probquant::CpuInfo cpu = probquant::cpu_info();
  const int best = std::min(rank(cpu.isa_detected), rank(cpu.isa_compiled));
  const int wanted = requested == "unset" ? best : std::min(best, rank(requested));
  std::printf("%s: %s, used %s\n", cpu.model.c_str(), cpu.isa_detected.c_str(), cpu.isa_used.c_str());
  return expect(!build.version.empty(), "a version") & expect(build.isas.front() == "reference", "reference is always there") &
         expect(build.isas.back() == cpu.isa_compiled, "the best compiled ISA is the last one listed") &
         expect(build.cuda == !build.cuda_archs.empty(), "CUDA comes with architectures") &
         expect(rank(cpu.isa_used) == wanted, "the ISA used");
}

}  // namespace

int main(int, char** arguments) {
  const std::string requested = arguments[1];
  return (requested == "error" ? check_error() : check(requested)) ? 0 : 1;
}
