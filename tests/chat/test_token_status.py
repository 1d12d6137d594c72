"""What a turn did, from places in the prompt to messages."""

from kvchat.chat.token_status import token_statuses
from kvchat.contract import TokenSpan, TokenStatus

SPANS = (
    TokenSpan(0, TokenStatus.REUSED, 9),
    TokenSpan(1, TokenStatus.REUSED, 5),
    TokenSpan(1, TokenStatus.READ, 2),
    TokenSpan(2, TokenStatus.WRITTEN, 7),
)
ASKED = {TokenStatus.REUSED: 5, TokenStatus.READ: 2}


def test_what_stands_after_the_last_message_is_the_answer_and_the_system_prompt_is_no_message() -> None:
    assert token_statuses(SPANS, [(), (4,)], 6) == {4: ASKED, 6: {TokenStatus.WRITTEN: 7}}


def test_questions_that_are_read_as_one_share_what_was_done() -> None:
    assert token_statuses(SPANS[1:], [(3,), (4, 5)], 6) == {4: ASKED, 5: ASKED, 6: {TokenStatus.WRITTEN: 7}}


def test_an_answer_that_is_gone_on_with_has_both() -> None:
    spans = (
        TokenSpan(0, TokenStatus.REUSED, 5),
        TokenSpan(1, TokenStatus.REUSED, 3),
        TokenSpan(1, TokenStatus.WRITTEN, 2),
    )
    assert token_statuses(spans, [(4,), (5,)], 5)[5] == {TokenStatus.REUSED: 3, TokenStatus.WRITTEN: 2}
