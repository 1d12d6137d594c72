"""Decodes token ids to text as they arrive; bytes of an incomplete character wait for the rest."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Decodes one answer. Constant time per token."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """`before` are ids before a continued answer: some tokenizers drop the space of a first word."""
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(before), skip_special_tokens=True)

    def step(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete, and for control tokens."""
        return self._stream.step(self._tokenizer, token) or ""
