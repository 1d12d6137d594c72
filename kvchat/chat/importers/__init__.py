"""Imports conversations of other programs and kvchat's own exports.

One module and one row of `FORMATS` for each format. Reads files only; must not write. Reports what can't be
imported with its place, and returns the rest.
"""

import json
import re
import sqlite3
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvchat.chat.conversation import Conversation
from kvchat.chat.importers import (
    chatgpt,
    claude,
    gemini,
    llm_logs,
    open_webui,
    openai_messages,
    own_json,
    own_markdown,
)
from kvchat.chat.importers.parsed import ParsedConversation, build
from kvchat.chat.importers.report import Problem, Report
from kvchat.errors import KvchatError, reason
from kvchat.text import megabytes, one_line
from kvchat.validation.plain_json import read_json

MOST_BYTES = 4_000_000_000
"""Limit of one unpacked file inside a zip."""
NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Format:
    """A JSON format."""

    name: str
    records: Callable[[object], Sequence[object] | None]
    """The records of a parsed file, one per conversation; None if it is another format."""
    read: Callable[[Mapping[str, object], Report], ParsedConversation | None]
    """Parses one record; None if it is skipped, which is reported."""


FORMATS = (
    Format("kvchat's own JSON or Markdown", own_json.records, own_json.read),
    Format("ChatGPT's conversations.json or its zip", chatgpt.records, chatgpt.read),
    Format("Claude's conversations.json or its zip", claude.records, claude.read),
    Format("Open WebUI's chats", open_webui.records, open_webui.read),
    Format("Gemini's MyActivity.json or a chat of AI Studio", gemini.records, gemini.read),
    Format("messages as OpenAI's API takes them", openai_messages.records, openai_messages.read),
)
KNOWN = f"{', '.join(each.name for each in FORMATS)}, or llm's logs.db"


@dataclass(frozen=True, slots=True)
class Import:
    """The contents of a file."""

    conversations: tuple[Conversation, ...]
    """With ids from their content; see `parsed.content_id`."""
    problems: tuple[Problem, ...] = ()

    @property
    def skipped(self) -> int:
        """Number of conversations that were not imported."""
        return sum(problem.skipped for problem in self.problems)


class _UnknownError(ValueError):
    """A file is damaged or has an unknown format."""


def read_import(file: str | Path) -> Import:
    """The distinct conversations in a file, a zip or a folder of files.

    Raises:
        KvchatError: it can't be read, has an unknown format, or nothing in it can be imported.
    """
    name = one_line(str(file))
    report = Report()
    try:
        found = list(_conversations(Path(file).expanduser(), report))
    except (OSError, sqlite3.Error, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        if isinstance(error, RecursionError):
            raise KvchatError(f"{name} is nested too deeply.") from error
        raise KvchatError(f"{name} can't be read: {reason(error)}.") from error
    except ValueError as error:
        raise KvchatError(f"{name} is damaged or has an unknown format. Known formats: {KNOWN}.") from error
    if not found and report.problems:
        first, more = report.problems[0], len(report.problems) - 1
        others = f" (and {more:,} more)" if more else ""
        raise KvchatError(f"Nothing in {name} can be imported. {first}{others}.")
    return Import(tuple(found), tuple(report.problems))


def _conversations(path: Path, report: Report) -> Iterator[Conversation]:
    """The distinct conversations of a file."""
    seen: set[str] = set()
    for parsed in _parsed_conversations(path, report):
        conversation = build(parsed, report)
        if conversation and conversation.id in seen:
            report.skip("is in the file already")
        elif conversation:
            seen.add(conversation.id)
            yield conversation


def _parsed_conversations(path: Path, report: Report) -> Iterator[ParsedConversation]:
    if path.is_dir():
        files = sorted(path.rglob("*.json"), key=lambda each: _in_order(str(each)))
        return _parts(((str(each.relative_to(path)), each.read_bytes) for each in files), report)
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(b"SQLite format 3\0"):
        return _logs(path, report)
    if start.startswith(b"PK"):
        return _zipped(path, report)
    raw = path.read_bytes()
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        return _document(_parsed(raw), report)
    return _markdown(raw, report)


def _zipped(path: Path, report: Report) -> Iterator[ParsedConversation]:
    with zipfile.ZipFile(path) as archive:
        inside = sorted(archive.infolist(), key=lambda each: _in_order(each.filename))
        found = [each for each in inside if _is_json(each.filename)]
        too_large = [each for each in found if each.file_size > MOST_BYTES]
        for each in too_large:
            report.note(f"{each.filename} has {megabytes(each.file_size)}: too large to be read")
        files = [(each.filename, partial(archive.read, each)) for each in found if each not in too_large]
        yield from _parts(files, report)


def _is_json(name: str) -> bool:
    return name.lower().endswith(".json") and not name.startswith("__MACOSX/")


def _in_order(name: str) -> tuple[str, list[int]]:
    """Sort key that orders numbered files by their numbers."""
    return NUMBER.sub("0", name), [int(digits) for digits in NUMBER.findall(name)]


def _parts(files: Iterable[tuple[str, Callable[[], bytes]]], report: Report) -> Iterator[ParsedConversation]:
    """The conversations of several files; files of other formats (account data, feedback) are ignored.

    Raises:
        ValueError: none of them has conversations.
    """
    known = False
    damaged = list[str]()
    for name, load in files:
        try:
            data = _parsed(load())
        except (ValueError, RecursionError, zipfile.BadZipFile):
            damaged.append(name)
            continue
        if _format_of(data):
            known = True
            report.in_part(name)
            yield from _document(data, report)
    report.in_part("")
    for name in damaged:
        report.note(f"{name} is damaged: no JSON; it was skipped")
    if not known:
        raise _UnknownError("no file with conversations")


def _parsed(raw: bytes) -> object:
    """Parses JSON or JSON Lines.

    Raises:
        ValueError, RecursionError: it is neither.
    """
    text = raw.decode("utf-8-sig", errors="surrogatepass")
    try:
        return read_json(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return [read_json(line) for line in text.split("\n") if line.strip()]


def _format_of(data: object) -> tuple[Format, Sequence[object]] | None:
    for each in FORMATS:
        if (records := each.records(data)) is not None:
            return each, records
    return None


def _document(data: object, report: Report) -> Iterator[ParsedConversation]:
    found = _format_of(data)
    if found is None:
        raise _UnknownError("no known format")
    known, records = found
    for record in records:
        report.begin()
        if not isinstance(record, dict):
            report.skip("must be a table of fields")
            continue
        report.name(record.get("title") or record.get("name"))
        parsed = known.read(record, report)
        if parsed is not None:
            yield parsed


def _markdown(raw: bytes, report: Report) -> Iterator[ParsedConversation]:
    report.begin()
    parsed = own_markdown.read(raw.decode("utf-8-sig", errors="surrogatepass"), report)
    if parsed is None:
        raise _UnknownError("no marker")
    report.name(parsed.title)
    yield parsed


def _logs(path: Path, report: Report) -> Iterator[ParsedConversation]:
    found = llm_logs.read(path)
    if found is None:
        raise _UnknownError("another database")
    for parsed in found:
        report.begin()
        report.name(parsed.title)
        yield parsed
