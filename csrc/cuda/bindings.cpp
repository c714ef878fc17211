// depthnet._C_cuda: the CUDA kernels on raw addresses.  What the tables hold is the business of
// depthnet.kernels.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "launch.h"

namespace py = pybind11;

namespace depthnet {
namespace cuda {
namespace {

void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

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
  check(depthnet_cuda_step(adam, &launch, device, stream));
}

void residual_forward(int dtype, int64_t members, int64_t rows, int64_t n, uintptr_t x, int64_t x_stride,
                      uintptr_t h, int64_t h_stride, uintptr_t y, int64_t y_stride, uintptr_t signs,
                      int64_t signs_stride, double scale, uintptr_t scales, double p, double q,
                      bool mean_subtract, int device, uintptr_t stream) {
  const ResidualLaunch launch = {dtype, members, rows, n, address<void>(x), address<void>(h),
                                 address<void>(y), address<uint8_t>(signs), x_stride, h_stride, y_stride,
                                 signs_stride, scale, address<const double>(scales), p, q, mean_subtract};
  check(depthnet_cuda_residual(&launch, device, stream));
}

void residual_backward(int dtype, int64_t members, int64_t rows, int64_t n, uintptr_t grad,
                       int64_t grad_stride, uintptr_t signs, int64_t signs_stride, uintptr_t out,
                       int64_t out_stride, double scale, uintptr_t scales, double p, double q,
                       bool mean_subtract, int device, uintptr_t stream) {
  residual_forward(dtype, members, rows, n, 0, 0, grad, grad_stride, out, out_stride, signs, signs_stride,
                   scale, scales, p, q, mean_subtract, device, stream);
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of depthnet, on raw addresses; use depthnet.kernels.";
  m.attr("CHUNK") = kChunk;
  m.attr("ARCHITECTURES") = DEPTHNET_CUDA_ARCHITECTURES;
  m.def("missing", &depthnet_cuda_missing, "Why the kernels cannot run on this machine, or None.");
  m.def("optimizer_step", &optimizer_step);
  m.def("residual_forward", &residual_forward);
  m.def("residual_backward", &residual_backward);
}

}  // namespace cuda
}  // namespace depthnet
