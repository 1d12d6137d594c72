"""Loads a model and runs it: weights, layout of its cache, forward pass, fingerprint."""
