// The limit that the kernels are measured against: multiply-adds between registers and nothing else.
#include "gemm.h"
#include "kernels.h"

namespace depthnet {
namespace DEPTHNET_ISA {
namespace {

constexpr int kSums = kOutputs * kVectors;  // independent, as many as the kernels keep

float run(int64_t iterations) {
  const Vec<float> a = broadcast(0.5f), b = broadcast(1.0f);
  Vec<float> sums[kSums];  // all different, lest one stand for another
#pragma GCC unroll 32
  for (int s = 0; s < kSums; ++s) sums[s] = broadcast(float(s));
  for (int64_t i = 0; i < iterations; ++i)
#pragma GCC unroll 32
    for (int s = 0; s < kSums; ++s) sums[s] = multiply_add(sums[s], a, b);
  float total = 0;
  for (const auto& s : sums) total += sum<float>(s);
  return total;
}

}  // namespace

const PeakKernel peak = {kSums * kLanes<float> * 2, run};

}  // namespace DEPTHNET_ISA
}  // namespace depthnet
