// What torch has no fast code for when one token is read: attention over a long cache, and a head in 8 bits.
//
// Both are bound by the bytes they read, so every key, value and weight is read once, in the width it is
// stored in, and computed with in fp32. Work is cut into pieces whose size doesn't depend on the number of
// threads: the results are the same, bit for bit, for any number of them.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

namespace {

constexpr int64_t kChunk = 256;  // tokens of one piece of attention
constexpr int64_t kTogether = 4;  // values that are summed in one go
constexpr int64_t kGroup = 32;    // weights that share a scale
constexpr int64_t kRows = 512;    // rows of one piece of a product

inline float wide(float x) { return x; }
// a bf16 is the upper half of a float; written so that compilers vectorise it
inline float wide(c10::BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16); }

// exp(x) for x <= 0, to 2e-7: a polynomial (Taylor of 2^f on half a unit) and a shift of the exponent
inline float exponential(float x) {
  x = std::max(x, -87.0f) * 1.44269504f;
  const float whole = std::nearbyint(x), f = x - whole;
  float p = 0.000154035304f;
  for (float c : {0.00133335581f, 0.00961812911f, 0.0555041087f, 0.240226507f, 0.693147181f, 1.0f}) p = p * f + c;
  return p * std::bit_cast<float>((static_cast<int32_t>(whole) + 127) << 23);
}

template <typename T>
inline void widen(const T* from, float* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = wide(from[i]);
}

inline float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// What one chunk of tokens adds, for the query rows that share a KV head: softmax is put together from the
// peaks and totals of all chunks ("flash decoding", Dao et al. 2023).
struct Part {
  float* sums;    // [rows, value_dim], weighted by exp(score - peak)
  float* peaks;   // [rows]
  float* totals;  // [rows]
};

// kDim: the head's dim where it is known when this is compiled, else 0
template <int64_t kDim, typename T>
void attend_chunk(const float* queries, const T* keys, const T* values, const float* mask, int64_t rows,
                  int64_t tokens, int64_t key_dim, int64_t value_dim, Part part) {
  if (kDim) key_dim = value_dim = kDim;
  std::vector<float> buffer(rows * kChunk + kTogether * std::max(key_dim, value_dim));
  float* scores = buffer.data();
  float* wide_rows = scores + rows * kChunk;
  for (int64_t t = 0; t < tokens; ++t) {
    widen(keys + t * key_dim, wide_rows, key_dim);
    for (int64_t r = 0; r < rows; ++r)
      scores[r * kChunk + t] = dot(queries + r * key_dim, wide_rows, key_dim) + mask[t];
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* s = scores + r * kChunk;
    float peak = std::numeric_limits<float>::lowest(), total = 0;
#pragma omp simd reduction(max : peak)
    for (int64_t t = 0; t < tokens; ++t) peak = std::max(peak, s[t]);
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < tokens; ++t) total += s[t] = exponential(s[t] - peak);
    part.peaks[r] = peak;
    part.totals[r] = total;
  }
  std::fill(part.sums, part.sums + rows * value_dim, 0.0f);
  for (int64_t t = 0; t < tokens; t += kTogether) {
    // past the last token a row is read again, with a score of 0: the buffer starts as zeros
    for (int64_t i = 0; i < kTogether; ++i)
      widen(values + std::min(t + i, tokens - 1) * value_dim, wide_rows + i * value_dim, value_dim);
    const float *a = wide_rows, *b = a + value_dim, *c = b + value_dim, *d = c + value_dim;
    for (int64_t r = 0; r < rows; ++r) {
      const float* s = scores + r * kChunk + t;
      float* sum = part.sums + r * value_dim;
#pragma omp simd
      for (int64_t i = 0; i < value_dim; ++i) sum[i] += s[0] * a[i] + s[1] * b[i] + s[2] * c[i] + s[3] * d[i];
    }
  }
}

