"""What a turn did with the messages of a conversation: reused, read, written, evicted, never cached.

By the ids of messages: a place in the prompt is another message on another branch, or under another system
prompt. It knows no storage and no screen.
"""

from collections.abc import Mapping, Sequence

from kvchat.contract import TokenSpan, TokenStatus

ANSWER = 0
"""Stands for the id of an answer that is not saved yet."""

Counts = Mapping[TokenStatus, int]
"""Tokens of one message by what was done with them."""
TokenStatuses = Mapping[int, Counts]
"""Message → what the turn did with it; a message that it knew nothing of is not in it."""


def token_statuses(
    spans: Sequence[TokenSpan], places: Sequence[Sequence[int]], answer: int
) -> dict[int, Counts]:
    """What was done with every message.

    Args:
        spans: as the engine tells them, by place in the prompt.
        places: ids of the messages at each place; what stands after the last one is the answer.
        answer: id of that one.
    """
    told: dict[int, dict[TokenStatus, int]] = {}
    for span in spans:
        for message in places[span.message] if span.message < len(places) else (answer,):
            told.setdefault(message, {})[span.status] = span.tokens
    return dict(told)
