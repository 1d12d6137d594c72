"""What kvchat asks of the operating system: owners and modes of files, child processes, signals, exit codes."""
