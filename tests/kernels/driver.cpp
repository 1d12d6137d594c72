// Tests of the kernels without torch, for every instruction set that a compiler can build for.
//
// Results are compared with the same computation in plain loops and fp64; where they may not depend on the batch size
// or the number of threads, bit for bit. Prints a line for each group of checks; exits with 1 if one failed.

#include <cstdio>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "../../kvchat/engine/compiled/kernels/attention.h"
#include "../../kvchat/engine/compiled/kernels/gemm.h"

namespace kvchat {

int64_t threads_in_use = 1;
int64_t thread_count() { return threads_in_use; }

void run_on_threads(int64_t count, void (*run)(const void*), const void* context) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < count; ++i) others.emplace_back(run, context);
  run(context);
  for (std::thread& each : others) each.join();
}

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- checks and random numbers -----------------------------------------------------------------------------

int64_t failures = 0, checks = 0;

void check(bool passed, const std::string& what) {
  ++checks;
  if (passed) return;
  if (++failures <= 20) std::printf("FAIL %s\n", what.c_str());
}

void check_close(double found, double expected, double allowed, const std::string& what) {
  const bool close = std::abs(found - expected) <= allowed;  // false for NaN
  check(close, close ? "" : what + ": " + std::to_string(found) + " instead of " + std::to_string(expected));
}

bool same_bits(const float* a, const float* b, int64_t count) { return !std::memcmp(a, b, count * sizeof(float)); }

uint64_t seed = 1;
uint32_t random_bits() {  // a linear congruential generator, Knuth's MMIX constants
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(seed >> 33);
}
int64_t random_below(int64_t limit) { return random_bits() % limit; }
float random_float() {  // about normal, standard deviation 1
  float sum = 0;
  for (int i = 0; i < 12; ++i) sum += static_cast<float>(random_bits() & 0xffff) / 65536;
  return sum - 6;
}
std::vector<float> random_floats(int64_t count, float scale = 1) {
  std::vector<float> numbers(count);
  for (float& each : numbers) each = scale * random_float();
  return numbers;
}

uint16_t to_fp16(float x) {  // normal numbers only, truncated
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
  if (exponent <= 0) return 0;
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 0x3ff));
}

// ---- simd.h ------------------------------------------------------------------------------------------------

void test_conversions() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double expected = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    if (bits & 0x8000) expected = -expected;
    const std::vector<uint16_t> many(kLanes, static_cast<uint16_t>(bits));
    const float one = fp16_to_float(many[0]), vector = from_fp16<F32>(many.data())[kLanes - 1];
    if (exponent == 31 && mantissa) check(one != one && vector != vector, "a NaN in fp16");
    else if (exponent == 31) check(std::isinf(one) && one == vector && (one < 0) == (expected < 0), "infinity in fp16");
    else check(one == expected && vector == expected, "fp16 " + std::to_string(bits));
    const float wide = std::bit_cast<float>(bits << 16);
    check(std::bit_cast<uint32_t>(from_bf16(many.data())[kLanes - 1]) == bits << 16, "bf16 to fp32");
    if (wide == wide) check(float_to_bf16(wide) == bits, "bf16 and back");
    else check((float_to_bf16(wide) & 0x7fff) > 0x7f80, "NaN to bf16");
  }
  for (const auto& [x, bits] : {std::pair{1.00390625f, 0x3f80}, {1.01171875f, 0x3f82}, {1.00390637f, 0x3f81}})
    check(float_to_bf16(x) == bits, "bf16 rounds to nearest, ties to even");
  int8_t codes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) codes[i] = static_cast<int8_t>(i % 2 ? 127 - i : i - 128);
  for (int64_t i = 0; i < kLanes; ++i) check(from_int8(codes)[i] == codes[i], "int8 to int32");
}

