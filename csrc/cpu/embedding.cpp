#include "embedding.h"

#include <algorithm>
#include <atomic>

#include "parallel.h"

namespace depthnet {
namespace {

// Rows of a few thousand elements in all are done before a second thread has woken up.
constexpr int64_t kElementsPerThread = 8192;

template <class T>
void add_row(T* __restrict to, const T* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

}  // namespace

template <class T>
bool embedding_forward(const Embedding& e, const T* table, T* y, int threads) {
  std::atomic<bool> valid{true};
  const int64_t grain = 1 + kElementsPerThread / (e.n * e.active + 1);
  parallel_for(threads, e.members * e.rows, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t member = row / e.rows;
      const int64_t* index = e.index + member * e.index_member + row % e.rows * e.active;
      T* sum = y + row * e.n;
      std::fill_n(sum, e.n, T(0));
      for (int64_t a = 0; a < e.active; ++a) {
        if (index[a] < 0 || index[a] >= e.features) return valid.store(false);
        add_row(sum, table + (member * e.features + index[a]) * e.n, e.n);
      }
    }
  });
  return valid;
}

template <class T>
void embedding_backward(const Embedding& e, const T* grad, T* table_grad, int threads) {
  const int64_t grain = 1 + kElementsPerThread / (e.n + 1);
  parallel_for(threads, e.members * e.features, grain, [&](int64_t begin, int64_t end, int) {
    std::fill(table_grad + begin * e.n, table_grad + end * e.n, T(0));
    while (begin < end) {
      const int64_t member = begin / e.features, start = member * e.features;
      const int64_t first = begin - start, last = std::min(end - start, e.features);
      const int64_t* index = e.index + member * e.index_member;
      for (int64_t i = 0; i < e.rows * e.active; ++i)
        if (index[i] >= first && index[i] < last)
          add_row(table_grad + (start + index[i]) * e.n, grad + (member * e.rows + i / e.active) * e.n, e.n);
      begin = start + last;
    }
  });
}

template bool embedding_forward(const Embedding&, const float*, float*, int);
template bool embedding_forward(const Embedding&, const double*, double*, int);
template void embedding_backward(const Embedding&, const float*, float*, int);
template void embedding_backward(const Embedding&, const double*, double*, int);

}  // namespace depthnet
