#include "stack_driver.h"

#include <algorithm>
#include <memory>
#include <new>

#include "pages.h"
#include "parallel.h"

namespace depthnet {
namespace {

// The blocks of the backward pass run in segments whose d stays in the caches between its two parts.
constexpr int64_t kKeptBytes = 4 << 20;

// From so many bytes on, the inputs that are saved would only push weights out of the caches.
constexpr int64_t kCachedBytes = 4 << 20;

// Memory of the calling thread.  The next call finds it again, unless it is much: the system takes longer
// to map and clear fresh pages than a kernel takes to fill them.
constexpr int64_t kMostKept = 32 << 20;
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(::operator new(size_t(bytes), std::align_val_t(64)));
      size_ = bytes;
      prefer_huge_pages(memory_.get(), bytes);
    }
  }
  ~Scratch() {
    if (size_ > kMostKept) memory_.reset(), size_ = 0;
  }
  char* get() const { return static_cast<char*>(memory_.get()); }

 private:
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  static thread_local std::unique_ptr<void, Free> memory_;
  static thread_local int64_t size_;
};
thread_local std::unique_ptr<void, Scratch::Free> Scratch::memory_;
thread_local int64_t Scratch::size_ = 0;

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

// Runs a pass over 0 .. size, each thread with `bytes` of memory.
void run(StackPass pass, const Stack& s, int64_t size, char* memory, int64_t bytes, int threads) {
  parallel_for(threads, size, 1, [&](int64_t begin, int64_t end, int part) {
    pass(s, begin, end, memory + part * bytes);
  });
}

}  // namespace

void stack_forward(const StackKernel& kernel, Stack s, int threads) {
  s.panel = panel_rows(kernel, s, threads);
  if (s.inputs) {
    const int64_t size = s.members * s.inputs_member * kernel.storage_bytes;
    prefer_huge_pages(s.inputs, size);
    s.past_caches = size >= kCachedBytes && s.n * kernel.storage_bytes % 64 == 0 &&
                    reinterpret_cast<uintptr_t>(s.inputs) % 64 == 0;
  }
  const int64_t bytes = kernel.workspace(s);
  const Scratch scratch(bytes * threads);
  run(kernel.forward, s, s.members * panels_of(s), scratch.get(), bytes, threads);
}

void stack_backward(const StackKernel& kernel, Stack s, int threads) {
  s.panel = panel_rows(kernel, s, threads);
  const int64_t depth = s.layer_end, panels = s.members * panels_of(s), bytes = kernel.workspace(s);
  const int64_t layer_bytes = s.weight_grad ? panels * s.n * s.panel * kernel.kept_bytes : 0;
  const int64_t layers = s.block.layers, blocks = depth / layers;
  const int64_t fit = layer_bytes ? kKeptBytes / (layers * layer_bytes) : blocks;
  const int64_t segment = std::clamp(fit, int64_t(1), blocks) * layers;
  const Scratch scratch(bytes * threads + segment * layer_bytes);
  if (s.weight_grad) {
    s.d = scratch.get() + bytes * threads;
    const int64_t size = (s.members - 1) * s.weight_grad_member + depth * s.n * s.n;
    prefer_huge_pages(s.weight_grad, size * kernel.storage_bytes);
  }
  for (s.layer_end = depth; s.layer_end > 0; s.layer_end = s.layer_begin) {
    s.layer_begin = std::max(s.layer_end - segment, int64_t(0));
    run(kernel.backward_data, s, panels, scratch.get(), bytes, threads);
    s.x = s.y;
    if (!s.weight_grad) continue;
    // Enough tasks for all threads, also where there are few layers.
    const int64_t strip = int64_t(kernel.lanes) * kernel.most_vectors;
    const int64_t strips = s.members * (s.layer_end - s.layer_begin) * ((s.n + strip - 1) / strip);
    const int64_t most = (s.n + kernel.outputs - 1) / kernel.outputs;
    s.shares = std::clamp((4 * threads + strips - 1) / strips, int64_t(1), most);
    run(kernel.backward_weight, s, strips * s.shares, scratch.get(), bytes, threads);
  }
}

}  // namespace depthnet
