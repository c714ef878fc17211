// Products of matrices, C = A B, in every member of a population.  A sum runs over k in ascending order, chunk
// by chunk, and then over the chunks, however else the work is cut: whoever trains beside a member, and on
// however many threads, its results are the same bits.
// B is copied, a strip of columns and a chunk of k at a time, to where its columns lie along the lanes; A is
// read where it lies, one broadcast element at a time.  Between chunks the sums wait in C.
// Compiled once per instruction set; everything here has internal linkage or lives in the set's namespace.
#include "gemm.h"
#include "kernels.h"

namespace depthnet {
namespace DEPTHNET_ISA {
namespace {

constexpr int64_t kChunk = 256;  // a chunk of a strip stays in the first-level cache
template <class T> constexpr int64_t kStrip = kVectors * kLanes<T>;
// A tile's strips read the same chunk of A, which stays in the second-level cache.
template <class T> constexpr int64_t kTile = 256 / sizeof(T);

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t blocks_of(int64_t size, int64_t n) { return (n + size - 1) / size; }

// B's elements b[k * step + j * column] to staged[k * kStrip + j], padded with zeros to whole vectors.
template <class T>
void stage(const T* b, int64_t step, int64_t column, int64_t depth, int64_t columns, T* staged) {
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    if (column == 1) {
      for (int64_t k = 0; k < depth; ++k)
        store(staged + k * kStrip<T> + j, load_some(b + k * step + j, columns - j));
      continue;
    }
    for (int64_t k = 0; k < depth; k += kLanes<T>) {
      Vec<T> square[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i)
        square[i] = j + i < columns ? load_some(b + (j + i) * column + k, depth - k) : Vec<T>{};
      transpose<T>(square);
      for (int i = 0; i < kLanes<T>; ++i) store(staged + (k + i) * kStrip<T> + j, square[i]);
    }
  }
}

// Adds the products over a chunk to the rows begin .. end of a strip of C.
template <class T, int V>
void multiply_strip(const Product& p, const T* a, const T* staged, int64_t depth, bool first, T* c,
                    int64_t columns, int64_t begin, int64_t end) {
  const int64_t last = columns - (V - 1) * kLanes<T>;  // lanes of the last vector
  for_blocks(begin, end, [&](int64_t row, auto block) {
    constexpr int M = decltype(block)::value;
    outlined([&] {
      const auto out = [&](int m, int v) { return c + (row + m) * p.columns + v * kLanes<T>; };
      Vec<T> sums[M][V]{};
      multiply(sums, depth, a + row * p.a_row, p.a_row, p.a_step, staged, kStrip<T>);
      if (!first)
        for_each<M, V>([&](int m, int v) {
          sums[m][v] += v + 1 < V ? load(out(m, v)) : load_some(out(m, v), last);
        });
      for_each<M, V>([&](int m, int v) {
        if (v + 1 < V) store(out(m, v), sums[m][v]);
        else store_some(out(m, v), sums[m][v], last);
      });
    });
  });
}

template <class T>
void multiply_tiles(const Product& p, int64_t begin, int64_t end) {
  alignas(64) T staged[kChunk * kStrip<T>];
  const int64_t tiles = blocks_of(kTile<T>, p.columns);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t share = task % p.shares, tile = task / p.shares % tiles, member = task / p.shares / tiles;
    const int64_t first_row = p.rows * share / p.shares, last_row = p.rows * (share + 1) / p.shares;
    const int64_t tile_end = smaller((tile + 1) * kTile<T>, p.columns);
    const T* a = static_cast<const T*>(p.a) + member * p.a_member;
    const T* b = static_cast<const T*>(p.b) + member * p.b_member;
    T* c = static_cast<T*>(p.c) + member * p.rows * p.columns;
    for (int64_t k = 0; k < p.depth || k == 0; k += kChunk) {
      const int64_t depth = smaller(kChunk, p.depth - k);
      for (int64_t j = tile * kTile<T>; j < tile_end; j += kStrip<T>) {
        const int64_t columns = smaller(kStrip<T>, tile_end - j);
        stage(b + k * p.b_step + j * p.b_column, p.b_step, p.b_column, depth, columns, staged);
        with_count<kVectors>(blocks_of(kLanes<T>, columns), [&](auto vectors) {
          multiply_strip<T, decltype(vectors)::value>(p, a + k * p.a_step, staged, depth, k == 0, c + j,
                                                      columns, first_row, last_row);
        });
      }
    }
  }
}

}  // namespace

const ProductKernel product[2] = {{kTile<float>, multiply_tiles<float>},
                                  {kTile<double>, multiply_tiles<double>}};

}  // namespace DEPTHNET_ISA
}  // namespace depthnet
