// What a launch takes, and the launchers.
#pragma once

#include <cstdint>

#include "math/step.h"

namespace depthnet {
namespace cuda {

// Elements of a chunk: few enough to busy all multiprocessors, enough to outweigh its constants.
constexpr int64_t kChunk = 8192;

// At most kChunk elements of one slice of a tensor.  `slice` counts over all tensors.
struct StepChunk {
  int64_t tensor, slice, begin, end;
};

// The tables, all in the GPU's memory; see kernels/device_tables.py.
struct StepLaunch {
  const StepTensor* tensors;
  const StepGroup* groups;
  const double* scales;  // lr of every slice, then eps, then weight decay
  int64_t slice_count;
  const StepChunk* chunks;
  int64_t chunk_count;
  int* arrived;             // for each tensor; zeros before and after
  double* partial_sums;     // for each chunk
  double* norm;             // of all gradients
  const float* grad_scale;  // gradients are divided by it; null for 1
  const float* found_inf;   // null, or not 0 if nothing is to be written
  double max_grad_norm;     // that gradients, after grad_scale, are brought down to; infinity for none
};

// y = x + scale * (phi(h) - mean(phi(h))) over rows of n elements, or its gradient with respect to h.
// A tensor is `members` blocks of `rows` contiguous rows; a stride, in elements, separates blocks.
struct ResidualLaunch {
  int dtype;
  int64_t members, rows, n;
  const void* x;   // null in the backward pass
  const void* h;   // in the backward pass the gradient of y
  void* out;       // y, or the gradient of h
  uint8_t* signs;  // ceil(n/8) bytes a row, bit i%8 of byte i/8 is h[i] >= 0; may be null with x
  int64_t x_stride, h_stride, out_stride, signs_stride;
  double scale;          // times scales[member] where scales is given
  const double* scales;  // one per member, or null
  double p, q;           // slopes of phi
  bool mean_subtract;
};

extern "C" {

// Why the kernels cannot run on this machine, or null.
const char* depthnet_cuda_missing();

// On a stream of a device, which is the calling thread's from then on; they return what went wrong or null.
const char* depthnet_cuda_step(bool adam, const StepLaunch* launch, int device, uintptr_t stream);
const char* depthnet_cuda_residual(const ResidualLaunch* launch, int device, uintptr_t stream);

}

}  // namespace cuda
}  // namespace depthnet
