"""The KV cache: read this folder to understand one.

Mechanism moves memory: `layers` (one layer's keys and values), `quantize` (in fewer bits), `recurrent`
(layers that hold a state), `kv` (all layers of one conversation), `rotate` (keys turned to other
positions), `snapshot` (to disk and back). Policy decides in integers and imports no tensors: `prefix` (what
a prompt can reuse), `evict` (what goes when the context is full), `pool` (what goes when memory is),
`fingerprint` (whether a cache may be used at all), `shelf` (what lies on disk).
"""
