// What this build contains and what this machine's processor offers: for bug reports, and for users who ask why it is slow.
#pragma once
#include <probquant/types.h>

#include <string>
#include <utility>
#include <vector>

namespace probquant {

struct BuildInfo {
  std::string version;
  bool cuda = false;          ///< CUDA kernels are compiled in
  std::string cuda_archs;     ///< their architectures, such as "80-real 90-real"; empty without CUDA
  std::string cuda_compiler;  ///< empty without CUDA
  std::string compiler;
  std::string build_type;
  std::vector<std::string> isas;  ///< CPU kernel families compiled in, from "reference" upwards
};

struct CpuInfo {
  std::string model;
  std::string isa_detected;  ///< the best that processor and operating system offer
  std::string isa_compiled;  ///< the best that is compiled in
  std::string isa_used;      ///< what runs: the lesser of both, or what PROBQUANT_ISA lowers it to
  std::vector<std::pair<std::string, bool>> features;
};

PROBQUANT_API BuildInfo build_info();

/// Throws Error if the environment variable PROBQUANT_ISA is set to something unknown.
PROBQUANT_API CpuInfo cpu_info();

}  // namespace probquant
