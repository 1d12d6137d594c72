"""Exports, builds, packages and runs a model compiled for this CPU."""
