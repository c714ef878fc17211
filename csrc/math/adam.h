// Adam and AdamW.  V is a scalar or a SIMD vector.
#pragma once

#include <cmath>

#include "step.h"

namespace depthnet {

// What the elements of a slice share.
template <class V>
struct AdamConstants {
  SharedConstants<V> shared;
  V beta1, one_minus_beta1, beta2, one_minus_beta2;
  V inverse_root_bias2;  // 1 / sqrt(1 - beta2^t)
  V step_size;           // lr / (1 - beta1^t)
  V eps;
  bool forgets;  // whether a new moment has more of the gradient than of the old moment
};

template <class V, class F>
DEPTHNET_HD auto map(const AdamConstants<V>& c, F f) -> AdamConstants<decltype(f(c.eps))> {
  return {map(c.shared, f), f(c.beta1), f(c.one_minus_beta1), f(c.beta2), f(c.one_minus_beta2),
          f(c.inverse_root_bias2), f(c.step_size), f(c.eps), c.forgets};
}

// beta^t for both betas.
struct AdamPowers {
  double beta1, beta2;
};
DEPTHNET_HD AdamPowers adam_powers(const StepGroup& group, double step) {
  return {pow(group.beta1, step), pow(group.beta2, step)};
}

// `group_lr` is the group's lr, wherever it is stored; `factor` is grad_factor().
DEPTHNET_HD AdamConstants<double> adam_constants(const StepGroup& group, double group_lr,
                                                 const StepSlice& slice, AdamPowers powers,
                                                 double factor) {
  const double lr = group_lr * slice.lr;
  return {shared_constants(group, lr, slice, factor),
          group.beta1,
          1 - group.beta1,
          group.beta2,
          1 - group.beta2,
          1 / sqrt(1 - powers.beta2),
          lr / (1 - powers.beta1),
          group.eps * slice.eps,
          1 - group.beta1 >= 0.5};
}

template <class V>
DEPTHNET_HD void adam_moments(V p, V g, V& m, V& v, const AdamConstants<V>& c) {
  g = step_gradient(p, g, c.shared);
  // Between the two, from the nearer one: so that neither cancels, and m = g stays.
  m = c.forgets ? g - c.beta1 * (g - m) : m + c.one_minus_beta1 * (g - m);
  v = c.beta2 * v + c.one_minus_beta2 * g * g;
}

// amsgrad: the greatest v so far.  NaN stays, whichever of the two it is.
template <class V>
DEPTHNET_HD V adam_greatest(V greatest, V v) {
  return (v > greatest) | (v != v) ? v : greatest;
}

template <class V, class Sqrt>
DEPTHNET_HD V adam_moved(V p, V m, V v, const AdamConstants<V>& c, Sqrt square_root) {
  return p * c.shared.shrink - c.step_size * (m / (square_root(v) * c.inverse_root_bias2 + c.eps));
}

}  // namespace depthnet
