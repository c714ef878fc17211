// Memory that is written for the first time costs a page fault every 4 KiB: a training step that gets all
// of its arrays anew can spend a third of its time on them.
#pragma once

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace depthnet {

// malloc returns memory that is freed at the top of its heap to the system, from an amount on that glibc
// raises when it sees a large block freed: to twice its size, and at the most to 64 MiB.  So what one
// step frees is there for the next.
inline void keep_freed_memory() {
  void* volatile block = std::malloc((32 << 20) - (64 << 10));  // else the compiler leaves both out
  std::free(block);
}

// Has the system map huge pages, one fault every 2 MiB: for what is too large to be kept.
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
