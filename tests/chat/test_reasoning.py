"""Splitting thinking and answer is lossless, for whole texts and streams."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvchat.chat.reasoning import ThinkingStream, inner_thinking, split_thinking

CASES = {
    "none": ("Hello", "", "Hello"),
    "empty": ("", "", ""),
    "whole": ("<think>a</think>b", "<think>a</think>", "b"),
    "blank lines": (" <think>\na\n</think>\n\nb\n", " <think>\na\n</think>\n\n", "b\n"),
    "unclosed": ("<think>a", "<think>a", ""),
    "nothing after": ("<think>a</think>\n", "<think>a</think>\n", ""),
    "opened by the template": ("a\n</think>\n\nb", "a\n</think>\n\n", "b"),
    "spoken of": ("Write `</think>` to end it.", "", "Write `</think>` to end it."),
    "later": ("See <think>a</think> b", "", "See <think>a</think> b"),
    "twice": ("<think>a</think>b<think>c</think>", "<think>a</think>", "b<think>c</think>"),
    "half a tag": ("<thin", "", "<thin"),
}
PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "th", "ink>", "a", "\n", " ", "</"]), max_size=9
)


@pytest.mark.parametrize(("text", "thinking", "answer"), CASES.values(), ids=CASES.keys())
def test_split_thinking_separates_thinking_and_answer(text: str, thinking: str, answer: str) -> None:
    assert split_thinking(text) == (thinking, answer)


def test_inner_thinking_has_no_tags() -> None:
    assert inner_thinking("<think>\na\n</think>\n\n") == "a"
    assert inner_thinking("<think>a") == "a"


@given(PIECES)
def test_streaming_gives_the_same_split_as_the_whole_text(pieces: list[str]) -> None:
    text = "".join(pieces)
    thinking, answer = split_thinking(text)
    assert thinking + answer == text
    stream = ThinkingStream()
    streamed = "".join(map(stream.feed, pieces)) + stream.end()
    if thinking.lstrip().startswith("<think>"):
        assert stream.thinking.rstrip() == thinking.rstrip()
        assert streamed.lstrip() == answer
    assert not stream.open
