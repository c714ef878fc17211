// The tables that an optimizer step runs over, laid out alike for CPU and GPU, and what its rules share.
#pragma once

#include <cstdint>

#include "homogeneous.h"

namespace depthnet {

// A row of the table of tensors.  Addresses are 0 for what a tensor does not have.  All tensors of a row
// are laid out alike, without gaps.
struct StepTensor {
  int64_t param, grad;  // storage type
  int64_t state[3];     // compute type.  Adam: exp_avg, exp_avg_sq, max_exp_avg_sq; SGD: momentum buffer
  int64_t master;       // compute type: the parameter before it is rounded to its storage type
  int64_t step;         // float: the steps taken so far; SGD: only for stochastic rounding
  int64_t size;         // elements
  int64_t slices;       // equal parts, one after another, with rates of their own
  int64_t first_slice;  // of this tensor, in the table of slices
  int64_t group;        // in the table of groups
  int64_t dtype;        // storage type, see below
  int64_t fresh;        // SGD: 1 if the momentum buffer, zeros, has not been written yet
  int64_t rounding;     // 16 bits without master: 0, to nearest, or 1 + the tensor's number, at random
};

// Storage types, in the order of the kernel tables.
enum DType { kFloat32, kFloat64, kBFloat16, kFloat16, kDTypes };

struct StepGroup {
  double lr, eps, weight_decay;
  double beta1, beta2;  // SGD: momentum, dampening
  double decoupled, maximize, nesterov;  // 0 or 1
  int64_t lr_address;  // of a float on the GPU that takes the place of lr, or 0
};

// What the rates of a slice are multiplied by.
struct StepSlice {
  double lr, eps, weight_decay;
};

// What gradients are multiplied by; `clip` is 1 or the factor below.
DEPTHNET_HD double grad_factor(const StepGroup& group, double grad_scale, double clip) {
  return (group.maximize != 0 ? -clip : clip) / grad_scale;
}

// The factor that brings gradients of this norm down to `max_norm`; NaN if the norm is.
DEPTHNET_HD double clip_factor(double norm, double max_norm) {
  const double factor = max_norm / (norm + 1e-6);
  return factor >= 1 ? 1 : factor;
}

// What the elements of a slice share under every rule.  V is a scalar or a SIMD vector.
template <class V>
struct SharedConstants {
  V grad_factor;
  V shrink;      // decoupled decay: 1 - lr * weight_decay
  V coupled;     // coupled decay: weight_decay
  bool couples;  // whether there is coupled decay
};

template <class V, class F>
DEPTHNET_HD auto map(const SharedConstants<V>& c, F f) -> SharedConstants<decltype(f(c.shrink))> {
  return {f(c.grad_factor), f(c.shrink), f(c.coupled), c.couples};
}

// `lr` is the slice's, `factor` is grad_factor().
DEPTHNET_HD SharedConstants<double> shared_constants(const StepGroup& group, double lr,
                                                     const StepSlice& slice, double factor) {
  const double weight_decay = group.weight_decay * slice.weight_decay;
  const bool decoupled = group.decoupled != 0;
  return {factor, decoupled ? 1 - lr * weight_decay : 1, decoupled ? 0 : weight_decay,
          !decoupled && weight_decay != 0};
}

// The gradient that a rule goes on with; without decay an infinite p leaves it alone.
template <class V>
DEPTHNET_HD V step_gradient(V p, V g, const SharedConstants<V>& c) {
  g = c.grad_factor * g;
  return c.couples ? g + c.coupled * p : g;
}

// Random bits that depend only on (tensor, step, element): stochastic rounding is the same on every
// backend and any number of threads.  W is a 32-bit unsigned scalar or vector.  The multipliers are
// those of Wellons' hash with the least known bias ("lowbias32").
template <class W>
DEPTHNET_HD W scramble(W x) {
  x = x ^ (x >> 16);
  x = x * 0x7feb352du;
  x = x ^ (x >> 15);
  x = x * 0x846ca68bu;
  return x ^ (x >> 16);
}

// For elements of which `element / 2^32` is `high`.
DEPTHNET_HD uint32_t rounding_key(int64_t rounding, double step, int64_t high) {
  return scramble(scramble(scramble(uint32_t(rounding)) ^ uint32_t(step)) ^ uint32_t(high));
}

template <class W>
DEPTHNET_HD W rounding_bits(W low_element, uint32_t key) {
  return scramble(scramble(low_element) ^ key);
}

}  // namespace depthnet
