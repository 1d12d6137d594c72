// Attention over the rows of a KV cache: flash-decoding partials, each with its own softmax.
//
// The cache is split into partials of 128 rows. For each, and for each block of queries, `attend_partial` computes
// scores, their softmax relative to the partial's own largest score, and the weighted sum of values; `merge` puts the
// partials together in their order by the online softmax (flash-decoding, Dao et al. 2023,
// https://pytorch.org/blog/flash-decoding/). Partials are split at multiples of 128 rows and every sum runs in an order
// that depends on the row alone, so a token's result is bit-identical for every batch size and number of threads.
//
// A score that is NaN makes the result NaN. So does a value that is NaN, for every token of its batch that shares a
// partial with it: hidden rows have the weight 0, and 0 * NaN is NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "cache_rows.h"
#include "simd.h"
#include "threads.h"

namespace kvchat {

// The figures below: 9 query heads, 3 KV heads, dim 64, bf16, 4,096 cached rows, on one Zen 3 core with AVX2. One token
// takes 0.19 ms, 64 tokens 13.1 ms. Each is the smallest time of three runs.

// Rows of the cache of a partial. 64 rows take 9 % more for one token and 37 % more for 64 tokens. 256 rows take 2 % and
// 9 % less, but give half as many pieces to threads: at 4,096 rows and 3 KV heads, 128 leave 96 pieces.
constexpr int64_t kPartial = 128;
// Tokens whose queries share dequantised rows. For 64 tokens, blocks of 8 take 1 % more, blocks of 32 take 8 % less; but
// their scores, here 48 KiB, would leave the L1 cache.
constexpr int64_t kQueryTokens = 16;
// Queries of a block from which keys are transposed first: then a score is a lane, and no lanes have to be summed.
// Only with the 32 registers of AVX-512.
constexpr int64_t kTransposeQueries = kWide ? 12 : std::numeric_limits<int64_t>::max();
// Tokens whose partials are in memory together. They bound its size; with more of them threads wait less often.
constexpr int64_t kPassTokens = 64;

constexpr float kMasked = -std::numeric_limits<float>::infinity();  // the score of a row that a token may not see

struct AttentionOptions {
  float scale;         // of scores
  int64_t window;      // rows that a token sees, its own included; 0: all
  float softcap;       // scores become softcap * tanh(score / softcap); 0: they don't
  const float* sinks;  // [heads]: a score that takes part in the softmax and adds no value; null: none
};

// Numbers with any strides: of a tensor [1, heads, tokens, dim].
struct Strided {
  const float* data;
  int64_t head_step, token_step, number_step;
  float operator()(int64_t head, int64_t token, int64_t i) const {
    return data[head * head_step + token * token_step + i * number_step];
  }
};

// What one partial contributes for one block of queries.
struct Partial {
  float* sums;    // [queries, value_padded], weighted by exp(score - peak)
  float* peaks;   // [queries]
  float* totals;  // [queries], of the weights; 0 where the query sees no row
};

// The queries of a block: those of all heads that share a KV head, for some tokens. Query `r` is that of head
// `r / tokens` and token `r % tokens`.
struct QueryBlock {
  const float* queries;  // [queries, key_padded], scaled
  int64_t tokens, count; // `count` queries
  int64_t row;           // of the cache: the first token's own
};

// ---- scores ------------------------------------------------------------------------------------------------

// Scores of `kRows` queries with the keys of a strip, to `to` [kRows, kPartial]. `padded` numbers each.
template <int kRows, typename Source>
inline void score(const float* queries, const Source& keys, int64_t padded, float* to) {
  for (int64_t k = 0; k < kStrip; k += kSums) {
    keys.prefetch_next(k, kSums);
    F32 sum[kRows][kSums] = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      F32 query[kRows];
      for (int r = 0; r < kRows; ++r) query[r] = load<F32>(queries + r * padded + i);
      for (int j = 0; j < kSums; ++j) {
        const F32 key = keys.at(k + j, i);
        for (int r = 0; r < kRows; ++r) sum[r][j] = fma(query[r], key, sum[r][j]);
      }
    }
    for (int r = 0; r < kRows; ++r) sum_lanes(sum[r], to + r * kPartial + k);
  }
}

// The same with transposed keys [padded, kStrip]: the lanes of `score` are sums here, added in the same order.
template <int kRows>
struct TransposedScore {
  static constexpr int kVectors = kStrip / kLanes;
  const float *queries, *keys;
  int64_t padded;

