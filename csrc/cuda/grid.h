// What the kernels take from CUDA; and, where the C++ compiler reads them, what takes its place: the host
// runs the same code block after block, and in a block thread after thread up to each barrier.
#pragma once

#include <cassert>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DEPTHNET_DEVICE static __device__ inline  // a free function, or a static member
#else
#define DEPTHNET_DEVICE static inline
#endif

namespace depthnet {
namespace cuda {

constexpr int kThreads = 128;  // of a block; the more blocks, the better they hide each other's beginning

#ifdef __CUDACC__

// What a thread keeps from one phase to the next, in registers.
template <class V> struct PerThread {
  V value;
  __device__ V& operator[](int) { return value; }
};

struct Block {
  int64_t number;

  // Calls f(thread) in every thread of the block; none goes on before all are through.
  template <class F> __device__ void each_thread(const F& f) const {
    each_thread_apart(f);
    __syncthreads();
  }

  // The same for threads that share no memory, of which none waits.
  template <class F> __device__ void each_thread_apart(const F& f) const { f(int(threadIdx.x)); }

  // Each value becomes what f, in the same order for all, makes of the values of the `width` threads
  // around it, 1 to kThreads of them, a power of two.
  template <class V, class F> __device__ void combine(PerThread<V>& values, int width, const F& f) const {
    V& value = values.value;
    for (int i = 1; i < width && i < 32; i *= 2) value = f(value, __shfl_xor_sync(~0u, value, i));
    if (width <= 32) return;
    __shared__ V of_warps[kThreads / 32];
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
    __syncthreads();
    const V* const first = of_warps + threadIdx.x / width * (width / 32);
    value = first[0];
    for (int i = 1; i < width / 32; ++i) value = f(value, first[i]);
    __syncthreads();
  }
};

// Counts one more, and returns how many were before.  Whatever the earlier ones did before they arrived is
// done, and is seen by who arrives after them.
DEPTHNET_DEVICE int arrive(int* counter) {
  __threadfence();
  const int before = atomicAdd(counter, 1);
  __threadfence();
  return before;
}

// Accesses to global memory, past the multiprocessor's own cache: nothing is read twice, and what other
// blocks have just written is seen.
using Words = uint4;  // 128 bits
template <class W> DEPTHNET_DEVICE W load(const W* from) { return __ldcg(from); }
template <class W> DEPTHNET_DEVICE void store(W* to, W value) { __stcg(to, value); }

#else

template <class V> struct PerThread {
  V values[kThreads];
  V& operator[](int thread) { return values[thread]; }
};

struct Block {
  int64_t number;
  bool backwards;  // the order of threads, which must not matter

  template <class F> void each_thread(const F& f) const {
    for (int i = 0; i < kThreads; ++i) f(backwards ? kThreads - 1 - i : i);
  }
  template <class F> void each_thread_apart(const F& f) const { each_thread(f); }

  template <class V, class F> void combine(PerThread<V>& values, int width, const F& f) const {
    for (int i = 1; i < width; i *= 2) {
      PerThread<V> before = values;
      each_thread([&](int thread) { values[thread] = f(before[thread], before[thread ^ i]); });
    }
  }
};

static inline int arrive(int* counter) { return (*counter)++; }

struct alignas(16) Words { uint32_t words[4]; };
// What is not aligned stops a GPU.
template <class W> static inline void check_alignment([[maybe_unused]] const W* address) {
  assert(reinterpret_cast<uintptr_t>(address) % sizeof(W) == 0);
}
template <class W> static inline W load(const W* from) {
  check_alignment(from);
  W value;
  memcpy(&value, from, sizeof value);
  return value;
}
template <class W> static inline void store(W* to, W value) {
  check_alignment(to);
  memcpy(to, &value, sizeof value);
}

#endif

template <class T> DEPTHNET_DEVICE T* at(int64_t address) { return reinterpret_cast<T*>(address); }

}  // namespace cuda
}  // namespace depthnet
