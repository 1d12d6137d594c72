"""Token statuses by message id."""

from kvchat.chat.token_status import token_statuses
from kvchat.contract import TokenSpan, TokenStatus

SPANS = (
    TokenSpan(0, TokenStatus.REUSED, 9),
    TokenSpan(1, TokenStatus.REUSED, 5),
    TokenSpan(1, TokenStatus.READ, 2),
    TokenSpan(2, TokenStatus.WRITTEN, 7),
)
ASKED = {TokenStatus.REUSED: 5, TokenStatus.READ: 2}


def test_spans_after_the_last_message_belong_to_the_answer() -> None:
    assert token_statuses(SPANS, [(), (4,)], 6) == {4: ASKED, 6: {TokenStatus.WRITTEN: 7}}


def test_consecutive_questions_share_a_status() -> None:
    assert token_statuses(SPANS[1:], [(3,), (4, 5)], 6) == {4: ASKED, 5: ASKED, 6: {TokenStatus.WRITTEN: 7}}


def test_a_continued_answer_has_both_statuses() -> None:
    spans = (
        TokenSpan(0, TokenStatus.REUSED, 5),
        TokenSpan(1, TokenStatus.REUSED, 3),
        TokenSpan(1, TokenStatus.WRITTEN, 2),
    )
    assert token_statuses(spans, [(4,), (5,)], 5)[5] == {TokenStatus.REUSED: 3, TokenStatus.WRITTEN: 2}
