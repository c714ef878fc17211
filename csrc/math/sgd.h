// Stochastic gradient descent.  V is a scalar or a SIMD vector.
#pragma once

#include "step.h"

namespace depthnet {

// What the elements of a slice share.
template <class V>
struct SgdConstants {
  V grad_factor;
  V shrink;   // decoupled decay: 1 - lr * weight_decay
  V coupled;  // coupled decay: weight_decay
  V momentum, one_minus_dampening;
  V lr;
  bool couples;  // whether there is coupled decay
};

template <class V, class F>
DEPTHNET_HD auto map(const SgdConstants<V>& c, F f) -> SgdConstants<decltype(f(c.lr))> {
  return {f(c.grad_factor), f(c.shrink), f(c.coupled), f(c.momentum), f(c.one_minus_dampening), f(c.lr),
          c.couples};
}

// The first gradient of a momentum buffer is not dampened.
DEPTHNET_HD SgdConstants<double> sgd_constants(const StepGroup& group, double group_lr,
                                               const StepSlice& slice, bool fresh, double factor) {
  const double lr = group_lr * slice.lr, weight_decay = group.weight_decay * slice.weight_decay;
  const bool decoupled = group.decoupled != 0;
  return {factor,
          decoupled ? 1 - lr * weight_decay : 1,
          decoupled ? 0 : weight_decay,
          group.beta1,
          fresh ? 1 : 1 - group.beta2,
          lr,
          !decoupled && weight_decay != 0};
}

template <class V>
DEPTHNET_HD V sgd_gradient(V p, V g, const SgdConstants<V>& c) {
  g = c.grad_factor * g;
  return c.couples ? g + c.coupled * p : g;
}

// g is sgd_gradient(), b the momentum buffer; returns the direction of the step.
template <class V>
DEPTHNET_HD V sgd_momentum(V g, V& b, bool nesterov, const SgdConstants<V>& c) {
  b = c.momentum * b + c.one_minus_dampening * g;
  return nesterov ? g + c.momentum * b : b;
}

template <class V>
DEPTHNET_HD V sgd_moved(V p, V direction, const SgdConstants<V>& c) {
  return p * c.shrink - c.lr * direction;
}

}  // namespace depthnet
