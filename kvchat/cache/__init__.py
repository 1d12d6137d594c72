"""The KV cache: read this folder to understand one.

`kv` holds the tensors and moves them; `prefix` decides, in integers, what of them a prompt can reuse.
"""
