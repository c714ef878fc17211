// scaled_residual on a GPU, forward and backward: one launch for all rows of all members.  The formulas are
// in math/; here is which thread handles what.
//
// A row belongs to a team of neighbouring threads, a power of two of them, which takes it in tiles of E
// elements a thread: words of N elements, the first word of each thread, then the second of each, so that
// neighbours access neighbouring memory.  The last tile, the only one but in long rows, stays in registers
// between the sum over a row and what follows.  The others are read again, backwards: what was read last is
// still in the cache.
#pragma once

#include <type_traits>

#include "launch.h"
#include "math/homogeneous.h"
#include "storage.h"

namespace depthnet {
namespace cuda {

// Elements of a thread in a tile: few; many, as registers allow, where a block could not hold a row else;
// and where each is a word, as a row is not aligned.
template <class T> constexpr int kFew = sizeof(T) == 2 ? 16 : 8;
template <class T> constexpr int kMany = 128 / sizeof(Compute<T>);
constexpr int kSingle = 8;

template <class C, int N, int E> using Tile = C[E / N][N];  // what a thread has of it

// A thread's part of the work.
struct Place {
  int64_t member, row;
  bool exists;
  int rank, team;  // the thread's number in the team, and the team's size
};

DEPTHNET_DEVICE Place place_of(const ResidualLaunch& r, const Block& block, int team, int thread) {
  const int64_t index = block.number * (kThreads / team) + thread / team, member = index / r.rows;
  return {member, index - member * r.rows, index < r.members * r.rows, thread % team, team};
}

template <class T> DEPTHNET_DEVICE T* row_of(T* tensor, int64_t stride, const Place& at, int64_t length) {
  return tensor + at.member * stride + at.row * length;
}
DEPTHNET_DEVICE uint8_t* signs_of(const ResidualLaunch& r, const Place& at) {
  return row_of(r.signs, r.signs_stride, at, (r.n + 7) / 8);
}

// Calls f(word, i) for the words of the tile from `start` on that are the thread's, the elements from i on.
template <int N, int E, class F>
DEPTHNET_DEVICE void for_each_word(const Place& at, int64_t start, int64_t n, const F& f) {
  for (int word = 0; word < E / N; ++word) {
    const int64_t i = start + (word * at.team + at.rank) * N;
    if (i < n) f(word, i);
  }
}

template <class T, int N, int W>
DEPTHNET_DEVICE void read_tile(const T* row, const Place& at, int64_t start, int64_t n,
                               Compute<T> (&to)[W][N]) {
  for_each_word<N, N * W>(at, start, n, [&](int word, int64_t i) { read(row + i, to[word]); });
}

// The signs of a thread's elements in a tile are the bits of a number, in their order.  In memory a byte of
// them is 8/N neighbours'; teams are no smaller.
template <int N> DEPTHNET_DEVICE int first_bit(const Place& at) { return at.rank * N % 8; }

template <int N, int E>
DEPTHNET_DEVICE uint32_t read_signs(const ResidualLaunch& r, const Place& at, int64_t start) {
  const uint8_t* const signs = signs_of(r, at);
  uint32_t bits = 0;
  for_each_word<N, E>(at, start, r.n, [&](int word, int64_t i) {
    bits |= (uint32_t(signs[i / 8]) >> first_bit<N>(at) & ((1u << N) - 1)) << (word * N);
  });
  return bits;
}

template <int N, int E>
DEPTHNET_DEVICE void write_signs(const Block& block, const ResidualLaunch& r, PerThread<Place>& places,
                                 int64_t start, PerThread<uint32_t>& bits) {
  for (int word = 0; word < E / N; ++word) {
    PerThread<uint32_t> byte;
    block.each_thread_apart([&](int thread) {
      byte[thread] = (bits[thread] >> (word * N) & ((1u << N) - 1)) << first_bit<N>(places[thread]);
    });
    block.combine(byte, 8 / N, [](uint32_t a, uint32_t b) { return a | b; });
    block.each_thread_apart([&](int thread) {
      const Place& at = places[thread];
      const int64_t i = start + (word * at.team + at.rank) * N;
      if (at.exists && i < r.n && first_bit<N>(at) == 0) signs_of(r, at)[i / 8] = uint8_t(byte[thread]);
    });
  }
}

template <class C> DEPTHNET_DEVICE C multiplier(const ResidualLaunch& r, const Place& at) {
  return C(r.scales ? r.scale * r.scales[at.member] : r.scale);
}

template <class C> DEPTHNET_DEVICE C activation(C h, C p, C minus_q) {
  return h * slope(h >= 0, p, minus_q);
}

// Replaces the sums of threads by their teams' means.
template <class C>
DEPTHNET_DEVICE void find_means(const Block& block, const ResidualLaunch& r, int team, PerThread<C>& sums) {
  block.combine(sums, team, [](C a, C b) { return a + b; });
  block.each_thread_apart([&](int thread) { sums[thread] /= C(r.n); });
}

template <class T, int N, int E>
DEPTHNET_DEVICE void forward_block(const Block& block, const ResidualLaunch& r, int team) {
  using C = Compute<T>;
  const C p = C(r.p), minus_q = C(-r.q);
  const int64_t tile = int64_t(team) * E, last = (r.n - 1) & -tile;
  PerThread<Tile<C, N, E>> x, z;
  PerThread<C> scale, mean;
  PerThread<Place> places;
  const auto read_x = [&](const Place& at, int64_t start, Tile<C, N, E>& to) {
    read_tile(row_of(static_cast<const T*>(r.x), r.x_stride, at, r.n), at, start, r.n, to);
  };
  const auto read_h = [&](const Place& at, int64_t start, Tile<C, N, E>& to) {
    read_tile(row_of(static_cast<const T*>(r.h), r.h_stride, at, r.n), at, start, r.n, to);
  };

  block.each_thread_apart([&](int thread) {
    const Place at = places[thread] = place_of(r, block, team, thread);
    mean[thread] = 0;
    if (!at.exists) return;
    scale[thread] = multiplier<C>(r, at);
    read_x(at, last, x[thread]);  // before the sum, which waits for h
  });
  for (int64_t start = r.mean_subtract || r.signs ? 0 : last; start < r.n; start += tile) {
    PerThread<uint32_t> bits;
    block.each_thread_apart([&](int thread) {
      const Place& at = places[thread];
      bits[thread] = 0;
      if (!at.exists) return;
      read_h(at, start, z[thread]);
      C sum = 0;
      for_each_word<N, E>(at, start, r.n, [&](int word, int64_t) {
        for (int j = 0; j < N; ++j) {
          C& value = z[thread][word][j];
          bits[thread] |= uint32_t(value >= 0) << (word * N + j);
          value = activation(value, p, minus_q);
          sum += value;
        }
      });
      mean[thread] += sum;
    });
    if (r.signs) write_signs<N, E>(block, r, places, start, bits);
  }
  if (r.mean_subtract) find_means(block, r, team, mean);
  for (int64_t start = last; start >= 0; start -= tile)
    block.each_thread_apart([&](int thread) {
      const Place& at = places[thread];
      if (!at.exists) return;
      if (start < last) {
        read_x(at, start, x[thread]);
        read_h(at, start, z[thread]);
        for (auto& word : z[thread])
          for (C& value : word) value = activation(value, p, minus_q);
      }
      T* const y = row_of(static_cast<T*>(r.out), r.out_stride, at, r.n);
      for_each_word<N, E>(at, start, r.n, [&](int word, int64_t i) {
        T stored[N];
        for (int j = 0; j < N; ++j) {
          const C z_mean = r.mean_subtract ? mean[thread] : C(0);
          narrow(residual_update(x[thread][word][j], z[thread][word][j], z_mean, scale[thread]), stored[j]);
        }
        write(y + i, stored);
      });
    });
}

template <class T, int N, int E>
DEPTHNET_DEVICE void backward_block(const Block& block, const ResidualLaunch& r, int team) {
  using C = Compute<T>;
  const C p = C(r.p), minus_q = C(-r.q);
  const int64_t tile = int64_t(team) * E, last = (r.n - 1) & -tile;
  PerThread<Tile<C, N, E>> g;
  PerThread<uint32_t> bits;
  PerThread<C> scale, mean;
  PerThread<Place> places;
  const auto read_g = [&](const Place& at, int64_t start, Tile<C, N, E>& to) {
    read_tile(row_of(static_cast<const T*>(r.h), r.h_stride, at, r.n), at, start, r.n, to);
  };

  block.each_thread_apart([&](int thread) {
    const Place at = places[thread] = place_of(r, block, team, thread);
    mean[thread] = 0;
    if (!at.exists) return;
    scale[thread] = multiplier<C>(r, at);
    bits[thread] = read_signs<N, E>(r, at, last);
  });
  for (int64_t start = r.mean_subtract ? 0 : last; start < r.n; start += tile)
    block.each_thread_apart([&](int thread) {
      const Place& at = places[thread];
      if (!at.exists) return;
      read_g(at, start, g[thread]);
      C sum = 0;
      for_each_word<N, E>(at, start, r.n, [&](int word, int64_t) {
        for (C value : g[thread][word]) sum += value;
      });
      mean[thread] += sum;
    });
  if (r.mean_subtract) find_means(block, r, team, mean);
  for (int64_t start = last; start >= 0; start -= tile)
    block.each_thread_apart([&](int thread) {
      const Place& at = places[thread];
      if (!at.exists) return;
      if (start < last) {
        read_g(at, start, g[thread]);
        bits[thread] = read_signs<N, E>(r, at, start);
      }
      T* const out = row_of(static_cast<T*>(r.out), r.out_stride, at, r.n);
      for_each_word<N, E>(at, start, r.n, [&](int word, int64_t i) {
        T stored[N];
        for (int j = 0; j < N; ++j) {
          const C g_mean = r.mean_subtract ? mean[thread] : C(0);
          const C slope_of_h = slope(bits[thread] >> (word * N + j) & 1, p, minus_q);
          narrow(residual_gradient(g[thread][word][j], g_mean, scale[thread], slope_of_h), stored[j]);
        }
        write(out + i, stored);
      });
    });
}

// The kernels' parameters.
template <class Type, int WordElements, int ThreadElements> struct ResidualVariant {
  using T = Type;
  static constexpr int N = WordElements, E = ThreadElements;
};

// Calls f(variant, team, blocks) with what suits the tensors: words of 128 bits where all rows are aligned.
template <class T, class F> void choose_variant(const ResidualLaunch& r, const F& f) {
  const auto run = [&](auto variant) {
    using V = decltype(variant);
    int team = 8 / V::N;
    while (team < kThreads && team * V::E < r.n) team *= 2;
    const int64_t rows_of_block = kThreads / team;
    f(variant, team, (r.members * r.rows + rows_of_block - 1) / rows_of_block);
  };
  const auto address = [](const void* tensor) { return reinterpret_cast<uintptr_t>(tensor); };
  const int64_t elements = r.n | r.x_stride | r.h_stride | r.out_stride;
  const bool aligned = (address(r.x) | address(r.h) | address(r.out) | elements * sizeof(T)) % 16 == 0;
  constexpr int kWord = 16 / sizeof(T);
  if (!aligned) run(ResidualVariant<T, 1, kSingle>());
  else if (r.n <= kThreads * kFew<T>) run(ResidualVariant<T, kWord, kFew<T>>());
  else run(ResidualVariant<T, kWord, kMany<T>>());
}

template <class F> void choose_variant(const ResidualLaunch& r, const F& f) {
  switch (r.dtype) {
    case kFloat32: return choose_variant<float>(r, f);
    case kFloat64: return choose_variant<double>(r, f);
    case kBFloat16: return choose_variant<bfloat16>(r, f);
    case kFloat16: return choose_variant<float16>(r, f);
  }
}

}  // namespace cuda
}  // namespace depthnet
