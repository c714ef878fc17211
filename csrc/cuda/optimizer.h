// Optimizer steps on a GPU: one launch for all tensors, a block for each chunk (two launches where the norm
// of the gradients is limited).  The rules are in math/; here is which thread handles what.
#pragma once

#include <cmath>
#include <type_traits>

#include "launch.h"
#include "math/adam.h"
#include "math/sgd.h"
#include "storage.h"

namespace depthnet {
namespace cuda {

// What the threads of a block share.
template <class Rule> struct StepShared {
  typename Rule::template Constants<float> in_float;
  typename Rule::template Constants<double> in_double;
  uint32_t rounding_keys[2];  // for elements with the chunk's first `element / 2^32`, and with the next
};

template <class C, class Rule> DEPTHNET_DEVICE const auto& constants(const StepShared<Rule>& shared) {
  if constexpr (sizeof(C) == sizeof(float)) return shared.in_float;
  else return shared.in_double;
}

// Steps the N elements from i on.  `update` gets references to a parameter and three states, of which it
// uses the first States.
template <int N, class T, int States, class Rule, class Update>
DEPTHNET_DEVICE void step_elements(const StepTensor& t, const StepChunk& chunk,
                                   const StepShared<Rule>& shared, int64_t i, const Update& update) {
  using C = Compute<T>;
  C g[N], p[N], states[3][N] = {};
  read(at<const T>(t.grad) + i, g);
  for (int s = 0; s < States; ++s) read(at<const C>(t.state[s]) + i, states[s]);
  if (t.master) read(at<const C>(t.master) + i, p);
  else read(at<const T>(t.param) + i, p);
  for (int j = 0; j < N; ++j) update(p[j], g[j], states[0][j], states[1][j], states[2][j]);
  for (int s = 0; s < States; ++s) write(at<C>(t.state[s]) + i, states[s]);
  if (t.master) write(at<C>(t.master) + i, p);
  T stored[N];
  for (int j = 0; j < N; ++j) {
    if constexpr (sizeof(T) == 2) {
      if (t.rounding) {
        const uint32_t key = shared.rounding_keys[((i + j) >> 32) - (chunk.begin >> 32)];
        narrow_stochastically(p[j], rounding_bits(uint32_t(i + j), key), stored[j]);
        continue;
      }
    }
    narrow(p[j], stored[j]);
  }
  write(at<T>(t.param) + i, stored);
}

// Calls f(integral_constant N, i) for the elements i .. i+N of the chunk that are this thread's: 16 bytes
// of the storage type where `aligned`, and single ones for the rest.
template <class T, class F>
DEPTHNET_DEVICE void for_each_piece(const StepChunk& chunk, bool aligned, int thread, const F& f) {
  constexpr int N = 16 / sizeof(T);
  const int64_t whole = aligned ? chunk.begin + (chunk.end - chunk.begin) / N * N : chunk.begin;
  for (int64_t i = chunk.begin + thread * N; i < whole; i += kThreads * N)
    f(std::integral_constant<int, N>(), i);
  for (int64_t i = whole + thread; i < chunk.end; i += kThreads) f(std::integral_constant<int, 1>(), i);
}

// Whether 128-bit accesses can start at the chunk's first element, in all of its tensors.
template <class T> DEPTHNET_DEVICE bool aligned(const StepTensor& t, int64_t begin) {
  const int64_t narrow = begin * int64_t(sizeof(T)), wide = begin * int64_t(sizeof(Compute<T>));
  int64_t addresses = (t.param + narrow) | (t.grad + narrow);
  for (int64_t state : t.state) addresses |= state ? state + wide : 0;
  addresses |= t.master ? t.master + wide : 0;
  return addresses % 16 == 0;
}

template <class T, int States, class Rule, class Update>
DEPTHNET_DEVICE void step_chunk(const StepTensor& t, const StepChunk& chunk, const StepShared<Rule>& shared,
                                int thread, const Update& update) {
  for_each_piece<T>(chunk, aligned<T>(t, chunk.begin), thread, [&](auto count, int64_t i) {
    step_elements<decltype(count)::value, T, States>(t, chunk, shared, i, update);
  });
}

struct Adam {
  template <class V> using Constants = AdamConstants<V>;

