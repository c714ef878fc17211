// The kernels of csrc/cuda/residual.h and their launcher; compiled by nvcc.
#include <cuda_runtime.h>

#include "residual.h"

namespace depthnet {
namespace cuda {
namespace {

// As many registers as leave room for so many blocks: enough bytes are then under way, and none is spilled.
template <class T, int E> constexpr int kBlocks = E < kMany<T> ? 4 : 3;

template <class T, int N, int E>
__global__ void __launch_bounds__(kThreads, kBlocks<T, E>)
    residual_forward_kernel(const ResidualLaunch r, int team) {
  forward_block<T, N, E>(Block{int64_t(blockIdx.x)}, r, team);
}

template <class T, int N, int E>
__global__ void __launch_bounds__(kThreads, kBlocks<T, E>)
    residual_backward_kernel(const ResidualLaunch r, int team) {
  backward_block<T, N, E>(Block{int64_t(blockIdx.x)}, r, team);
}

}  // namespace

const char* depthnet_cuda_residual(const ResidualLaunch* launch, int device, uintptr_t stream_address) {
  const ResidualLaunch& r = *launch;
  cudaSetDevice(device);  // of this runtime, which is not torch's
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  choose_variant(r, [&](auto variant, int team, int64_t blocks) {
    using V = decltype(variant);
    const auto kernel = r.x ? residual_forward_kernel<typename V::T, V::N, V::E>
                            : residual_backward_kernel<typename V::T, V::N, V::E>;
    kernel<<<unsigned(blocks), kThreads, 0, stream>>>(r, team);
  });
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace depthnet
