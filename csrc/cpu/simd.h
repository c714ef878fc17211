// Vectors of the instruction set that this file is compiled for, on the GCC/Clang vector extension:
// arithmetic, comparison and selection are the compiler's; only what it has no syntax for is here.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace depthnet {

// Storage types: 16 bits that are only ever loaded into, and stored from, float vectors.
struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

namespace DEPTHNET_ISA {

#if defined(DEPTHNET_ISA_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(DEPTHNET_ISA_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Compute<T> is the type that T is computed in.
template <class T> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };
template <class T> using Compute = typename ComputeOf<T>::type;

template <class C> struct VectorOf;
template <> struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
};
template <> struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};
template <class C> using Vec = typename VectorOf<C>::type;
template <class C> using Mask = typename VectorOf<C>::mask;
template <class C> using Lane = decltype(Mask<C>{}[0] + 0);  // of a mask
template <class C> constexpr int kLanes = kVectorBytes / int(sizeof(C));

template <class C> static inline Vec<C> broadcast(C value) { return value - Vec<C>{}; }

// One bit per lane, lane 0 lowest.
static inline uint32_t to_bits(Mask<float> mask) {
#if defined(DEPTHNET_ISA_AVX512)
  return uint32_t(_mm512_movepi32_mask(__m512i(mask)));
#elif defined(DEPTHNET_ISA_AVX2)
  return uint32_t(_mm256_movemask_ps(__m256(mask)));
#elif defined(__x86_64__)
  return uint32_t(_mm_movemask_ps(__m128(mask)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<float>; ++i) bits |= uint32_t(mask[i] & 1) << i;
  return bits;
#endif
}
static inline uint32_t to_bits(Mask<double> mask) {
#if defined(DEPTHNET_ISA_AVX512)
  return uint32_t(_mm512_movepi64_mask(__m512i(mask)));
#elif defined(DEPTHNET_ISA_AVX2)
  return uint32_t(_mm256_movemask_pd(__m256d(mask)));
#elif defined(__x86_64__)
  return uint32_t(_mm_movemask_pd(__m128d(mask)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<double>; ++i) bits |= uint32_t(mask[i] & 1) << i;
  return bits;
#endif
}

// The inverse of to_bits; bits above the lanes are ignored.
template <class C> static inline Mask<C> from_bits(uint32_t bits) {
  Mask<C> lane{};
  for (int i = 0; i < kLanes<C>; ++i) lane[i] = Lane<C>(1) << i;
  return ((Mask<C>{} + Lane<C>(bits)) & lane) != 0;
}

template <class C> static inline C sum(Vec<C> v) {
  C lanes[kLanes<C>];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = kLanes<C> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

static inline Vec<float> square_root(Vec<float> v) {
#if defined(DEPTHNET_ISA_AVX512)
  return Vec<float>(_mm512_sqrt_ps(__m512(v)));
#elif defined(DEPTHNET_ISA_AVX2)
  return Vec<float>(_mm256_sqrt_ps(__m256(v)));
#elif defined(__x86_64__)
  return Vec<float>(_mm_sqrt_ps(__m128(v)));
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
static inline Vec<double> square_root(Vec<double> v) {
#if defined(DEPTHNET_ISA_AVX512)
  return Vec<double>(_mm512_sqrt_pd(__m512d(v)));
#elif defined(DEPTHNET_ISA_AVX2)
  return Vec<double>(_mm256_sqrt_pd(__m256d(v)));
#elif defined(__x86_64__)
  return Vec<double>(_mm_sqrt_pd(__m128d(v)));
#else
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

// Unaligned loads and stores, converting between the storage and the compute type.
template <class C> static inline Vec<C> load(const C* from) {
  Vec<C> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class C> static inline void store(C* to, Vec<C> v) { std::memcpy(to, &v, sizeof v); }

// A store past the caches, to an address aligned as a vector; fence() orders it before what follows.
static inline void stream(float* to, Vec<float> v) {
#if defined(DEPTHNET_ISA_AVX512)
  _mm512_stream_ps(to, __m512(v));
#elif defined(DEPTHNET_ISA_AVX2)
  _mm256_stream_ps(to, __m256(v));
#elif defined(__x86_64__)
  _mm_stream_ps(to, __m128(v));
#else
  store(to, v);
#endif
}
static inline void stream(double* to, Vec<double> v) {
  stream(reinterpret_cast<float*>(to), (Vec<float>)v);
}
static inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));

// 16-bit lanes to and from 32-bit ones, of which the upper halves are zero.
static inline Word widen(const uint16_t* from) {
#if defined(DEPTHNET_ISA_AVX512)
  return Word(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)));
#elif defined(DEPTHNET_ISA_AVX2)
  return Word(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)));
#else
  Half half;
  std::memcpy(&half, from, sizeof half);
  return __builtin_convertvector(half, Word);
#endif
}
static inline void narrow(uint16_t* to, Word word) {
#if defined(DEPTHNET_ISA_AVX512)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(__m512i(word)));
#elif defined(DEPTHNET_ISA_AVX2)
  __m256i packed = _mm256_packus_epi32(__m256i(word), __m256i(word));
  packed = _mm256_permute4x64_epi64(packed, 0x08);
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(packed));
#else
  Half half = __builtin_convertvector(word, Half);
  std::memcpy(to, &half, sizeof half);
