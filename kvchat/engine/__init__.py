"""The engine: render, find the cached prefix, prefill, decode, detokenise, measure. Imports no screen."""
