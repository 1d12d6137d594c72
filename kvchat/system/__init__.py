"""Operating system: file owners and modes, child processes, signals, exit codes."""
