// Optimizer steps on the CPU: one pass over a chunk's memory.  Compiled once per instruction set;
// everything here has internal linkage or lives in the set's namespace.
#include "kernels.h"
#include "math/optimizer.h"
#include "simd.h"

namespace depthnet {
namespace DEPTHNET_ISA {
namespace {

// Calls step(p, g, s0, s1) on pointers to kStep elements of the parameter, its gradient and its
// `States` state tensors, for each step of a chunk.
template <class T, int States, class Step>
void for_each_step(const Chunk& c, const Step& step) {
  T* param = static_cast<T*>(c.param);
  const T* grad = static_cast<const T*>(c.grad);
  T* s0 = static_cast<T*>(c.state[0]);
  T* s1 = static_cast<T*>(c.state[1]);
  int64_t i = c.begin;
  for (; i + kStep <= c.end; i += kStep)
    step(param + i, grad + i, States > 0 ? s0 + i : nullptr, States > 1 ? s1 + i : nullptr);
  if (const int64_t rest = c.end - i) {
    const size_t bytes = size_t(rest) * sizeof(T);
    Padded<T> p(param + i, rest), g(grad + i, rest);
    Padded<T> a(States > 0 ? s0 + i : param + i, rest), b(States > 1 ? s1 + i : param + i, rest);
    step(p.values, g.values, a.values, b.values);
    std::memcpy(param + i, p.values, bytes);
    if (States > 0) std::memcpy(s0 + i, a.values, bytes);
    if (States > 1) std::memcpy(s1 + i, b.values, bytes);
  }
}

double power(double base, double exponent) { return __builtin_pow(base, exponent); }

template <class T, class C = Compute<T>>
void adamw(const Chunk& c, const StepOptions& o) {
  const AdamConstants<Vec<C>> constants = {
      broadcast(C(o.decoupled ? 1 - c.lr * c.weight_decay : 1)),
      broadcast(C(o.decoupled ? 0 : c.weight_decay)),
      broadcast(C(1 - o.beta1)),
      broadcast(C(o.beta2)),
      broadcast(C(1 - o.beta2)),
      broadcast(C(1 / __builtin_sqrt(1 - power(o.beta2, c.step)))),
      broadcast(C(c.lr / (1 - power(o.beta1, c.step)))),
      broadcast(C(c.eps)),
  };
  const auto root = [](Vec<C> v) { return square_root(v); };
  for_each_step<T, 2>(c, [&](T* param, const T* grad, T* exp_avg, T* exp_avg_sq) {
    for (int i = 0; i < kStep; i += kLanes<C>) {
      Vec<C> p = load(param + i), m = load(exp_avg + i), v = load(exp_avg_sq + i);
      adam_update(p, load(grad + i), m, v, constants, root);
      store(param + i, p);
      store(exp_avg + i, m);
      store(exp_avg_sq + i, v);
    }
  });
}

template <class T, class C = Compute<T>>
void sgd(const Chunk& c, const StepOptions& o) {
  const SgdConstants<Vec<C>> constants = {
      broadcast(C(o.decoupled ? 1 - c.lr * c.weight_decay : 1)),
      broadcast(C(o.decoupled ? 0 : c.weight_decay)),
      broadcast(C(o.momentum)),
      broadcast(C(1 - o.dampening)),
      broadcast(C(c.lr)),
  };
  if (!c.state[0])
    return for_each_step<T, 0>(c, [&](T* param, const T* grad, T*, T*) {
      for (int i = 0; i < kStep; i += kLanes<C>) {
        Vec<C> p = load(param + i);
        sgd_update(p, load(grad + i), constants);
        store(param + i, p);
      }
    });
  for_each_step<T, 1>(c, [&](T* param, const T* grad, T* buffer, T*) {
    for (int i = 0; i < kStep; i += kLanes<C>) {
      Vec<C> p = load(param + i), b = load(buffer + i);
      sgd_update(p, load(grad + i), b, o.nesterov, constants);
      store(param + i, p);
      store(buffer + i, b);
    }
  });
}

}  // namespace

const StepKernel adamw_step[kDTypes] = {adamw<float>, adamw<double>, adamw<bfloat16>, adamw<float16>};
const StepKernel sgd_step[kDTypes] = {sgd<float>, sgd<double>, sgd<bfloat16>, sgd<float16>};

}  // namespace DEPTHNET_ISA
}  // namespace depthnet