  struct Sums {
    F32 of[kRows][kVectors];
    Sums operator+(const Sums& other) const {
      Sums sums;
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sums.of[r][v] = of[r][v] + other.of[r][v];
      return sums;
    }
  };

  // What lane `lane` of `score` sums: every `kLanes`th number.
  inline Sums of_lane(int64_t lane) const {
    Sums sums = {};
    for (int64_t i = lane; i < padded; i += kLanes) {
      F32 column[kVectors];
      for (int v = 0; v < kVectors; ++v) column[v] = in_register(load<F32>(keys + i * kStrip + v * kLanes));
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v)
          sums.of[r][v] = fma(splat(queries[r * padded + i]), column[v], sums.of[r][v]);
    }
    return sums;
  }

  // The tree of `sum_lanes`.
  template <int kCount>
  inline Sums of_lanes(int64_t lane) const {
    if constexpr (kCount > 1) return of_lanes<kCount / 2>(lane) + of_lanes<kCount / 2>(lane + kCount / 2);
    else if constexpr (kWide) return of_lane(lane) + of_lane(lane + kLanes / 2);
    else return of_lane(lane);
  }

  void write(float* to) const {
    const Sums sums = of_lanes<kWide ? kLanes / 2 : kLanes>(0);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) store(to + r * kPartial + v * kLanes, sums.of[r][v]);
  }
};

// Scores of all queries of a block with a strip of keys. `buffer` has room for two strips; dequantised keys are in
// the first one, where there are many queries.
template <typename Source>
void score_strip(const QueryBlock& block, const Source& keys, int64_t padded, float* buffer, float* to) {
  int64_t r = 0;
  if (block.count >= kTransposeQueries) {
    float* columns = buffer + kStrip * padded;
    transpose(buffer, kStrip, padded, columns);
    for (; r + 2 <= block.count; r += 2)
      TransposedScore<2>{block.queries + r * padded, columns, padded}.write(to + r * kPartial);
  }
  // 3 queries times 4 keys: 12 sums, of 16 registers with AVX2
  for (; r + 3 <= block.count; r += 3) score<3>(block.queries + r * padded, keys, padded, to + r * kPartial);
  for (; r < block.count; ++r) score<1>(block.queries + r * padded, keys, padded, to + r * kPartial);
}

// ---- values ------------------------------------------------------------------------------------------------

