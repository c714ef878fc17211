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
  // Fork and join are stated as atomics as well, which cost nothing: ThreadSanitizer does not see into the
  // OpenMP runtime.
  struct Region {
    void (*body)(void*, int);
    void* context;
    int parts;
    std::atomic<int> ready{0};
  } region{body, context, parts};
  region.ready.store(1, std::memory_order_release);
  openmp().parallel([](void* raw) {
    Region& r = *static_cast<Region*>(raw);
    r.ready.load(std::memory_order_acquire);
    // The runtime may grant a smaller team than asked for.
    int team = openmp().team();
    for (int part = openmp().thread(); part < r.parts; part += team) r.body(r.context, part);
    r.ready.fetch_add(1, std::memory_order_release);
  }, &region, unsigned(parts), 0);
  region.ready.load(std::memory_order_acquire);
}

}  // namespace depthnet
