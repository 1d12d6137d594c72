// What torch has no fast code for: products with weights of 4 and 8 bits, and attention over the filled rows of
// a cache, whatever these are stored in.
//
// Decoding is bound by the bytes that are read, so weights, keys and values are read once, in the width they are
// stored in. States are rounded to 16 bits per group of 32 numbers, 8 bits finer than bf16, so that products run
// in whole numbers. The order of every sum depends neither on the number of threads nor on how many tokens are
// read together: a token counts the same, bit for bit, read alone, in a chunk of a prompt, or in a draft.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

// ---- vectors: the compiler makes of them what the CPU has ---------------------------------------------------

#ifdef __AVX512F__
constexpr int64_t kBytes = 64;  // as wide as the CPU's own
#else
constexpr int64_t kBytes = 32;
#endif
using Floats = float __attribute__((vector_size(kBytes)));
using Ints = int32_t __attribute__((vector_size(kBytes)));
using Shorts = int16_t __attribute__((vector_size(kBytes)));
using UShorts = uint16_t __attribute__((vector_size(kBytes)));
using EightFloats = float __attribute__((vector_size(32)));
using EightInts = int32_t __attribute__((vector_size(32)));
using SixteenShorts = int16_t __attribute__((vector_size(32)));
using SixteenUShorts = uint16_t __attribute__((vector_size(32)));
using FourFloats = float __attribute__((vector_size(16)));
constexpr int64_t kLanes = kBytes / sizeof(float);
constexpr bool kWide = kLanes == 16;
constexpr float kLowest = std::numeric_limits<float>::lowest();

template <typename V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename V>
inline void store(void* to, V v) { std::memcpy(to, &v, sizeof v); }
template <typename V = Floats>
inline V all(std::remove_reference_t<decltype(V{}[0])> x) { return x - V{}; }
template <typename Both, typename V>
inline Both joined(V low, V high) {  // one vector of two
#ifdef __AVX512F__
  return (Both)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)low), (__m256i)high, 1);
#else
  const V both[] = {low, high};
  return load<Both>(both);
#endif
}
// A register holds it, else gcc reads it from memory as often as it is used; cores multiply faster than they read.
inline Floats kept(Floats v) {
#ifdef __AVX2__
  asm("" : "+v"(v));
#endif
  return v;
}
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// a * b + c, rounded once; left to the compiler, it would be so in some places and not in others
template <typename V>
inline V fused(V a, V b, V c) {
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 64) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#ifdef __FMA__
  if constexpr (sizeof(V) == 32) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
  for (size_t i = 0; i < sizeof(V) / sizeof(float); ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
}

// sum + products of neighbouring pairs of 16-bit numbers
template <typename I, typename S>
inline I multiply_add(I sum, S a, S b) {
#ifdef __AVX512VNNI__
  if constexpr (sizeof(I) == 64) return (I)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#ifdef __AVX512VL__
  if constexpr (sizeof(I) == 32) return (I)_mm256_dpwssd_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#endif
#endif
#ifdef __AVX512BW__
  if constexpr (sizeof(I) == 64) return sum + (I)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
#ifdef __AVX2__
  if constexpr (sizeof(I) == 32) {
    sum += (I)_mm256_madd_epi16((__m256i)a, (__m256i)b);
    asm("" : "+x"(sum));  // else gcc adds up later and spills the products until then: half the speed
    return sum;
  }
#endif
  return sum + ((I)a << 16 >> 16) * ((I)b << 16 >> 16) + ((I)a >> 16) * ((I)b >> 16);
}

template <typename V = Floats>
inline V halves(const void* from) {  // as many fp16
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 64) return (V)_mm512_cvtph_ps(load<__m256i>(from));
#endif
#ifdef __F16C__
  if constexpr (sizeof(V) == 32) return (V)_mm256_cvtph_ps(load<__m128i>(from));
#endif
  V v;
  c10::Half half[sizeof(V) / sizeof(float)];
  std::memcpy(half, from, sizeof half);
  for (size_t i = 0; i < sizeof(V) / sizeof(float); ++i) v[i] = half[i];
  return v;
}

template <typename I = Ints>
inline I widened(const int8_t* from) {  // as many; gcc would convert one after the other
#ifdef __AVX512F__
  if constexpr (sizeof(I) == 64) return (I)_mm512_cvtepi8_epi32(load<__m128i>(from));
#endif
#ifdef __AVX2__
  if constexpr (sizeof(I) == 32)
    return (I)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#endif
  I v;
  for (size_t i = 0; i < sizeof(I) / sizeof(int32_t); ++i) v[i] = from[i];
  return v;
}

inline Floats widened(const uint16_t* from) {  // a bf16 is the upper half of a float; gcc would take four steps
#if defined(__AVX512F__)
  return (Floats)((Ints)_mm512_cvtepu16_epi32(load<__m256i>(from)) << 16);
#elif defined(__AVX2__)
  return (Floats)((Ints)_mm256_cvtepu16_epi32(load<__m128i>(from)) << 16);
#else
  Ints v;
  for (int64_t i = 0; i < kLanes; ++i) v[i] = from[i] << 16;
  return (Floats)v;
#endif
}

template <typename T>
using Memory = std::unique_ptr<T[]>;
template <typename T>
inline Memory<T> fresh(int64_t count) {  // not filled with zeros, as a vector would be
  return std::make_unique_for_overwrite<T[]>(count);
}

// Calls `work(begin, end)` for pieces of [0, count). A thread that is done takes the next piece: cores are seldom
// equally free, and a layer begins when the last one is done.
template <typename Work>
inline void share(int64_t count, int64_t piece, const Work& work) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (count + piece - 1) / piece);
  if (threads <= 1) return work(0, count);
  std::atomic<int64_t> next = 0;
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(piece)) < count;) work(begin, std::min(begin + piece, count));
  });
}