void test_vectors() {
  const std::vector<float> numbers = random_floats(kSums * kLanes);
  F32 vectors[kSums];
  for (int64_t v = 0; v < kSums; ++v) vectors[v] = load<F32>(&numbers[v * kLanes]);
  float sums[kSums];
  sum_lanes(vectors, sums);
  for (int64_t v = 0; v < kSums; ++v) {
    std::vector<float> tree(&numbers[v * kLanes], &numbers[v * kLanes] + kLanes);
    if (kWide) {
      for (int64_t i = 0; i < 8; ++i) tree[i] += tree[i + 8];
      tree.resize(8);
    }
    for (; tree.size() > 1; tree.resize(tree.size() / 2))
      for (size_t i = 0; i < tree.size() / 2; ++i) tree[i] = tree[2 * i] + tree[2 * i + 1];
    check(sums[v] == tree[0], "sum_lanes");
    double sum = 0, largest = -kInfinity;
    for (int64_t i = 0; i < kLanes; ++i) {
      sum += numbers[v * kLanes + i];
      largest = std::max<double>(largest, numbers[v * kLanes + i]);
    }
    check_close(sum_of(vectors[v]), sum, 1e-5, "sum_of");
    check(max_of(vectors[v]) == largest, "max_of");
  }
  const int64_t height = 2 * kLanes, width = 3 * kLanes;
  const std::vector<float> matrix = random_floats(height * width);
  std::vector<float> turned(matrix.size());
  transpose(matrix.data(), height, width, turned.data());
  bool equal = true;
  for (int64_t r = 0; r < height; ++r)
    for (int64_t c = 0; c < width; ++c) equal &= turned[c * height + r] == matrix[r * width + c];
  check(equal, "transpose");
}

void test_exp() {
  for (float x = 0; x > -87; x -= 0.0131f)
    for (int64_t lane : {int64_t{0}, kLanes - 1}) {
      F32 v = splat(-1.0f);
      v[lane] = x;
      const double expected = std::exp(static_cast<double>(x));
      check_close(exp_nonpositive(v)[lane], expected, (2e-7 - 1.2e-7 * x) * expected, "exp");
    }
  check(exp_nonpositive(splat(0.0f))[0] == 1, "exp(0)");
  for (float x : {-88.0f, -1e30f, -kInfinity})
    check_close(exp_nonpositive(splat(x))[0], 0, 2e-38, "exp of a small number");
  for (float x : {kNan, -kNan}) check(std::isnan(exp_nonpositive(splat(x))[0]), "exp(NaN)");
}

// ---- gemm.h ------------------------------------------------------------------------------------------------

struct Matrix {  // packed as `pack` in Python does
  int bits;
  int64_t tiles, groups;
  std::vector<int> quants;               // [rows, columns]
  std::vector<float> scales, minima;     // [rows, groups]
  std::vector<uint8_t> blocks;

  int64_t rows() const { return tiles * kTile; }
  int64_t columns() const { return groups * kGroup; }
  double at(int64_t row, int64_t column) const {
    const int64_t group = row * groups + column / kGroup;
    return static_cast<double>(quants[row * columns() + column]) * scales[group] + minima[group];
  }
};

Matrix random_matrix(int bits, int64_t tiles, int64_t groups) {
  Matrix m{bits, tiles, groups, {}, {}, {}, {}};
  for (int64_t i = 0; i < m.rows() * m.columns(); ++i)
    m.quants.push_back(static_cast<int>(bits == 4 ? random_below(16) : random_below(255) - 127));
  for (int64_t i = 0; i < m.rows() * groups; ++i) {
    m.scales.push_back(fp16_to_float(to_fp16(0.01f + 0.01f * static_cast<float>(random_below(9)))));
    m.minima.push_back(bits == 4 ? fp16_to_float(to_fp16(random_float())) : 0);
  }
  const int64_t bytes = bits == 4 ? kBlockBytes<4> : kBlockBytes<8>, pairs = 16 / bits;
  m.blocks.assign(tiles * groups * bytes, 0);
  for (int64_t row = 0; row < m.rows(); ++row)
    for (int64_t column = 0; column < m.columns(); ++column) {
      const int64_t group = column / kGroup, pair = column % kGroup / 2, tile = row / kTile;
      uint8_t* block = &m.blocks[(tile * groups + group) * bytes];
      const int64_t lane = pair / pairs * 16 + row % kTile * 2 + column % 2, shift = pair % pairs * bits;
      uint16_t lanes = load<uint16_t>(block + 2 * lane);
      lanes |= static_cast<uint16_t>((m.quants[row * m.columns() + column] & ((1 << bits) - 1)) << shift);
      store(block + 2 * lane, lanes);
      uint8_t* scales = block + bits * 32 + 2 * (row % kTile);
      store(scales, to_fp16(m.scales[row * groups + group]));
      if (bits == 4) store(scales + 2 * kTile, to_fp16(m.minima[row * groups + group]));
    }
  return m;
}

std::vector<float> product(const float* x, int64_t tokens, const Matrix& m) {
  std::vector<float> found(tokens * m.rows(), -1);
  const auto apply = m.bits == 4 ? multiply<4> : multiply<8>;
  apply(x, tokens, m.columns(), m.blocks.data(), m.tiles, found.data());
  return found;
}

