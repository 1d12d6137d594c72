// Products of activations with quantised weights: GEMV for single tokens, packed-panel GEMM for many.
//
// Decoding is bound by memory bandwidth, so weights are read once, in the width they are stored in. Activations are
// rounded to 16 bits per group of 32 numbers (8 bits finer than bf16), which makes the inner sums integer and exact.
// The fp32 sums over groups always run in the order of the groups: a token's result is bit-identical for every
// batch size and every number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "int_dot.h"
#include "simd.h"
#include "threads.h"
#include "weights.h"

namespace kvchat {

// Tokens of a GEMV pass and tiles of rows: their sums fit into the registers. 2 tiles of one vector or 1 tile of
// two, times 4 tokens: 8 sums, of 16 registers with AVX2.
constexpr int64_t kGemvTokens = 4;
constexpr int64_t kGemvTiles = kTileVectors == 1 ? 2 : 1;
// Tokens that share an unpacked panel of weights. Their sums, 64 * 32 rows in fp32, take 8 KiB of the L1 cache.
constexpr int64_t kPanelTokens = 64;
// Vectors of 16 rows in a panel. With 8 tokens: 16 sums, of 32 registers with AVX-512.
constexpr int kPanelVectors = 2;
// Multiplications (rows * columns * tokens) below which another thread costs more than it saves: a few microseconds.
constexpr int64_t kMinWork = 1 << 16;
// Pieces of a product for each thread: a thread that was interrupted leaves its other pieces to the rest.
constexpr int64_t kPiecesPerThread = 4;

// ---- activations -------------------------------------------------------------------------------------------

// Activations [tokens, columns] in 16 bits: `number * scale`, with a scale and the exact sum for each group. A group
// that holds NaN or infinity has the scale NaN, and so has every product with it.
template <int kBits>
struct Activations {
  static constexpr int64_t kGroupBytes = kGroup * sizeof(int16_t);
  static constexpr float kPeak = TileDot<kBits>::kPeak;
  static constexpr float kSmallest = 1e-33f;  // a smaller peak counts as 0: kPeak / peak would overflow

  int64_t groups, tokens;
  Buffer<uint8_t> numbers;    // [groups, tokens, kGroupBytes], as `TileDot` reads them
  Buffer<float> scales, sums; // [groups, tokens]

  Activations(const float* x, int64_t tokens, int64_t columns)
      : groups(columns / kGroup),
        tokens(tokens),
        numbers(allocate<uint8_t>(tokens * groups * kGroupBytes)),
        scales(allocate<float>(tokens * groups)),
        sums(allocate<float>(tokens * groups)) {
    const int64_t piece = std::max<int64_t>(1, 512 / std::max<int64_t>(1, groups));  // 16,384 numbers: some us
    parallel_for(tokens, piece, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        for (int64_t g = 0; g < groups; ++g) round_group(x + n * columns + g * kGroup, g * tokens + n);
    });
  }

  const uint8_t* group(int64_t at) const { return numbers.get() + at * kGroupBytes; }

 private:
  void round_group(const float* x, int64_t at) {
    // magnitudes are compared by their bits: there NaN is larger than infinity, and that than any number
    I32 largest = {};
    F32 sum = {};
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      const F32 v = load<F32>(x + i);
      sum += v;
      largest = max(largest, (I32)v & 0x7fffffff);
    }
    const float peak = std::bit_cast<float>(max_of(largest));
    const bool finite = peak <= std::numeric_limits<float>::max();
    const float inverse = finite && peak > kSmallest ? kPeak / peak : 0;
    scales[at] = finite ? peak / kPeak : std::numeric_limits<float>::quiet_NaN();
    sums[at] = sum_of(sum);
    alignas(kVectorBytes) int16_t rounded[kGroup];  // anything, where the scale is NaN
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      const I32 number = (I32)(load<F32>(x + i) * inverse + splat(kRounding)) - (I32)splat(kRounding);
      store(rounded + i, __builtin_convertvector(number, Vector<int16_t, kVectorBytes / 2>));
    }
    TileDot<kBits>::lay_out(rounded, numbers.get() + at * kGroupBytes);
  }
};

// ---- GEMV --------------------------------------------------------------------------------------------------

