#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>

namespace depthnet {
namespace {

// A second pool of spinning threads beside torch's costs more than most kernels on few cores.  torch
// loads its OpenMP runtime with global symbols, so we start our regions in that runtime: the same
// threads, asleep or awake together, and torch.set_num_threads() bounds both.
using ParallelFn = void (*)(void (*)(void*), void*, unsigned, unsigned);
using CountFn = int (*)();
struct OpenMP {
  ParallelFn parallel = reinterpret_cast<ParallelFn>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  CountFn thread = reinterpret_cast<CountFn>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  CountFn team = reinterpret_cast<CountFn>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  bool found() const { return parallel && thread && team; }
};

const OpenMP& openmp() {
  static const OpenMP runtime;
  return runtime;
}

// The team's threads do not survive fork(), and OpenMP would wait for them for ever: a forked child
// (a DataLoader worker) runs its loops in the calling thread.
std::atomic<bool> forked{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool have_threads() { return openmp().found() && !forked && fork_handler == 0; }

void run_parts(int parts, void (*body)(void*, int), void* context) {
  if (!have_threads()) {
    for (int part = 0; part < parts; ++part) body(context, part);
    return;
  }
  struct Region { void (*body)(void*, int); void* context; int parts; } region{body, context, parts};
  openmp().parallel([](void* raw) {
    const Region& r = *static_cast<Region*>(raw);
    // The runtime may grant a smaller team than asked for.
    int team = openmp().team();
    for (int part = openmp().thread(); part < r.parts; part += team) r.body(r.context, part);
  }, &region, unsigned(parts), 0);
}

}  // namespace depthnet
