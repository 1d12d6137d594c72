"""Which part of a cache a prompt can reuse, decided in token ids alone.

A key or value depends on every token before it, so a cache is valid exactly up to the first token that
differs. Must not import tensors.
"""

from collections.abc import Sequence


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix of two id lists, by halving on slices (they compare in C)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if tuple(a[low:middle]) == tuple(b[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def reusable_prefix(cached: Sequence[int], prompt: Sequence[int]) -> int:
    """Length of the longest common prefix that leaves at least the last token of the prompt to read.

    The logits for the first new token are computed from the last prompt token, and a cache stores no logits.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt:
        raise ValueError("a prompt has at least one token")
    return min(common_prefix(cached, prompt), len(prompt) - 1)


def gap_bounds(rows: Sequence[int], tokens: int) -> tuple[int, int]:
    """(tokens before the first evicted one, token after the last evicted one) of a history of `tokens`.

    `rows` are the tokens that are still stored, ascending; without a gap both bounds are `(tokens, 0)`.
    """
    if len(rows) == tokens:
        return tokens, 0
    first = next((i for i, row in enumerate(rows) if row != i), len(rows))
    if not rows or rows[-1] != tokens - 1:
        return first, tokens
    at_end = next(n for n in range(1, len(rows) + 1) if n == len(rows) or rows[-n - 1] != rows[-n] - 1)
    return first, tokens - at_end
