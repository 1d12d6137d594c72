"""The words for what changed."""

import pytest

from kvchat.contract import PromptMessage
from kvchat.engine.miss_reason import (
    ANOTHER_TOKENIZER,
    REASONING_DROPPED,
    TEMPLATE_REWROTE,
    explain_difference,
    has_history,
)

A = PromptMessage("user", "Which pass?")
B = PromptMessage("assistant", "The first.", (1, 2), "t")
C = PromptMessage("user", "Sure?")
THOUGHT = PromptMessage("assistant", "<think>Hm.</think>The first.", (1, 2), "t")
OLD, NEW = PromptMessage("system", "Be brief."), PromptMessage("system", "Be kind.")


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ([OLD, A, B], [NEW, A, B, C], "system prompt edited"),
        ([A, B], [NEW, A, B, C], "system prompt edited"),
        ([OLD, A, B], [A, B, C], "system prompt edited"),
        ([OLD, A, B], [NEW, C], "system prompt edited"),
        ([A, B], [C], "message 1 edited"),
        ([OLD, A, B], [OLD, C], "message 1 edited"),
        ([A, B, C], [A, PromptMessage("assistant", "The last."), C], "message 2 edited"),
        ([A, B, C], [A, B, PromptMessage("user", "Really?")], "message 3 edited"),
        ([A, B, C], [A, B, PromptMessage("assistant", C.text)], "message 3 edited"),
        ([A, B], [A, B, C], TEMPLATE_REWROTE),
        ([A, B], [A, PromptMessage("assistant", B.text, (7,), "t"), C], TEMPLATE_REWROTE),
        ([A, B], [A, PromptMessage("assistant", B.text, (1, 2), "another"), C], ANOTHER_TOKENIZER),
        ([A, THOUGHT], [A, THOUGHT, C], REASONING_DROPPED),
        ([A, THOUGHT], [A, B, C], "message 2 edited"),
        ([], [A, B, C], TEMPLATE_REWROTE),
    ],
    ids=[
        "system changed",
        "system added",
        "system removed",
        "system before messages",
        "first message",
        "the system prompt is not counted",
        "an answer",
        "the last message",
        "another role",
        "nothing changed",
        "other ids for the same text",
        "ids of another tokenizer",
        "reasoning in an answer",
        "reasoning in an answer that was edited",
        "nothing known",
    ],
)
def test_difference_of(before: list[PromptMessage], now: list[PromptMessage], words: str) -> None:
    assert explain_difference(before, now) == words


@pytest.mark.parametrize(
    ("messages", "answered"), [([], False), ([OLD, A], False), ([A, B], True), ([OLD, A, B, C], True)]
)
def test_history_means_an_earlier_answer(messages: list[PromptMessage], answered: bool) -> None:
    assert has_history(messages) is answered
