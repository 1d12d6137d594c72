"""kvchat's own Markdown: the text between two markers is a message."""

import re
from collections.abc import Mapping

from kvchat.chat.importers.own_json import MESSAGE_FIELDS, settings_of
from kvchat.chat.importers.parsed import ParsedConversation, ParsedMessage, as_mapping, chained, split
from kvchat.chat.importers.report import Report
from kvchat.validation.plain_json import read_json

MARKED = re.compile(r"^<!-- kvchat:(conversation|user|assistant) (\{.*\}) -->\r?$", re.MULTILINE)
ESCAPED_MARKER = re.compile(r"<!-- \\(\\*)kvchat:")
HEADING = re.compile(r"\A\r?\n### [^\n]*\n\r?\n")
CLOSING = re.compile(r"\n(`{3,}|~{3,})\n<!-- kvchat:closed -->\Z")
"""A code fence that the export closed because the message left it open."""


def read(text: str, report: Report) -> ParsedConversation | None:
    """The conversation of a file; None if it does not begin with a marker."""
    marks = list(MARKED.finditer(text))
    if not marks or marks[0][1] != "conversation":
        return None
    ends = [mark.start() for mark in marks[1:]] + [len(text) + 1]
    messages = [
        _message(mark, text[mark.end() + 1 : end - 1], report, number)
        for number, (mark, end) in enumerate(zip(marks[1:], ends[1:], strict=True), start=1)
    ]
    about = _fields(marks[0], report)
    return ParsedConversation(
        chained(messages),
        about.get("title"),
        about.get("system_prompt", ""),
        about.get("created_at"),
        joins=False,
        more=settings_of(about),
    )


def _message(mark: re.Match[str], body: str, report: Report, number: int) -> ParsedMessage:
    about = _fields(mark, report, number)
    body = HEADING.sub("", "\n" + body).removesuffix("\n")
    raw = ESCAPED_MARKER.sub(r"<!-- \1kvchat:", CLOSING.sub("", body))
    thinking, text = split(raw) if mark[1] == "assistant" else ("", raw)
    more = {name: about[name] for name in MESSAGE_FIELDS if about.get(name) is not None}
    return ParsedMessage(None, None, mark[1], text, thinking, about.get("created_at"), more)


def _fields(mark: re.Match[str], report: Report, number: int = 0) -> Mapping[str, object]:
    try:
        return as_mapping(read_json(mark[2]))
    except (ValueError, RecursionError):
        report.note("the fields in its comment are no JSON; they were left out", number)
        return {}
