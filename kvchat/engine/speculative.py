"""Guesses the next tokens, so that the model checks several in one pass instead of computing one by one.

What a guess is worth depends on the text, so `Pace` watches: it guesses more while guesses come true, and
rests longer each time none did. A wrong guess costs time and never changes an answer: each token is chosen
from the model's own logits, and what was read too far is taken back by a crop.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvchat.cache.prefix import common_prefix

if TYPE_CHECKING:
    from kvchat.engine.model.loader import LoadedModel

LEAST, MOST = 3, 15
"""Tokens of a guess: with the one before them 4 or 16, of which the kernels multiply 4 at a time."""
NGRAM = 3
"""Tokens that have to agree before what followed them is guessed."""
LONGEST_REST = 128
"""Tokens."""


class Drafter(Protocol):
    """Guesses how a text goes on."""

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens after `tokens`; none where it has no idea."""
        ...

    def judge(self, proposed: int, accepted: int) -> None:
        """Tells how many of the last proposal came true."""
        ...


@dataclass(slots=True)
class Pace:
    """How much to guess, and how long to rest."""

    width: int = LEAST
    rest: int = 0
    failures: int = 0

    def most(self, allowed: int) -> int:
        """Tokens to guess now; counts a token of rest."""
        if self.rest:
            self.rest -= 1
            return 0
        return min(self.width, allowed)

    def judge(self, proposed: int, accepted: int) -> None:
        """Checking three guesses takes up to as long as a token does: more than one has to come true."""
        if accepted == proposed:
            self.width = min(MOST, 2 * self.width + 1)
            self.failures = 0
            return
        self.width = LEAST
        if 3 * accepted > proposed:
            self.failures = max(0, self.failures - 1)
        else:
            self.failures += 1
            self.rest = min(LONGEST_REST, 2**self.failures)


class PromptLookup:
    """Guesses that the text goes on as it did where its last tokens stood before.

    Source: Saxena, "Prompt Lookup Decoding", 2023 (https://github.com/apoorvumang/prompt-lookup-decoding).
    """

    def __init__(self) -> None:
        self._pace = Pace()
        self._after: dict[tuple[int, ...], int] = {}
        """Every n-gram → the token after its last place."""
        self._indexed = NGRAM

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """What followed the last n-gram the last time; all tokens are those of one conversation, growing."""
        # the last n-gram is looked up before it is noted: it would find itself
        for end in range(self._indexed, len(tokens)):
            self._after[tuple(tokens[end - NGRAM : end])] = end
        self._indexed = max(self._indexed, len(tokens))
        place, width = self._after.get(tuple(tokens[-NGRAM:])), self._pace.most(most)
        if place is None or not width:
            return []
        return list(tokens[place : place + width])

    def judge(self, proposed: int, accepted: int) -> None:
        """Guesses more, less, or not for a while."""
        self._pace.judge(proposed, accepted)


class DraftModel:
    """Guesses what a smaller model would say. Its own cache counts in the budget, and is the first to go."""

    def __init__(self, loaded: "LoadedModel") -> None:
        """The model has to have the tokenizer of the one that checks."""
        self._loaded = loaded
        self._kv = loaded.new_kv()
        self._pace = Pace()
        self.room: Callable[[], int] = lambda: sys.maxsize

    @property
    def storage_bytes(self) -> int:
        """What its cache takes."""
        return self._kv.storage_bytes

    def clear(self) -> int:
        """Frees its cache; returns how many tokens it has to read again."""
        tokens = len(self._kv)
        self._kv.clear()
        return tokens

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """The most probable tokens, one after the other; reads what it has not read yet.

        None where the budget has no room to read: no conversation loses its cache for guesses.
        """
        room = self._loaded.facts.context_limit - len(tokens) - 1
        width = self._pace.most(min(most, room))
        if width <= 0:
            return []
        self._kv.truncate(self._kv.reachable(min(common_prefix(self._kv.ids, tokens), len(tokens) - 1)))
        unread = list(tokens[len(self._kv.ids) :])
        needed = self._kv.bytes_to_read(len(unread) + width)
        if needed and needed > self.room():
            return []
        reader = self._loaded.reader(self._kv)
        guesses: list[int] = []
        while len(guesses) < width:
            guesses.append(int(reader.read(unread)[-1].argmax()))
            unread = guesses[-1:]
        return guesses

    def judge(self, proposed: int, accepted: int) -> None:
        """Guesses more, less, or not for a while."""
        self._pace.judge(proposed, accepted)
