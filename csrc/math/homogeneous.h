// The family of positively 1-homogeneous activations,
//     phi(h) = p * max(h, 0) + q * max(-h, 0) = h * slope(h),   slope(h) = h >= 0 ? p : -q.
// V is a scalar or a SIMD vector, Mask the type of its comparisons.
#pragma once

#ifdef __CUDACC__
#define DEPTHNET_HD static __host__ __device__ inline
#else
// Internal linkage: each instruction set keeps a copy of its own, which the linker cannot merge.
#define DEPTHNET_HD static inline
#endif

namespace depthnet {

// NaN compares false: its slope is -q and phi(NaN) is NaN.
template <class Mask, class V>
DEPTHNET_HD V slope(Mask nonnegative, V p, V minus_q) {
  return nonnegative ? p : minus_q;
}

// The scaled residual update; z = phi(h) and z_mean its mean over the row.
template <class V>
DEPTHNET_HD V residual_update(V x, V z, V z_mean, V scale) {
  return x + scale * (z - z_mean);
}

// Backward of residual_update with respect to h; g is the incoming gradient and g_mean
// its mean over the row (mean subtraction is its own adjoint).
template <class V>
DEPTHNET_HD V residual_gradient(V g, V g_mean, V scale, V slope_of_h) {
  return scale * (g - g_mean) * slope_of_h;
}

}  // namespace depthnet