template <typename T>
inline void ask_for(const T* from, int64_t count) {  // what is read soon
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

// (0 + 1) + (2 + 3) + ((4 + 5) + (6 + 7)) of the lanes of each vector; wide ones are folded first.
constexpr int64_t kSummed = kLanes / 2;
inline void sum_lanes(const Floats v[kSummed], float* to) {
#ifdef __AVX512F__
  using V = __m512;
  const auto folded = [](Floats a, Floats b) {
    return _mm512_shuffle_f32x4((V)a, (V)b, 0x44) + _mm512_shuffle_f32x4((V)a, (V)b, 0xEE);
  };
  const auto pairs = [](V a, V b) { return _mm512_shuffle_ps(a, b, 0x88) + _mm512_shuffle_ps(a, b, 0xDD); };
  const V low = pairs(folded(v[0], v[4]), folded(v[1], v[5])), high = pairs(folded(v[2], v[6]), folded(v[3], v[7]));
  const V sums = pairs(low, high);
  const V eight = _mm512_shuffle_f32x4(sums, sums, 0x88) + _mm512_shuffle_f32x4(sums, sums, 0xDD);
  store(to, _mm512_castps512_ps256(eight));
#else
  const auto pairs = [](Floats a, Floats b) {
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
  };
  const Floats sums = pairs(pairs(v[0], v[1]), pairs(v[2], v[3]));
  store(to, __builtin_shufflevector(sums, sums, 0, 1, 2, 3) + __builtin_shufflevector(sums, sums, 4, 5, 6, 7));
#endif
}

// The lanes of a vector put together: halves first.
template <typename Fold>
inline float fold(Floats v, const Fold& pair) {
  EightFloats eight = load<EightFloats>(&v);
  if constexpr (kWide) eight = pair(eight, load<EightFloats>(reinterpret_cast<const float*>(&v) + 8));
  const FourFloats four =
      pair(__builtin_shufflevector(eight, eight, 0, 1, 2, 3), __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
  const FourFloats two = pair(four, __builtin_shufflevector(four, four, 2, 3, 0, 1));
  return pair(two, __builtin_shufflevector(two, two, 1, 0, 3, 2))[0];
}
inline float sum_of(Floats v) { return fold(v, [](auto a, auto b) { return a + b; }); }
inline float largest_of(Floats v) { return fold(v, [](auto a, auto b) { return a > b ? a : b; }); }

// exp(x) for x <= 0, to 2e-7: a polynomial (Taylor of 2^f on half a unit) and a shift of the exponent
inline Floats exponential(Floats x) {
  x = larger(x, all(-87.0f)) * 1.44269504f;
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const Floats shifted = x + magic, f = x - (shifted - magic);
  Floats p = all(0.000154035304f);
  for (float c : {0.00133335581f, 0.00961812911f, 0.0555041087f, 0.240226507f, 0.693147181f, 1.0f})
    p = fused(p, f, all(c));
  const Ints exponent = (Ints)shifted - (Ints)magic + 127;
  return p * (Floats)(exponent << 23);
}

// ---- products with quantised weights ------------------------------------------------------------------------

constexpr int64_t kGroup = 32;    // weights of a row that share a scale
constexpr int64_t kTile = 8;      // rows whose weights lie together
constexpr int64_t kTogether = 4;  // tokens that are multiplied in one go where nothing stays unpacked
constexpr int64_t kBlock = 64;    // tokens that share what was unpacked
constexpr int64_t kSerial = 1 << 16;  // products that are not worth another thread
constexpr int64_t kPieces = 4;    // for each thread

// Weights of one group of a tile in memory: vectors of 16-bit lanes, two for each row, each lane holding the
// weights of several pairs of columns one above the other; then the scales in fp16, and with 4 bits the minima.
template <int kBits>
constexpr int64_t kBlockBytes = kTile * kGroup * kBits / 8 + (kBits == 4 ? 4 : 2) * kTile;

// Tokens' states in 16 bits: `numbers * scale`, with a scale and the exact sum per group.
struct Rounded {
  int64_t groups, tokens;
  Memory<int16_t> numbers;     // [groups, tokens, kGroup]
  Memory<float> scales, sums;  // [groups, tokens]

  Rounded(const float* states, int64_t tokens, int64_t in)
      : groups(in / kGroup),
        tokens(tokens),
        numbers(fresh<int16_t>(tokens * in)),
        scales(fresh<float>(tokens * groups)),
        sums(fresh<float>(tokens * groups)) {
    share(tokens, std::max<int64_t>(1, 512 / groups), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        for (int64_t g = 0; g < groups; ++g) round(states + n * in + g * kGroup, g * tokens + n);
    });
  }

  void round(const float* x, int64_t at) {
    Floats top = all(0), sum = all(0);
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      const Floats v = load<Floats>(x + i);
      sum += v;
      top = larger(top, larger(v, -v));
    }
    const float peak = largest_of(top);
    const float inverse = peak > 0 ? 32767 / peak : 0;
    scales[at] = peak / 32767;
    sums[at] = sum_of(sum);
    int16_t* to = numbers.get() + at * kGroup;
    for (int64_t i = 0; i < kGroup; ++i) to[i] = static_cast<int16_t>(std::nearbyint(x[i] * inverse));
  }
};

// The weights of pair `j` of every lane, as 16-bit numbers.
template <int kBits, typename V, typename U>
inline V unpack(U lanes, int j) {
  if constexpr (kBits == 4) return (V)((lanes >> (4 * j)) & 15);
  return j ? (V)lanes >> 8 : (V)(lanes << 8) >> 8;
}

