#include "optimizer_driver.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"

namespace depthnet {
namespace {

// Work is shared out in pieces of this many elements, counted through all tensors: neither many small
// tensors nor a few large ones leave a thread idle.
constexpr int64_t kPiece = 16384;

// Where each tensor's elements begin when all are counted through, and the number of all.
std::vector<int64_t> starts_of(const StepTables& t) {
  std::vector<int64_t> starts(size_t(t.count) + 1);
  for (int64_t i = 0; i < t.count; ++i) starts[size_t(i) + 1] = starts[size_t(i)] + t.tensors[i].size;
  return starts;
}

int64_t pieces_of(const std::vector<int64_t>& starts) { return (starts.back() + kPiece - 1) / kPiece; }

// Calls f(tensor, slice, run) for the runs that the elements from .. to are made of.
template <class F>
void for_each_run(const StepTables& tables, const std::vector<int64_t>& starts, int64_t from, int64_t to,
                  const F& f) {
  int64_t i = std::upper_bound(starts.begin(), starts.end(), from) - starts.begin() - 1;
  for (; from < to; ++i) {
    const StepTensor& t = tables.tensors[i];
    if (t.size == 0) continue;
    const int64_t start = starts[size_t(i)], end = std::min(to - start, t.size);
    const int64_t length = t.size / t.slices;
    const auto address = [](int64_t a) { return reinterpret_cast<void*>(a); };
    StepRun run{};
    run.param = address(t.param), run.grad = address(t.grad), run.master = address(t.master);
    for (int s = 0; s < 3; ++s) run.state[s] = address(t.state[s]);
    run.stochastic = t.rounding != 0;
    for (run.begin = from - start; run.begin < end; run.begin = run.end) {
      const int64_t slice = run.begin / length;
      run.end = std::min({end, (slice + 1) * length, (run.begin | 0xffffffff) + 1});
      f(t, t.first_slice + slice, run);
    }
    from = std::max(from, start + end);
  }
}

StepSlice slice_of(const StepTables& t, int64_t slice) {
  return {t.scales[slice], t.scales[t.slices + slice], t.scales[2 * t.slices + slice]};
}

// The factor that max_norm asks for.
double clip(const Isa& isa, const StepTables& tables, const std::vector<int64_t>& starts, double grad_scale,
            double max_norm, int threads) {
  if (!std::isfinite(max_norm)) return 1;
  std::vector<double> sums(static_cast<size_t>(pieces_of(starts)));
  parallel_for(threads, int64_t(sums.size()), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t piece = begin; piece < end; ++piece)
      for_each_run(tables, starts, piece * kPiece, std::min((piece + 1) * kPiece, starts.back()),
                   [&](const StepTensor& t, int64_t, const StepRun& run) {
                     sums[size_t(piece)] += isa.squares[t.dtype](run);
                   });
  });
  double sum = 0;
  for (double each : sums) sum += each;
  return clip_factor(std::sqrt(sum) / grad_scale, max_norm);
}

float* steps_taken(const StepTensor& t) { return reinterpret_cast<float*>(t.step); }

double next_step(const StepTensor& t) { return t.step ? double(*steps_taken(t)) + 1 : 0; }

// Calls f(tensor, group, slice's scales, factor of gradients, run) for all runs, on several threads, and
// counts the step; f is copied for each thread, so that it may remember what it computed last.
template <class F>
void for_all_runs(const Isa& isa, const StepTables& tables, double grad_scale, double max_norm, int threads,
                  const F& f) {
  const std::vector<int64_t> starts = starts_of(tables);
  const double factor = clip(isa, tables, starts, grad_scale, max_norm, threads);
  parallel_for(threads, pieces_of(starts), 1, [&](int64_t begin, int64_t end, int) {
    F own = f;
    for_each_run(tables, starts, begin * kPiece, std::min(end * kPiece, starts.back()),
                 [&](const StepTensor& t, int64_t slice, StepRun& run) {
                   const StepGroup& group = tables.groups[t.group];
                   run.nesterov = group.nesterov != 0;
                   run.rounding_key = rounding_key(t.rounding, next_step(t), run.begin >> 32);
                   own(t, group, slice_of(tables, slice), grad_factor(group, grad_scale, factor), run);
                 });
  });
  for (int64_t i = 0; i < tables.count; ++i)
    if (tables.tensors[i].step) *steps_taken(tables.tensors[i]) += 1;
}

}  // namespace

void adam_step(const Isa& isa, const StepTables& tables, double grad_scale, double max_norm, int threads) {
  // Powers are dear beside short runs, and nearly always those of the run before.
  StepGroup last{};
  double last_step = 0;
  AdamPowers powers{};
  for_all_runs(isa, tables, grad_scale, max_norm, threads,
               [=, &isa](const StepTensor& t, const StepGroup& group, StepSlice slice, double factor,
                         const StepRun& run) mutable {
                 const double step = next_step(t);
                 if (step != last_step || group.beta1 != last.beta1 || group.beta2 != last.beta2)
                   powers = adam_powers(group, step), last = group, last_step = step;
                 isa.adam_step[t.dtype](run, adam_constants(group, group.lr, slice, powers, factor));
               });
}

void sgd_step(const Isa& isa, const StepTables& tables, double grad_scale, double max_norm, int threads) {
  for_all_runs(isa, tables, grad_scale, max_norm, threads,
               [&isa](const StepTensor& t, const StepGroup& group, StepSlice slice, double factor,
                      const StepRun& run) {
                 isa.sgd_step[t.dtype](run, sgd_constants(group, group.lr, slice, t.fresh != 0, factor));
               });
}

}  // namespace depthnet