  DEPTHNET_DEVICE Constants<double> constants_of(const StepTensor&, const StepGroup& group, double lr,
                                                 const StepSlice& slice, double step, double factor) {
    return adam_constants(group, lr, slice, adam_powers(group, step), factor);
  }

  template <class T>
  DEPTHNET_DEVICE void run(const StepTensor& t, const StepGroup&, const StepChunk& chunk,
                           const StepShared<Adam>& shared, int thread) {
    using C = Compute<T>;
    const Constants<C> c = constants<C>(shared);
    const auto root = [](C v) { return std::sqrt(v); };
    if (t.state[2])
      return step_chunk<T, 3>(t, chunk, shared, thread, [&](C& p, C g, C& m, C& v, C& greatest) {
        adam_moments(p, g, m, v, c);
        greatest = adam_greatest(greatest, v);
        p = adam_moved(p, m, greatest, c, root);
      });
    step_chunk<T, 2>(t, chunk, shared, thread, [&](C& p, C g, C& m, C& v, C&) {
      adam_moments(p, g, m, v, c);
      p = adam_moved(p, m, v, c, root);
    });
  }
};

struct Sgd {
  template <class V> using Constants = SgdConstants<V>;

  DEPTHNET_DEVICE Constants<double> constants_of(const StepTensor& t, const StepGroup& group, double lr,
                                                 const StepSlice& slice, double, double factor) {
    return sgd_constants(group, lr, slice, t.fresh != 0, factor);
  }