// `kTiles` tiles of rows times `kTokens` tokens from `first` on.
template <int kBits, int kTiles, int kTokens>
void multiply_few(const uint8_t* weights, const Rounded& states, int64_t first, float* to, int64_t stride) {
  constexpr int kPairs = 16 / kBits;  // in a lane
  const int64_t groups = states.groups, ahead = kTiles * groups * kBlockBytes<kBits>;
  EightFloats result[kTiles][kTokens] = {};
  for (int64_t g = 0; g < groups; ++g) {
    EightInts sum[kTiles][kTokens] = {};
    for (int r = 0; r < kTiles && first == 0; ++r)  // later tokens find the weights in the cache
      ask_for(weights + (r * groups + g) * kBlockBytes<kBits> + ahead, kBlockBytes<kBits>);
    const int64_t at = g * states.tokens + first;
    const int16_t* numbers = states.numbers.get() + at * kGroup;
    for (int v = 0; v < kBits; ++v) {
      SixteenUShorts lanes[kTiles];
      for (int r = 0; r < kTiles; ++r)
        lanes[r] = load<SixteenUShorts>(weights + (r * groups + g) * kBlockBytes<kBits> + v * sizeof(SixteenShorts));
#pragma GCC unroll 4
      for (int j = 0; j < kPairs; ++j) {
        SixteenShorts unpacked[kTiles];
        for (int r = 0; r < kTiles; ++r) unpacked[r] = unpack<kBits, SixteenShorts>(lanes[r], j);
        for (int n = 0; n < kTokens; ++n) {
          const auto pair = (SixteenShorts)all<EightInts>(load<int32_t>(numbers + n * kGroup + 2 * (v * kPairs + j)));
          for (int r = 0; r < kTiles; ++r) sum[r][n] = multiply_add(sum[r][n], unpacked[r], pair);
        }
      }
    }
    for (int r = 0; r < kTiles; ++r) {
      const uint8_t* scales = weights + (r * groups + g) * kBlockBytes<kBits> + kBits * sizeof(SixteenShorts);
      const auto scale = halves<EightFloats>(scales);
      const auto minimum = halves<EightFloats>(scales + (kBits == 4 ? 2 * kTile : 0));
      for (int n = 0; n < kTokens; ++n) {
        const auto whole = __builtin_convertvector(sum[r][n], EightFloats);
        result[r][n] = fused(whole, scale * states.scales[at + n], result[r][n]);
        if constexpr (kBits == 4) result[r][n] = fused(minimum, all<EightFloats>(states.sums[at + n]), result[r][n]);
      }
    }
  }
  for (int n = 0; n < kTokens; ++n)
    for (int r = 0; r < kTiles; ++r) store(to + (first + n) * stride + r * kTile, result[r][n]);
}

// One group of the weights of `kRows` rows, unpacked for many tokens; a vector holds a pair of columns of its rows.
template <int kBits>
struct Unpacked {
  static constexpr int kVectors = 2;
  static constexpr int64_t kTilesOfVector = kLanes / kTile, kTiles = kVectors * kTilesOfVector, kRows = kTiles * kTile;
  Shorts weights[kGroup / 2][kVectors];
  Floats scales[kVectors], minima[kVectors];

  Unpacked(const uint8_t* from, int64_t tile_bytes) {
    constexpr int64_t kScales = kTile * kGroup * kBits / 8;
    for (int r = 0; r < kVectors; ++r, from += kTilesOfVector * tile_bytes) {
      const auto wide = [&]<typename V>(int64_t offset, V (*tile)(const void*), auto whole) {
        if constexpr (kTilesOfVector == 1) return tile(from + offset);
        else return joined<decltype(whole)>(tile(from + offset), tile(from + tile_bytes + offset));
      };
      for (int v = 0; v < kBits; ++v) {
        const auto lanes = wide(v * sizeof(SixteenShorts), load<SixteenUShorts>, UShorts{});
        for (int j = 0; j < 16 / kBits; ++j) weights[v * (16 / kBits) + j][r] = unpack<kBits, Shorts>(lanes, j);
      }
      scales[r] = wide(kScales, halves<EightFloats>, Floats{});
      if constexpr (kBits == 4) minima[r] = wide(kScales + 2 * kTile, halves<EightFloats>, Floats{});
    }
  }

  // Adds the group's products with `kTokens` tokens to [tokens, kRows].
  template <int kTokens>
  void multiply(const int16_t* numbers, const float* token_scales, const float* sums, float* to) const {
    Ints sum[kTokens][kVectors] = {};
#pragma GCC unroll 2
    for (int64_t pair = 0; pair < kGroup / 2; ++pair) {
      Shorts rows[kVectors];
      for (int v = 0; v < kVectors; ++v) rows[v] = weights[pair][v];
      for (int n = 0; n < kTokens; ++n) {
        const auto both = (Shorts)all<Ints>(load<int32_t>(numbers + n * kGroup + 2 * pair));
        for (int v = 0; v < kVectors; ++v) sum[n][v] = multiply_add(sum[n][v], rows[v], both);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      for (int n = 0; n < kTokens; ++n) {
        float* at = to + n * kRows + v * kLanes;
        const auto whole = __builtin_convertvector(sum[n][v], Floats);
        Floats result = fused(whole, scales[v] * token_scales[n], load<Floats>(at));
        if constexpr (kBits == 4) result = fused(minima[v], all(sums[n]), result);
        store(at, result);
      }
    }
  }
};

// `Unpacked::kRows` rows times `count` tokens from `first` on, `kBlock` at most.
template <int kBits>
void multiply_block(const uint8_t* weights, const Rounded& states, int64_t first, int64_t count, float* to, int64_t,
                    int64_t stride) {
  constexpr int64_t kRows = Unpacked<kBits>::kRows, kTiles = Unpacked<kBits>::kTiles;
  const int64_t tile_bytes = states.groups * kBlockBytes<kBits>;
  alignas(kBytes) float results[kBlock * kRows];
  std::fill(results, results + count * kRows, 0.0f);
  for (int64_t g = 0; g < states.groups; ++g) {
    const uint8_t* from = weights + g * kBlockBytes<kBits>;
    for (int64_t t = 0; t < kTiles; ++t) ask_for(from + (kTiles + t) * tile_bytes, kBlockBytes<kBits>);
    const Unpacked<kBits> group(from, tile_bytes);
    const int64_t at = g * states.tokens + first;
    const auto multiply = [&]<int kTokens>(int64_t n) {
      group.template multiply<kTokens>(states.numbers.get() + (at + n) * kGroup, &states.scales[at + n],
                                       &states.sums[at + n], results + n * kRows);
    };
    int64_t n = 0;
    for (; n + 8 <= count; n += 8) multiply.template operator()<8>(n);  // their sums fit into registers
    if (n + 4 <= count) multiply.template operator()<4>(n), n += 4;
    if (n + 2 <= count) multiply.template operator()<2>(n), n += 2;
    if (n < count) multiply.template operator()<1>(n);
  }
  for (int64_t n = 0; n < count; ++n)
    std::memcpy(to + (first + n) * stride, results + n * kRows, kRows * sizeof(float));
}

// `tiles` tiles of rows times `count` tokens from `first` on.
template <int kBits>
void multiply_tiles(const uint8_t* weights, const Rounded& states, int64_t first, int64_t count, float* to,
                    int64_t tiles, int64_t stride) {
  for (; tiles > 0; tiles -= 2, weights += 2 * states.groups * kBlockBytes<kBits>, to += 2 * kTile)
    for (int64_t n = first, left; (left = first + count - n) > 0; n += kTogether) {
      const auto multiply = [&]<int kTokens>() {
        const auto apply = tiles > 1 ? multiply_few<kBits, 2, kTokens> : multiply_few<kBits, 1, kTokens>;
        apply(weights, states, n, to, stride);
      };
      if (left >= kTogether) multiply.template operator()<kTogether>();
      else if (left == 3) multiply.template operator()<3>();
      else if (left == 2) multiply.template operator()<2>();
      else multiply.template operator()<1>();
    }
}

template <int kBits>
void multiply_all(const uint8_t* weights, const Rounded& states, float* to, int64_t tiles) {
  const bool unpacks = kWide && states.tokens > 1;  // for one it isn't worth it, and narrow vectors are too few
  const int64_t tile_bytes = states.groups * kBlockBytes<kBits>, stride = tiles * kTile;
  const int64_t together = unpacks ? Unpacked<kBits>::kTiles : 2, panels = (tiles + together - 1) / together;
  const int64_t block = unpacks ? kBlock : states.tokens, blocks = (states.tokens + block - 1) / block;
  const int64_t products = together * kTile * states.groups * kGroup * std::min(states.tokens, block);  // of a job
  const int64_t piece = std::max({int64_t{1}, kSerial / products, panels * blocks / (kPieces * at::get_num_threads())});
  share(panels * blocks, piece, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t first = job / panels * block, count = std::min(block, states.tokens - first);
      const int64_t tile = job % panels * together, here = std::min(together, tiles - tile);
      const uint8_t* from = weights + tile * tile_bytes;
      const auto apply = unpacks && here == together ? multiply_block<kBits> : multiply_tiles<kBits>;
      apply(from, states, first, count, to + tile * kTile, here, stride);
    }
  });
}

