"""kvchat: chat with a local model in the terminal, and see its KV cache work."""