#endif
}

static inline Vec<float> load(const bfloat16* from) { return (Vec<float>)(widen(&from->bits) << 16); }
static inline Word to_bfloat16(Vec<float> v) {
  Word bits = (Word)v;
  Word rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  Word quiet_nan = (bits >> 16) | 0x40;
  return v == v ? rounded : quiet_nan;
}
static inline void store(bfloat16* to, Vec<float> v) { narrow(&to->bits, to_bfloat16(v)); }

#if defined(DEPTHNET_ISA_AVX512)
static inline Vec<float> load(const float16* from) {
  return Vec<float>(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)));
}
static inline void store(float16* to, Vec<float> v) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(DEPTHNET_ISA_AVX2)
static inline Vec<float> load(const float16* from) {
  return Vec<float>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)));
}
static inline void store(float16* to, Vec<float> v) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
static inline Vec<float> load(const float16* from) {
  Word bits = widen(&from->bits);
  Word sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff, shifted = magnitude << 13;
  // No subnormal float occurs on the way: they may be flushed to zero.
  Word least = Word{} + (113u << 23);  // 2^-14, the least normal half
  Word subnormal = (Word)((Vec<float>)(shifted + least) - (Vec<float>)least);
  Word value = magnitude < 0x400 ? subnormal : shifted + (112u << 23);
  value = magnitude >= 0x7c00 ? shifted | 0x7f800000 : value;
  return (Vec<float>)(value | sign);
}
static inline void store(float16* to, Vec<float> v) {
  Word bits = (Word)v;
  Word sign = bits & 0x80000000u, magnitude = bits ^ sign;
  Vec<float> absolute = (Vec<float>)magnitude;
  // Adding 2^(e+13) (at least 2^-1, for subnormal results) makes the adder round, to nearest even,
  // at the last bit of the half; its exponent e is that of the value.
  Word exponent = magnitude & 0x7f800000;
  Vec<float> magic = (Vec<float>)(exponent + (13u << 23));
  magic = magic < 0x1p-1f ? broadcast<float>(0x1p-1f) : magic;
  Vec<float> rounded = (absolute + magic) - magic;
  Word normal = ((Word)rounded - (112u << 23)) >> 13;
  Vec<float> in_steps = rounded < 0x1p-14f ? rounded * 0x1p24f : Vec<float>{};
  Word subnormal = __builtin_convertvector(in_steps, Word);
  Word half = rounded < 0x1p-14f ? subnormal : normal;
  half = absolute >= 65520.f ? Word{} + 0x7c00 : half;
  half = v == v ? half : ((magnitude >> 13) & 0x3ff) | 0x7e00;
  narrow(&to->bits, half | (sign >> 16));
}
#endif

// The value that v has when it is stored as T.
template <class T> static inline Vec<Compute<T>> rounded(Vec<Compute<T>> v) {
  if constexpr (sizeof(T) == sizeof(Compute<T>)) return v;
  T stored[kLanes<Compute<T>>];
  store(stored, v);
  return load(stored);
}

// A vector of which only the first `count` lanes are in memory; the others are loaded as zeros.
template <class T> static inline Vec<Compute<T>> load_some(const T* from, int64_t count) {
  if (count >= kLanes<Compute<T>>) return load(from);
  T values[kLanes<Compute<T>>] = {};
  std::memcpy(values, from, size_t(count) * sizeof(T));
  return load(values);
}
template <class T> static inline void store_some(T* to, Vec<Compute<T>> v, int64_t count) {
  if (count >= kLanes<Compute<T>>) return store(to, v);
  T values[kLanes<Compute<T>>];
  store(values, v);
  std::memcpy(to, values, size_t(count) * sizeof(T));
}

