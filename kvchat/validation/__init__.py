"""Checks of untrusted input: bounds, validation of records, JSON without NaN."""
