// The kernels as operators of torch: checks of what they are given, and their registration. The kernels themselves
// include no torch.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "attention.h"
#include "gemm.h"

namespace kvchat {

int64_t thread_count() { return at::get_num_threads(); }

void run_on_threads(int64_t count, void (*run)(const void*), const void* context) {
  at::parallel_for(0, count, 1, [&](int64_t, int64_t) { run(context); });
}

namespace {

// The bits of packed weights, uint8 [tiles, groups, bytes of a block].
int64_t bits_of(const at::Tensor& blocks) {
  TORCH_CHECK(blocks.dim() == 3 && blocks.is_contiguous() && blocks.scalar_type() == at::kByte &&
                  (blocks.size(2) == kBlockBytes<4> || blocks.size(2) == kBlockBytes<8>),
              "these are no blocks of 4 or 8 bits");
  return blocks.size(2) == kBlockBytes<4> ? 4 : 8;
}

// states [tokens, in] fp32 times packed weights [out / 8, in / 32, bytes]. Returns [tokens, out] in fp32.
at::Tensor product(const at::Tensor& states, const at::Tensor& blocks) {
  const int64_t bits = bits_of(blocks);
  TORCH_CHECK(states.dim() == 2 && states.scalar_type() == at::kFloat && blocks.size(1) * kGroup == states.size(1),
              "the blocks don't fit the states");
  const at::Tensor dense = states.contiguous();
  const int64_t tokens = states.size(0), columns = states.size(1), tiles = blocks.size(0);
  at::Tensor out = at::empty({tokens, tiles * kTile}, dense.options());
  const auto apply = bits == 4 ? multiply<4> : multiply<8>;
  apply(dense.const_data_ptr<float>(), tokens, columns, blocks.const_data_ptr<uint8_t>(), tiles,
        out.mutable_data_ptr<float>());
  return out;
}

// Rows `ids` [tokens] of packed weights of 8 bits. Returns [tokens, in] in fp32.
at::Tensor lookup(const at::Tensor& ids, const at::Tensor& blocks) {
  TORCH_CHECK(bits_of(blocks) == 8 && ids.dim() == 1 && ids.scalar_type() == at::kLong,
              "rows are looked up in blocks of 8 bits");
  const int64_t groups = blocks.size(1), columns = groups * kGroup;
  at::Tensor out = at::empty({ids.size(0), columns}, at::TensorOptions().dtype(at::kFloat));
  for (int64_t n = 0; n < ids.size(0); ++n) {
    const int64_t id = ids.const_data_ptr<int64_t>()[n * ids.stride(0)];
    TORCH_CHECK(0 <= id && id < blocks.size(0) * kTile, "there is no row ", id);
    dequantise_row(blocks.const_data_ptr<uint8_t>(), groups, id, out.mutable_data_ptr<float>() + n * columns);
  }
  return out;
}

Strided strided(const at::Tensor& states) {
  return {states.const_data_ptr<float>(), states.stride(1), states.stride(2), states.stride(3)};
}

// Writes the new tokens' keys and values into rows `rows` of layer `layer` of the cache, then attends from
// query [1, heads, tokens, key_dim] to all rows up to each token's own. `rows` [.., tokens] are consecutive;
// `table` [layers, fields] says where the cache is. `sinks` [heads]: scores that take part and add no value.
// Returns [1, tokens, heads, value_dim]. All fp32.
at::Tensor attend_layer(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const at::Tensor& rows, const at::Tensor& table, int64_t layer, double scale, int64_t window,
                        double softcap, const std::optional<at::Tensor>& sinks) {
  constexpr int64_t kFields = sizeof(Layer) / sizeof(int64_t);
  TORCH_CHECK(table.dim() == 2 && table.size(1) == kFields && table.is_contiguous() &&
                  table.scalar_type() == at::kLong && 0 <= layer && layer < table.size(0),
              "the table has other fields or layers");
  const Layer& memory = reinterpret_cast<const Layer*>(table.const_data_ptr<int64_t>())[layer];
  const int64_t heads = query.size(1), tokens = query.size(2);
  TORCH_CHECK(query.dim() == 4 && query.size(0) == 1 && query.size(3) == memory.dim[0] &&
                  heads % memory.heads == 0 &&
                  key.sizes() == at::IntArrayRef({1, memory.heads, tokens, memory.dim[0]}) &&
                  value.sizes() == at::IntArrayRef({1, memory.heads, tokens, memory.dim[1]}) &&
                  rows.numel() == tokens && rows.scalar_type() == at::kLong && tokens > 0,
              "query, keys and values don't fit the cache");
  TORCH_CHECK(!sinks || (sinks->is_contiguous() && sinks->numel() == heads), "there is a sink for each head");
  const int64_t row = rows.const_data_ptr<int64_t>()[0];
  TORCH_CHECK(memory.first <= row && row + tokens <= memory.first + memory.room, "there is no room for these rows");
  append(memory, 0, tokens, row, strided(key));
  append(memory, 1, tokens, row, strided(value));
  at::Tensor out = at::empty({1, tokens, heads, memory.dim[1]}, query.options());
  const AttentionOptions options{static_cast<float>(scale), window, static_cast<float>(softcap),
                                 sinks ? sinks->const_data_ptr<float>() : nullptr};
  attend(memory, options, strided(query), heads, tokens, row, out.mutable_data_ptr<float>());
  return out;
}

// What Python has to agree on: `abi.py` makes the same text of its own constants and of the fields of `Memory`.
// The number goes up with every change of the operators, of `Layer` or of packed weights.
constexpr int64_t kAbi = 1;
constexpr const char* kFieldNames =
    "width first room bits slots starts heads key_dim value_dim keys values key_head_step value_head_step "
    "key_row_step value_row_step key_codes value_codes key_scales value_scales key_zeros value_zeros";

std::string layout() {
  return "abi " + std::to_string(kAbi) + ", tile " + std::to_string(kTile) + ", group " + std::to_string(kGroup) +
         ", block " + std::to_string(kSlot) + ": " + kFieldNames;
}

}  // namespace
}  // namespace kvchat

TORCH_LIBRARY(kvchat, library) {
  library.def("layout() -> str", kvchat::layout);
  library.def("product(Tensor states, Tensor blocks) -> Tensor");
  library.def("lookup(Tensor ids, Tensor blocks) -> Tensor");
  library.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor rows, Tensor table, int layer, float scale, "
      "int window, float softcap, Tensor? sinks) -> Tensor");
  library.impl("product", c10::DispatchKey::CPU, kvchat::product);
  library.impl("lookup", c10::DispatchKey::CPU, kvchat::lookup);
  library.impl("attend", c10::DispatchKey::CPU, kvchat::attend_layer);
}
