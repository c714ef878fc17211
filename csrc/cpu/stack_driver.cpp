#include "stack_driver.h"

#include <algorithm>
#include <memory>
#include <new>

#include "parallel.h"

namespace depthnet {
namespace {

// The layers of the backward pass run in segments whose d stays in the caches between its two parts.
constexpr int64_t kKeptBytes = 4 << 20;

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<void, Free>;
Memory allocate(int64_t bytes) { return Memory(::operator new(size_t(bytes), std::align_val_t(64))); }

// The width of a panel that lets the busiest thread finish first.  Half a vector more is what the work
// around the products costs, whatever the width.
int64_t panel_rows(const StackKernel& kernel, const Stack& s, int threads) {
  int64_t best = kernel.lanes;
  double least = 0;
  for (int vectors = 1; vectors <= kernel.most_vectors; ++vectors) {
    const int64_t panel = int64_t(vectors) * kernel.lanes;
    const int64_t panels = s.members * ((s.rows + panel - 1) / panel);
    const double cost = double((panels + threads - 1) / threads) * (vectors + 0.5);
    if (vectors == 1 || cost <= least) best = panel, least = cost;
  }
  return best;
}

void run(const StackKernel& kernel, StackPass pass, const Stack& s, int64_t size, int threads) {
  const int64_t bytes = kernel.workspace(s);
  const Memory workspace = allocate(bytes * threads);
  parallel_for(threads, size, 1, [&](int64_t begin, int64_t end, int part) {
    pass(s, begin, end, static_cast<char*>(workspace.get()) + part * bytes);
  });
}

}  // namespace

void stack_forward(const StackKernel& kernel, Stack s, int threads) {
  s.panel = panel_rows(kernel, s, threads);
  run(kernel, kernel.forward, s, s.members * s.panels(), threads);
}

void stack_backward(const StackKernel& kernel, Stack s, int threads) {
  s.panel = panel_rows(kernel, s, threads);
  const int64_t depth = s.layer_end, panels = s.members * s.panels();
  int64_t segment = depth;
  Memory d;
  if (s.weight_grad) {
    const int64_t layer_bytes = panels * s.n * s.panel * kernel.kept_bytes;
    segment = std::clamp(kKeptBytes / (layer_bytes + 1), int64_t(1), depth);
    d = allocate(segment * layer_bytes);
    s.d = d.get();
  }
  for (s.layer_end = depth; s.layer_end > 0; s.layer_end = s.layer_begin) {
    s.layer_begin = std::max(s.layer_end - segment, int64_t(0));
    run(kernel, kernel.backward_data, s, panels, threads);
    s.x = s.y;
    if (!s.weight_grad) continue;
    // Enough tasks for all threads, also where there are few layers.
    const int64_t strip = int64_t(kernel.lanes) * kernel.most_vectors;
    const int64_t strips = s.members * (s.layer_end - s.layer_begin) * ((s.n + strip - 1) / strip);
    s.shares = std::clamp((4 * threads + strips - 1) / strips, int64_t(1), (s.n + 5) / 6);
    run(kernel, kernel.backward_weight, s, strips * s.shares, threads);
  }
}

}  // namespace depthnet
