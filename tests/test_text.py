"""What is shown holds no terminal escapes; sizes for people."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvchat.text import clean, megabytes, one_line

HARMFUL = {
    chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
ALLOWED = {"\n", "\t"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("\x1b]0;title\x07text", "]0;titletext"),
        ("\x9b31mred\x90", "31mred"),
        ("over\rwritten\b\x7f", "overwritten"),
        ("invoice \u202egnp.exe\u2066", "invoice gnp.exe"),
        ("two\n\tlines", "two\n\tlines"),
        ("naïve 山 🏔️ עברית", "naïve 山 🏔️ עברית"),
    ],
)
def test_clean_takes_controls_and_leaves_text(text: str, shown: str) -> None:
    assert clean(text) == shown


@given(st.text() | st.text(st.sampled_from([*sorted(HARMFUL), "a", " "])))
def test_nothing_harmful_passes_and_nothing_else_is_lost(text: str) -> None:
    assert clean(text) == "".join(letter for letter in text if letter in ALLOWED or letter not in HARMFUL)
    assert not set(one_line(text)) & (HARMFUL | ALLOWED)


def test_one_line_joins_lines() -> None:
    assert one_line("  Trip\n\n to\tthe \x1b[1mAlps\u2028 ") == "Trip to the [1mAlps"


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0.0 MB"),
        (31_040_000, "31.0 MB"),
        (999_949_999, "999.9 MB"),
        (1_000_000_000, "1.00 GB"),
        (1_239_000_000, "1.24 GB"),
    ],
)
def test_megabytes(count: int, shown: str) -> None:
    assert megabytes(count) == shown
