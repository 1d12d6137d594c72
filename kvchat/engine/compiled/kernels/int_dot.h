// Integer dot products of quantised weights and activations: the inner step of GEMV and GEMM.
//
// Weights have 4 or 8 bits, activations 16. Sums of a group of 32 columns are exact: 32 * 127 * 32767 < 2^31.
// `TileDot` is the step for a tile of 8 rows, in one vector of 32 bytes or two of 16. It says how activations are
// laid out in memory (64 bytes for a group of a token), how many columns a step multiplies, and what it adds up.
#pragma once

#include <cstdint>

#include "weights.h"

#if KVCHAT_NEON && defined(__ARM_FEATURE_DOTPROD)
#define KVCHAT_INT8_DOT 1
#endif

namespace kvchat {

constexpr int64_t kTileBytes = kVectorBytes < kQuantBytes ? kVectorBytes : kQuantBytes;
constexpr int64_t kTileVectors = kQuantBytes / kTileBytes;           // vectors of a tile's rows: 1 or 2
constexpr int64_t kTileLanes = kTileBytes / sizeof(float);           // rows of such a vector: 8 or 4
using TileF32 = Vector<float, kTileBytes>;
using TileI32 = Vector<int32_t, kTileBytes>;
using TileI16 = Vector<int16_t, kTileBytes>;
using TileU16 = Vector<uint16_t, kTileBytes>;

// sum + the products of neighbouring int16 pairs of a and b.
template <typename I, typename S>
inline I add_pair_products(I sum, S a, S b) {
#if KVCHAT_AVX512 && defined(__AVX512VNNI__)
  if constexpr (sizeof(I) == 64) return (I)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
  if constexpr (sizeof(I) == 32) return (I)_mm256_dpwssd_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif KVCHAT_AVX512
  if constexpr (sizeof(I) == 64) return sum + (I)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
#if KVCHAT_AVX2
  if constexpr (sizeof(I) == 32) {
    sum += (I)_mm256_madd_epi16((__m256i)a, (__m256i)b);
    asm("" : "+x"(sum));  // else GCC adds later and spills the products until then: half the speed
    return sum;
  }
#elif defined(__SSE4_1__)
  if constexpr (sizeof(I) == 16) return sum + (I)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
  return sum + ((I)a << 16 >> 16) * ((I)b << 16 >> 16) + ((I)a >> 16) * ((I)b >> 16);
}

#if KVCHAT_INT8_DOT

// aarch64 with the dot-product extension: 4 columns of int8 a step. An activation is 256 * high + low, both int8.
template <int kBits>
struct TileDot {
  static constexpr int kColumns = 4;
  static constexpr int kStepsOfVector = 8 / kBits;  // in a vector of quants
  static constexpr float kPeak = 127 * 256 + 127;   // the largest activation whose two parts fit into int8
  using Weights = int8x16_t;
  struct Activations {
    int8x16_t high, low;
  };

  static Weights unpack(TileU16 quants, int step) {
    const auto bytes = (uint8x16_t)quants;
    if constexpr (kBits == 8) return (Weights)bytes;
    return (Weights)(step ? bytes >> 4 : bytes & 15);
  }

  // Lays out the activations of a group; columns in the order that `unpack` gives them in.
  static void lay_out(const int16_t* numbers, uint8_t* to) {
    for (int64_t step = 0; step < kGroup / kColumns; ++step)
      for (int64_t i = 0; i < kColumns; ++i) {
        const int64_t first = kBits == 8 ? 4 * step : 8 * (step / 2) + 2 * (step % 2);
        const int64_t column = first + i / 2 + i % 2 * (kBits == 8 ? 2 : 4);
        const int32_t high = (numbers[column] + 128) >> 8;
        to[8 * step + i] = static_cast<uint8_t>(high);
        to[8 * step + 4 + i] = static_cast<uint8_t>(numbers[column] - 256 * high);
      }
  }

  static Activations broadcast(const uint8_t* group, int64_t step) {
    return {(int8x16_t)vdupq_n_s32(load<int32_t>(group + 8 * step)),
            (int8x16_t)vdupq_n_s32(load<int32_t>(group + 8 * step + 4))};
  }

  int32x4_t high = {}, low = {};
  void add(Weights weights, Activations activations) {
    high = vdotq_s32(high, weights, activations.high);
    low = vdotq_s32(low, weights, activations.low);
  }
  TileI32 total() const { return (TileI32)((high << 8) + low); }
};

#else

// Everywhere else: 2 columns of int16 a step.
template <int kBits>
struct TileDot {
  static constexpr int kColumns = 2;
  static constexpr int kStepsOfVector = 16 / kBits;
  static constexpr float kPeak = 32767;
  using Weights = TileI16;
  using Activations = TileI16;

  static Weights unpack(TileU16 quants, int step) { return unpack_pair<kBits, TileI16>(quants, step); }
  static void lay_out(const int16_t* numbers, uint8_t* to) { std::memcpy(to, numbers, kGroup * sizeof(int16_t)); }
  static Activations broadcast(const uint8_t* group, int64_t step) {
    return (TileI16)splat<TileI32>(load<int32_t>(group + 4 * step));
  }

#if KVCHAT_NEON && KVCHAT_VECTOR_BYTES == 16
  // products of even and of odd columns stand beside each other until the end: widening multiplications take halves
  int32x4_t low = {}, high = {};
  void add(Weights weights, Activations activations) {
    const auto a = (int16x8_t)weights, b = (int16x8_t)activations;
    low = vmlal_s16(low, vget_low_s16(a), vget_low_s16(b));
    high = vmlal_high_s16(high, a, b);
  }
  TileI32 total() const { return (TileI32)vpaddq_s32(low, high); }
#else
  TileI32 sum = {};
  void add(Weights weights, Activations activations) { sum = add_pair_products(sum, weights, activations); }
  TileI32 total() const { return sum; }
#endif
};

#endif

}  // namespace kvchat