void check_product(const std::vector<float>& x, int64_t tokens, const Matrix& m, const std::string& what) {
  const std::vector<float> found = product(x.data(), tokens, m);
  for (int64_t n = 0; n < tokens; ++n)
    for (int64_t row = 0; row < m.rows(); ++row) {
      double expected = 0, allowed = 0;
      for (int64_t g = 0; g < m.groups; ++g) {
        double peak = 0, quants = 0;
        for (int64_t i = g * kGroup; i < (g + 1) * kGroup; ++i) {
          const double number = x[n * m.columns() + i];
          expected += number * m.at(row, i);
          allowed += 1e-6 * std::abs(number) *
                     (std::abs(m.quants[row * m.columns() + i] * m.scales[row * m.groups + g]) +
                      std::abs(m.minima[row * m.groups + g]));
          peak = std::max(peak, std::abs(number));
          quants += std::abs(m.quants[row * m.columns() + i]) * m.scales[row * m.groups + g];
        }
        allowed += peak / (2 * Activations<8>::kPeak) * quants;  // half a step of the activations' 16 bits
      }
      check_close(found[n * m.rows() + row], expected, allowed + 1e-30, what);
    }
}

void test_products(int bits) {
  for (int64_t tiles : {1, 2, 3, 4, 5, 9})
    for (int64_t tokens : {1, 2, 3, 4, 7, 70}) {
      const Matrix m = random_matrix(bits, tiles, 3);
      const std::vector<float> x = random_floats(tokens * m.columns());
      check_product(x, tokens, m, "product");
      std::vector<float> alone;
      for (int64_t n = 0; n < tokens; ++n)
        for (float each : product(&x[n * m.columns()], 1, m)) alone.push_back(each);
      const std::vector<float> together = product(x.data(), tokens, m);
      check(same_bits(together.data(), alone.data(), alone.size()), "a product by batch size, bit for bit");
    }
  const Matrix m = random_matrix(bits, 65, 4);
  for (float scale : {0.0f, 1e-30f, 1e30f})
    check_product(random_floats(5 * m.columns(), scale), 5, m, "a scaled product");
  std::vector<float> extreme(m.columns(), 3.0f);  // the largest int16 everywhere
  check_product(extreme, 1, m, "a product of equal numbers");
  for (float& each : extreme) each = -each;
  check_product(extreme, 1, m, "a product of equal negative numbers");
  const std::vector<float> tiny(m.columns(), 1e-40f);
  for (float each : product(tiny.data(), 1, m)) check(std::abs(each) < 1e-30, "a product of subnormal numbers");
  const std::vector<float> x = random_floats(33 * m.columns());
  const std::vector<float> one = product(x.data(), 33, m);
  threads_in_use = 3;
  check(product(x.data(), 33, m) == one, "a product by number of threads, bit for bit");
  threads_in_use = 1;
}

// A number that is not finite makes all products of its token NaN, and changes no other token's.
void test_products_of_nan(int bits) {
  const Matrix m = random_matrix(bits, 5, 2);
  const std::vector<float> clean = random_floats(9 * m.columns());
  for (float bad : {kNan, -kNan, kInfinity, -kInfinity})
    for (int64_t column = 0; column < m.columns(); ++column)
      for (int64_t tokens : {1, 2, 9}) {
        const std::vector<float> expected = product(clean.data(), tokens, m);
        std::vector<float> x = clean;
        const int64_t where = tokens / 2;
        x[where * m.columns() + column] = bad;
        const std::vector<float> found = product(x.data(), tokens, m);
        for (int64_t n = 0; n < tokens; ++n)
          for (int64_t row = 0; row < m.rows(); ++row) {
            const int64_t i = n * m.rows() + row;
            if (n == where) check(std::isnan(found[i]), "a product with NaN or infinity");
            else check(same_bits(&found[i], &expected[i], 1), "a product beside one with NaN");
          }
      }
}

void test_rows() {
  const Matrix m = random_matrix(8, 3, 2);
  std::vector<float> found(m.columns());
  for (int64_t row = 0; row < m.rows(); ++row) {
    dequantise_row(m.blocks.data(), m.groups, row, found.data());
    for (int64_t i = 0; i < m.columns(); ++i)
      check_close(found[i], m.at(row, i), 1e-7 * std::abs(m.at(row, i)), "a dequantised row");
  }
}

// ---- attention.h -------------------------------------------------------------------------------------------

