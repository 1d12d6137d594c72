"""The screen. It knows sessions and figures; it refuses to know torch, the engine and the cache."""
