"""Maps token statuses of a turn from prompt indices to message ids.

Ids are stable; an index of the prompt is a different message on another branch or under another system
prompt. Must not depend on storage or the screen.
"""

from collections.abc import Mapping, Sequence

from kvchat.contract import TokenSpan, TokenStatus

ANSWER = 0
"""In place of the id of an answer that is not saved yet."""

Counts = Mapping[TokenStatus, int]
"""Tokens of one message by status."""
TokenStatuses = Mapping[int, Counts]
"""Message id → counts, for the messages of the turn."""


def token_statuses(
    spans: Sequence[TokenSpan], places: Sequence[Sequence[int]], answer: int
) -> dict[int, Counts]:
    """The token counts of every message.

    Args:
        spans: from the engine, by index in the prompt.
        places: message ids at each index of the prompt; spans after the last index belong to the answer.
        answer: id of the answer.
    """
    counts: dict[int, dict[TokenStatus, int]] = {}
    for span in spans:
        for message in places[span.message] if span.message < len(places) else (answer,):
            counts.setdefault(message, {})[span.status] = span.tokens
    return dict(counts)
