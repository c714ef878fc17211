// Between the matrix products of a transformer's block: mlp_activation and rotary.  Compiled once per
// instruction set, as residual.cpp.
#include "kernels.h"
#include "sums.h"

namespace depthnet {
namespace DEPTHNET_ISA {
namespace {

using V = Vec<float>;

inline V absolute(V v) { return (V)((Word)v & 0x7fffffffu); }
// Where the tails of a normal variable are 0, so that they are no 0 times infinity.
inline V bounded(V v) { return v > 40.f ? broadcast(40.f) : v < -40.f ? broadcast(-40.f) : v; }

// exp(v) for v <= 0; 0 where it would soon be subnormal.
inline V exp_of_negative(V v) {
  const V least = broadcast(-87.3f);
  // In powers of two: the sum with 1.5 * 2^23 has the nearest integer in its last bits.
  const V shifted = v * 1.44269504f + 12582912.f;
  const V steps = shifted - 12582912.f;
  const V r = (v - steps * 0.693359375f) + steps * 2.12194440e-4f;  // minus steps * log 2
  V series = broadcast(1.f / 5040);
  series = series * r + 1.f / 720;
  series = series * r + 1.f / 120;
  series = series * r + 1.f / 24;
  series = series * r + 1.f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.f;
  series = series * r + 1.f;
  const V result = (V)((Word)series + ((Word)shifted << 23));
  return v < least ? V{} : v == v ? result : v;
}

// Of a normal variable: the probability beyond |x|, and the density at x.
struct Normal { V tail, density; };
inline Normal normal(V x) {
  const V a = absolute(x);
  const V e = exp_of_negative(-0.5f * x * x);
  // exp(a^2 / 2) * tail is a polynomial in t = 1 / (1 + 0.27 a), here the one whose greatest relative error
  // for a in [0, 14], 2.4e-8, is the least.
  const V t = 1.f / (1.f + 0.27f * a);
  V series = broadcast(0.02891527089f);
  series = series * t - 0.1262552479f;
  series = series * t + 0.1692913687f;
  series = series * t - 0.0686209312f;
  series = series * t + 0.107399395f;
  series = series * t + 0.07224030791f;
  series = series * t + 0.1017591603f;
  series = series * t + 0.1075505071f;
  series = series * t + 0.107720181f;
  return {series * t * e, 0.398942280f * e};
}

inline V sigmoid(V x) {
  const V e = exp_of_negative(-absolute(x));
  return (x >= 0 ? broadcast(1.f) : e) / (1.f + e);
}

template <class T>
void gelu(const MlpActivation& m, int64_t begin, int64_t end) {
  const T* h = static_cast<const T*>(m.h);
  T* y = static_cast<T*>(m.out);
  for_vectors<float>(end - begin, [&](int64_t i, int64_t count) {
    const V x = load_some(h + begin + i, count);
    store_some(y + begin + i, (x < 0 ? V{} : x) - absolute(bounded(x)) * normal(x).tail, count);
  });
}

template <class T>
void gelu_backward(const MlpActivation& m, int64_t begin, int64_t end) {
  const T *h = static_cast<const T*>(m.h), *grad = static_cast<const T*>(m.grad);
  T* out = static_cast<T*>(m.out);
  for_vectors<float>(end - begin, [&](int64_t i, int64_t count) {
    const V x = load_some(h + begin + i, count);
    const Normal at = normal(x);
    const V slope = (x >= 0 ? 1.f - at.tail : at.tail) + bounded(x) * at.density;
    store_some(out + begin + i, load_some(grad + begin + i, count) * slope, count);
  });
}

template <class T>
void absolute_value(const MlpActivation& m, int64_t begin, int64_t end) {
  const T* h = static_cast<const T*>(m.h);
  T* y = static_cast<T*>(m.out);
  for_vectors<float>(end - begin, [&](int64_t i, int64_t count) {
    store_some(y + begin + i, absolute(load_some(h + begin + i, count)), count);
  });
}

template <class T>
void absolute_value_backward(const MlpActivation& m, int64_t begin, int64_t end) {
  const T *h = static_cast<const T*>(m.h), *grad = static_cast<const T*>(m.grad);
  T* out = static_cast<T*>(m.out);
  for_vectors<float>(end - begin, [&](int64_t i, int64_t count) {
    const V x = load_some(h + begin + i, count), g = load_some(grad + begin + i, count);
    store_some(out + begin + i, x > 0 ? g : x < 0 ? -g : g * 0.f, count);
  });
}

template <class T>
void swiglu(const MlpActivation& m, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(m.h) + 2 * row * m.n;
    const T* up = gate + m.n;
    T* y = static_cast<T*>(m.out) + row * m.n;
    for_vectors<float>(m.n, [&](int64_t i, int64_t count) {
      const V x = load_some(gate + i, count);
      store_some(y + i, x * sigmoid(x) * load_some(up + i, count), count);
    });
  }
}

template <class T>
void swiglu_backward(const MlpActivation& m, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(m.h) + 2 * row * m.n;
    const T *up = gate + m.n, *grad = static_cast<const T*>(m.grad) + row * m.n;
    T* gate_grad = static_cast<T*>(m.out) + 2 * row * m.n;
    T* up_grad = gate_grad + m.n;
    for_vectors<float>(m.n, [&](int64_t i, int64_t count) {
      const V x = load_some(gate + i, count), g = load_some(grad + i, count);
      const V on = sigmoid(x), silu = x * on;
      store_some(gate_grad + i, g * load_some(up + i, count) * (on + silu * (1.f - on)), count);
      store_some(up_grad + i, g * silu, count);
    });
  }
}

// The heads of one token, from its row of `qkv` to where its queries, keys and values are, or back.
template <class T, bool Back>
void rotary(const Rotary& r, int64_t begin, int64_t end) {
  const int64_t half = r.size / 2;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = row % r.tokens;
    const float* cos = static_cast<const float*>(r.rotation) + token * 2 * r.size;
    const float* sin = cos + r.size;
    T* joint = static_cast<T*>(r.qkv) + row * 3 * r.heads * r.size;
    for (const HeadsOf& part : r.parts) {
      T* heads = static_cast<T*>(part.data) + row / r.tokens * part.batch + token * part.token;
      for (int64_t head = 0; head < r.heads; ++head, joint += r.size) {
        T* apart = heads + head * part.head;
        const T* from = Back ? apart : joint;
        T* to = Back ? joint : apart;
        if (&part == &r.parts[2]) {  // values
          std::memcpy(to, from, size_t(r.size) * sizeof(T));
          continue;
        }
        for_vectors<float>(half, [&](int64_t i, int64_t count) {
          const V first = load_some(from + i, count), second = load_some(from + half + i, count);
          const V a = load_some(sin + i, count), b = load_some(sin + half + i, count);
          store_some(to + i, first * load_some(cos + i, count) + second * (Back ? b : a), count);
          store_some(to + half + i, second * load_some(cos + half + i, count) + first * (Back ? a : b),
                     count);
        });
      }
    }
  }
}

}  // namespace

#define DEPTHNET_MLP(kind) \
  {{kind<float>, kind##_backward<float>}, {}, {kind<bfloat16>, kind##_backward<bfloat16>}, \
   {kind<float16>, kind##_backward<float16>}}

const MlpActivationKernel mlp_activation[kMlps][kDTypes] = {
    DEPTHNET_MLP(gelu), DEPTHNET_MLP(absolute_value), DEPTHNET_MLP(swiglu)};

#define DEPTHNET_ROTARY(back) \
  {rotary<float, back>, nullptr, rotary<bfloat16, back>, rotary<float16, back>}

const RotaryKernel rotary_heads[2][kDTypes] = {DEPTHNET_ROTARY(false), DEPTHNET_ROTARY(true)};

}  // namespace DEPTHNET_ISA
}  // namespace depthnet
