"""Conversations, the store, and the core of every front end. No torch, no textual."""
