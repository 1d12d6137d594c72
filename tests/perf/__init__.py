"""Measures how the program feels from outside: first paint, key echo, scrolling."""
