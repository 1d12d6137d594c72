"""Whole screens: each composes widgets and routes their messages."""
