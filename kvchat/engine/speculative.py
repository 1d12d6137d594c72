"""Speculative decoding: drafts the next tokens, so that the model verifies several in one pass.

How often drafts are accepted depends on the text, so `DraftPacing` adapts: longer drafts while they are
accepted, longer pauses each time they are rejected. A rejected token costs time and never changes an answer:
each token is sampled from the model's own logits, and a crop removes rejected tokens from the cache.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvchat.cache.prefix import common_prefix

if TYPE_CHECKING:
    from kvchat.engine.model.loader import LoadedModel

SHORTEST, LONGEST = 3, 15
"""Tokens of a draft: with the token before them 4 or 16; the kernels multiply 4 at a time."""
NGRAM = 3
"""Tokens that have to match before the tokens after them are drafted."""
LONGEST_PAUSE = 128
"""Tokens."""


class Drafter(Protocol):
    """Proposes how a text continues."""

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens after `tokens`; may be none."""
        ...

    def record(self, proposed: int, accepted: int) -> None:
        """Records how many tokens of the last proposal were accepted."""
        ...


@dataclass(slots=True)
class DraftPacing:
    """How long drafts are, and how long to pause after rejected ones."""

    width: int = SHORTEST
    pause: int = 0
    failures: int = 0

    def most(self, allowed: int) -> int:
        """Tokens to draft now; each call counts as one token of the pause."""
        if self.pause:
            self.pause -= 1
            return 0
        return min(self.width, allowed)

    def record(self, proposed: int, accepted: int) -> None:
        """Adapts. Verifying three tokens takes up to as long as decoding one: more than one must be right."""
        if accepted == proposed:
            self.width = min(LONGEST, 2 * self.width + 1)
            self.failures = 0
            return
        self.width = SHORTEST
        if 3 * accepted > proposed:
            self.failures = max(0, self.failures - 1)
        else:
            self.failures += 1
            self.pause = min(LONGEST_PAUSE, 2**self.failures)


class PromptLookup:
    """Drafts the tokens that followed the last n-gram where it occurred before.

    Source: Saxena, "Prompt Lookup Decoding", 2023 (https://github.com/apoorvumang/prompt-lookup-decoding).
    """

    def __init__(self) -> None:
        self._pacing = DraftPacing()
        self._after: dict[tuple[int, ...], int] = {}
        """Every n-gram → index of the token after its last occurrence."""
        self._indexed = NGRAM

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """What followed the last n-gram; `tokens` must extend those of the previous call."""
        # the last n-gram is not indexed before the lookup, since it would find itself
        for end in range(self._indexed, len(tokens)):
            self._after[tuple(tokens[end - NGRAM : end])] = end
        self._indexed = max(self._indexed, len(tokens))
        place, width = self._after.get(tuple(tokens[-NGRAM:])), self._pacing.most(most)
        if place is None or not width:
            return []
        return list(tokens[place : place + width])

    def record(self, proposed: int, accepted: int) -> None:
        """Adapts the length of the next drafts."""
        self._pacing.record(proposed, accepted)


class DraftModel:
    """Drafts with a smaller model. Its own cache counts in the budget and is evicted first."""

    def __init__(self, loaded: "LoadedModel") -> None:
        """The model must have the tokenizer of the one that verifies."""
        self._loaded = loaded
        self._kv = loaded.new_kv()
        self._pacing = DraftPacing()
        self.free_bytes: Callable[[], int] = lambda: sys.maxsize

    @property
    def storage_bytes(self) -> int:
        """Bytes of its cache."""
        return self._kv.storage_bytes

    def clear(self) -> int:
        """Frees its cache; returns how many tokens it has to read again."""
        tokens = len(self._kv)
        self._kv.clear()
        return tokens

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """The most probable tokens, one after the other; first reads the tokens it has not read yet.

        None where the budget is full: no conversation's cache is evicted for drafts.
        """
        width = self._pacing.most(min(most, self._loaded.facts.context_limit - len(tokens) - 1))
        if width <= 0:
            return []
        self._kv.truncate(self._kv.reachable(min(common_prefix(self._kv.ids, tokens), len(tokens) - 1)))
        unread = list(tokens[len(self._kv.ids) :])
        needed = self._kv.bytes_to_read(len(unread) + width)
        if needed and needed > self.free_bytes():
            return []
        reader = self._loaded.reader(self._kv)
        draft: list[int] = []
        while len(draft) < width:
            draft.append(int(reader.read(unread)[-1].argmax()))
            unread = draft[-1:]
        return draft

    def record(self, proposed: int, accepted: int) -> None:
        """Adapts the length of the next drafts."""
        self._pacing.record(proposed, accepted)