// `kTiles` tiles of rows times `kTokens` tokens from `first` on. `to` [tokens, stride], rows beside each other.
template <int kBits, int kTiles, int kTokens>
void gemv(const uint8_t* weights, const Activations<kBits>& x, int64_t first, float* to, int64_t stride) {
  using Dot = TileDot<kBits>;
  constexpr int kVectors = kTiles * kTileVectors;
  const int64_t tile_bytes = x.groups * kBlockBytes<kBits>;
  // bytes of vector r: its tile, and in a block the part that belongs to its rows
  const auto part = [](int64_t r) { return r % kTileVectors; };
  const auto block_of = [&](int64_t r, int64_t g) {
    return weights + r / kTileVectors * tile_bytes + g * kBlockBytes<kBits>;
  };
  TileF32 result[kVectors][kTokens] = {};
  for (int64_t g = 0; g < x.groups; ++g) {
    if (first == 0)  // later tokens find the weights in the cache
      for (int t = 0; t < kTiles; ++t)
        prefetch(weights + (kTiles + t) * tile_bytes + g * kBlockBytes<kBits>, kBlockBytes<kBits>);
    const int64_t at = g * x.tokens + first;
    const uint8_t* numbers = x.group(at);
    Dot sum[kVectors][kTokens] = {};
    for (int v = 0; v < kBits; ++v) {
      TileU16 quants[kVectors];
      for (int r = 0; r < kVectors; ++r)
        quants[r] = load<TileU16>(block_of(r, g) + v * kQuantBytes + part(r) * kTileBytes);
      KVCHAT_UNROLL(4)
      for (int j = 0; j < Dot::kStepsOfVector; ++j) {
        typename Dot::Weights unpacked[kVectors];
        for (int r = 0; r < kVectors; ++r) unpacked[r] = Dot::unpack(quants[r], j);
        for (int n = 0; n < kTokens; ++n) {
          const auto acts =
              Dot::broadcast(numbers + n * Activations<kBits>::kGroupBytes, v * Dot::kStepsOfVector + j);
          for (int r = 0; r < kVectors; ++r) sum[r][n].add(unpacked[r], acts);
        }
      }
    }
    for (int r = 0; r < kVectors; ++r) {
      const int64_t row_bytes = 2 * kTileLanes * part(r);
      const auto scale = from_fp16<TileF32>(block_of(r, g) + kScalesAt<kBits> + row_bytes);
      TileF32 minimum = {};
      if constexpr (kBits == 4) minimum = from_fp16<TileF32>(block_of(r, g) + kMinimaAt<kBits> + row_bytes);
      for (int n = 0; n < kTokens; ++n) {
        const auto whole = __builtin_convertvector(sum[r][n].total(), TileF32);
        result[r][n] = fma(whole, scale * x.scales[at + n], result[r][n]);
        if constexpr (kBits == 4) result[r][n] = fma(minimum, splat<TileF32>(x.sums[at + n]), result[r][n]);
      }
    }
  }
  for (int n = 0; n < kTokens; ++n)
    for (int r = 0; r < kVectors; ++r) store(to + (first + n) * stride + r * kTileLanes, result[r][n]);
}

// `tiles` tiles of rows times `count` tokens from `first` on, `kGemvTokens` at a time: these read the weights again,
// from the L1 cache.
template <int kBits>
void gemv_tiles(const uint8_t* weights, const Activations<kBits>& x, int64_t first, int64_t count, float* to,
                int64_t tiles, int64_t stride) {
  const auto multiply = [&]<int kTokens>(int64_t n) {
    const auto apply = tiles >= kGemvTiles ? gemv<kBits, kGemvTiles, kTokens> : gemv<kBits, 1, kTokens>;
    apply(weights, x, n, to, stride);
  };
  for (; tiles > 0; tiles -= kGemvTiles) {
    for (int64_t n = first, left; (left = first + count - n) > 0; n += kGemvTokens) {
      if (left >= kGemvTokens) multiply.template operator()<kGemvTokens>(n);
      else if (left == 3) multiply.template operator()<3>(n);
      else if (left == 2) multiply.template operator()<2>(n);
      else multiply.template operator()<1>(n);
    }
    weights += kGemvTiles * x.groups * kBlockBytes<kBits>;
    to += kGemvTiles * kTile;
  }
}

// ---- packed-panel GEMM, with wide vectors ------------------------------------------------------------------

// One group of the weights of `kRows` rows, unpacked to int16 for many tokens. A vector holds a pair of columns of 16
// rows, that is of two tiles.
template <int kBits>
struct Panel {
  static constexpr int64_t kVectorTiles = 2, kTiles = kPanelVectors * kVectorTiles, kRows = kTiles * kTile;
  I16 weights[kGroup / 2][kPanelVectors];
  F32 scales[kPanelVectors], minima[kPanelVectors];

  Panel(const uint8_t* from, int64_t tile_bytes) {
    for (int r = 0; r < kPanelVectors; ++r, from += kVectorTiles * tile_bytes) {
      const auto both = [&](auto read, int64_t offset) {
        return concat(read(from + offset), read(from + tile_bytes + offset));
      };
      for (int v = 0; v < kBits; ++v) {
        const auto quants = both(load<Half<U16>>, v * kQuantBytes);
        for (int j = 0; j < 16 / kBits; ++j) weights[v * (16 / kBits) + j][r] = unpack_pair<kBits, I16>(quants, j);
      }
      scales[r] = both(from_fp16<Half<F32>>, kScalesAt<kBits>);
      if constexpr (kBits == 4) minima[r] = both(from_fp16<Half<F32>>, kMinimaAt<kBits>);
    }
  }

