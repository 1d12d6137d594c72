"""Model cards, model names and downloads. Must not import torch."""