struct Case {
  int64_t heads, kv_heads, key_dim, value_dim, window = 0;
  float softcap = 0;
  bool sinks = false;
};

// A cache with room for `rows` rows: bits 32 is fp32, 16 bf16; 8 and 4 are quantised rows in whole slots, with the
// last rows exact in bf16. Memory that nobody has written is NaN.
struct Cache {
  Case shape;
  int64_t bits, rows, quantised;
  std::vector<float> exact32[2];
  std::vector<uint16_t> exact16[2], scales[2], zeros[2];
  std::vector<int8_t> codes[2];
  std::vector<int64_t> starts;
  Layer layer{};

  int64_t dim(int which) const { return which ? shape.value_dim : shape.key_dim; }

  Cache(const Case& shape, int64_t bits, int64_t rows, std::vector<int64_t> slots = {})
      : shape(shape), bits(bits), rows(rows), quantised(0), starts{0} {
    for (int64_t each : slots) starts.push_back(quantised += each);
    const int64_t exact = rows - quantised, blocks = static_cast<int64_t>(slots.size()) * shape.kv_heads;
    layer.width = bits == 32 ? 4 : 2;
    layer.first = quantised;
    layer.room = exact;
    layer.heads = shape.kv_heads;
    if (quantised) {
      layer.bits = bits;
      layer.slots = static_cast<int64_t>(slots.size());
      layer.starts = reinterpret_cast<int64_t>(starts.data());
    }
    for (int which : {0, 1}) {
      layer.dim[which] = dim(which);
      layer.head_step[which] = exact * dim(which);
      layer.row_step[which] = dim(which);
      const int64_t numbers = shape.kv_heads * exact * dim(which), shared = blocks * (which ? kSlot : dim(which));
      if (bits == 32) exact32[which].assign(numbers, kNan);
      else exact16[which].assign(numbers, 0x7fc0);
      layer.exact[which] = bits == 32 ? reinterpret_cast<int64_t>(exact32[which].data())
                                      : reinterpret_cast<int64_t>(exact16[which].data());
      if (!quantised) continue;
      for (int64_t i = 0; i < blocks * kSlot * dim(which) * bits / 8; ++i)
        codes[which].push_back(static_cast<int8_t>(random_below(256) - 128));
      for (int64_t i = 0; i < shared; ++i) {
        scales[which].push_back(to_fp16(bits == 8 ? 0.01f : 0.1f + 0.01f * static_cast<float>(random_below(9))));
        zeros[which].push_back(to_fp16(random_float() - (bits == 4 ? 1 : 0)));
      }
      layer.codes[which] = reinterpret_cast<int64_t>(codes[which].data());
      layer.scales[which] = reinterpret_cast<int64_t>(scales[which].data());
      if (bits == 4 || which == 0) layer.zeros[which] = reinterpret_cast<int64_t>(zeros[which].data());
    }
  }

  double at(int which, int64_t head, int64_t row, int64_t i) const {
    if (row >= quantised) {
      const int64_t at = (head * (rows - quantised) + row - quantised) * dim(which) + i;
      return bits == 32 ? exact32[which][at] : bf16_to_float(exact16[which][at]);
    }
    int64_t slot = 0;
    while (starts[slot + 1] <= row) ++slot;
    const int64_t block = slot * shape.kv_heads + head, in_slot = row - starts[slot];
    const int64_t shared = which ? block * kSlot + in_slot : block * dim(which) + i;
    double code;
    if (bits == 8) {
      code = codes[which][(block * kSlot + in_slot) * dim(which) + i];
    } else {
      const int byte = codes[which][(block * kSlot / 2 + in_slot % (kSlot / 2)) * dim(which) + i];
      code = (in_slot < kSlot / 2 ? byte : byte >> 4) & 15;
    }
    const double zero = layer.zeros[which] ? fp16_to_float(zeros[which][shared]) : 0;
    return code * fp16_to_float(scales[which][shared]) + zero;
  }
};

struct States {  // [heads, tokens, dim]
  std::vector<float> numbers;
  int64_t tokens, dim;
  Strided strided(int64_t token = 0) const { return {numbers.data() + token * dim, tokens * dim, dim, 1}; }
};
States random_states(int64_t heads, int64_t tokens, int64_t dim, float scale = 1) {
  return {random_floats(heads * tokens * dim, scale), tokens, dim};
}

