// Sums over rows: kept in vectors for kSumBlock elements, then added up in double precision.
#pragma once

#include "simd.h"

namespace depthnet {
namespace DEPTHNET_ISA {

constexpr int64_t kSumBlock = 4096;

template <class C>
static inline double total(const Vec<C>* partial) {
  return double(sum<C>((partial[0] + partial[1]) + (partial[2] + partial[3])));
}

// Calls step(i, count) for the vectors of a row of n elements; the last may have fewer than all its lanes.
template <class C, class Step>
[[gnu::always_inline]] static inline void for_vectors(int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + kLanes<C> <= n; i += kLanes<C>) step(i, int64_t(kLanes<C>));
  if (i < n) step(i, n - i);
}

// Calls step(i, count, partial) likewise, and adds up what the calls add to `partial`, Sums vectors.
template <class C, int Sums, class Step>
[[gnu::always_inline]] static inline void row_sums(int64_t n, double (&totals)[Sums], const Step& step) {
  constexpr int64_t lanes = kLanes<C>;
  for (int k = 0; k < Sums; ++k) totals[k] = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t end = i + kSumBlock < n ? i + kSumBlock : n;
    Vec<C> partial[4][Sums]{};
    for (; i + 4 * lanes <= end; i += 4 * lanes)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) step(i + k * lanes, lanes, partial[k]);
    for (int k = 0; i < end; i += lanes, ++k) step(i, end - i, partial[k]);
    for (int k = 0; k < Sums; ++k) {
      const Vec<C> column[4] = {partial[0][k], partial[1][k], partial[2][k], partial[3][k]};
      totals[k] += total<C>(column);
    }
  }
}

}  // namespace DEPTHNET_ISA
}  // namespace depthnet