// Adds the values of a strip, weighted, to the sums of `kRows` queries: `kVectors` vectors from number `from` on.
// weights [kRows, kPartial], sums [kRows, padded].
template <int kRows, int kVectors, typename Source>
inline void add_values(const float* weights, const Source& values, int64_t from, int64_t padded, float* sums) {
  F32 sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load<F32>(sums + r * padded + v * kLanes);
  for (int64_t k = 0; k < kStrip; ++k) {
    if (from == 0) values.prefetch_next(k, 1);
    F32 weight[kRows];
    for (int r = 0; r < kRows; ++r) weight[r] = splat(weights[r * kPartial + k]);
    for (int v = 0; v < kVectors; ++v) {
      const F32 value = in_register(values.at(k, from + v * kLanes));
      for (int r = 0; r < kRows; ++r) sum[r][v] = fma(value, weight[r], sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(sums + r * padded + v * kLanes, sum[r][v]);
}

template <int kRows, typename Source>
inline void add_row_values(const float* weights, const Source& values, int64_t padded, float* sums) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= padded; i += 4 * kLanes) add_values<kRows, 4>(weights, values, i, padded, sums + i);
  for (; i < padded; i += kLanes) add_values<kRows, 1>(weights, values, i, padded, sums + i);
}

// The values of a strip for all queries: weights [queries, kPartial], sums [queries, padded].
template <typename Source>
void add_strip_values(int64_t queries, const float* weights, const Source& values, int64_t padded, float* sums) {
  int64_t r = 0;
  // 3 (6) queries times 4 vectors: 12 (24) sums, of 16 registers with AVX2 (32 with AVX-512)
  if (kWide)
    for (; r + 6 <= queries; r += 6) add_row_values<6>(weights + r * kPartial, values, padded, sums + r * padded);
  for (; r + 3 <= queries; r += 3) add_row_values<3>(weights + r * kPartial, values, padded, sums + r * padded);
  for (; r < queries; ++r) add_row_values<1>(weights + r * kPartial, values, padded, sums + r * padded);
}

// ---- softmax -----------------------------------------------------------------------------------------------

// Turns the scores [kPartial] of a query, of which [first, last] are visible, into weights exp(score - peak).
// Returns the peak and the sum of the weights: NaN if a visible score is, 0 if none is visible.
inline std::pair<float, float> softmax_partial(float* scores, int64_t first, int64_t last, float softcap) {
  if (softcap)
    for (int64_t t = 0; t <= last; ++t) scores[t] = softcap * std::tanh(scores[t] / softcap);
  std::fill(scores, scores + std::min(first, kPartial), kMasked);
  std::fill(scores + std::max<int64_t>(0, last + 1), scores + kPartial, kMasked);
  F32 largest = splat(kMasked);
  for (int64_t t = 0; t < kPartial; t += kLanes) largest = max(largest, load<F32>(scores + t));
  const float peak = max_of(largest);
  F32 total = {};
  for (int64_t t = 0; t < kPartial; t += kLanes) {
    const F32 score = load<F32>(scores + t);
    const F32 weight = score == kMasked ? splat(0.0f) : exp_nonpositive(score - peak);
    total += weight;
    store(scores + t, weight);
  }
  return {peak, sum_of(total)};
}

// ---- partials ----------------------------------------------------------------------------------------------

// The partial of cache rows [start, start + kPartial) for a block of queries.
inline void attend_partial(const AttentionOptions& options, const CacheRows& keys, const CacheRows& values,
                           const QueryBlock& block, int64_t key_padded, int64_t value_padded, int64_t start,
                           const Partial& part) {
  const int64_t end = std::min(start + kPartial, block.row + block.tokens);
  std::fill(part.totals, part.totals + block.count, 0.0f);
  if (end <= start || (options.window && start + kPartial <= block.row - options.window + 1)) return;
  const int64_t strip_numbers = kStrip * std::max(2 * key_padded, value_padded);
  const Buffer<float> memory = allocate<float>(block.count * kPartial + strip_numbers);
  float *scores = memory.get(), *buffer = scores + block.count * kPartial;
  for (int64_t at = start; at < end; at += kStrip)
    keys.visit(at, std::min(at + kStrip, end), block.count, buffer, key_padded, [&](const auto& source) {
      score_strip(block, source, key_padded, buffer, scores + at - start);
    });
  for (int64_t r = 0; r < block.count; ++r) {
    const int64_t own = block.row + r % block.tokens;  // the last row that this query sees
    const int64_t last = std::min(end - 1, own) - start;
    const int64_t first = options.window ? std::max<int64_t>(0, own - options.window + 1 - start) : 0;
    std::tie(part.peaks[r], part.totals[r]) = softmax_partial(scores + r * kPartial, first, last, options.softcap);
  }
  std::fill(part.sums, part.sums + block.count * value_padded, 0.0f);
  for (int64_t at = start; at < end; at += kStrip)
    values.visit(at, std::min(at + kStrip, end), block.count, buffer, value_padded, [&](const auto& source) {
      add_strip_values(block.count, scores + at - start, source, value_padded, part.sums);
    });
}

// The result [dim] of query `r` from its partials, by the online softmax. `part_of(i)` is partial i of `count`; `sink`
// is null or a score. `sum` is memory for `padded` numbers.
template <typename PartOf>
inline void merge(const PartOf& part_of, int64_t count, int64_t r, const float* sink, int64_t dim, int64_t padded,
                  float* sum, float* to) {
  float peak = sink ? *sink : kMasked, total = sink ? 1 : 0;
  std::fill(sum, sum + padded, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const Partial part = part_of(i);
    if (part.totals[r] == 0) continue;
    const float larger = std::max(peak, part.peaks[r]);
    const F32 weights = exp_nonpositive(F32{peak - larger, part.peaks[r] - larger});
    total = total * weights[0] + part.totals[r] * weights[1];
    for (int64_t n = 0; n < padded; n += kLanes)
      store(sum + n, load<F32>(sum + n) * weights[0] + load<F32>(part.sums + r * padded + n) * weights[1]);
    peak = larger;
  }
  for (int64_t i = 0; i < dim; ++i) to[i] = sum[i] / total;
}

// ---- the whole ---------------------------------------------------------------------------------------------

// One pass: up to `kPassTokens` tokens, all heads, all partials. Holds the queries and partials.
class AttentionPass {
 public:
  // `tokens` tokens, the first of which is row `row` of the cache.
  AttentionPass(const Layer& layer, const AttentionOptions& options, int64_t heads, int64_t tokens, int64_t row)
      : layer_(layer),
        options_(options),
        heads_(heads),
        group_(heads / layer.heads),
        tokens_(tokens),
        row_(row),
        key_padded_(pad(layer.dim[0])),
        value_padded_(pad(layer.dim[1])),
        blocks_((tokens + kQueryTokens - 1) / kQueryTokens),
        partials_((row + tokens + kPartial - 1) / kPartial),
        most_(group_ * std::min(kQueryTokens, tokens)),
        part_numbers_(most_ * (value_padded_ + 2)),
        queries_(layer.heads * blocks_ * most_ * key_padded_),
        parts_(allocate<float>(layer.heads * blocks_ * partials_ * part_numbers_)) {}

  // query(head, token, number), tokens from `begin` on; `to` [tokens, heads, value_dim].
  void run(const Strided& query, int64_t begin, float* to) {
    const int64_t jobs = layer_.heads * blocks_;
    for (int64_t job = 0; job < jobs; ++job) pack_queries(query, begin, job);
    parallel_for(jobs * partials_, 1, [&](int64_t first, int64_t end) {
      for (int64_t each = first; each < end; ++each) {
        const int64_t job = each / partials_, partial = each % partials_, head = job / blocks_;
        attend_partial(options_, {layer_, 0, head}, {layer_, 1, head}, block_of(job), key_padded_, value_padded_,
                       partial * kPartial, part_of(job, partial));
      }
    });
    parallel_for(jobs, 4, [&](int64_t first, int64_t end) {  // 4: a merge is short beside waking a thread
      std::vector<float> sum(value_padded_);
      for (int64_t job = first; job < end; ++job) merge_block(job, sum.data(), to);
    });
  }

 private:
  // A job is a block of tokens of one KV head.
  static int64_t pad(int64_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; }
  int64_t first_token(int64_t job) const { return job % blocks_ * kQueryTokens; }
  int64_t tokens_of(int64_t job) const { return std::min(kQueryTokens, tokens_ - first_token(job)); }
  float* queries_of(int64_t job) { return queries_.data() + job * most_ * key_padded_; }

  QueryBlock block_of(int64_t job) {
    return {queries_of(job), tokens_of(job), group_ * tokens_of(job), row_ + first_token(job)};
  }

  Partial part_of(int64_t job, int64_t partial) const {
    float* sums = parts_.get() + (job * partials_ + partial) * part_numbers_;
    float* peaks = sums + most_ * value_padded_;
    return {sums, peaks, peaks + most_};
  }

  void pack_queries(const Strided& query, int64_t begin, int64_t job) {
    const int64_t head = job / blocks_ * group_, first = begin + first_token(job), tokens = tokens_of(job);
    float* packed = queries_of(job);
    for (int64_t r = 0; r < group_ * tokens; ++r)
      for (int64_t i = 0; i < layer_.dim[0]; ++i)
        packed[r * key_padded_ + i] = query(head + r / tokens, first + r % tokens, i) * options_.scale;
  }

  void merge_block(int64_t job, float* sum, float* to) const {
    const int64_t tokens = tokens_of(job);
    for (int64_t r = 0; r < group_ * tokens; ++r) {
      const int64_t head = job / blocks_ * group_ + r / tokens, token = first_token(job) + r % tokens;
      const float* sink = options_.sinks ? options_.sinks + head : nullptr;
      merge([&](int64_t partial) { return part_of(job, partial); }, partials_, r, sink, layer_.dim[1], value_padded_,
            sum, to + (token * heads_ + head) * layer_.dim[1]);
    }
  }

  const Layer& layer_;
  const AttentionOptions& options_;
  const int64_t heads_, group_;  // query heads, and those of a KV head
  const int64_t tokens_, row_;
  const int64_t key_padded_, value_padded_;  // dims, filled up with zeros to whole vectors
  const int64_t blocks_, partials_;          // blocks of `kQueryTokens` tokens
  const int64_t most_, part_numbers_;        // queries of a full block; numbers of its partial
  std::vector<float> queries_;               // [KV heads, blocks, most, key_padded]
  const Buffer<float> parts_;                // [KV heads, blocks, partials, part_numbers]
};

// Attention of `tokens` queries of `heads` heads to all rows up to each token's own, which is `row` for the first one.
// Their keys and values are in the cache already. `to` [tokens, heads, value_dim].
inline void attend(const Layer& layer, const AttentionOptions& options, const Strided& query, int64_t heads,
                   int64_t tokens, int64_t row, float* to) {
  for (int64_t begin = 0; begin < tokens; begin += kPassTokens) {
    const int64_t count = std::min(kPassTokens, tokens - begin);
    AttentionPass(layer, options, heads, count, row + begin).run(query, begin, to + begin * heads * layer.dim[1]);
  }
}

}  // namespace kvchat
