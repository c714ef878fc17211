// Optimizer steps on the CPU: one pass over a run's memory.  Compiled once per instruction set;
// everything here has internal linkage or lives in the set's namespace.
#include "kernels.h"
#include "math/adam.h"
#include "math/sgd.h"
#include "simd.h"

namespace depthnet {
namespace DEPTHNET_ISA {
namespace {

template <class C> Word element_numbers() {
  Word numbers{};
  for (int i = 0; i < kLanes<C>; ++i) numbers[i] = uint32_t(i);
  return numbers;
}

// Calls update(p, g, states) on vectors of the parameter, its gradient and its `States` state tensors, for
// all elements of a run.
template <class T, int States, class Update, class C = Compute<T>>
void for_each_vector(const StepRun& r, const Update& update) {
  T* const param = static_cast<T*>(r.param);
  const T* const grad = static_cast<const T*>(r.grad);
  C* const master = static_cast<C*>(r.master);
  const auto step = [&](int64_t i, int64_t count) {
    Vec<C> p = master ? load_some(master + i, count) : load_some(param + i, count);
    const Vec<C> g = load_some(grad + i, count);
    Vec<C> states[States + 1];
    for (int s = 0; s < States; ++s) states[s] = load_some(static_cast<C*>(r.state[s]) + i, count);
    update(p, g, states);
    for (int s = 0; s < States; ++s) store_some(static_cast<C*>(r.state[s]) + i, states[s], count);
    if (master) store_some(master + i, p, count);
    if constexpr (sizeof(T) == 2) {
      if (r.stochastic) {
        const Word bits = rounding_bits(element_numbers<C>() + uint32_t(i), r.rounding_key);
        return store_some_stochastically(param + i, p, bits, count);
      }
    }
    store_some(param + i, p, count);
  };
  int64_t i = r.begin;
  for (; i + kLanes<C> <= r.end; i += kLanes<C>) step(i, kLanes<C>);
  if (i < r.end) step(i, r.end - i);
}

template <class C, template <class> class Constants>
Constants<Vec<C>> in_lanes(const Constants<double>& c) {
  return map(c, [](double value) { return broadcast(C(value)); });
}

template <class T, class C = Compute<T>>
void adam(const StepRun& r, const AdamConstants<double>& scalars) {
  const AdamConstants<Vec<C>> c = in_lanes<C>(scalars);
  const auto root = [](Vec<C> v) { return square_root(v); };
  if (r.state[2])
    return for_each_vector<T, 3>(r, [&](Vec<C>& p, Vec<C> g, Vec<C>* s) {
      adam_moments(p, g, s[0], s[1], c);
      s[2] = adam_greatest(s[2], s[1]);
      p = adam_moved(p, s[0], s[2], c, root);
    });
  for_each_vector<T, 2>(r, [&](Vec<C>& p, Vec<C> g, Vec<C>* s) {
    adam_moments(p, g, s[0], s[1], c);
    p = adam_moved(p, s[0], s[1], c, root);
  });
}

template <class T, class C = Compute<T>>
void sgd(const StepRun& r, const SgdConstants<double>& scalars) {
  const SgdConstants<Vec<C>> c = in_lanes<C>(scalars);
  if (!r.state[0])
    return for_each_vector<T, 0>(r, [&](Vec<C>& p, Vec<C> g, Vec<C>*) {
      p = sgd_moved(p, step_gradient(p, g, c.shared), c);
    });
  for_each_vector<T, 1>(r, [&](Vec<C>& p, Vec<C> g, Vec<C>* s) {
    p = sgd_moved(p, sgd_momentum(step_gradient(p, g, c.shared), s[0], r.nesterov, c), c);
  });
}

template <class T, class C = Compute<T>>
double sum_of_squares(const StepRun& r) {
  const T* const grad = static_cast<const T*>(r.grad);
  Vec<C> sums[4] = {};
  int64_t i = r.begin;
  for (; i + 4 * kLanes<C> <= r.end; i += 4 * kLanes<C>)
    for (int j = 0; j < 4; ++j) {
      const Vec<C> g = load(grad + i + j * kLanes<C>);
      sums[j] += g * g;
    }
  for (; i < r.end; i += kLanes<C>) {
    const Vec<C> g = load_some(grad + i, r.end - i);
    sums[0] += g * g;
  }
  return double(sum<C>((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

}  // namespace

const AdamKernel adam_step[kDTypes] = {adam<float>, adam<double>, adam<bfloat16>, adam<float16>};
const SgdKernel sgd_step[kDTypes] = {sgd<float>, sgd<double>, sgd<bfloat16>, sgd<float16>};
const SquaresKernel squares[kDTypes] = {sum_of_squares<float>, sum_of_squares<double>,
                                        sum_of_squares<bfloat16>, sum_of_squares<float16>};

}  // namespace DEPTHNET_ISA
}  // namespace depthnet
