// A layer's prediction (predict.cuh) where it has a law per output or input channel, from stats: hundreds of laws in double, which GeForce and
// L4 have a 64th of float32's units for, so that every block of the layer would lose microseconds to them. One law is the layer's own affair.
//
// Launch: one block of 256 threads per sample, at most 64 registers, 6,208 bytes of static shared memory. Bound by the launch.
#include "predict.cuh"
#include "runtime.h"

namespace probquant::cuda {
namespace {

__global__ void __launch_bounds__(kPredictThreads) predict_kernel(const PredictProblem p, const LayerArguments a) { predict(p, a, blockIdx.x); }

__global__ void __launch_bounds__(kPredictThreads) law_kernel(const PredictProblem p, const LayerArguments a, float* laws) { write_laws(p, a, blockIdx.x, laws); }

}  // namespace

void launch_predict(const PredictProblem& p, const LayerArguments& a, int64_t samples, void* stream) {
  launch("conv2d", predict_kernel, {samples, kPredictThreads}, stream, p, a);
}

void launch_law(const PredictProblem& p, const LayerArguments& a, int64_t samples, float* law, void* stream) {
  launch("surrogate_law", law_kernel, {samples, kPredictThreads}, stream, p, a, law);
}

}  // namespace probquant::cuda