// Rounded up with the probability that leaves the expectation unchanged (to 16 bits for bfloat16, 13 for
// float16): random bits are added below the last bit that is kept, and what is below it is dropped.  NaN and
// infinities are stored as ever.
static inline void store_stochastically(bfloat16* to, Vec<float> v, Word random) {
  const Word magnitude = (Word)v & 0x7fffffff;
  const Word moved = ((Word)v + (random >> 16)) >> 16;
  narrow(&to->bits, magnitude < 0x7f800000 ? moved : to_bfloat16(v));
}
static inline void store_stochastically(float16* to, Vec<float> v, Word random) {
  const Word sign = (Word)v & 0x80000000u, magnitude = (Word)v ^ sign;
  // The last bit of the half, 2^(e-10), is a power of two: so is the exponent alone, e >= -14.
  Word exponent = magnitude & 0x7f800000;
  exponent = exponent < (113u << 23) ? Word{} + (113u << 23) : exponent;
  const Vec<float> last = (Vec<float>)(exponent - (10u << 23));
  const Vec<float> fraction = __builtin_convertvector(random >> 19, Vec<float>) * 0x1p-13f;
  const Vec<float> moved = (Vec<float>)magnitude + fraction * last;
  // Towards zero: normal halves drop 13 bits, subnormal ones are multiples of 2^-24.
  const Vec<float> steps =
      __builtin_convertvector(__builtin_convertvector(moved * 0x1p24f, VectorOf<float>::mask), Vec<float>);
  const Word dropped = moved < 0x1p-14f ? (Word)(steps * 0x1p-24f) : (Word)moved & 0xffffe000u;
  store(to, (Vec<float>)((magnitude < 0x7f800000 ? dropped : magnitude) | sign));
}
template <class T>
static inline void store_some_stochastically(T* to, Vec<float> v, Word random, int64_t count) {
  if (count >= kLanes<float>) return store_stochastically(to, v, random);
  T values[kLanes<float>];
  store_stochastically(values, v, random);
  std::memcpy(to, values, size_t(count) * sizeof(T));
}

// Lane i of the result is lane i of a where i has no bit Half, and lane i - Half of b where it has; or, for
// the second, lane i + Half of a, and lane i of b.
template <int Half, class C, int... I> struct Exchange {
  static constexpr int kCount = kLanes<C>;
#if defined(__clang__)
  static Vec<C> first(Vec<C> a, Vec<C> b) {
    return __builtin_shufflevector(a, b, (I & Half ? kCount + I - Half : I)...);
  }
  static Vec<C> second(Vec<C> a, Vec<C> b) {
    return __builtin_shufflevector(a, b, (I & Half ? kCount + I : I + Half)...);
  }
#else
  static Vec<C> first(Vec<C> a, Vec<C> b) {
    return __builtin_shuffle(a, b, Mask<C>{(I & Half ? kCount + I - Half : I)...});
  }
  static Vec<C> second(Vec<C> a, Vec<C> b) {
    return __builtin_shuffle(a, b, Mask<C>{(I & Half ? kCount + I : I + Half)...});
  }
#endif
};
template <int Half, class C, int Count, int... I>
struct ExchangeOf : ExchangeOf<Half, C, Count - 1, Count - 1, I...> {};
template <int Half, class C, int... I>
struct ExchangeOf<Half, C, 0, I...> : Exchange<Half, C, I...> {};

// Transposes a square of vectors in place: lane j of v[i] and lane i of v[j] change places.
template <class C, int Half = 1>
[[gnu::always_inline]] static inline void transpose(Vec<C>* v) {
  if constexpr (Half < kLanes<C>) {
    using E = ExchangeOf<Half, C, kLanes<C>>;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<C>; ++i)
      if (!(i & Half)) {
        const Vec<C> a = v[i], b = v[i + Half];
        v[i] = E::first(a, b);
        v[i + Half] = E::second(a, b);
      }
    transpose<C, Half * 2>(v);
  }
}

// Kernels go through memory in steps of this many elements (whose signs are one 32-bit word).
constexpr int64_t kStep = 32;

// The last, incomplete step, padded with zeros, so that no step tests lengths.
template <class T>
struct Padded {
  alignas(64) T values[kStep];
  Padded(const T* from, int64_t valid) {
    std::memset(values, 0, sizeof values);
    std::memcpy(values, from, size_t(valid) * sizeof(T));
  }
};

}  // namespace DEPTHNET_ISA
}  // namespace depthnet
