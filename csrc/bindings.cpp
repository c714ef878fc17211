// depthnet._C: the native kernels on raw addresses and sizes.  Shapes, dtypes and devices are checked
// by the callers in depthnet.kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <memory>
#include <vector>

#include "cpu/embedding.h"
#include "cpu/kernels.h"
#include "cpu/linear_driver.h"
#include "cpu/optimizer_driver.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/stack_driver.h"
#include "describe.h"

namespace py = pybind11;

namespace depthnet {
namespace {

const Isa* selected = nullptr;

py::list isas() {
  const Isa* sets[kMostIsas];
  const int count = available_isas(sets);
  py::list names;
  for (int i = 0; i < count; ++i) names.append(sets[i]->name);
  return names;
}

void select_isa(const std::string& name) {
  const Isa* sets[kMostIsas];
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
               [&](int64_t begin, int64_t end, int) { kernel(r, begin, end); });
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

void residual_norm_forward(int dtype, int branch_dtype, bool center, int64_t rows, int64_t n, uintptr_t x,
                           uintptr_t branch, uintptr_t s, uintptr_t y, uintptr_t statistics,
                           uintptr_t weight, uintptr_t bias, double scale, double eps, int threads) {
  const ResidualNorm r = {rows, n, address<void>(x), address<void>(branch), address<void>(s),
                          address<void>(y), address<void>(statistics), address<void>(weight),
                          address<void>(bias), scale, eps};
  const auto forward = selected->residual_norm[center][dtype][branch_dtype].forward;
  py::gil_scoped_release nogil;
  parallel_for(threads, rows, 1 + kElementsPerThread / (n + 1),
               [&](int64_t begin, int64_t end, int) { forward(r, begin, end); });
}

// sums[i] = the sum of parts[part][i], in the order of the parts.
template <class C>
void add_up(const C* parts, int64_t count, int64_t n, C* sums) {
  std::fill_n(sums, n, C(0));
  for (int64_t part = 0; part < count; ++part)
    for (int64_t i = 0; i < n; ++i) sums[i] += parts[part * n + i];
}

// weight_grad and bias_grad may be null.
template <class C>
void run_residual_norm_backward(const ResidualNormKernel& kernel, ResidualNormBackward r, C* weight_grad,
                                C* bias_grad, int threads) {
  constexpr int64_t kLeastChunk = 32, kMostChunks = 128;  // short chains of sums are accurate ones
  r.chunk = std::max(kLeastChunk, (r.rows + kMostChunks - 1) / kMostChunks);
  const int64_t chunks = (r.rows + r.chunk - 1) / r.chunk;
  const std::unique_ptr<C[]> parts(new C[size_t(chunks * r.n) * (bool(weight_grad) + bool(bias_grad))]);
  C* const bias_parts = parts.get() + (weight_grad ? chunks * r.n : 0);
  r.weight_sums = weight_grad ? parts.get() : nullptr;
  r.bias_sums = bias_grad ? bias_parts : nullptr;
  parallel_for(threads, chunks, 1 + kElementsPerThread / (r.chunk * r.n + 1),
               [&](int64_t begin, int64_t end, int) { kernel.backward(r, begin, end); });
  if (weight_grad) add_up(parts.get(), chunks, r.n, weight_grad);
  if (bias_grad) add_up(bias_parts, chunks, r.n, bias_grad);
}

void residual_norm_backward(int dtype, int branch_dtype, bool center, int64_t rows, int64_t n,
                            uintptr_t grad_s, uintptr_t grad_y, uintptr_t s, uintptr_t statistics,
                            uintptr_t weight, uintptr_t grad_x, uintptr_t grad_branch, uintptr_t weight_grad,
                            uintptr_t bias_grad, double scale, int threads) {
  ResidualNormBackward r{};
  r.rows = rows, r.n = n, r.scale = scale;
  r.grad_s = address<void>(grad_s), r.grad_y = address<void>(grad_y);
  r.s = address<void>(s), r.statistics = address<void>(statistics), r.weight = address<void>(weight);
  r.grad_x = address<void>(grad_x), r.grad_branch = address<void>(grad_branch);
  const ResidualNormKernel& kernel = selected->residual_norm[center][dtype][branch_dtype];
  py::gil_scoped_release nogil;
  if (dtype == kFloat64)
    run_residual_norm_backward(kernel, r, address<double>(weight_grad), address<double>(bias_grad), threads);
  else
    run_residual_norm_backward(kernel, r, address<float>(weight_grad), address<float>(bias_grad), threads);
}

// A null grad: forward.
void mlp_activation(int dtype, int kind, int64_t rows, int64_t n, uintptr_t grad, uintptr_t h, uintptr_t out,
                    int threads) {
  const MlpActivation m = {n, address<void>(h), address<void>(grad), address<void>(out)};
  const MlpActivationKernel& kernel = selected->mlp_activation[kind][dtype];
  const auto run = grad ? kernel.backward : kernel.forward;
  const bool by_rows = kind == kSwiglu;
  py::gil_scoped_release nogil;
  parallel_for(threads, by_rows ? rows : rows * n, 1 + kElementsPerThread / (by_rows ? n + 1 : 1),
               [&](int64_t begin, int64_t end, int) { run(m, begin, end); });
}

// parts: the addresses and strides over batch, heads and tokens of queries, keys and values.
void rotary(int dtype, bool back, int64_t batch, int64_t tokens, int64_t heads, int64_t size, uintptr_t qkv,
            uintptr_t rotation, const std::array<std::array<int64_t, 4>, 3>& parts, int threads) {
  Rotary r = {tokens, heads, size, address<void>(qkv), address<void>(rotation), {}};
  for (int i = 0; i < 3; ++i) {
    const auto& [data, of_batch, of_head, of_token] = parts[i];
    r.parts[i] = {address<void>(uintptr_t(data)), of_batch, of_head, of_token};
  }
  const RotaryKernel run = selected->rotary_heads[back][dtype];
  py::gil_scoped_release nogil;
  parallel_for(threads, batch * tokens, 1 + kElementsPerThread / (3 * heads * size + 1),
               [&](int64_t begin, int64_t end, int) { run(r, begin, end); });
}

Stack stack_of(int64_t members, int64_t depth, int64_t rows, int64_t n, uintptr_t weight,
               int64_t weight_member, int64_t weight_layer, uintptr_t x, uintptr_t y, uintptr_t inputs,
               uintptr_t signs, uintptr_t inverses, int64_t block_layers, const std::string& norm,
               bool activate_first, double scale, uintptr_t scales, double p, double q,
               bool mean_subtract) {
  Stack s{};
  s.members = members, s.rows = rows, s.n = n, s.layer_end = depth;
  s.weight = address<void>(weight), s.weight_member = weight_member, s.weight_layer = weight_layer;
  s.x = address<void>(x), s.y = address<void>(y);
  s.inputs = address<void>(inputs), s.inputs_member = depth * rows * n;
  s.signs = address<uint8_t>(signs), s.signs_member = depth * rows * ((n + 7) / 8);
  s.inverses = address<void>(inverses), s.inverses_member = depth / block_layers * rows;
  s.block = {block_layers, !norm.empty(), norm == "layer", activate_first};
  s.scale = scale, s.scales = address<const double>(scales);
  s.p = p, s.q = q, s.mean_subtract = mean_subtract;
  return s;
}

void residual_stack_forward(int dtype, int64_t members, int64_t depth, int64_t rows, int64_t n,
                            uintptr_t weight, int64_t weight_member, int64_t weight_layer, uintptr_t x,
                            uintptr_t y, uintptr_t inputs, uintptr_t signs, uintptr_t inverses,
                            int64_t block_layers, const std::string& norm, bool activate_first,
                            double scale, uintptr_t scales, double p, double q, bool mean_subtract,
                            int threads) {
  const Stack s = stack_of(members, depth, rows, n, weight, weight_member, weight_layer, x, y, inputs,
                           signs, inverses, block_layers, norm, activate_first, scale, scales, p, q,
                           mean_subtract);
  py::gil_scoped_release nogil;
  stack_forward(*selected->residual_stack[dtype], s, threads);
}

void residual_stack_backward(int dtype, int64_t members, int64_t depth, int64_t rows, int64_t n,
                             uintptr_t weight, int64_t weight_member, int64_t weight_layer, uintptr_t grad,
                             uintptr_t grad_x, uintptr_t inputs, uintptr_t signs, uintptr_t inverses,
                             int64_t block_layers, const std::string& norm, bool activate_first,
                             uintptr_t weight_grad, int64_t weight_grad_member, double scale,
                             uintptr_t scales, double p, double q, bool mean_subtract, int threads) {
  Stack s = stack_of(members, depth, rows, n, weight, weight_member, weight_layer, grad, grad_x, inputs,
                     signs, inverses, block_layers, norm, activate_first, scale, scales, p, q,
                     mean_subtract);
  s.weight_grad = address<void>(weight_grad), s.weight_grad_member = weight_grad_member;
  py::gil_scoped_release nogil;
  stack_backward(*selected->residual_stack[dtype], s, threads);
}

// c = a b in every member, of float (dtype 0) or double (1); see Product.
void linear(int dtype, int64_t members, int64_t rows, int64_t columns, int64_t depth, uintptr_t a,
            int64_t a_member, int64_t a_row, int64_t a_step, uintptr_t b, int64_t b_member, int64_t b_step,
            int64_t b_column, uintptr_t c, int threads) {
  const Product p = {members,  rows,   columns,  depth, address<const void>(a), a_member, a_row, a_step,
                     address<const void>(b), b_member, b_step, b_column, address<void>(c)};
  const int64_t bytes = members * rows * columns * (dtype == 0 ? 4 : 8);
  py::gil_scoped_release nogil;
  prefer_huge_pages(p.c, bytes);
  multiply(selected->product[dtype], p, threads);
}

// Whether all indices are in range.
bool embedding_sum_forward(int dtype, int64_t members, int64_t rows, int64_t active, int64_t features,
                           int64_t n, uintptr_t index, int64_t index_member, uintptr_t table, uintptr_t y,
                           int threads) {
  const Embedding e = {members, rows, active, features, n, address<const int64_t>(index), index_member};
  py::gil_scoped_release nogil;
  return dtype == 0 ? embedding_forward(e, address<const float>(table), address<float>(y), threads)
                    : embedding_forward(e, address<const double>(table), address<double>(y), threads);
}

void embedding_sum_backward(int dtype, int64_t members, int64_t rows, int64_t active, int64_t features,
                            int64_t n, uintptr_t index, int64_t index_member, uintptr_t grad,
                            uintptr_t table_grad, int threads) {
  const Embedding e = {members, rows, active, features, n, address<const int64_t>(index), index_member};
  py::gil_scoped_release nogil;
  prefer_huge_pages(address<void>(table_grad), members * features * n * (dtype == 0 ? 4 : 8));
  if (dtype == 0) embedding_backward(e, address<const float>(grad), address<float>(table_grad), threads);
  else embedding_backward(e, address<const double>(grad), address<double>(table_grad), threads);
}

// `count` rows of StepTensor, scales (3, slices) and the rows of StepGroup that they refer to.
void optimizer_step(const std::string& rule, uintptr_t tensors, int64_t count, uintptr_t scales,
                    int64_t slices, uintptr_t groups, double grad_scale, double max_norm, int threads) {
  const StepTables tables = {address<const StepTensor>(tensors), count, address<const double>(scales), slices,
                             address<const StepGroup>(groups)};
  py::gil_scoped_release nogil;
  (rule == "adam" ? adam_step : sgd_step)(*selected, tables, grad_scale, max_norm, threads);
}

}  // namespace

// Float operations a second of multiply-adds in the registers of `threads` cores.
double fma_peak(double seconds, int threads) {
  using Clock = std::chrono::steady_clock;
  const PeakKernel& peak = *selected->peak;
  py::gil_scoped_release nogil;
  for (int64_t iterations = 1 << 12;; iterations *= 2) {
    const auto start = Clock::now();
    parallel_for(threads, threads, 1, [&](int64_t, int64_t, int) {
      volatile float kept = peak.run(iterations);
      (void)kept;
    });
    const std::chrono::duration<double> taken = Clock::now() - start;
    if (taken.count() >= seconds)
      return double(peak.operations) * double(iterations) * threads / taken.count();
  }
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of depthnet, on raw addresses; use depthnet.kernels.";
  keep_freed_memory();
  m.def("isas", &isas, "Names of the instruction sets that can run here, narrowest first.");
  m.def("select_isa", &select_isa);
  m.def("selected_isa", [] { return selected ? selected->name : ""; });
  m.def("have_threads", &have_threads);
  m.def("residual_forward", &residual_forward);
  m.def("residual_backward", &residual_backward);
  m.def("residual_norm_forward", &residual_norm_forward);
  m.def("residual_norm_backward", &residual_norm_backward);
  m.def("mlp_activation", &mlp_activation);
  m.def("rotary", &rotary);
  m.def("residual_stack_forward", &residual_stack_forward);
  m.def("residual_stack_backward", &residual_stack_backward);
  m.def("linear", &linear);
  m.def("embedding_sum_forward", &embedding_sum_forward);
  m.def("embedding_sum_backward", &embedding_sum_backward);
  m.def("optimizer_step", &optimizer_step);
  m.def("describe", &describe);
  m.def("describe_step", &describe_step);
  m.def("use_exchange_api", &use_exchange_api);
  m.def("fma_peak", &fma_peak);
}

}  // namespace depthnet
