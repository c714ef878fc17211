// The storage types on a GPU: how they are converted and moved.  Conversions are integer arithmetic, the
// same on the host; beside the memory's, their time does not count.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "grid.h"

namespace depthnet {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

namespace cuda {

// Compute<T> is the type that T is computed in.
template <class T> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };
template <class T> using Compute = typename ComputeOf<T>::type;

DEPTHNET_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
DEPTHNET_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr uint32_t kSign = 0x80000000, kInfinity = 0x7f800000;  // a float's

DEPTHNET_DEVICE float widened(float v) { return v; }
DEPTHNET_DEVICE double widened(double v) { return v; }
DEPTHNET_DEVICE float widened(bfloat16 v) { return float_of(uint32_t(v.bits) << 16); }
DEPTHNET_DEVICE float widened(float16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, magnitude = v.bits & 0x7fff;
  // The exponents' biases differ by 112; the last bit of a float in [1/2, 1) is that of a subnormal half.
  const uint32_t subnormal = bits_of(float_of(bits_of(0.5f) + magnitude) - 0.5f);
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t finite = magnitude < 0x400 ? subnormal : normal;
  return float_of(sign | (magnitude < 0x7c00 ? finite : magnitude << 13 | kInfinity));
}

// To nearest, ties to even; NaN stays NaN, quiet.
DEPTHNET_DEVICE void narrow(float v, float& to) { to = v; }
DEPTHNET_DEVICE void narrow(double v, double& to) { to = v; }
DEPTHNET_DEVICE void narrow(float v, bfloat16& to) {
  const uint32_t bits = bits_of(v), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = uint16_t(v == v ? rounded : bits >> 16 | 0x40);
}
DEPTHNET_DEVICE void narrow(float v, float16& to) {
  const uint32_t sign = bits_of(v) & kSign, magnitude = bits_of(v) ^ sign;
  // The last bit of a float in [1/2, 1) is that of a subnormal half.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  uint32_t half = magnitude < 113u << 23 ? subnormal : normal;
  if (half > 0x7c00) half = 0x7c00;
  if (magnitude > kInfinity) half = 0x7e00 | (magnitude >> 13 & 0x3ff);
  to.bits = uint16_t(sign >> 16 | half);
}

// Rounded up with the probability that leaves the expectation unchanged (to 16 bits for bfloat16, 13 for
// float16): random bits are added below the last bit that is kept, and what is below it is dropped.
DEPTHNET_DEVICE void narrow_stochastically(float v, uint32_t random, bfloat16& to) {
  if ((bits_of(v) & kInfinity) == kInfinity) return narrow(v, to);
  to.bits = uint16_t((bits_of(v) + (random >> 16)) >> 16);
}
DEPTHNET_DEVICE void narrow_stochastically(float v, uint32_t random, float16& to) {
  const uint32_t sign = bits_of(v) & kSign, magnitude = bits_of(v) ^ sign;
  if (magnitude >= kInfinity) return narrow(v, to);
  const uint32_t exponent = magnitude & kInfinity, least = 113u << 23;  // of normal halves
  const float last = float_of((exponent < least ? least : exponent) - (10u << 23));  // the last bit kept
  const float moved = float_of(magnitude) + float(random >> 19) * 0x1p-13f * last;
  uint32_t half = moved < 0x1p-14f ? uint32_t(moved * 0x1p24f) : (bits_of(moved) - (112u << 23)) >> 13;
  if (half > 0x7c00) half = 0x7c00;
  to.bits = uint16_t(sign >> 16 | half);
}

template <int Bytes> struct WordOf;
template <> struct WordOf<2> { using type = unsigned short; };
template <> struct WordOf<4> { using type = unsigned int; };
template <> struct WordOf<8> { using type = unsigned long long; };

// What moves N elements: words of an element each, or of 128 bits, to whose size addresses are aligned.
template <class T, int N> struct Access {
  using Word = std::conditional_t<N == 1, typename WordOf<sizeof(T)>::type, Words>;
  static constexpr int kCount = sizeof(Word) / sizeof(T);  // elements of a word
  static_assert(N % kCount == 0, "whole words");
};

template <class T, int N> DEPTHNET_DEVICE void read(const T* from, Compute<T> (&to)[N]) {
  using Word = typename Access<T, N>::Word;
  T values[N];
  for (int i = 0; i < N; i += Access<T, N>::kCount) {
    const Word word = load(reinterpret_cast<const Word*>(from + i));
    memcpy(values + i, &word, sizeof word);
  }
  for (int i = 0; i < N; ++i) to[i] = widened(values[i]);
}
template <class T, int N> DEPTHNET_DEVICE void write(T* to, const T (&from)[N]) {
  using Word = typename Access<T, N>::Word;
  for (int i = 0; i < N; i += Access<T, N>::kCount) {
    Word word;
    memcpy(&word, from + i, sizeof word);
    store(reinterpret_cast<Word*>(to + i), word);
  }
}

}  // namespace cuda
}  // namespace depthnet