int64_t bits_of(const at::Tensor& blocks) {
  TORCH_CHECK(blocks.dim() == 3 && blocks.is_contiguous() && blocks.scalar_type() == at::kByte &&
                  (blocks.size(2) == kBlockBytes<4> || blocks.size(2) == kBlockBytes<8>),
              "these are no blocks of 4 or 8 bits");
  return blocks.size(2) == kBlockBytes<4> ? 4 : 8;
}

// states [tokens, in] fp32 times weights as blocks [out / 8, in / 32, bytes]. Returns [tokens, out] in fp32.
at::Tensor product(const at::Tensor& states, const at::Tensor& blocks) {
  const int64_t bits = bits_of(blocks), tokens = states.size(0), in = states.size(-1);
  TORCH_CHECK(states.dim() == 2 && states.scalar_type() == at::kFloat && blocks.size(1) * kGroup == in,
              "the blocks don't fit the states");
  const at::Tensor whole = states.contiguous();
  const Rounded rounded(whole.const_data_ptr<float>(), tokens, in);
  at::Tensor out = at::empty({tokens, blocks.size(0) * kTile}, whole.options());
  const auto apply = bits == 4 ? multiply_all<4> : multiply_all<8>;
  apply(blocks.const_data_ptr<uint8_t>(), rounded, out.mutable_data_ptr<float>(), blocks.size(0));
  return out;
}

// Rows `ids` [tokens] of weights as blocks of 8 bits. Returns [tokens, in] in fp32.
at::Tensor lookup(const at::Tensor& ids, const at::Tensor& blocks) {
  TORCH_CHECK(bits_of(blocks) == 8 && ids.dim() == 1 && ids.scalar_type() == at::kLong,
              "rows are looked up in blocks of 8 bits");
  const int64_t groups = blocks.size(1);
  at::Tensor out = at::empty({ids.size(0), groups * kGroup}, at::TensorOptions().dtype(at::kFloat));
  float* to = out.mutable_data_ptr<float>();
  for (int64_t n = 0; n < ids.size(0); ++n) {
    const int64_t id = ids.const_data_ptr<int64_t>()[n * ids.stride(0)], lane = id % kTile;
    TORCH_CHECK(0 <= id && id < blocks.size(0) * kTile, "there is no row ", id);
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* block = blocks.const_data_ptr<uint8_t>() + (id / kTile * groups + g) * kBlockBytes<8>;
      const float scale = load<c10::Half>(block + kTile * kGroup + 2 * lane);
      for (int64_t pair = 0; pair < kGroup / 2; ++pair)
        for (int64_t column = 0; column < 2; ++column) {
          const int64_t at = pair / 2 * 32 + (2 * lane + column) * 2 + pair % 2;
          *to++ = scale * static_cast<float>(static_cast<int8_t>(block[at]));
        }
    }
  }
  return out;
}

// ---- attention over a cache ---------------------------------------------------------------------------------

constexpr int64_t kChunk = 128;   // rows of the cache whose softmax is computed on its own
constexpr int64_t kAtOnce = 32;   // rows that are widened to fp32 together
constexpr int64_t kQueries = 16;  // tokens that share what was widened
constexpr int64_t kFew = 3;       // query heads that read a row too seldom for it to be written down in fp32
constexpr int64_t kMany = kWide ? 12 : std::numeric_limits<int64_t>::max();  // queries that keys are turned for
constexpr int64_t kTokens = 64;   // tokens whose parts are held together
constexpr int64_t kSlot = 64;     // rows of a quantised block

// Where one layer's keys and values lie: a row of the table, in the order of `Memory` in `cache/layers.py`.
struct Layer {
  int64_t width;                             // bytes of an exact number: 4 is fp32, 2 is bf16
  int64_t first, room;                       // row of the cache that the exact rows start with; how many fit
  int64_t bits, slots, starts;               // of the rows before: 0 where there are none; int64 [slots + 1]
  int64_t heads, dim[2];                     // of keys and of values
  int64_t exact[2], head_step[2], row_step[2];  // address, and numbers from one head or row to the next
  int64_t codes[2], scales[2], zeros[2];     // addresses; `quantize.py` has the layout
};

