"""The screen. Must not import torch, the engine or the cache."""
