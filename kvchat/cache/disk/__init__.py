"""Caches on disk: the segment format, the store, and the thread that writes."""
