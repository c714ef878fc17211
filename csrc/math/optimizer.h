// One element's optimizer step.  V is a scalar or a SIMD vector; the constants are those of its slice.
#pragma once

#include "homogeneous.h"

namespace depthnet {

template <class V>
struct AdamConstants {
  V shrink;           // decoupled decay: 1 - lr * weight_decay
  V coupled;          // coupled decay: weight_decay
  V one_minus_beta1, beta2, one_minus_beta2;
  V inverse_root_bias2;  // 1 / sqrt(1 - beta2^t)
  V step_size;           // lr / (1 - beta1^t)
  V eps;
};

template <class V, class Sqrt>
DEPTHNET_HD void adam_update(V& p, V g, V& m, V& v, const AdamConstants<V>& c, Sqrt square_root) {
  g = g + c.coupled * p;
  p = p * c.shrink;
  m = m + c.one_minus_beta1 * (g - m);
  v = c.beta2 * v + c.one_minus_beta2 * g * g;
  p = p - c.step_size * (m / (square_root(v) * c.inverse_root_bias2 + c.eps));
}

template <class V>
struct SgdConstants {
  V shrink, coupled;  // as above
  V momentum, one_minus_dampening;
  V lr;
};

// With momentum; b is the momentum buffer.
template <class V>
DEPTHNET_HD void sgd_update(V& p, V g, V& b, bool nesterov, const SgdConstants<V>& c) {
  g = g + c.coupled * p;
  b = c.momentum * b + c.one_minus_dampening * g;
  p = p * c.shrink - c.lr * (nesterov ? g + c.momentum * b : b);
}

// Without.
template <class V>
DEPTHNET_HD void sgd_update(V& p, V g, const SgdConstants<V>& c) {
  p = p * c.shrink - c.lr * (g + c.coupled * p);
}

}  // namespace depthnet
