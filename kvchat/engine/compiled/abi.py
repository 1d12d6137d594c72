"""The memory layout that Python and the compiled kernels share. Must not import torch."""

ABI = 1
"""Increase it with every change of the kernels' operators, of `Memory` or of packed blocks, also `kAbi` in
the kernels."""
GROUP = 32
"""Weights of a row that share a scale."""
TILE = 8
"""Rows of weights that are packed together."""


def layout(fields: tuple[str, ...], block: int) -> str:
    """The expected result of the kernels' operator `layout`.

    Args:
        fields: of `Memory`, in order.
        block: rows of a quantised block of a cache.
    """
    return f"abi {ABI}, tile {TILE}, group {GROUP}, block {block}: {' '.join(fields)}"
