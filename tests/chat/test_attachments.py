"""Attachments: composing, parsing, completion, and errors of files that are not text."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvchat.chat.attachments import (
    LARGEST_BYTES,
    Attachment,
    compose,
    joined,
    mentions,
    parse_attachments,
    path_completions,
    read_attachment,
)
from kvchat.chat.conversation import title_from
from kvchat.errors import KvchatError

NOTES = Attachment("src/notes.md", '# Notes\n\n<file name="x">\nno\n</file> end')
OTHER = Attachment("b.txt", "")
WORDS = st.sampled_from(["a", "\n", "\n\n", '<file name="x">', "</file>", "\n</file>", ' @"b c"'])


def test_compose_and_parse_are_inverses() -> None:
    text = compose("Explain @src/notes.md", [NOTES, OTHER])
    assert text.startswith('Explain @src/notes.md\n\n<file name="src/notes.md">\n# Notes')
    assert text.endswith('</file>\n\n<file name="b.txt">\n\n</file>')
    assert parse_attachments(text) == ("Explain @src/notes.md", (NOTES, OTHER))
    assert parse_attachments(compose("", [OTHER])) == ("", (OTHER,))


@pytest.mark.parametrize("text", ["", "Hello", '<file name="x">', 'Say\n\n<file name="x">\nopen', "</file>"])
def test_text_without_attachments_has_no_files(text: str) -> None:
    assert parse_attachments(text) == (text, ())


@given(parts=st.lists(WORDS))
def test_parsing_then_composing_gives_the_same_text(parts: list[str]) -> None:
    text = "".join(parts)
    written, attached = parse_attachments(text)
    assert compose(written, attached) == text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see @a.txt, @b/c.py.", ["a.txt", "b/c.py"]),
        ('@"my notes.md" and @~/x', ["my notes.md", "~/x"]),
        ("me@home @ @@x", ["@x"]),
        ("@a @a", ["a"]),
        ("(@a)", []),
    ],
)
def test_mentions(text: str, found: list[str]) -> None:
    assert mentions(text) == found


def test_the_title_uses_text_else_file_names() -> None:
    assert title_from(compose("Explain this", [NOTES])) == "Explain this"
    assert title_from(compose("", [NOTES, OTHER])) == "src/notes.md, b.txt"


def test_text_files_are_read_unchanged(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffGrüße\r\n[/b]\n".encode())
    assert read_attachment("a.txt", tmp_path) == Attachment("a.txt", "Grüße\r\n[/b]")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\x89PNG\r\n\x1a\n", "only text files can be attached"),
        (b"a\0b", "is binary"),
        (b"x" * (LARGEST_BYTES + 1), "files of at most 1.0 MB can be attached"),
    ],
)
def test_files_that_are_not_text_are_errors(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(KvchatError, match=sentence):
        read_attachment("file", tmp_path)


@pytest.mark.parametrize(
    ("name", "sentence"), [(".", "is a folder"), ("missing", "There is no file missing")]
)
def test_folders_and_missing_files_are_errors(tmp_path: Path, name: str, sentence: str) -> None:
    with pytest.raises(KvchatError, match=sentence):
        read_attachment(name, tmp_path)


def test_paths_are_completed(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for name in ("src/a.py", "Setup.md", "x.txt", ".hidden", "odd\x1bname"):
        (tmp_path / name).touch()
    assert path_completions("", tmp_path) == ["src/", "Setup.md", "x.txt"]
    assert path_completions("s", tmp_path) == ["src/", "Setup.md"]
    assert path_completions("src/", tmp_path) == ["src/a.py"]
    assert path_completions(".h", tmp_path) == [".hidden"]
    assert path_completions(f"{tmp_path}/x", Path("/")) == [f"{tmp_path}/x.txt"]
    assert path_completions("none/", tmp_path) == path_completions("a\0b", tmp_path) == []


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        ("Question", "", "Question"),
        ("Question", "more", "Question\nmore"),
        ("Question", " and more", "Question and more"),
        ("Question", "Question, again", "Question, again"),
        ("", "more", "more"),
    ],
)
def test_joined_merges_two_messages(first: str, second: str, both: str) -> None:
    assert joined(first, second) == both


def test_joined_renames_files_with_equal_names() -> None:
    first = compose("See @pasted-1", [Attachment("pasted-1", "one")])
    second = compose(
        "And @pasted-1, @pasted-10", [Attachment("pasted-1", "two"), Attachment("pasted-10", "x")]
    )
    written, files = parse_attachments(joined(first, second))
    assert written == "See @pasted-1\nAnd @pasted-1-2, @pasted-10"
    assert {each.name: each.text for each in files} == {
        "pasted-1": "one",
        "pasted-1-2": "two",
        "pasted-10": "x",
    }
    assert joined(first, first) == first
