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

struct Isa {
  const char* name;
  ResidualKernel residual_forward[kDTypes];
  ResidualKernel residual_backward[kDTypes];
};

namespace baseline { extern const Isa isa; }
#ifdef DEPTHNET_HAVE_AVX512
namespace avx2 { extern const Isa isa; }
namespace avx512 { extern const Isa isa; }
#endif

// The sets that this CPU can run, narrowest first; returns their number.
int available_isas(const Isa* out[3]);

}  // namespace depthnet
