// The kernels that exist once per instruction set, and the table that selects among the sets.
#pragma once

#include <cstdint>

#include "math/adam.h"
#include "math/sgd.h"

namespace depthnet {

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

// s = x + scale * branch over rows of n elements, and y = (s - mean) * rstd * weight + bias, with the mean
// over the row or 0.  All is contiguous; x and s are of one storage type, branch and y of another.
struct ResidualNorm {
  int64_t rows, n;
  const void *x, *branch;
  void *s, *y;
  void* statistics;           // compute type: the means of all rows, if any, and their rstd; may be null
  const void *weight, *bias;  // compute type, n elements; may be null
  double scale, eps;
};

// Its backward pass.  Rows are cut into chunks, in a way that does not depend on the number of threads.
struct ResidualNormBackward {
  int64_t rows, n;
  const void *grad_s, *grad_y;  // grad_s may be null
  const void *s, *statistics, *weight;
  void *grad_x, *grad_branch;
  void *weight_sums, *bias_sums;  // compute type (chunks, n): sums over each chunk's rows; may be null
  int64_t chunk;                  // rows
  double scale;
};

struct ResidualNormKernel {
  void (*forward)(const ResidualNorm&, int64_t row_begin, int64_t row_end);
  void (*backward)(const ResidualNormBackward&, int64_t chunk_begin, int64_t chunk_end);
};

// What an MLP applies between its products: y = gelu(h), |h|, or silu(gate) * up with the halves of rows of h.
enum Mlp { kGelu, kAbsolute, kSwiglu, kMlps };
struct MlpActivation {
  int64_t n;  // elements in a row of y, of which a row of h has as many or, for kSwiglu, twice as many
  const void *h, *grad;  // grad, of y: backward only
  void* out;             // y; backward: the gradient of h
};

// Handle the rows begin .. end of kSwiglu, or as many elements of the others.
struct MlpActivationKernel {
  void (*forward)(const MlpActivation&, int64_t begin, int64_t end);
  void (*backward)(const MlpActivation&, int64_t begin, int64_t end);
};

// Queries, keys and values of attention out of one product, by heads, the first two turned by their position.
struct HeadsOf { void* data; int64_t batch, head, token; };  // strides in elements
struct Rotary {
  int64_t tokens, heads, size;
  void* qkv;             // (batch, tokens, 3, heads, size), contiguous
  const void* rotation;  // compute type (tokens, 2, size)
  HeadsOf parts[3];      // q, k, v
};

// Handles the tokens begin .. end of all of the batch: from qkv to the parts, or gradients back.
using RotaryKernel = void (*)(const Rotary&, int64_t begin, int64_t end);

// What a residual block computes from x:  phi(W_k .. phi(W_1 norm(x)))  or, where phi comes first,
// W_k phi(.. W_1 phi(x)),  which goes without a norm.
struct Block {
  int64_t layers = 1;   // k
  bool norm = false;    // x / sqrt(mean(x^2) + 1e-5)
  bool center = false;  // before the norm: x - mean(x)
  bool activate_first = false;
};

// The layers layer_begin .. layer_end, whole blocks of them, of  x <- x + scale * (z - mean(z)),  z being
// what a block gives, in `members` networks, and their backward pass.  Tensors are contiguous but for the
// strides that are given, in elements.  The stream type is that which the storage type is computed in.
struct Stack {
  int64_t members, rows, n, layer_begin, layer_end;
  const void* weight;  // storage type (members, layers, n, n)
  int64_t weight_member, weight_layer;
  const void* x;  // stream type (members, rows, n): x_0; backward: the gradient of x_L
  void* y;        // stream type (members, rows, n): x_L; backward: the gradient of x_0, may be x
  void* inputs;   // storage type (members, layers, rows, n): every layer's operand; forward: may be null
  uint8_t* signs;  // (members, layers, rows, ceil(n/8)) of what phi is taken of, in the order in which it
                   // is, as Residual's; forward: null with inputs
  void* inverses;  // stream type (members, blocks, rows): every block's 1/std; null without inputs or norm
  int64_t inputs_member, signs_member, inverses_member;
  void* weight_grad;  // storage type (members, layers, n, n); may be null
  int64_t weight_grad_member;
  double scale;
  const double* scales;
  double p, q;
  bool mean_subtract;
  Block block;