template <typename T>
void attend_typed(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const float* mask,
                  double scale, T* out) {
  const int64_t kv_heads = key.size(1), tokens = key.size(2), key_dim = key.size(3), value_dim = value.size(3);
  const int64_t rows = query.size(1) / kv_heads, chunks = (tokens + kChunk - 1) / kChunk;
  const int64_t part_size = rows * (value_dim + 2);
  std::vector<float> queries(query.numel()), buffer(kv_heads * chunks * part_size);
  for (int64_t i = 0; i < query.numel(); ++i)
    queries[i] = wide(query.const_data_ptr<T>()[i]) * static_cast<float>(scale);
  auto part_of = [&](int64_t job) {
    float* sums = buffer.data() + job * part_size;
    return Part{sums, sums + rows * value_dim, sums + rows * (value_dim + 1)};
  };
  auto attend_one = key_dim == 64 && value_dim == 64     ? attend_chunk<64, T>
                    : key_dim == 128 && value_dim == 128 ? attend_chunk<128, T>
                                                         : attend_chunk<0, T>;
  at::parallel_for(0, kv_heads * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t head = job / chunks, start = job % chunks * kChunk;
      attend_one(queries.data() + head * rows * key_dim,
                 key.const_data_ptr<T>() + head * key.stride(1) + start * key_dim,
                 value.const_data_ptr<T>() + head * value.stride(1) + start * value_dim, mask + start, rows,
                 std::min(kChunk, tokens - start), key_dim, value_dim, part_of(job));
    }
  });
  std::vector<float> sum(value_dim);
  for (int64_t head = 0; head < kv_heads; ++head) {
    for (int64_t r = 0; r < rows; ++r) {
      float peak = std::numeric_limits<float>::lowest(), total = 0;
      for (int64_t c = 0; c < chunks; ++c) peak = std::max(peak, part_of(head * chunks + c).peaks[r]);
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t c = 0; c < chunks; ++c) {
        const Part part = part_of(head * chunks + c);
        const float weight = exponential(part.peaks[r] - peak);
        total += weight * part.totals[r];
        for (int64_t i = 0; i < value_dim; ++i) sum[i] += weight * part.sums[r * value_dim + i];
      }
      for (int64_t i = 0; i < value_dim; ++i) *out++ = static_cast<T>(sum[i] / total);
    }
  }
}

void check_rows(const at::Tensor& tensor, const at::Tensor& query) {
  TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == 1 && tensor.stride(3) == 1 &&
                  tensor.stride(2) == tensor.size(3) && tensor.scalar_type() == query.scalar_type(),
              "keys and values must be [1, kv_heads, tokens, head_dim] with whole rows, as the query's type");
}

// query [1, heads, 1, key_dim] over key, value [1, kv_heads, tokens, dim]; mask [1, 1, 1, tokens], added to
// the scores. Returns [1, 1, heads, value_dim].
at::Tensor attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& mask,
                  double scale) {
  check_rows(key, query);
  check_rows(value, query);
  TORCH_CHECK(query.dim() == 4 && query.size(0) == 1 && query.size(2) == 1 && query.is_contiguous() &&
                  query.size(3) == key.size(3) && query.size(1) % key.size(1) == 0,
              "the query must be [1, heads, 1, head_dim]");
  TORCH_CHECK(key.size(1) == value.size(1) && key.size(2) == value.size(2) && mask.numel() == key.size(2) &&
                  mask.is_contiguous() && mask.scalar_type() == at::kFloat,
              "keys, values and the fp32 mask must be of the same tokens");
  at::Tensor out = at::empty({1, 1, query.size(1), value.size(3)}, query.options());
  const float* added = mask.const_data_ptr<float>();
  if (query.scalar_type() == at::kBFloat16) {
    attend_typed(query, key, value, added, scale, out.mutable_data_ptr<c10::BFloat16>());
  } else {
    attend_typed(query, key, value, added, scale, out.mutable_data_ptr<float>());
  }
  return out;
}

// states [n, in] times quants [out, in] int8 with a scale per group of 32, scales [out, in / 32] fp32.
// Returns [n, out] in fp32: logits rounded to bf16 would be half of all the error there is.
at::Tensor product8(const at::Tensor& states, const at::Tensor& quants, const at::Tensor& scales) {
  const int64_t out = quants.size(0), in = quants.size(1), groups = in / kGroup;
  TORCH_CHECK(states.dim() == 2 && states.size(1) == in && in % kGroup == 0 && quants.is_contiguous() &&
                  quants.scalar_type() == at::kChar && scales.is_contiguous() &&
                  scales.scalar_type() == at::kFloat && scales.numel() == out * groups,
              "quants and scales don't fit the states");
  const at::Tensor wide_states = states.to(at::kFloat).contiguous();
  at::Tensor result = at::empty({states.size(0), out}, wide_states.options());
  for (int64_t n = 0; n < states.size(0); ++n) {
    const float* x = wide_states.const_data_ptr<float>() + n * in;
    float* to = result.mutable_data_ptr<float>() + n * out;
    at::parallel_for(0, out, kRows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int8_t* q = quants.const_data_ptr<int8_t>() + row * in;
        const float* s = scales.const_data_ptr<float>() + row * groups;
        float lanes[kGroup] = {};
        for (int64_t g = 0; g < groups; ++g) {
#pragma omp simd
          for (int64_t i = 0; i < kGroup; ++i)
            lanes[i] += s[g] * (static_cast<float>(q[g * kGroup + i]) * x[g * kGroup + i]);
        }
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < kGroup; ++i) sum += lanes[i];
        to[row] = sum;
      }
    });
  }
  return result;
}

}  // namespace

TORCH_LIBRARY(kvchat, library) {
  library.def("attend(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor");
  library.def("product8(Tensor states, Tensor quants, Tensor scales) -> Tensor");
  library.impl("attend", c10::DispatchKey::CPU, attend);
  library.impl("product8", c10::DispatchKey::CPU, product8);
}
