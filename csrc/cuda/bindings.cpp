// depthnet._C_cuda: the CUDA kernels on raw addresses.  What the tables hold is the business of
// depthnet.kernels.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "launch.h"

namespace py = pybind11;

namespace depthnet {
namespace cuda {
namespace {

template <class T> T* address(uintptr_t value) { return reinterpret_cast<T*>(value); }

void optimizer_step(bool adam, uintptr_t tensors, uintptr_t groups, uintptr_t scales, int64_t slice_count,
                    uintptr_t chunks, int64_t chunk_count, uintptr_t arrived, uintptr_t partial_sums,
                    uintptr_t norm, uintptr_t grad_scale, uintptr_t found_inf, double max_grad_norm,
                    int device, uintptr_t stream) {
  const StepLaunch launch = {address<const StepTensor>(tensors), address<const StepGroup>(groups),
                             address<const double>(scales), slice_count, address<const StepChunk>(chunks),
                             chunk_count, address<int>(arrived), address<double>(partial_sums),
                             address<double>(norm), address<const float>(grad_scale),
                             address<const float>(found_inf), max_grad_norm};
  const char* error = depthnet_cuda_step(adam, &launch, device, stream);
  if (error) throw std::runtime_error(error);
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of depthnet, on raw addresses; use depthnet.kernels.";
  m.attr("CHUNK") = kChunk;
  m.attr("ARCHITECTURES") = DEPTHNET_CUDA_ARCHITECTURES;
  m.def("missing", &depthnet_cuda_missing, "Why the kernels cannot run on this machine, or None.");
  m.def("optimizer_step", &optimizer_step);
}

}  // namespace cuda
}  // namespace depthnet
