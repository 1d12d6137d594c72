// SIMD vectors: types, and the operations that compilers don't generate well from plain C++.
//
// The types are the vector extensions of GCC and Clang, so arithmetic, comparisons and `a > b ? a : b` work on
// them as they are. Everything that needs an instruction set is in this file and in `int_dot.h`. Each function has
// a portable version, which is also what runs where an instruction set is missing.
//
//   instruction set                   bytes of a vector   compiler's names
//   x86-64-v4 (AVX-512 F BW DQ VL)    64                  -march=x86-64-v4
//   x86-64-v3 (AVX2, FMA, F16C)       32                  -march=x86-64-v3
//   aarch64 (NEON)                    16                  -march=armv8-a
//   anything else                     16                  -march=x86-64-v2, for example
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define KVCHAT_AVX512 1
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define KVCHAT_AVX2 1  // also with AVX-512
#endif
#if defined(__aarch64__)
#define KVCHAT_NEON 1
#include <arm_neon.h>
#elif defined(__SSE4_1__)
#include <immintrin.h>
#endif

// Tests set this to 64 to run the code for wide vectors on a CPU without AVX-512.
#ifndef KVCHAT_VECTOR_BYTES
#if KVCHAT_AVX512
#define KVCHAT_VECTOR_BYTES 64
#elif KVCHAT_AVX2
#define KVCHAT_VECTOR_BYTES 32
#else
#define KVCHAT_VECTOR_BYTES 16
#endif
#endif

#if defined(__clang__)
#define KVCHAT_PRAGMA(text) _Pragma(#text)
#define KVCHAT_UNROLL(count) KVCHAT_PRAGMA(clang loop unroll_count(count))
#else
#define KVCHAT_PRAGMA(text) _Pragma(#text)
#define KVCHAT_UNROLL(count) KVCHAT_PRAGMA(GCC unroll count)
#endif

namespace kvchat {

// ---- types -------------------------------------------------------------------------------------------------

template <typename T, int64_t kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <typename T, int64_t kBytes>
using Vector = typename VectorOf<T, kBytes>::type;

constexpr int64_t kVectorBytes = KVCHAT_VECTOR_BYTES;
constexpr int64_t kLanes = kVectorBytes / sizeof(float);  // 32-bit numbers of a vector: 16, 8 or 4
constexpr bool kWide = kLanes == 16;

using F32 = Vector<float, kVectorBytes>;
using I32 = Vector<int32_t, kVectorBytes>;
using I16 = Vector<int16_t, kVectorBytes>;
using U16 = Vector<uint16_t, kVectorBytes>;

template <typename V>
using Element = std::remove_cvref_t<decltype(V{}[0])>;
template <typename V>
using Half = Vector<Element<V>, sizeof(V) / 2>;
template <typename V>
constexpr int64_t kLanesOf = sizeof(V) / sizeof(Element<V>);

#if KVCHAT_AVX512
constexpr size_t kNativeBytes = 64;
#elif KVCHAT_AVX2
constexpr size_t kNativeBytes = 32;
#else
constexpr size_t kNativeBytes = 16;
#endif

// ---- memory ------------------------------------------------------------------------------------------------

template <typename V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

// All lanes are x.
template <typename V = F32>
inline V splat(Element<V> x) {
  return x - V{};
}

template <typename V>
inline Half<V> low_half(V v) {
  return load<Half<V>>(&v);
}

template <typename V>
inline Half<V> high_half(V v) {
  return load<Half<V>>(reinterpret_cast<const char*>(&v) + sizeof(V) / 2);
}

// One vector of two.
template <typename V>
inline auto concat(V low, V high) {
  using Both = Vector<Element<V>, 2 * sizeof(V)>;
#if KVCHAT_AVX512
  if constexpr (sizeof(V) == 32)
    return (Both)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)low), (__m256i)high, 1);
#endif
  const V both[] = {low, high};
  return load<Both>(both);
}

// Uninitialised memory for `count` numbers.
template <typename T>
using Buffer = std::unique_ptr<T[]>;
template <typename T>
inline Buffer<T> allocate(int64_t count) {
  return std::make_unique_for_overwrite<T[]>(count);
}

// Prefetches `count` numbers. 64 bytes: the cache line of x86-64 and of most aarch64 CPUs.
template <typename T>
inline void prefetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

// Makes the compiler load v into a register once. Without it GCC folds the load into each FMA that uses v, and
// these CPUs execute more FMAs than loads per cycle.
inline F32 in_register(F32 v) {
#if KVCHAT_AVX512 || (KVCHAT_AVX2 && KVCHAT_VECTOR_BYTES == 32)
  asm("" : "+v"(v));
#endif
  return v;
}

