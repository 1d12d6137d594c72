"""The command line: one module per command group. The only package that imports both ui and engine."""
