"""The engine in a child process: the client in the terminal process, the server in the child."""
