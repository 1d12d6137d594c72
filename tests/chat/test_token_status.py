"""What a turn did, from places in the prompt to messages."""

from kvchat.chat.token_status import fates_of
from kvchat.contract import Fate, Span

SPANS = (
    Span(0, Fate.REUSED, 9),
    Span(1, Fate.REUSED, 5),
    Span(1, Fate.READ, 2),
    Span(2, Fate.WRITTEN, 7),
)
ASKED = {Fate.REUSED: 5, Fate.READ: 2}


def test_what_stands_after_the_last_message_is_the_answer_and_the_system_prompt_is_no_message() -> None:
    assert fates_of(SPANS, [(), (4,)], 6) == {4: ASKED, 6: {Fate.WRITTEN: 7}}


def test_questions_that_are_read_as_one_share_what_was_done() -> None:
    assert fates_of(SPANS[1:], [(3,), (4, 5)], 6) == {4: ASKED, 5: ASKED, 6: {Fate.WRITTEN: 7}}


def test_an_answer_that_is_gone_on_with_has_both() -> None:
    spans = (Span(0, Fate.REUSED, 5), Span(1, Fate.REUSED, 3), Span(1, Fate.WRITTEN, 2))
    assert fates_of(spans, [(4,), (5,)], 5)[5] == {Fate.REUSED: 3, Fate.WRITTEN: 2}
