// Products of matrices over all threads.
#pragma once

#include "kernels.h"

namespace depthnet {

void multiply(const ProductKernel& kernel, Product p, int threads);

}  // namespace depthnet
