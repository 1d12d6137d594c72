"""Measurements and proofs that run without a screen: `kvchat bench` and `kvchat verify`."""