// ---- arithmetic --------------------------------------------------------------------------------------------

// The larger one by lanes; b where one of them is NaN.
template <typename V>
inline V max(V a, V b) {
  return a > b ? a : b;
}

// a * b + c by lanes: rounded once where the CPU has FMA instructions, else twice. Sources are compiled with
// -ffp-contract=off, so it is the same everywhere in a build, which makes results independent of the batch size.
template <typename V>
inline V fma(V a, V b, V c) {
#if KVCHAT_AVX512
  if constexpr (sizeof(V) == 64) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#if KVCHAT_AVX2
  if constexpr (sizeof(V) == 32) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif KVCHAT_NEON
  if constexpr (sizeof(V) == 16) return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
  if constexpr (sizeof(V) > kNativeBytes)
    return concat(fma(low_half(a), low_half(b), low_half(c)), fma(high_half(a), high_half(b), high_half(c)));
  else
    return a * b + c;
}

// Reduces the lanes of a vector to one number, halves first: lane i with lane i + lanes / 2.
template <typename V, typename Combine>
inline Element<V> reduce(V v, const Combine& combine) {
  if constexpr (sizeof(V) > 16) {
    return reduce(combine(low_half(v), high_half(v)), combine);
  } else {
    v = combine(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
    return combine(v, __builtin_shufflevector(v, v, 1, 0, 3, 2))[0];
  }
}
inline float sum_of(F32 v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}
template <typename V>
inline Element<V> max_of(V v) {
  return reduce(v, [](auto a, auto b) { return max(a, b); });
}

// Sums each of `kSums` vectors over its lanes, to `to` [kSums]. The order is that of a binary tree over
// neighbours, (0 + 1) + (2 + 3) + ..., after 16 lanes were folded to 8 (lane i + lane i + 8).
constexpr int64_t kSums = kWide ? 8 : 4;
inline void sum_lanes(const F32 v[kSums], float* to) {
#if KVCHAT_VECTOR_BYTES == 64
  const auto fold = [](F32 a, F32 b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  const auto pairs = [](F32 a, F32 b) {
    return __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
  };
  const F32 low = pairs(fold(v[0], v[4]), fold(v[1], v[5])), high = pairs(fold(v[2], v[6]), fold(v[3], v[7]));
  const F32 s = pairs(low, high);
  store(to, __builtin_shufflevector(s, s, 0, 1, 2, 3, 8, 9, 10, 11) +
                __builtin_shufflevector(s, s, 4, 5, 6, 7, 12, 13, 14, 15));
#elif KVCHAT_VECTOR_BYTES == 32
  const auto pairs = [](F32 a, F32 b) {
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
  };
  const F32 s = pairs(pairs(v[0], v[1]), pairs(v[2], v[3]));
  store(to, __builtin_shufflevector(s, s, 0, 1, 2, 3) + __builtin_shufflevector(s, s, 4, 5, 6, 7));
#else
  const auto pairs = [](F32 a, F32 b) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
  };
  store(to, pairs(pairs(v[0], v[1]), pairs(v[2], v[3])));
#endif
}

// 1.5 * 2^23. Adding it to x, |x| < 2^22, rounds to the nearest whole number, ties to even; its bits less those of this
// number are that as an int32.
constexpr float kRounding = 12582912.0f;

// exp(x) for x <= 0: 2^f for |f| <= 1/2 by its Taylor polynomial, then a shift of the exponent. The relative error is
// at most 2e-7 + 1.2e-7 * |x|, since x * log2(e) is rounded. Below -87 it is exp(-87), about 1e-38. NaN stays NaN.
inline F32 exp_nonpositive(F32 x) {
  x = max(splat(-87.0f), x) * 1.44269504f;  // log2(e)
  const F32 rounding = splat(kRounding), shifted = x + rounding, f = x - (shifted - rounding);
  F32 p = splat(0.000154035304f);
  for (float c : {0.00133335581f, 0.00961812911f, 0.0555041087f, 0.240226507f, 0.693147181f, 1.0f})
    p = fma(p, f, splat(c));
  const I32 exponent = (I32)shifted - (I32)rounding + 127;
  return p * (F32)(exponent << 23);
}

// ---- conversions: vectors of V from as many numbers of another type in memory ------------------------------

// IEEE half precision (fp16), one number. A multiplication by 2^112 corrects the exponent, also of subnormals.
inline float fp16_to_float(uint16_t bits) {
#if KVCHAT_AVX2
  return _cvtsh_ss(bits);
#else
  const uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | sign | special);
#endif
}

