"""What Python and the compiled kernels have to agree on, so that neither reads the other's memory wrongly.

Imports no torch.
"""

ABI = 1
"""Goes up with every change of the kernels' operators, of `Memory` or of packed blocks: `kAbi` in the kernels
says the same."""
GROUP = 32
"""Weights of a row that share a scale."""
TILE = 8
"""Rows of packed weights that lie together."""


def layout(fields: tuple[str, ...], block: int) -> str:
    """What the kernels' operator `layout` must answer.

    Args:
        fields: of `Memory`, in their order.
        block: rows of a quantised block of a cache.
    """
    return f"abi {ABI}, tile {TILE}, group {GROUP}, block {block}: {' '.join(fields)}"
