// residual_norm on the CPU: rows are read once from memory, and from the nearest cache in the passes after
// the first.  Compiled once per instruction set, as residual.cpp.
#include "kernels.h"
#include "sums.h"

namespace depthnet {
namespace DEPTHNET_ISA {
namespace {

// Parameters that may be missing: as if they were all `otherwise`.
template <class C>
Vec<C> load_or(const C* from, int64_t i, int64_t count, Vec<C> otherwise) {
  return from ? load_some(from + i, count) : otherwise;
}

template <class T, class B, bool Center, class C = Compute<T>>
void forward(const ResidualNorm& r, int64_t begin, int64_t end) {
  const int64_t n = r.n;
  const C* weight = static_cast<const C*>(r.weight);
  const C* bias = static_cast<const C*>(r.bias);
  C* means = static_cast<C*>(r.statistics);
  C* rstds = means && Center ? means + r.rows : means;
  const Vec<C> scale = broadcast(C(r.scale)), one = broadcast(C(1));
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(r.x) + row * n;
    const B* branch = static_cast<const B*>(r.branch) + row * n;
    T* s = static_cast<T*>(r.s) + row * n;
    B* y = static_cast<B*>(r.y) + row * n;

    double sums[1], mean_of_row = 0;
    row_sums<C>(n, sums, [&](int64_t i, int64_t count, Vec<C>* partial) {
      Vec<C> v = load_some(x + i, count) + scale * load_some(branch + i, count);
      store_some(s + i, v, count);
      if (sizeof(T) < sizeof(C)) v = load_some(s + i, count);  // as it was rounded
      partial[0] += Center ? v : v * v;
    });
    if (Center) mean_of_row = sums[0] / double(n);
    const Vec<C> mean = broadcast(C(mean_of_row));
    if (Center)
      row_sums<C>(n, sums, [&](int64_t i, int64_t count, Vec<C>* partial) {
        Vec<C> v = load_some(s + i, count) - mean;
        if (count < kLanes<C>) v = from_bits<C>((uint32_t(1) << count) - 1) ? v : Vec<C>{};
        partial[0] += v * v;
      });
    const C rstd_of_row = C(1 / __builtin_sqrt(sums[0] / double(n) + r.eps));
    if (rstds) rstds[row] = rstd_of_row;
    if (rstds && Center) means[row] = mean[0];

    const Vec<C> rstd = broadcast(rstd_of_row);
    for_vectors<C>(n, [&](int64_t i, int64_t count) {
      const Vec<C> normalized = (load_some(s + i, count) - mean) * rstd;
      store_some(y + i, normalized * load_or(weight, i, count, one) + load_or(bias, i, count, Vec<C>{}),
                 count);
    });
  }
}

template <class C>
C* zeros(void* array, int64_t chunk, int64_t n) {
  if (!array) return nullptr;
  C* sums = static_cast<C*>(array) + chunk * n;
  std::memset(sums, 0, size_t(n) * sizeof(C));
  return sums;
}

template <class C>
void add(C* to, Vec<C> v, int64_t count) {
  store_some(to, load_some(to, count) + v, count);
}

template <class T, class B, bool Center, class C = Compute<T>>
void backward(const ResidualNormBackward& r, int64_t chunk_begin, int64_t chunk_end) {
  const int64_t n = r.n;
  const C* weight = static_cast<const C*>(r.weight);
  const C* means = static_cast<const C*>(r.statistics);
  const C* rstds = Center ? means + r.rows : means;
  const Vec<C> scale = broadcast(C(r.scale)), one = broadcast(C(1));
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    C* weight_sums = zeros<C>(r.weight_sums, chunk, n);
    C* bias_sums = zeros<C>(r.bias_sums, chunk, n);
    const int64_t begin = chunk * r.chunk, end = begin + r.chunk < r.rows ? begin + r.chunk : r.rows;
    for (int64_t row = begin; row < end; ++row) {
      const T* grad_s = r.grad_s ? static_cast<const T*>(r.grad_s) + row * n : nullptr;
      const B* grad_y = static_cast<const B*>(r.grad_y) + row * n;
      const T* s = static_cast<const T*>(r.s) + row * n;
      T* grad_x = static_cast<T*>(r.grad_x) + row * n;
      B* grad_branch = static_cast<B*>(r.grad_branch) + row * n;
      const Vec<C> mean = broadcast(Center ? means[row] : C(0)), rstd = broadcast(rstds[row]);

      double sums[2];  // of a = weight * grad_y and of a * normalized
      row_sums<C>(n, sums, [&](int64_t i, int64_t count, Vec<C>* partial) {
        const Vec<C> g = load_some(grad_y + i, count);
        const Vec<C> normalized = (load_some(s + i, count) - mean) * rstd;
        const Vec<C> along = g * normalized, w = load_or(weight, i, count, one);
        if (Center) partial[0] += g * w;
        partial[1] += along * w;
        if (weight_sums) add(weight_sums + i, along, count);
        if (bias_sums) add(bias_sums + i, g, count);
      });
      const Vec<C> a_mean = broadcast(C(sums[0] / double(n)));
      const Vec<C> along_mean = broadcast(C(sums[1] / double(n)));
      for_vectors<C>(n, [&](int64_t i, int64_t count) {
        const Vec<C> a = load_some(grad_y + i, count) * load_or(weight, i, count, one);
        const Vec<C> normalized = (load_some(s + i, count) - mean) * rstd;
        Vec<C> g = rstd * (a - a_mean - normalized * along_mean);
        if (grad_s) g += load_some(grad_s + i, count);
        store_some(grad_x + i, g, count);
        store_some(grad_branch + i, scale * g, count);
      });
    }
  }
}

template <class T, class B, bool Center>
constexpr ResidualNormKernel kernel() {
  return {forward<T, B, Center>, backward<T, B, Center>};
}

}  // namespace

#define DEPTHNET_RESIDUAL_NORM(center)                                                             \
  {{kernel<float, float, center>(), {}, kernel<float, bfloat16, center>(),                         \
    kernel<float, float16, center>()},                                                             \
   {{}, kernel<double, double, center>(), {}, {}},                                                 \
   {{}, {}, kernel<bfloat16, bfloat16, center>(), {}},                                             \
   {{}, {}, {}, kernel<float16, float16, center>()}}

const ResidualNormKernel residual_norm[2][kDTypes][kDTypes] = {DEPTHNET_RESIDUAL_NORM(false),
                                                               DEPTHNET_RESIDUAL_NORM(true)};

}  // namespace DEPTHNET_ISA
}  // namespace depthnet
