// Quantised weights in memory: a matrix [out, in] as blocks [out / 8, in / 32, bytes], written by `pack` in Python.
//
// A block holds the weights of 8 rows (a tile) and 32 columns (a group): `quant * scale`, or with 4 bits
// `quant * scale + minimum`. Quants are -127 to 127 with 8 bits, 0 to 15 with 4 bits.
//
//   quants: `bits` vectors of 32 bytes; in each, every row has 4 bytes, that is two 16-bit lanes, one for even and
//           one for odd columns. A lane holds 16 / bits columns, the first one lowest.
//           8 bits, vector v, row r:  columns 4v + (0 2 | 1 3)                 bytes, even lane | odd lane
//           4 bits, vector v, row r:  columns 8v + (0 2 4 6 | 1 3 5 7)         half-bytes
//   scales: fp16 [8]
//   minima: fp16 [8], with 4 bits only
//
// A pair of columns (2p, 2p + 1) of all rows is thus a vector of int16 after one shift and one mask, as the
// instructions that multiply int16 pairs need it; and 4 columns are a vector of int8.
#pragma once

#include <cstdint>

#include "simd.h"

namespace kvchat {

constexpr int64_t kGroup = 32;  // columns that share a scale: the block of GGUF's Q4_0, Q4_1 and Q8_0
constexpr int64_t kTile = 8;    // rows that are stored together: the int32 sums of a 32-byte vector
constexpr int64_t kQuantBytes = 32;  // of a vector of quants

// Bytes of a block, and where its scales and minima start.
template <int kBits>
constexpr int64_t kScalesAt = kBits * kQuantBytes;
template <int kBits>
constexpr int64_t kMinimaAt = kScalesAt<kBits> + 2 * kTile;
template <int kBits>
constexpr int64_t kBlockBytes = kMinimaAt<kBits> + (kBits == 4 ? 2 * kTile : 0);

// Pair `j` of every lane as int16, j < 16 / kBits.
template <int kBits, typename I, typename U>
inline I unpack_pair(U lanes, int j) {
  if constexpr (kBits == 4) return (I)((lanes >> (4 * j)) & 15);
  return j ? (I)lanes >> 8 : (I)(lanes << 8) >> 8;
}

// Row `row` of an 8-bit matrix [.., 32 * groups] as fp32, to `to` [32 * groups].
inline void dequantise_row(const uint8_t* blocks, int64_t groups, int64_t row, float* to) {
  const int64_t lane = row % kTile;
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* block = blocks + (row / kTile * groups + g) * kBlockBytes<8>;
    const float scale = fp16_to_float(load<uint16_t>(block + kScalesAt<8> + 2 * lane));
    for (int64_t column = 0; column < kGroup; ++column) {
      const int64_t vector = column / 4, odd = column % 2, part = column / 2 % 2;
      const auto quant = static_cast<int8_t>(block[vector * kQuantBytes + 4 * lane + 2 * odd + part]);
      *to++ = scale * static_cast<float>(quant);
    }
  }
}

}  // namespace kvchat
