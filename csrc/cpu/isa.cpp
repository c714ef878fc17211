#include "kernels.h"

namespace depthnet {

int available_isas(const Isa* out[3]) {
  int count = 0;
  out[count++] = &baseline::isa;
#ifdef DEPTHNET_HAVE_AVX512
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    out[count++] = &avx2::isa;
  if (count == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    out[count++] = &avx512::isa;
#endif
  return count;
}

}  // namespace depthnet
