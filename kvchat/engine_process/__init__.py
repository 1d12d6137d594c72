"""The engine in a child process: `client` runs in the terminal's process, `server` in the child."""