// Rows as fp32, a vector of numbers at a time: of a buffer, of bf16, and of 8 bits, where keys share a
// scale and a zero point by number, and values a scale by row. All give the same numbers. `ask` fetches what is read
// `kAtOnce` rows later.
struct Widened {
  const float* rows;
  int64_t step;
  Floats at(int64_t row, int64_t i) const { return load<Floats>(rows + row * step + i); }
  void ask(int64_t, int64_t) const {}
};

struct Sixteen {
  const uint16_t* rows;
  int64_t step;
  Floats at(int64_t row, int64_t i) const { return widened(rows + row * step + i); }
  void ask(int64_t row, int64_t count) const { ask_for(rows + (row + kAtOnce) * step, count * step); }
};

struct EightBitKeys {
  const int8_t *rows, *next;
  const c10::Half *scales, *zeros;
  int64_t step;
  Floats at(int64_t row, int64_t i) const {
    const Floats code = __builtin_convertvector(widened(rows + row * step + i), Floats);
    return fused(code, halves(scales + i), halves(zeros + i));
  }
  void ask(int64_t row, int64_t count) const { ask_for(next + row * step, count * step); }
};

struct EightBitValues {
  const int8_t *rows, *next;
  const c10::Half* scales;
  int64_t step;
  Floats at(int64_t row, int64_t i) const {
    return __builtin_convertvector(widened(rows + row * step + i), Floats) * all(scales[row]);
  }
  void ask(int64_t row, int64_t count) const { ask_for(next + row * step, count * step); }
};

// One head's keys (0) or values (1).
struct Rows {
  const Layer& memory;
  int which;
  int64_t head;

  int64_t dim() const { return memory.dim[which]; }

  // Hands rows [begin, end), `kAtOnce` at most, to `use`. What few queries read is widened on the way, which
  // saves writing it down; else it is widened once, into `wide`. Zeros stand there for what is missing: a weight
  // of 0 must not meet what is no number.
  template <typename Use>
  void visit(int64_t begin, int64_t end, int64_t queries, float* wide, int64_t padded, const Use& use) const {
    if (queries <= kFew && end - begin == kAtOnce && padded == dim()) {
      if (begin >= memory.first && memory.width == 2)
        return use(Sixteen{exact_row<uint16_t>(begin - memory.first), memory.row_step[which]});
      if (end <= memory.first && memory.bits == 8) {
        const auto [slot, row] = place(begin);
        if (row + kAtOnce <= in_slot(slot)) {
          const int8_t* codes = codes_8(slot) + row * dim();
          const int8_t* next = codes + (row ? (memory.heads - 1) * kSlot + kAtOnce : kAtOnce) * dim();
          const int64_t block = slot * memory.heads + head;
          const c10::Half *scales = shared(memory.scales, block), *zeros = shared(memory.zeros, block);
          if (which == 0) return use(EightBitKeys{codes, next, scales, zeros, dim()});
          return use(EightBitValues{codes, next, scales + row, dim()});
        }
      }
    }
    if (padded > dim() || end - begin < kAtOnce) std::fill(wide, wide + kAtOnce * padded, 0.0f);
    widen(begin, end, wide, padded);
    use(Widened{wide, padded});
  }

  // Rows [begin, end) as fp32, `padded` numbers each; the padding is not written.
  void widen(int64_t begin, int64_t end, float* to, int64_t padded) const {
    if (const int64_t stop = std::min(end, memory.first); begin < stop) {
      widen_quantised(begin, stop, to, padded);
      to += (stop - begin) * padded;
      begin = stop;
    }
    if (begin < end) widen_exact(begin - memory.first, end - begin, to, padded);
  }

  template <typename T>
  const T* exact_row(int64_t row) const {
    const int64_t start = head * memory.head_step[which] + row * memory.row_step[which];
    return reinterpret_cast<const T*>(memory.exact[which]) + start;
  }

  void widen_exact(int64_t row, int64_t count, float* to, int64_t padded) const {
    const int64_t step = memory.row_step[which];
    const auto copy = [&](auto* from, int64_t numbers, int64_t rows) {
      for (; rows; --rows, from += step, to += padded) widen_numbers(from, numbers, to);
    };
    const bool dense = step == dim() && padded == dim();  // a row ends where the next begins
    const int64_t numbers = dense ? count * dim() : dim(), rows = dense ? 1 : count;
    if (memory.width == 4) copy(exact_row<float>(row), numbers, rows);
    else copy(exact_row<uint16_t>(row), numbers, rows);
  }

  static void widen_numbers(const float* from, int64_t numbers, float* to) {
    std::memcpy(to, from, numbers * sizeof(float));
  }

