// Parallel loops inside torch's own OpenMP team, where the process has one.
#pragma once

#include <cstdint>

namespace depthnet {

// True if parallel loops use more than the calling thread.
bool have_threads();

// Calls body(context, part) for part = 0 .. parts-1, on up to `parts` threads.
void run_parts(int parts, void (*body)(void*, int), void* context);

// Splits 0 .. size into even ranges, one for each started `grain` but at most `threads`, and calls
// f(begin, end, part) for each.  Every index is handled whole by one thread.
template <class F>
void parallel_for(int threads, int64_t size, int64_t grain, const F& f) {
  if (size <= 0) return;
  int64_t wanted = (size + grain - 1) / grain;
  int parts = int(wanted < threads ? wanted : threads);
  if (parts <= 1) return f(int64_t(0), size, 0);
  struct Context { const F& f; int64_t size; int parts; } context{f, size, parts};
  run_parts(parts, [](void* raw, int part) {
    const Context& c = *static_cast<Context*>(raw);
    c.f(c.size * part / c.parts, c.size * (part + 1) / c.parts, part);
  }, &context);
}

}  // namespace depthnet
