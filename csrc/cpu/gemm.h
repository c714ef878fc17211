// The inner loop of every matrix product of the residual stack: a block of sums in registers.  A sum
// runs over k in ascending order, so that no result depends on threads, tiles or who is in the batch.
#pragma once

#include "simd.h"

namespace depthnet {
namespace DEPTHNET_ISA {

// A block is up to kOutputs by kVectors sums; beside them the registers hold kVectors loaded vectors and
// one broadcast element.
constexpr int kOutputs = 6;
#if defined(DEPTHNET_ISA_AVX512) || defined(__aarch64__)
constexpr int kVectors = 4;  // of 32 registers
#else
constexpr int kVectors = 2;  // of 16 registers
#endif

// What the products of tensors of type T are made of: the compute type, or where the CPU has a dot
// product of bfloat16, pairs of neighbours along k.
template <class T> struct OperandOf {
  using type = Compute<T>;
  static constexpr int terms = 1;
};
static inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> sum) {
  return sum + a * b;
}
static inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> sum) {
  return sum + a * b;
}

#if defined(DEPTHNET_ISA_AVX512_BF16)
struct Pair { uint32_t bits; };  // the first in the lower half
template <> struct OperandOf<bfloat16> {
  using type = Pair;
  static constexpr int terms = 2;
};
static inline Word load(const Pair* from) { return Word(_mm512_loadu_si512(from)); }
static inline Word broadcast(Pair value) { return Word{} + value.bits; }
static inline Vec<float> multiply_add(Word a, Word b, Vec<float> sum) {
  return Vec<float>(_mm512_dpbf16_ps(__m512(sum), (__m512bh)a, (__m512bh)b));
}
#endif

template <class T> using Operand = typename OperandOf<T>::type;
template <class T> constexpr int kTerms = OperandOf<T>::terms;

// sums[m][v] += sum over k < depth of a[m * a_row + k * a_step] * b[k * b_step + v * lanes]
// Each step also calls a line of what comes next into the caches, if given: next[k * next_step].
template <int M, int V, class Sum, class E, class Next = char>
[[gnu::always_inline]] static inline void multiply(Sum (&sums)[M][V], int64_t depth, const E* a,
                                                   int64_t a_row, int64_t a_step, const E* b,
                                                   int64_t b_step, const Next* next = nullptr,
                                                   int64_t next_step = 0) {
  constexpr int lanes = int(sizeof(Sum) / sizeof(E));
  const bool prefetch = next != nullptr;
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load(b)) row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = load(b + v * lanes);
    if (prefetch) __builtin_prefetch(next);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto factor = broadcast(a[m * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[m][v] = multiply_add(factor, row[v], sums[m][v]);
    }
    a += a_step;
    b += b_step;
    next += next_step;
  }
}

// Calls f(m, v) for all sums of a block.
template <int M, int V, class F>
[[gnu::always_inline]] static inline void for_each(const F& f) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) f(m, v);
}

// Calls f from a function of its own: amid a caller's loops and constants the compiler would keep some
// of the sums in memory.
template <class F>
[[gnu::noinline]] static void outlined(const F& f) { f(); }

template <int N> struct Int { static constexpr int value = N; };

// Calls f(Int<count>) for a count of 1 .. Most.
template <int Most, class F>
static inline void with_count(int64_t count, const F& f) {
  if constexpr (Most > 1)
    if (count < Most) return with_count<Most - 1>(count, f);
  f(Int<Most>{});
}

// Cuts begin .. end into blocks of at most kOutputs, as even as can be, and calls f(start, Int<size>).
template <class F>
static inline void for_blocks(int64_t begin, int64_t end, const F& f) {
  for (int64_t blocks = (end - begin + kOutputs - 1) / kOutputs; blocks > 0; --blocks) {
    const int64_t size = (end - begin) / blocks;
    with_count<kOutputs>(size, [&](auto m) { f(begin, m); });
    begin += size;
  }
}

}  // namespace DEPTHNET_ISA
}  // namespace depthnet