  static void widen_numbers(const uint16_t* from, int64_t numbers, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= numbers; i += kLanes) store(to + i, widened(from + i));
    for (; i < numbers; ++i) to[i] = std::bit_cast<float>(static_cast<uint32_t>(from[i]) << 16);
  }

  const int64_t* starts() const { return reinterpret_cast<const int64_t*>(memory.starts); }

  int64_t in_slot(int64_t slot) const { return starts()[slot + 1] - starts()[slot]; }

  // The slot that a quantised row lies in, and its number there.
  std::pair<int64_t, int64_t> place(int64_t row) const {
    const int64_t slot = std::upper_bound(starts(), starts() + memory.slots, row) - starts() - 1;
    return {slot, row - starts()[slot]};
  }

  void widen_quantised(int64_t row, int64_t end, float* to, int64_t padded) const {
    for (auto [slot, first] = place(row); row < end; ++slot, first = 0) {
      const int64_t last = std::min(first + end - row, in_slot(slot));
      if (memory.bits == 8) widen_8(slot, first, last, to, padded);
      else widen_4(slot, first, last, to, padded);
      to += (last - first) * padded;
      row += last - first;
    }
  }

  const c10::Half* shared(const int64_t (&addresses)[2], int64_t block) const {
    const c10::Half* from = reinterpret_cast<const c10::Half*>(addresses[which]);
    return from ? from + block * (which == 0 ? dim() : kSlot) : nullptr;
  }

  // code * scale + zero of rows of a slot; keys share these by number, values by row. The dim is a multiple of 8.
  template <typename Code>
  void scaled(int64_t block, int64_t first, int64_t last, float* to, int64_t padded, const Code& code) const {
    const c10::Half *scales = shared(memory.scales, block), *zeros = shared(memory.zeros, block);
    const auto numbers = [&]<typename F, typename I>(F, I, int64_t i) {
      const auto of = [&](const c10::Half* from, int64_t row) {
        return !from ? F{} : which == 0 ? halves<F>(from + i) : all<F>(from[row]);
      };
      for (int64_t row = first; row < last; ++row) {
        const F whole = __builtin_convertvector(code.template operator()<I>(row, i), F);
        store(to + (row - first) * padded + i, fused(whole, of(scales, row), of(zeros, row)));
      }
    };
    int64_t i = 0;
    for (; i + kLanes <= dim(); i += kLanes) numbers(Floats{}, Ints{}, i);
    for (; i < dim(); i += 8) numbers(EightFloats{}, EightInts{}, i);
  }

  const int8_t* codes_8(int64_t slot) const {
    return reinterpret_cast<const int8_t*>(memory.codes[which]) + (slot * memory.heads + head) * kSlot * dim();
  }

  void widen_8(int64_t slot, int64_t first, int64_t last, float* to, int64_t padded) const {
    const int64_t block = slot * memory.heads + head, step = dim();
    const int8_t* codes = codes_8(slot);
    scaled(block, first, last, to, padded, [=]<typename I>(int64_t row, int64_t i) {
      return widened<I>(codes + row * step + i);
    });
  }

  // The lower half of a byte is a number of a row of the slot's first half, the upper half one of the second's.
  void widen_4(int64_t slot, int64_t first, int64_t last, float* to, int64_t padded) const {
    const int64_t block = slot * memory.heads + head, step = dim();
    const int8_t* codes = reinterpret_cast<const int8_t*>(memory.codes[which]) + block * (kSlot / 2) * step;
    const auto half = [&](int64_t from, int64_t end, int shift) {
      if (from >= end) return;
      const int64_t skipped = shift ? kSlot / 2 : 0;
      scaled(block, from, end, to + (from - first) * padded, padded, [=]<typename I>(int64_t row, int64_t i) {
        return (widened<I>(codes + (row - skipped) * step + i) >> shift) & 15;
      });
    };
    half(first, std::min(last, kSlot / 2), 0);
    half(std::max(first, kSlot / 2), last, 4);
  }
};

// What one chunk of rows adds, for the queries of a head: softmax is put together from the peaks and totals of
// all chunks in order ("flash decoding", Dao et al. 2023).
struct Part {
  float* sums;    // [queries, value_dim], weighted by exp(score - peak)
  float* peaks;   // [queries]
  float* totals;  // [queries]; 0 where nothing of the chunk is in sight
};

struct Attention {
  int64_t groups;         // query heads of a KV head
  int64_t key_padded, value_padded;
  int64_t window;         // rows in sight, with the token's own; 0: all
  float softcap;          // 0: none
};

// Scores of queries against `kAtOnce` keys; both `padded` numbers wide.
template <int kRows, typename Source>
inline void score(const float* queries, const Source& keys, int64_t padded, float* to) {
  for (int64_t k = 0; k < kAtOnce; k += kSummed) {
    keys.ask(k, kSummed);
    Floats sum[kRows][kSummed] = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      Floats query[kRows];
      for (int r = 0; r < kRows; ++r) query[r] = load<Floats>(queries + r * padded + i);
      for (int j = 0; j < kSummed; ++j) {
        const Floats key = keys.at(k + j, i);
        for (int r = 0; r < kRows; ++r) sum[r][j] = fused(query[r], key, sum[r][j]);
      }
    }
    for (int r = 0; r < kRows; ++r) sum_lanes(sum[r], to + r * kChunk + k);
  }
}

// Rows [kAtOnce, padded] become columns [padded, kAtOnce]. `padded` is a multiple of a vector's lanes.
inline void transpose(const float* from, int64_t padded, float* to) {
  for (int64_t row = 0; row < kAtOnce; row += kLanes)
    for (int64_t i = 0; i < padded; i += kLanes) {
      Floats square[kLanes];
      for (int64_t k = 0; k < kLanes; ++k) square[k] = load<Floats>(from + (row + k) * padded + i);
#pragma GCC unroll 4
      for (int half = kLanes / 2; half; half /= 2) {  // two rows of halves change places, then of quarters, ...
        Ints low, high;
        for (int l = 0; l < kLanes; ++l) {
          low[l] = l & half ? kLanes + (l ^ half) : l;
          high[l] = l & half ? kLanes + l : l ^ half;
        }
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k)
          if (const Floats a = square[k], b = square[k | half]; !(k & half))
            square[k] = __builtin_shuffle(a, b, low), square[k | half] = __builtin_shuffle(a, b, high);
      }
      for (int64_t k = 0; k < kLanes; ++k) store(to + (i + k) * kAtOnce + row, square[k]);
    }
}

// Scores of `kRows` queries against the columns of `kAtOnce` keys, added up in the order of `score`.
template <int kRows>
struct Columns {
  static constexpr int kVectors = kAtOnce / kLanes;
  const float *queries, *keys;
  int64_t padded;

  struct Sums {
    Floats of[kRows][kVectors];
    Sums operator+(const Sums& other) const {
      Sums sums;
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sums.of[r][v] = of[r][v] + other.of[r][v];
      return sums;
    }
  };

  // every `kLanes`th number from `lane` on
  inline Sums of_lane(int64_t lane) const {
    Sums sums = {};
    for (int64_t i = lane; i < padded; i += kLanes) {
      Floats column[kVectors];
      for (int v = 0; v < kVectors; ++v) column[v] = kept(load<Floats>(keys + i * kAtOnce + v * kLanes));
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v)
          sums.of[r][v] = fused(all(queries[r * padded + i]), column[v], sums.of[r][v]);
    }
    return sums;
  }

  template <int kCount>
  inline Sums of_lanes(int64_t lane) const {
    if constexpr (kCount == 1) return kWide ? of_lane(lane) + of_lane(lane + kLanes / 2) : of_lane(lane);
    else return of_lanes<kCount / 2>(lane) + of_lanes<kCount / 2>(lane + kCount / 2);
  }

  void score(float* to) const {
    const Sums sums = of_lanes<8>(0);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) store(to + r * kChunk + v * kLanes, sums.of[r][v]);
  }
};

