"""Helpers that several test files use: tiny models, drivers, a scripted engine."""