template <typename V = F32>
inline V from_fp16(const void* from) {
#if KVCHAT_AVX512
  if constexpr (sizeof(V) == 64) return (V)_mm512_cvtph_ps(load<__m256i>(from));
#endif
#if KVCHAT_AVX2
  if constexpr (sizeof(V) == 32) return (V)_mm256_cvtph_ps(load<__m128i>(from));
#elif KVCHAT_NEON
  if constexpr (sizeof(V) == 16) return (V)vcvt_f32_f16(load<float16x4_t>(from));
#endif
  V v;
  uint16_t bits[kLanesOf<V>];
  std::memcpy(bits, from, sizeof bits);
  for (int64_t i = 0; i < kLanesOf<V>; ++i) v[i] = fp16_to_float(bits[i]);
  return v;
}

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// Rounds to nearest, ties to even, as torch does. NaN stays NaN.
inline uint16_t float_to_bf16(float x) {
  if (x != x) return 0x7fc0;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline F32 from_bf16(const uint16_t* from) {
#if KVCHAT_VECTOR_BYTES == 64 && KVCHAT_AVX512
  return (F32)((I32)_mm512_cvtepu16_epi32(load<__m256i>(from)) << 16);
#elif KVCHAT_VECTOR_BYTES == 32 && KVCHAT_AVX2
  return (F32)((I32)_mm256_cvtepu16_epi32(load<__m128i>(from)) << 16);
#elif KVCHAT_VECTOR_BYTES == 16 && KVCHAT_NEON
  return (F32)vshll_n_u16(load<uint16x4_t>(from), 16);
#elif KVCHAT_VECTOR_BYTES == 16 && defined(__SSE4_1__)
  return (F32)((I32)_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))) << 16);
#else
  F32 v;
  for (int64_t i = 0; i < kLanes; ++i) v[i] = bf16_to_float(from[i]);
  return v;
#endif
}

template <typename V = I32>
inline V from_int8(const int8_t* from) {
#if KVCHAT_AVX512
  if constexpr (sizeof(V) == 64) return (V)_mm512_cvtepi8_epi32(load<__m128i>(from));
#endif
#if KVCHAT_AVX2
  if constexpr (sizeof(V) == 32) return (V)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load<int64_t>(from)));
#elif KVCHAT_NEON
  if constexpr (sizeof(V) == 16) return (V)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(load<uint32_t>(from)))));
#elif defined(__SSE4_1__)
  if constexpr (sizeof(V) == 16) return (V)_mm_cvtepi8_epi32(_mm_cvtsi32_si128(load<int32_t>(from)));
#endif
  V v;
  for (int64_t i = 0; i < kLanesOf<V>; ++i) v[i] = from[i];
  return v;
}

// ---- transposition -----------------------------------------------------------------------------------------

// Two rows a, b of a square matrix exchange blocks of `kBlock` lanes: the high one of each pair of blocks of a
// against the low one of b.
template <int64_t kBlock, size_t... kLane>
inline void exchange_blocks(F32& a, F32& b, std::index_sequence<kLane...>) {
  const F32 x = a, y = b;
  a = __builtin_shufflevector(x, y, (int64_t(kLane) & kBlock ? kLanes + (int64_t(kLane) ^ kBlock) : int64_t(kLane))...);
  b = __builtin_shufflevector(x, y, (int64_t(kLane) & kBlock ? kLanes + int64_t(kLane) : int64_t(kLane) ^ kBlock)...);
}

template <int64_t kBlock = kLanes / 2>
inline void transpose_square(F32 (&rows)[kLanes]) {
  KVCHAT_UNROLL(16)
  for (int64_t k = 0; k < kLanes; ++k)
    if (!(k & kBlock)) exchange_blocks<kBlock>(rows[k], rows[k | kBlock], std::make_index_sequence<kLanes>{});
  if constexpr (kBlock > 1) transpose_square<kBlock / 2>(rows);
}

// A matrix [height, width] to [width, height]. Both are multiples of `kLanes`.
inline void transpose(const float* from, int64_t height, int64_t width, float* to) {
  for (int64_t row = 0; row < height; row += kLanes)
    for (int64_t column = 0; column < width; column += kLanes) {
      F32 square[kLanes];
      for (int64_t k = 0; k < kLanes; ++k) square[k] = load<F32>(from + (row + k) * width + column);
      transpose_square(square);
      for (int64_t k = 0; k < kLanes; ++k) store(to + (column + k) * height + row, square[k]);
    }
}

}  // namespace kvchat
