// Large arrays that are about to be written for the first time.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace depthnet {

// Has the system map huge pages, one fault for every 2 MiB instead of every 4 KiB: for the gradient of a wide
// stack, which is allocated anew at every step, faults cost up to half as long as the products.
inline void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (uintptr_t(memory) + page - 1) / page * page;
  const uintptr_t end = (uintptr_t(memory) + uintptr_t(bytes)) / page * page;
  if (bytes >= 2 << 20) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace depthnet
