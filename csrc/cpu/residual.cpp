// scaled_residual on the CPU: two passes over each row, the second from cache.  Compiled once per
// instruction set; everything here has internal linkage or lives in the set's namespace.
#include "kernels.h"
#include "math/homogeneous.h"
#include "simd.h"
#include "sums.h"

namespace depthnet {
namespace DEPTHNET_ISA {
namespace {

// Calls step(values, offset, valid, partial) for each step of a row, the last one padded with zeros, and
// returns the sum of what the calls add to their partial sums.
template <class T, class C = Compute<T>, class Step>
double row_sum(const T* row, int64_t n, const Step& step) {
  const int64_t whole = n - n % kStep;
  double result = 0;
  for (int64_t block = 0; block < whole; block += kSumBlock) {
    Vec<C> partial[4]{};
    const int64_t block_end = block + kSumBlock < whole ? block + kSumBlock : whole;
    for (int64_t i = block; i < block_end; i += kStep) step(row + i, i, kStep, partial);
    result += total<C>(partial);
  }
  if (const int64_t rest = n - whole) {
    Vec<C> partial[4]{};
    step(Padded<T>(row + whole, rest).values, whole, rest, partial);
    result += total<C>(partial);
  }
  return result;
}

// Bits of h >= 0 for one step, and phi(h) added to the partial sums.
template <class T, class C = Compute<T>>
uint32_t sign_step(const T* h, Vec<C> p, Vec<C> minus_q, Vec<C>* partial) {
  uint32_t bits = 0;
  for (int i = 0; i < kStep / kLanes<C>; ++i) {
    Vec<C> v = load(h + i * kLanes<C>);
    Mask<C> nonnegative = v >= Vec<C>{};
    bits |= to_bits(nonnegative) << (i * kLanes<C>);
    partial[i & 3] += v * slope(nonnegative, p, minus_q);
  }
  return bits;
}

template <class T, class C = Compute<T>>
void add_step(const T* x, const T* h, T* y, Vec<C> scale, Vec<C> mean, Vec<C> p, Vec<C> minus_q) {
  for (int i = 0; i < kStep / kLanes<C>; ++i) {
    Vec<C> v = load(h + i * kLanes<C>);
    Vec<C> z = v * slope(v >= Vec<C>{}, p, minus_q);
    store(y + i * kLanes<C>, residual_update(load(x + i * kLanes<C>), z, mean, scale));
  }
}

template <class T, class C = Compute<T>>
void forward(const Residual& r, int64_t begin, int64_t end) {
  const int64_t n = r.n, whole = n - n % kStep, rest = n - whole, sign_bytes = (n + 7) / 8;
  const Vec<C> p = broadcast(C(r.p)), minus_q = broadcast(C(-r.q));
  for (int64_t index = begin; index < end; ++index) {
    const int64_t member = index / r.rows, row = index % r.rows;
    const T* x = static_cast<const T*>(r.x) + member * r.x_stride + row * n;
    const T* h = static_cast<const T*>(r.h) + member * r.h_stride + row * n;
    T* y = static_cast<T*>(r.out) + member * r.out_stride + row * n;

    Vec<C> mean{};
    if (r.signs || r.mean_subtract) {
      uint8_t* signs = r.signs ? r.signs + member * r.signs_stride + row * sign_bytes : nullptr;
      const double z_sum = row_sum(h, n, [&](const T* values, int64_t i, int64_t valid, Vec<C>* partial) {
        uint32_t bits = sign_step(values, p, minus_q, partial);
        if (valid < kStep) bits &= (uint32_t(1) << valid) - 1;
        if (signs) std::memcpy(signs + i / 8, &bits, size_t(valid + 7) / 8);
      });
      if (r.mean_subtract) mean = broadcast(C(z_sum / double(n)));
    }

    const Vec<C> scale = broadcast(C(multiplier(r, member)));
    for (int64_t i = 0; i < whole; i += kStep) add_step(x + i, h + i, y + i, scale, mean, p, minus_q);
    if (rest) {
      Padded<T> last(x + whole, rest);
      add_step(last.values, Padded<T>(h + whole, rest).values, last.values, scale, mean, p, minus_q);
      std::memcpy(y + whole, last.values, size_t(rest) * sizeof(T));
    }
  }
}

template <class T, class C = Compute<T>>
void sum_step(const T* g, Vec<C>* partial) {
  for (int i = 0; i < kStep / kLanes<C>; ++i) partial[i & 3] += load(g + i * kLanes<C>);
}

template <class T, class C = Compute<T>>
void gradient_step(const T* g, uint32_t bits, T* out, Vec<C> scale, Vec<C> mean, Vec<C> p,
                   Vec<C> minus_q) {
  for (int i = 0; i < kStep / kLanes<C>; ++i) {
    Vec<C> slope_of_h = slope(from_bits<C>(bits >> (i * kLanes<C>)), p, minus_q);
    Vec<C> v = load(g + i * kLanes<C>);
    store(out + i * kLanes<C>, residual_gradient(v, mean, scale, slope_of_h));
  }
}

template <class T, class C = Compute<T>>
void backward(const Residual& r, int64_t begin, int64_t end) {
  const int64_t n = r.n, whole = n - n % kStep, rest = n - whole, sign_bytes = (n + 7) / 8;
  const Vec<C> p = broadcast(C(r.p)), minus_q = broadcast(C(-r.q));
  for (int64_t index = begin; index < end; ++index) {
    const int64_t member = index / r.rows, row = index % r.rows;
    const T* g = static_cast<const T*>(r.h) + member * r.h_stride + row * n;
    T* out = static_cast<T*>(r.out) + member * r.out_stride + row * n;
    const uint8_t* signs = r.signs + member * r.signs_stride + row * sign_bytes;

    Vec<C> mean{};
    if (r.mean_subtract) {
      const double g_sum = row_sum(g, n, [](const T* values, int64_t, int64_t, Vec<C>* partial) {
        sum_step(values, partial);
      });
      mean = broadcast(C(g_sum / double(n)));
    }

    const Vec<C> scale = broadcast(C(multiplier(r, member)));
    uint32_t bits = 0;
    for (int64_t i = 0; i < whole; i += kStep) {
      std::memcpy(&bits, signs + i / 8, 4);
      gradient_step(g + i, bits, out + i, scale, mean, p, minus_q);
    }
    if (rest) {
      bits = 0;
      std::memcpy(&bits, signs + whole / 8, size_t(sign_bytes - whole / 8));
      Padded<T> last(g + whole, rest);
      gradient_step(last.values, bits, last.values, scale, mean, p, minus_q);
      std::memcpy(out + whole, last.values, size_t(rest) * sizeof(T));
    }
  }
}

}  // namespace

const ResidualKernel residual_forward[kDTypes] = {forward<float>, forward<double>,
                                                  forward<bfloat16>, forward<float16>};
const ResidualKernel residual_backward[kDTypes] = {backward<float>, backward<double>,
                                                   backward<bfloat16>, backward<float16>};

}  // namespace DEPTHNET_ISA
}  // namespace depthnet
