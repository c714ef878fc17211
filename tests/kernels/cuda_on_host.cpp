// Runs the per-thread code of the CUDA kernels over the launch grid on the host, one block after another.
#include "cuda/optimizer.h"
#include "cuda/residual.h"

using namespace depthnet::cuda;

template <class F> static void for_each_block(int64_t count, bool backwards, const F& f) {
  for (int64_t i = 0; i < count; ++i) f(Block{backwards ? count - 1 - i : i, backwards});
}

template <class Rule> static void step_blocks(const StepLaunch& s, bool backwards) {
  for_each_block(s.chunk_count, backwards, [&](const Block& block) {
    StepShared<Rule> shared;
    step_block(block, s, shared);
  });
}

// `backwards`: the order of blocks and threads, which must not matter.
extern "C" void step_on_host(bool adam, const StepLaunch* launch, bool backwards) {
  if (std::isfinite(launch->max_grad_norm))
    for_each_block(launch->chunk_count, backwards, [&](const Block& block) {
      NormShared shared;
      norm_block(block, *launch, shared);
    });
  if (adam) step_blocks<Adam>(*launch, backwards);
  else step_blocks<Sgd>(*launch, backwards);
}

extern "C" void residual_on_host(const ResidualLaunch* launch, bool backwards) {
  choose_variant(*launch, [&](auto variant, int team, int64_t blocks) {
    using V = decltype(variant);
    for_each_block(blocks, backwards, [&](const Block& block) {
      if (launch->x) forward_block<typename V::T, V::N, V::E>(block, *launch, team);
      else backward_block<typename V::T, V::N, V::E>(block, *launch, team);
    });
  });
}

extern "C" int64_t chunk_size() { return kChunk; }

template <class T>
static void convert(int64_t count, const T* stored, float* widened_ones, const float* values,
                    const uint32_t* random, T* narrow_ones) {
  for (int64_t i = 0; i < count; ++i) {
    widened_ones[i] = widened(stored[i]);
    if (random) narrow_stochastically(values[i], random[i], narrow_ones[i]);
    else narrow(values[i], narrow_ones[i]);
  }
}

// Widens `stored` and narrows `values`, stochastically if there are random bits.
extern "C" void convert_on_host(bool is_bfloat16, int64_t count, const void* stored, float* widened_ones,
                                const float* values, const uint32_t* random, void* narrow_ones) {
  using depthnet::bfloat16;
  using depthnet::float16;
  if (is_bfloat16)
    convert(count, static_cast<const bfloat16*>(stored), widened_ones, values, random,
            static_cast<bfloat16*>(narrow_ones));
  else
    convert(count, static_cast<const float16*>(stored), widened_ones, values, random,
            static_cast<float16*>(narrow_ones));
}
