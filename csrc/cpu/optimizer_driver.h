// An optimizer step over tables of tensors, in one parallel region (two with a norm).
#pragma once

#include "kernels.h"

namespace depthnet {

struct StepTables {
  const StepTensor* tensors;
  int64_t count;
  const double* scales;  // lr of every slice, then eps, then weight decay
  int64_t slices;
  const StepGroup* groups;
};

// Gradients are divided by grad_scale, and then brought down to the norm max_norm, all together.  Results
// are the same bits for any number of threads.
void adam_step(const Isa&, const StepTables&, double grad_scale, double max_norm, int threads);
void sgd_step(const Isa&, const StepTables&, double grad_scale, double max_norm, int threads);

}  // namespace depthnet
