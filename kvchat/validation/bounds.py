"""Valid ranges of numbers and patterns of text, and the annotated types made from them.

Shared by flags, settings, model cards, imports, database rows and engine requests; `checks` validates values
against these types.
"""

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta


@dataclass(frozen=True, slots=True)
class Bounds:
    """A closed range with finite ends; with `above` the lower end is excluded."""

    lowest: float
    highest: float
    above: bool = False
    """Whether `lowest` itself is excluded."""

    def __contains__(self, value: float) -> bool:
        low = value > self.lowest if self.above else value >= self.lowest
        return low and value <= self.highest  # NaN is in no range

    @property
    def meta(self) -> Meta:
        """The range for msgspec."""
        if self.above:
            return Meta(gt=self.lowest, le=self.highest)
        return Meta(ge=self.lowest, le=self.highest)


INT64 = 2**63 - 1
"""The largest integer that SQLite stores."""
TEMPERATURE = Bounds(0, 5)
TOP_P = Bounds(0, 1, above=True)
TOP_K = Bounds(0, 2**31 - 1)
MIN_P = Bounds(0, 1)
REPEAT_PENALTY = Bounds(0, 100, above=True)
SEED = Bounds(0, INT64)
MAX_TOKENS = Bounds(1, 10_000_000)
CONTEXT = Bounds(16, 100_000_000)
"""Tokens."""
THREADS = Bounds(1, 4_096)
UNLOAD_AFTER = Bounds(0, 525_600)
"""Minutes; the highest is a year."""
MESSAGES = Bounds(0, 2**31 - 1)
"""A number of messages."""
TOKEN_IDS = Bounds(0, 2**31 - 1)
"""Token ids; the engine also checks them against the vocabulary."""
COUNTS = Bounds(0, INT64)
"""Tokens and bytes."""
MEASURED = Bounds(-1e18, 1e18)
"""Seconds and rates: any finite number."""

DESCRIBED: dict[str, str] = {}
"""`repr` of a text type's regular expression → its description for error messages."""


def matching(pattern: str, words: str) -> Meta:
    """Text that matches a regular expression; error messages describe it as `words`."""
    DESCRIBED[repr(pattern)] = words
    return Meta(pattern=pattern)


Temperature = Annotated[float, TEMPERATURE.meta]
TopP = Annotated[float, TOP_P.meta]
TopK = Annotated[int, TOP_K.meta]
MinP = Annotated[float, MIN_P.meta]
RepeatPenalty = Annotated[float, REPEAT_PENALTY.meta]
Seed = Annotated[int, SEED.meta]
MaxTokens = Annotated[int, MAX_TOKENS.meta]
MessageCount = Annotated[int, MESSAGES.meta]
TokenId = Annotated[int, TOKEN_IDS.meta]
CountTokens = Annotated[int, COUNTS.meta]
Measured = Annotated[float, MEASURED.meta]
Text = Annotated[str, matching(r"\A[^\ud800-\udfff]*\Z", "text without lone surrogates")]
"""Text that UTF-8, SQLite and tokenizers accept."""
Role = Annotated[str, matching(r"\A(user|assistant)\Z", "user or assistant")]
PromptRole = Annotated[str, matching(r"\A(system|user|assistant)\Z", "system, user or assistant")]
Finish = Annotated[
    str,
    matching(r"\A(stop|length|cancelled|context|error)\Z", "stop, length, cancelled, context or error"),
]
"""The values of `contract.FinishReason`."""