struct Inputs {
  Case shape;
  States query, key, value;
  std::vector<float> sinks;
};
Inputs random_inputs(const Case& shape, int64_t tokens) {
  return {shape, random_states(shape.heads, tokens, shape.key_dim, 3),
          random_states(shape.kv_heads, tokens, shape.key_dim), random_states(shape.kv_heads, tokens, shape.value_dim),
          shape.sinks ? random_floats(shape.heads) : std::vector<float>{}};
}

AttentionOptions options_of(const Inputs& in) {
  const float scale = 1 / std::sqrt(static_cast<float>(in.shape.key_dim));
  return {scale, in.shape.window, in.shape.softcap, in.shape.sinks ? in.sinks.data() : nullptr};
}

// Reads the tokens in chunks of those sizes, into the cache from row `row` on; [tokens, heads, value_dim].
std::vector<float> read(const Inputs& in, Cache& cache, int64_t row, const std::vector<int64_t>& chunks) {
  std::vector<float> found;
  int64_t token = 0;
  const AttentionOptions options = options_of(in);
  for (int64_t count : chunks) {
    append(cache.layer, 0, count, row + token, in.key.strided(token));
    append(cache.layer, 1, count, row + token, in.value.strided(token));
    std::vector<float> out(count * in.shape.heads * in.shape.value_dim);
    attend(cache.layer, options, in.query.strided(token), in.shape.heads, count, row + token, out.data());
    found.insert(found.end(), out.begin(), out.end());
    token += count;
  }
  return found;
}

void check_attention(const Inputs& in, const Cache& cache, int64_t row, const std::vector<float>& found,
                     const std::string& what) {
  const Case& shape = in.shape;
  const AttentionOptions options = options_of(in);
  for (int64_t n = 0; n < in.query.tokens; ++n)
    for (int64_t head = 0; head < shape.heads; ++head) {
      const int64_t own = row + n, kv_head = head / (shape.heads / shape.kv_heads);
      const int64_t first = shape.window ? std::max<int64_t>(0, own - shape.window + 1) : 0;
      std::vector<double> scores(own + 1);
      double peak = shape.sinks ? in.sinks[head] : -kInfinity;
      for (int64_t t = first; t <= own; ++t) {
        double sum = 0;
        for (int64_t i = 0; i < shape.key_dim; ++i)
          sum += static_cast<double>(in.query.strided()(head, n, i)) * cache.at(0, kv_head, t, i);
        sum *= options.scale;
        scores[t] = shape.softcap ? shape.softcap * std::tanh(sum / shape.softcap) : sum;
        peak = std::max(peak, scores[t]);
      }
      double total = shape.sinks ? std::exp(in.sinks[head] - peak) : 0;
      for (int64_t t = first; t <= own; ++t) total += scores[t] = std::exp(scores[t] - peak);
      for (int64_t i = 0; i < shape.value_dim; ++i) {
        double expected = 0;
        for (int64_t t = first; t <= own; ++t) expected += scores[t] / total * cache.at(1, kv_head, t, i);
        check_close(found[(n * shape.heads + head) * shape.value_dim + i], expected, 2e-5 + 1e-4 * std::abs(expected),
                    what);
      }
    }
}

const std::vector<Case> kCases = {
    {4, 2, 64, 64}, {9, 3, 64, 64}, {3, 3, 32, 32}, {4, 2, 12, 20}, {4, 1, 20, 12},
    {4, 2, 64, 64, 50}, {4, 2, 64, 64, 1}, {4, 2, 32, 32, 140}, {4, 2, 64, 64, 0, 5}, {4, 2, 64, 64, 0, 0, true},
    {6, 2, 24, 40, 33, 8, true}};

void test_attention() {
  for (const Case& shape : kCases)
    for (int64_t bits : {32, 16}) {
      const Inputs in = random_inputs(shape, 200);
      Cache cache(shape, bits, 210);
      const std::vector<float> found = read(in, cache, 0, {200});
      check_attention(in, cache, 0, found, "attention");
      for (const auto& chunks : {std::vector<int64_t>(200, 1), {7, 1, 16, 17, 63, 65, 1, 30}}) {
        Cache other(shape, bits, 210);
        check(read(in, other, 0, chunks) == found, "attention by batch size, bit for bit");
      }
      threads_in_use = 3;
      Cache other(shape, bits, 210);
      check(read(in, other, 0, {200}) == found, "attention by number of threads, bit for bit");
      threads_in_use = 1;
    }
}