  // Adds the group's products with `kTokens` tokens to `to` [kTokens, kRows]. Activations are int16 pairs.
  template <int kTokens>
  void multiply(const uint8_t* numbers, const float* token_scales, const float* token_sums, float* to) const {
    I32 sum[kTokens][kPanelVectors] = {};
    KVCHAT_UNROLL(2)
    for (int64_t pair = 0; pair < kGroup / 2; ++pair) {
      I16 rows[kPanelVectors];
      for (int v = 0; v < kPanelVectors; ++v) rows[v] = weights[pair][v];
      for (int n = 0; n < kTokens; ++n) {
        const uint8_t* both = numbers + n * Activations<kBits>::kGroupBytes + pair * sizeof(int32_t);
        const auto acts = (I16)splat<I32>(load<int32_t>(both));
        for (int v = 0; v < kPanelVectors; ++v) sum[n][v] = add_pair_products(sum[n][v], rows[v], acts);
      }
    }
    for (int v = 0; v < kPanelVectors; ++v)
      for (int n = 0; n < kTokens; ++n) {
        float* at = to + n * kRows + v * kLanes;
        const auto whole = __builtin_convertvector(sum[n][v], F32);
        F32 result = fma(whole, scales[v] * token_scales[n], load<F32>(at));
        if constexpr (kBits == 4) result = fma(minima[v], splat(token_sums[n]), result);
        store(at, result);
      }
  }
};

// `Panel::kRows` rows times `count` tokens from `first` on, `kPanelTokens` at most.
template <int kBits>
void gemm_panel(const uint8_t* weights, const Activations<kBits>& x, int64_t first, int64_t count, float* to,
                int64_t stride) {
  constexpr int64_t kRows = Panel<kBits>::kRows, kTiles = Panel<kBits>::kTiles;
  const int64_t tile_bytes = x.groups * kBlockBytes<kBits>;
  alignas(kVectorBytes) float results[kPanelTokens * kRows];
  std::fill(results, results + count * kRows, 0.0f);
  for (int64_t g = 0; g < x.groups; ++g) {
    const uint8_t* from = weights + g * kBlockBytes<kBits>;
    for (int64_t t = 0; t < kTiles; ++t) prefetch(from + (kTiles + t) * tile_bytes, kBlockBytes<kBits>);
    const Panel<kBits> panel(from, tile_bytes);
    const int64_t at = g * x.tokens + first;
    const auto multiply = [&]<int kTokens>(int64_t n) {
      panel.template multiply<kTokens>(x.group(at + n), &x.scales[at + n], &x.sums[at + n], results + n * kRows);
    };
    int64_t n = 0;
    for (; n + 8 <= count; n += 8) multiply.template operator()<8>(n);
    if (n + 4 <= count) multiply.template operator()<4>(n), n += 4;
    if (n + 2 <= count) multiply.template operator()<2>(n), n += 2;
    if (n < count) multiply.template operator()<1>(n);
  }
  for (int64_t n = 0; n < count; ++n)
    std::memcpy(to + (first + n) * stride, results + n * kRows, kRows * sizeof(float));
}

// ---- the whole product -------------------------------------------------------------------------------------

// x [tokens, columns] times weights [8 * tiles, columns] in blocks of `kBits`; to `to` [tokens, 8 * tiles].
// Panels need the 32 registers of AVX-512: with 16, GEMV is as fast for any number of tokens.
template <int kBits>
void multiply(const float* x, int64_t tokens, int64_t columns, const uint8_t* weights, int64_t tiles, float* to) {
  if (tokens == 0 || tiles == 0) return;
  const Activations<kBits> activations(x, tokens, columns);
  const bool panels = kWide && tokens > 1;  // unpacking for a single token costs more than it saves
  const int64_t tile_bytes = activations.groups * kBlockBytes<kBits>, stride = tiles * kTile;
  const int64_t job_tiles = panels ? Panel<kBits>::kTiles : kGemvTiles;
  const int64_t job_tokens = panels ? kPanelTokens : tokens;
  const int64_t row_jobs = (tiles + job_tiles - 1) / job_tiles;
  const int64_t jobs = row_jobs * ((tokens + job_tokens - 1) / job_tokens);
  const int64_t work = job_tiles * kTile * columns * std::min(tokens, job_tokens);  // of a job
  const int64_t piece = std::max(
      {int64_t{1}, kMinWork / std::max<int64_t>(1, work), jobs / (kPiecesPerThread * thread_count())});
  parallel_for(jobs, piece, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t first = job / row_jobs * job_tokens, count = std::min(job_tokens, tokens - first);
      const int64_t tile = job % row_jobs * job_tiles, here = std::min(job_tiles, tiles - tile);
      const uint8_t* from = weights + tile * tile_bytes;
      float* rows = to + tile * kTile;
      if constexpr (kWide)
        if (panels && here == job_tiles) {
          gemm_panel<kBits>(from, activations, first, count, rows, stride);
          continue;
        }
      gemv_tiles<kBits>(from, activations, first, count, rows, here, stride);
    }
  });
}

}  // namespace kvchat
