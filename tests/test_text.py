"""What is shown holds no terminal escapes; sizes for people."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvchat.text import clean, megabytes, one_line, parse_size

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


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("1e9", 1_000_000_000),
        ("2GB", 2_000_000_000),
        ("2gb", 2_000_000_000),
        ("2G", 2_000_000_000),
        (" 512 MB ", 512_000_000),
        ("512M", 512_000_000),
        ("1.5 kB", 1_500),
        ("100B", 100),
        ("0.5", 0),
        ("0GB", 0),
        ("123456789", 123_456_789),
    ],
)
def test_sizes_that_people_write(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "B", "GB", "much", "-1", "-0.5", "-1GB", "2GiB", "2TB", "2 G 1", "0x10", "inf", "1e999", "nan"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whoever asked for a size has the words
        parse_size(text)


@given(st.integers(0, 10**9), st.sampled_from(["", "k", "M", "G"]), st.sampled_from(["", " "]))
def test_a_whole_number_of_units_is_exactly_so_many_bytes(number: int, unit: str, space: str) -> None:
    exact = number * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}[unit]
    if exact < 2**53:
        assert parse_size(f"{number}{space}{unit}B") == exact