void test_quantised_attention() {
  for (const Case& shape : {Case{4, 2, 64, 64}, Case{3, 1, 64, 64}, Case{6, 2, 24, 40, 90}, Case{2, 2, 128, 96}})
    for (int64_t bits : {8, 4})
      for (const std::vector<int64_t>& slots : {std::vector<int64_t>{64, 64, 64}, {64, 5, 40, 64}})
        for (int64_t tokens : {1, 2, 20}) {
          const Inputs in = random_inputs(shape, tokens);
          int64_t row = 0;
          for (int64_t each : slots) row += each;
          Cache cache(shape, bits, row + 33, slots);
          check_attention(in, cache, row, read(in, cache, row, {tokens}), "attention over quantised rows");
        }
}

// A query that is NaN makes the results of its head and token NaN. A key that is NaN does so for all that see it.
void test_attention_to_nan() {
  for (const Case& shape : {Case{6, 2, 64, 64}, Case{6, 2, 64, 64, 40, 5, true}})
    for (int64_t bits : {32, 16})
      for (const auto& chunks : {std::vector<int64_t>{150}, std::vector<int64_t>(150, 1)}) {
        const Inputs clean = random_inputs(shape, 150);
        Cache cache(shape, bits, 150);
        const std::vector<float> expected = read(clean, cache, 0, chunks);
        const int64_t token = 70, head = 1, group = shape.heads / shape.kv_heads;
        const auto check_all = [&](const Inputs& in, const auto& is_nan, const std::string& what) {
          Cache other(shape, bits, 150);
          const std::vector<float> found = read(in, other, 0, chunks);
          for (int64_t n = 0; n < 150; ++n)
            for (int64_t h = 0; h < shape.heads; ++h)
              for (int64_t i = 0; i < shape.value_dim; ++i) {
                const int64_t at = (n * shape.heads + h) * shape.value_dim + i;
                check(is_nan(n, h) ? std::isnan(found[at]) : same_bits(&found[at], &expected[at], 1), what);
              }
        };
        Inputs in = clean;
        in.query.numbers[(head * 150 + token) * shape.key_dim + 5] = kNan;
        check_all(in, [&](int64_t n, int64_t h) { return n == token && h == head; }, "attention with a query of NaN");
        in = clean;
        in.key.numbers[(head * 150 + token) * shape.key_dim + 5] = kNan;
        const auto sees = [&](int64_t n, int64_t h) {
          return h / group == head && n >= token && (!shape.window || n < token + shape.window);
        };
        check_all(in, sees, "attention with a key of NaN");
        in = clean;
        in.value.numbers[(head * 150 + token) * shape.value_dim + 5] = kNan;
        Cache other(shape, bits, 150);
        const std::vector<float> found = read(in, other, 0, chunks);
        const int64_t at = (token * shape.heads + head * group) * shape.value_dim + 5;
        check(std::isnan(found[at]), "attention with a value of NaN");
      }
}

void test_extreme_scores() {
  const Case shape{4, 2, 64, 64};
  Inputs in = random_inputs(shape, 40);
  for (float& each : in.query.numbers) each *= 1e4f;
  for (float& each : in.key.numbers) each *= 1e4f;
  Cache cache(shape, 32, 40);
  const std::vector<float> found = read(in, cache, 0, {40});
  for (float each : found) check(std::isfinite(each), "attention with huge scores");
}

int run_all() {
  const std::pair<const char*, std::function<void()>> groups[] = {
      {"conversions", test_conversions},
      {"vectors", test_vectors},
      {"exp", test_exp},
      {"products, 4 bits", [] { test_products(4); }},
      {"products, 8 bits", [] { test_products(8); }},
      {"products of NaN, 4 bits", [] { test_products_of_nan(4); }},
      {"products of NaN, 8 bits", [] { test_products_of_nan(8); }},
      {"rows", test_rows},
      {"attention", test_attention},
      {"attention over quantised rows", test_quantised_attention},
      {"attention to NaN", test_attention_to_nan},
      {"attention with extreme scores", test_extreme_scores},
  };
  for (const auto& [name, run] : groups) {
    const int64_t before = failures, first = checks;
    seed = 1;
    run();
    const auto count = static_cast<long long>(checks - first);
    std::printf("%s %s (%lld checks)\n", failures == before ? "ok  " : "fail", name, count);
  }
  return failures ? 1 : 0;
}

}  // namespace
}  // namespace kvchat

int main() {
  std::printf("vectors of %d bytes%s\n", KVCHAT_VECTOR_BYTES,
#if KVCHAT_INT8_DOT
              ", int8 dot products"
#elif defined(__AVX512VNNI__)
              ", VNNI"
#else
              ""
#endif
  );
  return kvchat::run_all();
}
