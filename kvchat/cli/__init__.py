"""The command line, one module per command group. Only this package may import both `ui` and `engine`."""
