#include "linear_driver.h"

#include <algorithm>

#include "parallel.h"

namespace depthnet {
namespace {

// So many multiply-adds are done before a second thread has woken up.
constexpr int64_t kProductsPerThread = 1 << 17;

// Copying a strip of B takes as long as the products of so many rows.
constexpr int64_t kStagingRows = 8;

}  // namespace

void multiply(const ProductKernel& kernel, Product p, int threads) {
  const int64_t products = p.members * p.rows * p.columns * p.depth;
  threads = int(std::min(int64_t(threads), 1 + products / kProductsPerThread));
  const int64_t tiles = p.members * ((p.columns + kernel.tile_columns - 1) / kernel.tile_columns);
  // The parts of a tile's rows that let the busiest thread finish first.
  int64_t least = 0;
  for (int64_t shares = 1; shares <= threads; ++shares) {
    const int64_t tasks = (tiles * shares + threads - 1) / threads;
    const int64_t cost = tasks * ((p.rows + shares - 1) / shares + kStagingRows);
    if (shares == 1 || cost < least) p.shares = shares, least = cost;
  }
  parallel_for(threads, tiles * p.shares, 1,
               [&](int64_t begin, int64_t end, int) { kernel.run(p, begin, end); });
}

}  // namespace depthnet