  // The driver's: how the work is cut, and the gradients of h between the two backward passes.
  int64_t panel = 0;   // rows that a thread handles together
  bool past_caches = false;  // inputs are too many to stay there, and are made of whole lines
  int64_t shares = 1;  // parts of a strip of the weight gradient
  void* d = nullptr;   // (members, layers, panels, n, panel); null without weight_grad
};

// Internal linkage, as all that the files of several instruction sets share: see math/homogeneous.h.
static inline int64_t panels_of(const Stack& s) { return (s.rows + s.panel - 1) / s.panel; }

// Whether blocks are phi(W x), so that products read the stream itself.
static inline bool plain(const Stack& s) {
  return s.block.layers == 1 && !s.block.norm && !s.block.activate_first;
}

// The branch multiplier of a member, of a Residual or a Stack.
template <class Operation>
static inline double multiplier(const Operation& op, int64_t member) {
  return op.scales ? op.scale * op.scales[member] : op.scale;
}

// Handles the panels (or strips of the weight gradient, or shares of them) begin .. end of all members.
using StackPass = void (*)(const Stack&, int64_t begin, int64_t end, void* workspace);

struct StackKernel {
  int lanes, most_vectors;  // a panel is 1 .. most_vectors vectors of lanes wide, a strip is the widest
  int outputs;  // features of a block of sums
  int storage_bytes, kept_bytes;  // an element of the storage type and of d
  int64_t (*workspace)(const Stack&);  // bytes that a thread needs
  StackPass forward, backward_data, backward_weight;
};

// C = A B for `members` pairs of matrices of floats or doubles.  Strides are in elements; C is contiguous.
struct Product {
  int64_t members, rows, columns, depth;
  const void* a;  // (members, rows, depth)
  int64_t a_member, a_row, a_step;
  const void* b;  // (members, depth, columns), of which steps or columns are neighbors
  int64_t b_member, b_step, b_column;
  void* c;             // (members, rows, columns)
  int64_t shares = 1;  // the driver's: parts of the rows of a tile
};

// Handles the shares begin .. end of the tiles, `tile_columns` wide, of all members.
struct ProductKernel {
  int64_t tile_columns;
  void (*run)(const Product&, int64_t begin, int64_t end);
};

// A run of elements of one tensor that share their constants: StepTensor's addresses, and the elements
// begin .. end, which all have the same `element / 2^32`.
struct StepRun {
  void* param;
  const void* grad;
  void* state[3];
  void* master;
  int64_t begin, end;
  bool nesterov;          // SGD
  bool stochastic;        // rounding, with the bits of rounding_key
  uint32_t rounding_key;
};

using AdamKernel = void (*)(const StepRun&, const AdamConstants<double>&);
using SgdKernel = void (*)(const StepRun&, const SgdConstants<double>&);
using SquaresKernel = double (*)(const StepRun&);  // the sum of squares of the gradient

// A loop of float multiply-adds, and how many operations an iteration is (a multiply-add being two).
struct PeakKernel {
  int64_t operations;
  float (*run)(int64_t iterations);
};

struct Isa {
  const char* name;
  const ResidualKernel* residual_forward;   // each an array over the dtypes
  const ResidualKernel* residual_backward;
  // [whether there is a mean][storage type of x][that of branch], of which both are the same or x's is float.
  const ResidualNormKernel (*residual_norm)[kDTypes][kDTypes];
  const MlpActivationKernel (*mlp_activation)[kDTypes];  // of each Mlp
  const RotaryKernel (*rotary_heads)[kDTypes];           // forward and backward
  const StackKernel* residual_stack[kDTypes];
  const ProductKernel* product;  // of float and double
  const AdamKernel* adam_step;
  const SgdKernel* sgd_step;
  const SquaresKernel* squares;
  const PeakKernel* peak;
};

#define DEPTHNET_DECLARE_ISA(isa)                              \
  namespace isa {                                              \
  extern const ResidualKernel residual_forward[kDTypes];       \
  extern const ResidualKernel residual_backward[kDTypes];      \
  extern const ResidualNormKernel residual_norm[2][kDTypes][kDTypes]; \
  extern const MlpActivationKernel mlp_activation[kMlps][kDTypes]; \
  extern const RotaryKernel rotary_heads[2][kDTypes];          \
  extern const StackKernel residual_stack[kDTypes];            \
  extern const ProductKernel product[2];                       \
  extern const AdamKernel adam_step[kDTypes];                  \
  extern const SgdKernel sgd_step[kDTypes];                    \
  extern const SquaresKernel squares[kDTypes];                 \
  extern const PeakKernel peak;                                \
  }
DEPTHNET_DECLARE_ISA(baseline)
#ifdef DEPTHNET_HAVE_AVX512
DEPTHNET_DECLARE_ISA(avx2)
DEPTHNET_DECLARE_ISA(avx512)
#endif
#ifdef DEPTHNET_HAVE_AVX512_BF16
// Beyond AVX-512 it has products of bfloat16 only.
namespace avx512_bf16 { extern const StackKernel residual_stack_bfloat16; }
#endif

constexpr int kMostIsas = 4;

// The sets that this CPU can run, narrowest first; returns their number.
int available_isas(const Isa* out[kMostIsas]);

}  // namespace depthnet
