// Runs a quantized model that torch compiled ahead of time (AOTInductor), without Python:
//
//   run_package OPS_LIBRARY PACKAGE BATCH CHANNELS HEIGHT WIDTH < float32 values > float32 values
//
// Links libtorch, not probquant: with T the folder of the torch package (python -c 'import torch; print(torch.__path__[0])')
//
//   g++ -std=c++20 -O2 run_package.cpp -o run_package -I$T/include -L$T/lib -Wl,-rpath,$T/lib -ltorch -ltorch_cpu -lc10 -ldl
//
// OPS_LIBRARY is probquant.ops_library: opening it registers torch.ops.probquant with the libtorch that this program links,
// whatever that is (2.10 or newer). PACKAGE is what torch._inductor.aoti_compile_and_package wrote.
#include <ATen/ops/empty.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

int main(int argc, char** argv) try {
  if (argc != 7) {
    std::fprintf(stderr, "usage: %s OPS_LIBRARY PACKAGE BATCH CHANNELS HEIGHT WIDTH < float32 values > float32 values\n", argv[0]);
    return 2;
  }
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  std::vector<int64_t> sizes;
  for (int i = 3; i < argc; ++i) sizes.push_back(std::atoll(argv[i]));
  const at::Tensor images = at::empty(sizes, at::kFloat);
  const auto count = static_cast<size_t>(images.numel());
  if (std::fread(images.data_ptr<float>(), sizeof(float), count, stdin) != count) {
    std::fprintf(stderr, "standard input holds fewer than %zu values\n", count);
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  for (const at::Tensor& output : model.run({images})) {
    const at::Tensor values = output.contiguous();
    std::fwrite(values.data_ptr(), 1, static_cast<size_t>(values.nbytes()), stdout);
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
