// Stochastic gradient descent.  V is a scalar or a SIMD vector.
#pragma once

#include "step.h"

namespace depthnet {

// What the elements of a slice share.
template <class V>
struct SgdConstants {
  SharedConstants<V> shared;
  V momentum, one_minus_dampening;
  V lr;
};

template <class V, class F>
DEPTHNET_HD auto map(const SgdConstants<V>& c, F f) -> SgdConstants<decltype(f(c.lr))> {
  return {map(c.shared, f), f(c.momentum), f(c.one_minus_dampening), f(c.lr)};
}

// The first gradient of a momentum buffer is not dampened.
DEPTHNET_HD SgdConstants<double> sgd_constants(const StepGroup& group, double group_lr,
                                               const StepSlice& slice, bool fresh, double factor) {
  const double lr = group_lr * slice.lr;
  return {shared_constants(group, lr, slice, factor),
          group.beta1,
          fresh ? 1 : 1 - group.beta2,
          lr};
}

// g is step_gradient(), b the momentum buffer; returns the direction of the step.
template <class V>
DEPTHNET_HD V sgd_momentum(V g, V& b, bool nesterov, const SgdConstants<V>& c) {
  b = c.momentum * b + c.one_minus_dampening * g;
  return nesterov ? g + c.momentum * b : b;
}

template <class V>
DEPTHNET_HD V sgd_moved(V p, V direction, const SgdConstants<V>& c) {
  return p * c.shared.shrink - c.lr * direction;
}

}  // namespace depthnet
