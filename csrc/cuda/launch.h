// What a launch takes, and the launchers of optimizer.cu.
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

extern "C" {

// Why the kernels cannot run on this machine, or null.
const char* depthnet_cuda_missing();

// One optimizer step on a stream of a device, which is the calling thread's from then on; returns what went
// wrong, or null.
const char* depthnet_cuda_step(bool adam, const StepLaunch* launch, int device, uintptr_t stream);

}

}  // namespace cuda
}  // namespace depthnet