// Adds `kAtOnce` values, weighted, to the sums of queries: `kVectors` vectors of them.
template <int kRows, int kVectors, typename Source>
inline void add_values(const float* weights, const Source& values, int64_t from, int64_t padded, float* sums) {
  Floats sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load<Floats>(sums + r * padded + v * kLanes);
  for (int64_t k = 0; k < kAtOnce; ++k) {
    if (from == 0) values.ask(k, 1);
    Floats weight[kRows];
    for (int r = 0; r < kRows; ++r) weight[r] = all(weights[r * kChunk + k]);
    for (int v = 0; v < kVectors; ++v) {
      const Floats value = kept(values.at(k, from + v * kLanes));
      for (int r = 0; r < kRows; ++r) sum[r][v] = fused(value, weight[r], sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(sums + r * padded + v * kLanes, sum[r][v]);
}

template <int kRows, typename Source>
inline void add_all_values(const float* weights, const Source& values, int64_t padded, float* sums) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= padded; i += 4 * kLanes)
    add_values<kRows, 4>(weights, values, i, padded, sums + i);
  for (; i < padded; i += kLanes) add_values<kRows, 1>(weights, values, i, padded, sums + i);
}

// One chunk for `tokens` tokens, the first of which is row `row` of the cache; queries [groups * tokens, dim].
void attend_chunk(const Attention& how, const Rows& keys, const Rows& values, const float* queries,
                  int64_t tokens, int64_t row, int64_t start, Part part) {
  const int64_t rows = how.groups * tokens, end = std::min(start + kChunk, row + tokens);
  std::fill(part.totals, part.totals + rows, 0.0f);
  if (end <= start || (how.window && start + kChunk <= row - how.window + 1)) return;
  const int64_t wide_size = kAtOnce * std::max(2 * how.key_padded, how.value_padded);
  const Memory<float> buffer = fresh<float>(rows * kChunk + wide_size);
  float *scores = buffer.get(), *wide = scores + rows * kChunk;
  for (int64_t at = start; at < end; at += kAtOnce)
    keys.visit(at, std::min(at + kAtOnce, end), rows, wide, how.key_padded, [&](const auto& source) {
      int64_t r = 0;
      float* to = scores + at - start;
      if (rows >= kMany) {
        float* columns = wide + kAtOnce * how.key_padded;
        transpose(wide, how.key_padded, columns);
        for (; r + 2 <= rows; r += 2)
          Columns<2>{queries + r * how.key_padded, columns, how.key_padded}.score(to + r * kChunk);
      }
      for (; r + 3 <= rows; r += 3) score<3>(queries + r * how.key_padded, source, how.key_padded, to + r * kChunk);
      for (; r < rows; ++r) score<1>(queries + r * how.key_padded, source, how.key_padded, to + r * kChunk);
    });
  for (int64_t r = 0; r < rows; ++r) {
    float* s = scores + r * kChunk;
    const int64_t own = row + r % tokens;  // the last row in sight
    const int64_t last = std::min(end - 1, own) - start;
    const int64_t from = how.window ? std::max<int64_t>(0, own - how.window + 1 - start) : 0;
    if (how.softcap)
      for (int64_t t = 0; t <= last; ++t) s[t] = how.softcap * std::tanh(s[t] / how.softcap);
    for (int64_t t = 0; t < from; ++t) s[t] = kLowest;
    for (int64_t t = std::max<int64_t>(0, last + 1); t < kChunk; ++t) s[t] = kLowest;
    Floats top = all(kLowest);
    for (int64_t t = 0; t < kChunk; t += kLanes) top = larger(top, load<Floats>(s + t));
    const float peak = part.peaks[r] = largest_of(top);
    if (from > last) continue;
    Floats total = all(0);
    for (int64_t t = 0; t < kChunk; t += kLanes) {
      const Floats x = load<Floats>(s + t);
      const Floats weight = x == kLowest ? all(0) : exponential(x - peak);
      total += weight;
      store(s + t, weight);
    }
    part.totals[r] = sum_of(total);
  }
  std::fill(part.sums, part.sums + rows * how.value_padded, 0.0f);
  for (int64_t at = start; at < end; at += kAtOnce)
    values.visit(at, std::min(at + kAtOnce, end), rows, wide, how.value_padded, [&](const auto& source) {
      int64_t r = 0;
      const float* weights = scores + at - start;
      if (kWide)
        for (; r + 6 <= rows; r += 6)
          add_all_values<6>(weights + r * kChunk, source, how.value_padded, part.sums + r * how.value_padded);
      for (; r + 3 <= rows; r += 3)
        add_all_values<3>(weights + r * kChunk, source, how.value_padded, part.sums + r * how.value_padded);
      for (; r < rows; ++r)
        add_all_values<1>(weights + r * kChunk, source, how.value_padded, part.sums + r * how.value_padded);
    });
}

void append(const Layer& memory, int which, const at::Tensor& states, int64_t row) {
  const auto from = states.accessor<float, 4>();
  for (int64_t head = 0; head < states.size(1); ++head)
    for (int64_t n = 0; n < states.size(2); ++n) {
      const int64_t at = head * memory.head_step[which] + (row + n - memory.first) * memory.row_step[which];
      for (int64_t i = 0; i < states.size(3); ++i)
        if (memory.width == 4)
          reinterpret_cast<float*>(memory.exact[which])[at + i] = from[0][head][n][i];
        else
          reinterpret_cast<c10::BFloat16*>(memory.exact[which])[at + i] = from[0][head][n][i];
    }
}

// Writes the new tokens' keys and values into rows `rows` of layer `layer` of the cache, then attends from
// query [1, heads, tokens, key_dim] to all rows up to each token's own. `rows` [.., tokens] are consecutive;
// `table` [layers, fields] says where the cache lies. A head's sink is a score that takes part and adds nothing.
// Returns [1, tokens, heads, value_dim]. All fp32.
at::Tensor attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& rows,
                  const at::Tensor& table, int64_t layer, double scale, int64_t window, double softcap,
                  const std::optional<at::Tensor>& sinks) {
  constexpr int64_t kFields = sizeof(Layer) / sizeof(int64_t);
  TORCH_CHECK(table.dim() == 2 && table.size(1) == kFields && table.is_contiguous() &&
                  table.scalar_type() == at::kLong && 0 <= layer && layer < table.size(0),
              "the table has other fields or layers");
  const Layer& memory = reinterpret_cast<const Layer*>(table.const_data_ptr<int64_t>())[layer];
  const int64_t heads = query.size(1), tokens = query.size(2), kv_heads = key.size(1);
  TORCH_CHECK(query.dim() == 4 && query.size(0) == 1 && query.size(3) == memory.dim[0] && heads % kv_heads == 0 &&
                  key.sizes() == at::IntArrayRef({1, memory.heads, tokens, memory.dim[0]}) &&
                  value.sizes() == at::IntArrayRef({1, memory.heads, tokens, memory.dim[1]}) &&
                  rows.numel() == tokens && rows.scalar_type() == at::kLong,
              "query, keys and values don't fit the cache");
  const int64_t row = rows.const_data_ptr<int64_t>()[0], groups = heads / kv_heads;
  TORCH_CHECK(memory.first <= row && row + tokens <= memory.first + memory.room, "there is no room for these rows");
  append(memory, 0, key, row);
  append(memory, 1, value, row);

  const auto padded = [](int64_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; };
  const Attention how{groups, padded(memory.dim[0]), padded(memory.dim[1]), window, static_cast<float>(softcap)};
  at::Tensor out = at::empty({1, tokens, heads, memory.dim[1]}, query.options());
  float* to = out.mutable_data_ptr<float>();
  const auto from = query.accessor<float, 4>();
  for (int64_t begin = 0; begin < tokens; begin += kTokens) {
    const int64_t count = std::min(kTokens, tokens - begin);
    const int64_t blocks = (count + kQueries - 1) / kQueries, chunks = (row + begin + count + kChunk - 1) / kChunk;
    const int64_t most = groups * std::min(kQueries, count), size = most * (how.value_padded + 2);
    const Memory<float> parts = fresh<float>(kv_heads * blocks * chunks * size);
    std::vector<float> queries(kv_heads * blocks * most * how.key_padded);  // zeros where they are padded
    const auto tokens_of = [&](int64_t block) { return std::min(kQueries, count - block * kQueries); };
    const auto queries_of = [&](int64_t job) { return queries.data() + job * most * how.key_padded; };
    const auto part_of = [&](int64_t job, int64_t chunk) {
      float* sums = parts.get() + (job * chunks + chunk) * size;
      float* peaks = sums + most * how.value_padded;
      return Part{sums, peaks, peaks + most};
    };
    // a job is a block of tokens of one KV head; its rows are the query heads that share it, token by token
    for (int64_t job = 0; job < kv_heads * blocks; ++job) {
      const int64_t head = job / blocks, block = job % blocks, n = tokens_of(block);
      float* packed = queries_of(job);
      for (int64_t r = 0; r < groups * n; ++r) {
        const auto one = from[0][head * groups + r / n][begin + block * kQueries + r % n];
        for (int64_t i = 0; i < memory.dim[0]; ++i) packed[r * how.key_padded + i] = one[i] * static_cast<float>(scale);
      }
    }
    share(kv_heads * blocks * chunks, 1, [&](int64_t first, int64_t end) {
      for (int64_t each = first; each < end; ++each) {
        const int64_t job = each / chunks, chunk = each % chunks, head = job / blocks, block = job % blocks;
        attend_chunk(how, {memory, 0, head}, {memory, 1, head}, queries_of(job), tokens_of(block),
                     row + begin + block * kQueries, chunk * kChunk, part_of(job, chunk));
      }
    });
    share(kv_heads * blocks, 4, [&](int64_t first, int64_t end) {
      std::vector<float> sum(how.value_padded);
      for (int64_t job = first; job < end; ++job) {
        const int64_t head = job / blocks, block = job % blocks, n = tokens_of(block);
        for (int64_t r = 0; r < groups * n; ++r) {
          float peak = kLowest, total = 0;
          if (sinks) peak = sinks->const_data_ptr<float>()[head * groups + r / n], total = 1;
          std::fill(sum.begin(), sum.end(), 0.0f);
          for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const Part part = part_of(job, chunk);
            if (part.totals[r] == 0) continue;
            const float top = std::max(peak, part.peaks[r]);
            const Floats weights = exponential(Floats{peak - top, part.peaks[r] - top});
            total = total * weights[0] + part.totals[r] * weights[1];
            for (int64_t i = 0; i < how.value_padded; i += kLanes)
              store(sum.data() + i, load<Floats>(sum.data() + i) * weights[0] +
                                        load<Floats>(part.sums + r * how.value_padded + i) * weights[1]);
            peak = top;
          }
          float* result = to + ((begin + block * kQueries + r % n) * heads + head * groups + r / n) * memory.dim[1];
          for (int64_t i = 0; i < memory.dim[1]; ++i) result[i] = sum[i] / total;
        }
      }
    });
  }
  return out;
}

// What Python must agree on; `abi.py` makes the same text of its own constants and of the fields of `Memory`. The
// number goes up with every change of the operators, of `Layer` or of packed blocks.
constexpr int64_t kAbi = 1;
constexpr const char* kFieldNames =
    "width first room bits slots starts heads key_dim value_dim keys values key_head_step value_head_step "
    "key_row_step value_row_step key_codes value_codes key_scales value_scales key_zeros value_zeros";

std::string layout() {
  return "abi " + std::to_string(kAbi) + ", tile " + std::to_string(kTile) + ", group " + std::to_string(kGroup) +
         ", block " + std::to_string(kSlot) + ": " + kFieldNames;
}

}  // namespace

TORCH_LIBRARY(kvchat, library) {
  library.def("layout() -> str", layout);
  library.def("product(Tensor states, Tensor blocks) -> Tensor");
  library.def("lookup(Tensor ids, Tensor blocks) -> Tensor");
  library.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor rows, Tensor table, int layer, float scale, "
      "int window, float softcap, Tensor? sinks) -> Tensor");
  library.impl("product", c10::DispatchKey::CPU, product);
  library.impl("lookup", c10::DispatchKey::CPU, lookup);
  library.impl("attend", c10::DispatchKey::CPU, attend);
}
