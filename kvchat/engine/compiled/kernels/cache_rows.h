// Keys and values of a KV cache, wherever and in whatever precision they are stored, read as fp32.
//
// A layer's cache is quantised rows followed by exact ones. Quantised rows are in slots of up to 64, in 8 or 4 bits;
// `quantize.py` and `codes.py` define the layout. Exact rows are fp32 or bf16.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "simd.h"

namespace kvchat {

// Rows that are converted to fp32 together: 32 rows of 64 to 256 numbers are 8 to 32 KiB, which stays in L1. Measured
// as in `attention.h`: 16 rows take 8 % more for one token, 64 rows 5 % more.
constexpr int64_t kStrip = 32;
// Up to so many queries convert each number of a key or value where they use it, in one pass of `score<3>`: a token
// takes 0.19 ms that way, 0.31 ms with a buffer of fp32. More share the buffer: each pass would convert again.
constexpr int64_t kDirectQueries = 3;
constexpr int64_t kSlot = 64;  // rows of a quantised block: BLOCK in `codes.py`

// Where the keys and values of one layer are: a row of the table, in the order of `Memory` in `cache/layer.py`.
// Pairs are of keys and of values.
struct Layer {
  int64_t width;                                // bytes of an exact number: 4 is fp32, 2 is bf16
  int64_t first, room;                          // the first exact row of the cache; how many exact rows fit
  int64_t bits, slots, starts;                  // of the quantised rows, or 0; `starts` is int64 [slots + 1]
  int64_t heads, dim[2];                        // KV heads; numbers of a row of one head
  int64_t exact[2], head_step[2], row_step[2];  // address; numbers from one head or row to the next
  int64_t codes[2], scales[2], zeros[2];        // addresses
};

// Sources of up to `kStrip` rows: `at` gives a vector of a row from number `i` on, as fp32. All give the same numbers
// for the same rows. `prefetch_next` fetches what is read `kStrip` rows later.
struct Fp32Rows {
  const float* rows;
  int64_t step;
  F32 at(int64_t row, int64_t i) const { return load<F32>(rows + row * step + i); }
  void prefetch_next(int64_t, int64_t) const {}
};

struct Bf16Rows {
  const uint16_t* rows;
  int64_t step;
  F32 at(int64_t row, int64_t i) const { return from_bf16(rows + row * step + i); }
  void prefetch_next(int64_t row, int64_t count) const { prefetch(rows + (row + kStrip) * step, count * step); }
};

// Keys share a scale and a zero point by number (channel).
struct Int8Keys {
  const int8_t *rows, *next;
  const uint16_t *scales, *zeros;  // fp16
  int64_t step;
  F32 at(int64_t row, int64_t i) const {
    const F32 code = __builtin_convertvector(from_int8(rows + row * step + i), F32);
    return fma(code, from_fp16(scales + i), from_fp16(zeros + i));
  }
  void prefetch_next(int64_t row, int64_t count) const { prefetch(next + row * step, count * step); }
};

// Values share a scale by row.
struct Int8Values {
  const int8_t *rows, *next;
  const uint16_t* scales;  // fp16
  int64_t step;
  F32 at(int64_t row, int64_t i) const {
    return __builtin_convertvector(from_int8(rows + row * step + i), F32) * splat(fp16_to_float(scales[row]));
  }
  void prefetch_next(int64_t row, int64_t count) const { prefetch(next + row * step, count * step); }
};

// The keys (0) or values (1) of one head.
struct CacheRows {
  const Layer& layer;
  int which;
  int64_t head;

  int64_t dim() const { return layer.dim[which]; }

  // Calls `use(source)` with a source of rows [begin, end), `kStrip` at most. For few queries it converts as it reads.
  // Otherwise rows are first dequantised into `buffer` [kStrip, padded]; missing rows and numbers are 0 there, since a
  // weight of 0 times what happens to be in memory may be NaN.
  template <typename Use>
  void visit(int64_t begin, int64_t end, int64_t queries, float* buffer, int64_t padded, const Use& use) const {
    if (queries <= kDirectQueries && end - begin == kStrip && padded == dim()) {
      if (begin >= layer.first && layer.width == 2)
        return use(Bf16Rows{exact_row<uint16_t>(begin - layer.first), layer.row_step[which]});
      if (end <= layer.first && layer.bits == 8) {
        const auto [slot, row] = place(begin);
        if (row + kStrip <= rows_of(slot)) {
          const int8_t* codes = codes_8(slot) + row * dim();
          const int8_t* next = codes + (row ? (layer.heads - 1) * kSlot + kStrip : kStrip) * dim();
          const int64_t block = slot * layer.heads + head;
          const uint16_t *scales = shared(layer.scales, block), *zeros = shared(layer.zeros, block);
          if (which == 0) return use(Int8Keys{codes, next, scales, zeros, dim()});
          return use(Int8Values{codes, next, scales + row, dim()});
        }
      }
    }
    if (padded > dim() || end - begin < kStrip) std::fill(buffer, buffer + kStrip * padded, 0.0f);
    dequantise(begin, end, buffer, padded);
    use(Fp32Rows{buffer, padded});
  }

  // Rows [begin, end) as fp32, `padded` numbers each; the padding is not written.
  void dequantise(int64_t begin, int64_t end, float* to, int64_t padded) const {
    if (const int64_t stop = std::min(end, layer.first); begin < stop) {
      dequantise_slots(begin, stop, to, padded);
      to += (stop - begin) * padded;
      begin = stop;
    }
    if (begin < end) convert_exact(begin - layer.first, end - begin, to, padded);
  }

 private:
  template <typename T>
  const T* exact_row(int64_t row) const {
    const int64_t start = head * layer.head_step[which] + row * layer.row_step[which];
    return reinterpret_cast<const T*>(layer.exact[which]) + start;
  }

