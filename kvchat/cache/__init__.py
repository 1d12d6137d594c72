"""The KV cache.

With tensors: `kv_cache` (all layers of one conversation), `layer` (interfaces), `dense_layer`,
`quantized_layer` with `quant_codec`, `state_layer` with `state_checkpoints`, `cow_buffer` (copy-on-write),
`rope_shift` (keys at other positions), `packed_rows` and `disk.snapshot` (to disk and back).
Integers only: `token_index` (tokens and rows), `prefix` (what a prompt can reuse), `eviction` (when the
context is full), `memory_budget` (when memory is full), `fingerprint` (which model a cache fits),
`disk.segment` and `disk.disk_store` (files).
"""
