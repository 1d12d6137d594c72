"""Owners and modes of files, child processes, signals, exit codes: what the operating system is asked."""
