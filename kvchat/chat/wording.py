"""What a cache costs, in words that every front end uses. Plain values in, text out."""

from kvchat.contract import Converted, CostEstimate
from kvchat.text import megabytes, one_line

BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
"""Of one number; scales of quantised blocks come on top."""


def about(seconds: float | None) -> str:
    """`, about 0.7 s`; nothing where nothing was measured yet."""
    return "" if seconds is None else f", about {seconds:.1f} s"


def tokens(count: int) -> str:
    """`1 token`, `1,204 tokens`."""
    return f"{count:,} token{'s' * (count != 1)}"


def price_words(estimate: CostEstimate) -> str:
    """What the next turn would read."""
    words = f"the next turn reads {tokens(estimate.prefilled_tokens)}{about(estimate.seconds)}"
    return f"{words}, {estimate.miss.tokens:,} of them again." if estimate.miss else f"{words}."


def sentence(words: str) -> str:
    """`words` with a capital letter and a full stop."""
    said = one_line(words)
    return f"{said[:1].upper()}{said[1:]}."


def policy_words(estimate: CostEstimate) -> str:
    """What the next turn would read, and what the policy would drop."""
    return f"{price_words(estimate)} When the context is full: {estimate.preview}."


def converted_words(converted: Converted) -> str:
    """Bytes before and after, and how far the model still agrees with itself."""
    words = f"Keys and values: {converted.kv_dtype}"
    if converted.bytes_after != converted.bytes_before:
        words += f", {megabytes(converted.bytes_before)} → {megabytes(converted.bytes_after)}"
    if converted.compared_tokens:
        words += (
            f"; of the last {converted.compared_tokens} tokens, the model would choose "
            f"{converted.agreeing_tokens} as before"
        )
    return f"{words}; {converted.note}." if converted.note else f"{words}."