  void convert_exact(int64_t row, int64_t count, float* to, int64_t padded) const {
    const int64_t step = layer.row_step[which];
    const auto copy = [&](auto* from, int64_t numbers, int64_t rows) {
      for (; rows; --rows, from += step, to += padded) convert(from, numbers, to);
    };
    const bool dense = step == dim() && padded == dim();  // a row ends where the next begins
    const int64_t numbers = dense ? count * dim() : dim(), rows = dense ? 1 : count;
    if (layer.width == 4) copy(exact_row<float>(row), numbers, rows);
    else copy(exact_row<uint16_t>(row), numbers, rows);
  }

  static void convert(const float* from, int64_t numbers, float* to) {
    std::memcpy(to, from, numbers * sizeof(float));
  }

  static void convert(const uint16_t* from, int64_t numbers, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= numbers; i += kLanes) store(to + i, from_bf16(from + i));
    for (; i < numbers; ++i) to[i] = bf16_to_float(from[i]);
  }

  const int64_t* starts() const { return reinterpret_cast<const int64_t*>(layer.starts); }

  int64_t rows_of(int64_t slot) const { return starts()[slot + 1] - starts()[slot]; }

  // The slot that a quantised row is in, and its number there.
  std::pair<int64_t, int64_t> place(int64_t row) const {
    const int64_t slot = std::upper_bound(starts(), starts() + layer.slots, row) - starts() - 1;
    return {slot, row - starts()[slot]};
  }

  void dequantise_slots(int64_t row, int64_t end, float* to, int64_t padded) const {
    for (auto [slot, first] = place(row); row < end; ++slot, first = 0) {
      const int64_t last = std::min(first + end - row, rows_of(slot));
      if (layer.bits == 8) dequantise_8(slot, first, last, to, padded);
      else dequantise_4(slot, first, last, to, padded);
      to += (last - first) * padded;
      row += last - first;
    }
  }

  // Scales or zero points of a slot's block, fp16: of keys [dim], of values [kSlot]. Null where there are none.
  const uint16_t* shared(const int64_t (&addresses)[2], int64_t block) const {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(addresses[which]);
    return from ? from + block * (which == 0 ? dim() : kSlot) : nullptr;
  }

  // code * scale + zero of rows [first, last) of a slot. `code(row, i)` gives a vector of codes. `dim` is a multiple
  // of 8.
  template <typename Code>
  void apply_scales(int64_t block, int64_t first, int64_t last, float* to, int64_t padded, const Code& code) const {
    const uint16_t *scales = shared(layer.scales, block), *zeros = shared(layer.zeros, block);
    const auto numbers = [&]<typename F, typename I>(F, I, int64_t i) {
      const auto of = [&](const uint16_t* from, int64_t row) {
        return !from ? F{} : which == 0 ? from_fp16<F>(from + i) : splat<F>(fp16_to_float(from[row]));
      };
      for (int64_t row = first; row < last; ++row) {
        const F whole = __builtin_convertvector(code.template operator()<I>(row, i), F);
        store(to + (row - first) * padded + i, fma(whole, of(scales, row), of(zeros, row)));
      }
    };
    int64_t i = 0;
    for (; i + kLanes <= dim(); i += kLanes) numbers(F32{}, I32{}, i);
    if constexpr (kWide)
      if (i < dim()) numbers(Half<F32>{}, Half<I32>{}, i);
  }

  const int8_t* codes_8(int64_t slot) const {
    return reinterpret_cast<const int8_t*>(layer.codes[which]) + (slot * layer.heads + head) * kSlot * dim();
  }

  void dequantise_8(int64_t slot, int64_t first, int64_t last, float* to, int64_t padded) const {
    const int64_t block = slot * layer.heads + head, step = dim();
    const int8_t* codes = codes_8(slot);
    apply_scales(block, first, last, to, padded, [=]<typename I>(int64_t row, int64_t i) {
      return from_int8<I>(codes + row * step + i);
    });
  }

  // The low half of a byte is a number of a row of the slot's first half, the high half one of the second's.
  void dequantise_4(int64_t slot, int64_t first, int64_t last, float* to, int64_t padded) const {
    const int64_t block = slot * layer.heads + head, step = dim();
    const int8_t* codes = reinterpret_cast<const int8_t*>(layer.codes[which]) + block * (kSlot / 2) * step;
    const auto half = [&](int64_t from, int64_t end, int shift) {
      if (from >= end) return;
      const int64_t skipped = shift ? kSlot / 2 : 0;
      apply_scales(block, from, end, to + (from - first) * padded, padded, [=]<typename I>(int64_t row, int64_t i) {
        return (from_int8<I>(codes + (row - skipped) * step + i) >> shift) & 15;
      });
    };
    half(first, std::min(last, kSlot / 2), 0);
    half(std::max(first, kSlot / 2), last, 4);
  }
};

// Writes states [heads, tokens, dim] of keys (0) or values (1) into exact rows from `row` of the cache on. `states`
// is a number by head, token and number.
template <typename States>
void append(const Layer& layer, int which, int64_t tokens, int64_t row, const States& states) {
  for (int64_t head = 0; head < layer.heads; ++head)
    for (int64_t n = 0; n < tokens; ++n) {
      const int64_t at = head * layer.head_step[which] + (row + n - layer.first) * layer.row_step[which];
      for (int64_t i = 0; i < layer.dim[which]; ++i)
        if (layer.width == 4) reinterpret_cast<float*>(layer.exact[which])[at + i] = states(head, n, i);
        else reinterpret_cast<uint16_t*>(layer.exact[which])[at + i] = float_to_bf16(states(head, n, i));
    }
}

}  // namespace kvchat
