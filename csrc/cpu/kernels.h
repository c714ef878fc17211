// The kernels that exist once per instruction set, and the table that selects among the sets.
#pragma once

#include <cstdint>

namespace depthnet {

// Storage types, in the order of the kernel tables.
enum DType { kFloat32, kFloat64, kBFloat16, kFloat16, kDTypes };

// y = x + scale * (phi(h) - mean(phi(h))) over rows of n elements, and its backward pass.
// A tensor is `members` blocks of `rows` contiguous rows; a stride, in elements, separates blocks.
struct Residual {
  int64_t members, rows, n;
  const void* x;        // forward only
  const void* h;        // forward: h; backward: the incoming gradient
  void* out;            // forward: y, may be x itself; backward: the gradient of h
  uint8_t* signs;       // ceil(n/8) bytes a row, bit i%8 of byte i/8 is h[i] >= 0; may be null forward
  int64_t x_stride, h_stride, out_stride, signs_stride;
  double scale;                 // times scales[member] where scales is given
  const double* scales;         // one per member, or null
  double p, q;                  // slopes of phi
  bool mean_subtract;
};

// Handles the rows begin .. end of members * rows.
using ResidualKernel = void (*)(const Residual&, int64_t begin, int64_t end);

// A run of elements that share their rates, within one tensor.  Offsets are in elements.
struct Chunk {
  void* param;
  const void* grad;
  void* state[2];  // Adam: exp_avg, exp_avg_sq; SGD: momentum buffer or null
  int64_t begin, end;
  double lr, eps, weight_decay, step;  // step: after this step, from 1 (Adam)
};

struct StepOptions {
  double beta1, beta2;                   // Adam
  double momentum, dampening;            // SGD
  bool nesterov, decoupled;
};

using StepKernel = void (*)(const Chunk&, const StepOptions&);

struct Isa {
  const char* name;
  const ResidualKernel* residual_forward;   // each an array over the dtypes
  const ResidualKernel* residual_backward;
  const StepKernel* adamw_step;
  const StepKernel* sgd_step;
};

#define DEPTHNET_DECLARE_ISA(isa)                              \
  namespace isa {                                              \
  extern const ResidualKernel residual_forward[kDTypes];       \
  extern const ResidualKernel residual_backward[kDTypes];      \
  extern const StepKernel adamw_step[kDTypes];                 \
  extern const StepKernel sgd_step[kDTypes];                   \
  }
DEPTHNET_DECLARE_ISA(baseline)
#ifdef DEPTHNET_HAVE_AVX512
DEPTHNET_DECLARE_ISA(avx2)
DEPTHNET_DECLARE_ISA(avx512)
#endif

// The sets that this CPU can run, narrowest first; returns their number.
int available_isas(const Isa* out[3]);

}  // namespace depthnet