  template <class T>
  DEPTHNET_DEVICE void run(const StepTensor& t, const StepGroup& group, const StepChunk& chunk,
                           const StepShared<Sgd>& shared, int thread) {
    using C = Compute<T>;
    const Constants<C> c = constants<C>(shared);
    const bool nesterov = group.nesterov != 0;
    if (t.state[0])
      return step_chunk<T, 1>(t, chunk, shared, thread, [&](C& p, C g, C& momentum, C&, C&) {
        p = sgd_moved(p, sgd_momentum(step_gradient(p, g, c.shared), momentum, nesterov, c), c);
      });
    step_chunk<T, 0>(t, chunk, shared, thread, [&](C& p, C g, C&, C&, C&) {
      p = sgd_moved(p, step_gradient(p, g, c.shared), c);
    });
  }
};

// The number of the step that is being taken; 0 for a tensor that does not count.  Each of the tensor's
// blocks calls it once, and has read the old count when it arrives: so the last to arrive may replace it.
DEPTHNET_DEVICE double count_step(const StepLaunch& s, int64_t tensor) {
  const StepTensor& t = s.tensors[tensor];
  if (!t.step) return 0;
  float* const count = at<float>(t.step);
  const float step = *count + 1;
  const int64_t length = t.size / t.slices, blocks = t.slices * ((length + kChunk - 1) / kChunk);
  if (arrive(&s.arrived[tensor]) == blocks - 1) {
    *count = step;
    s.arrived[tensor] = 0;
  }
  return step;
}

// Constants take double precision and powers, so one thread computes them for its block.
template <class Rule>
DEPTHNET_DEVICE void prepare(const StepLaunch& s, const StepChunk& chunk, StepShared<Rule>& shared) {
  const StepTensor& t = s.tensors[chunk.tensor];
  const StepGroup& group = s.groups[t.group];
  const double lr = group.lr_address ? double(*at<const float>(group.lr_address)) : group.lr;
  const double* const scales = s.scales + chunk.slice;
  const StepSlice slice = {scales[0], scales[s.slice_count], scales[2 * s.slice_count]};
  const double step = count_step(s, chunk.tensor);
  const double grad_scale = s.grad_scale ? double(*s.grad_scale) : 1;
  const bool clips = std::isfinite(s.max_grad_norm);
  const double clip = clips ? clip_factor(*s.norm / grad_scale, s.max_grad_norm) : 1;
  const double factor = grad_factor(group, grad_scale, clip);
  shared.in_double = Rule::constants_of(t, group, lr, slice, step, factor);
  shared.in_float = map(shared.in_double, [](double value) { return float(value); });
  for (int i = 0; i < 2; ++i)
    shared.rounding_keys[i] = rounding_key(t.rounding, step, (chunk.begin >> 32) + i);
}

// A block of the step; there is one for each chunk.
template <class Rule>
DEPTHNET_DEVICE void step_block(const Block& block, const StepLaunch& s, StepShared<Rule>& shared) {
  if (s.found_inf && *s.found_inf != 0) return;
  const StepChunk chunk = s.chunks[block.number];
  const StepTensor t = s.tensors[chunk.tensor];
  block.each_thread([&](int thread) {
    if (thread == 0) prepare(s, chunk, shared);
  });
  block.each_thread([&](int thread) {
    const StepGroup& group = s.groups[t.group];
    switch (t.dtype) {
      case kFloat32: return Rule::template run<float>(t, group, chunk, shared, thread);
      case kFloat64: return Rule::template run<double>(t, group, chunk, shared, thread);
      case kBFloat16: return Rule::template run<bfloat16>(t, group, chunk, shared, thread);
      case kFloat16: return Rule::template run<float16>(t, group, chunk, shared, thread);
    }
  });
}

// What the threads of a block share on the way to the norm.
struct NormShared {
  double sums[kThreads];
  bool last;
};

template <class T>
DEPTHNET_DEVICE double sum_of_squares(const StepTensor& t, const StepChunk& chunk, int thread) {
  const T* const grad = at<const T>(t.grad);
  const bool whole_pieces = (t.grad + chunk.begin * int64_t(sizeof(T))) % 16 == 0;
  Compute<T> sum = 0;
  for_each_piece<T>(chunk, whole_pieces, thread, [&](auto count, int64_t i) {
    Compute<T> g[decltype(count)::value];
    read(grad + i, g);
    for (Compute<T> each : g) sum += each * each;
  });
  return double(sum);
}

// Adds up the sums of all threads, always in the same order, into the first.
DEPTHNET_DEVICE void add_up(const Block& block, NormShared& shared) {
  for (int width = kThreads / 2; width > 0; width /= 2)
    block.each_thread([&](int thread) {
      if (thread < width) shared.sums[thread] += shared.sums[thread + width];
    });
}

// A block of the norm of all gradients; there is one for each chunk.  The last to arrive, at the first
// tensor's counter, adds up what all have found.
DEPTHNET_DEVICE void norm_block(const Block& block, const StepLaunch& s, NormShared& shared) {
  const StepChunk chunk = s.chunks[block.number];
  const StepTensor t = s.tensors[chunk.tensor];
  block.each_thread([&](int thread) {
    double& sum = shared.sums[thread];
    switch (t.dtype) {
      case kFloat32: sum = sum_of_squares<float>(t, chunk, thread); break;
      case kFloat64: sum = sum_of_squares<double>(t, chunk, thread); break;
      case kBFloat16: sum = sum_of_squares<bfloat16>(t, chunk, thread); break;
      case kFloat16: sum = sum_of_squares<float16>(t, chunk, thread); break;
    }
  });
  add_up(block, shared);
  block.each_thread([&](int thread) {
    if (thread != 0) return;
    s.partial_sums[block.number] = shared.sums[0];
    shared.last = arrive(s.arrived) == s.chunk_count - 1;
  });
  if (!shared.last) return;
  block.each_thread([&](int thread) {
    double sum = 0;
    for (int64_t i = thread; i < s.chunk_count; i += kThreads) sum += load(s.partial_sums + i);
    shared.sums[thread] = sum;
  });
  add_up(block, shared);
  block.each_thread([&](int thread) {
    if (thread != 0) return;
    *s.norm = std::sqrt(shared.sums[0]);
    *s.arrived = 0;
  });
}

}  // namespace cuda
}  // namespace depthnet
