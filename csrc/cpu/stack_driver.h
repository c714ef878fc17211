// The passes of residual_stack over all threads.  They throw std::bad_alloc and nothing else.
#pragma once

#include "kernels.h"

namespace depthnet {

void stack_forward(const StackKernel& kernel, Stack s, int threads);
void stack_backward(const StackKernel& kernel, Stack s, int threads);

}  // namespace depthnet
