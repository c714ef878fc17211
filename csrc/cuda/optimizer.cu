// The kernels of csrc/cuda/optimizer.h and their launchers; compiled by nvcc.
#include <cuda_runtime.h>

#include "optimizer.h"

namespace depthnet {
namespace cuda {
namespace {

// As many registers as leave room for five blocks: enough bytes are then under way, and none is spilled.
template <class Rule>
__global__ void __launch_bounds__(kThreads, 5) step_kernel(const StepLaunch s) {
  __shared__ StepShared<Rule> shared;
  step_block<Rule>(Block{int64_t(blockIdx.x)}, s, shared);
}

__global__ void __launch_bounds__(kThreads) norm_kernel(const StepLaunch s) {
  __shared__ NormShared shared;
  norm_block(Block{int64_t(blockIdx.x)}, s, shared);
}

// Null where there is no error.
const char* message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* depthnet_cuda_missing() {
  int count;
  if (const char* error = message(cudaGetDeviceCount(&count))) return error;
  cudaFuncAttributes unused;  // asked for to learn whether there is code for the device
  return message(cudaFuncGetAttributes(&unused, norm_kernel));
}

const char* depthnet_cuda_step(bool adam, const StepLaunch* launch, int device, uintptr_t stream_address) {
  const StepLaunch& s = *launch;
  if (s.chunk_count == 0) return nullptr;  // no tensor has elements
  cudaSetDevice(device);  // of this runtime, which is not torch's
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  const auto blocks = unsigned(s.chunk_count);
  if (std::isfinite(s.max_grad_norm)) norm_kernel<<<blocks, kThreads, 0, stream>>>(s);
  if (adam) step_kernel<Adam><<<blocks, kThreads, 0, stream>>>(s);
  else step_kernel<Sgd><<<blocks, kThreads, 0, stream>>>(s);
  return message(cudaGetLastError());
}

}  // namespace cuda
}  // namespace depthnet
