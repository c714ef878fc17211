// depthnet._C: the native kernels on raw addresses and sizes.  Shapes, dtypes and devices are checked
// by the callers in depthnet.kernels.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace depthnet {
namespace {

const Isa* selected = nullptr;

py::list isas() {
  const Isa* sets[3];
  const int count = available_isas(sets);
  py::list names;
  for (int i = 0; i < count; ++i) names.append(sets[i]->name);
  return names;
}

void select_isa(const std::string& name) {
  const Isa* sets[3];
  const int count = available_isas(sets);
  for (int i = 0; i < count; ++i)
    if (name == sets[i]->name) {
      selected = sets[i];
      return;
    }
  throw py::value_error("instruction set '" + name + "' cannot run here");
}

// Rows of a few thousand elements in all are done before a second thread has woken up.
constexpr int64_t kElementsPerThread = 8192;

void run_residual(const ResidualKernel kernels[kDTypes], int dtype, const Residual& r, int threads) {
  const ResidualKernel kernel = kernels[dtype];
  const int64_t grain = 1 + kElementsPerThread / (r.n + 1);
  py::gil_scoped_release nogil;
  parallel_for(threads, r.members * r.rows, grain,
               [&](int64_t begin, int64_t end) { kernel(r, begin, end); });
}

template <class T> T* address(uintptr_t value) { return reinterpret_cast<T*>(value); }

void residual_forward(int dtype, int64_t members, int64_t rows, int64_t n, uintptr_t x,
                      int64_t x_stride, uintptr_t h, int64_t h_stride, uintptr_t y, int64_t y_stride,
                      uintptr_t signs, int64_t signs_stride, double scale, uintptr_t scales, double p,
                      double q, bool mean_subtract, int threads) {
  run_residual(selected->residual_forward, dtype,
               {members, rows, n, address<void>(x), address<void>(h), address<void>(y),
                address<uint8_t>(signs), x_stride, h_stride, y_stride, signs_stride, scale,
                address<const double>(scales), p, q, mean_subtract},
               threads);
}

void residual_backward(int dtype, int64_t members, int64_t rows, int64_t n, uintptr_t grad,
                       int64_t grad_stride, uintptr_t signs, int64_t signs_stride, uintptr_t out,
                       int64_t out_stride, double scale, uintptr_t scales, double p, double q,
                       bool mean_subtract, int threads) {
  run_residual(selected->residual_backward, dtype,
               {members, rows, n, nullptr, address<void>(grad), address<void>(out),
                address<uint8_t>(signs), 0, grad_stride, out_stride, signs_stride, scale,
                address<const double>(scales), p, q, mean_subtract},
               threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of depthnet, on raw addresses; use depthnet.kernels.";
  m.def("isas", &isas, "Names of the instruction sets that can run here, narrowest first.");
  m.def("select_isa", &select_isa);
  m.def("selected_isa", [] { return selected ? selected->name : ""; });
  m.def("have_threads", &have_threads);
  m.def("residual_forward", &residual_forward);
  m.def("residual_backward", &residual_backward);
}

}  // namespace depthnet
