"""A loaded model: weights, layout of its cache, forward pass, fingerprint."""
