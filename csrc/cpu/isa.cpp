#include "kernels.h"

namespace depthnet {
namespace {

// The kernels of the set `isa`, but for those of stacks of bfloat16.
#define DEPTHNET_ISA_TABLE(name, isa, bfloat16_stack) \
  Isa{name, isa::residual_forward, isa::residual_backward, isa::residual_norm, isa::mlp_activation, \
      isa::rotary_heads, \
      {isa::residual_stack, isa::residual_stack + 1, bfloat16_stack, isa::residual_stack + 3}, \
      isa::product, isa::adam_step, isa::sgd_step, isa::squares, &isa::peak}

const Isa kIsas[] = {
    DEPTHNET_ISA_TABLE("baseline", baseline, baseline::residual_stack + 2),
#ifdef DEPTHNET_HAVE_AVX512
    DEPTHNET_ISA_TABLE("avx2", avx2, avx2::residual_stack + 2),
    DEPTHNET_ISA_TABLE("avx512", avx512, avx512::residual_stack + 2),
#endif
#ifdef DEPTHNET_HAVE_AVX512_BF16
    DEPTHNET_ISA_TABLE("avx512_bf16", avx512, &avx512_bf16::residual_stack_bfloat16),
#endif
};

}  // namespace

int available_isas(const Isa* out[kMostIsas]) {
  int count = 0;
  out[count++] = &kIsas[0];
#ifdef DEPTHNET_HAVE_AVX512
  // Every CPU with AVX2 has F16C, whose name old compilers do not know here.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    out[count++] = &kIsas[1];
  if (count == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    out[count++] = &kIsas[2];
#endif
#ifdef DEPTHNET_HAVE_AVX512_BF16
  if (count == 3 && __builtin_cpu_supports("avx512bf16")) out[count++] = &kIsas[3];
#endif
  return count;
}

}  // namespace depthnet
