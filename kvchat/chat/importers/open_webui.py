"""Open WebUI's exported chats: a tree of messages for each chat."""

import re
from collections.abc import Mapping, Sequence
from html import unescape

from kvchat.chat.importers.report import Report
from kvchat.chat.importers.talk import (
    Said,
    Talk,
    as_list,
    as_mapping,
    as_text,
    chained,
    paragraphs,
    split,
    thought,
)

REASONING = re.compile(
    r'\A\s*<details type="reasoning"[^>]*>\s*(?:<summary>.*?</summary>)?(?P<thought>.*?)</details>\s*',
    re.DOTALL,
)
QUOTED = re.compile(r"^> ?", re.MULTILINE)


def records(data: object) -> Sequence[object] | None:
    """The chats of a file; None where it is another format."""
    given = as_list(data) or [data]
    return given if any(_is_chat(_chat(as_mapping(each))) for each in given) else None


def read(given: Mapping[str, object], report: Report) -> Talk | None:
    """One chat, with all its branches."""
    chat = _chat(given)
    title = chat.get("title") or given.get("title")
    report.name(title)
    history = as_mapping(chat.get("history"))
    nodes = as_mapping(history.get("messages"))
    said = [_said(key, as_mapping(node)) for key, node in nodes.items()]
    if not nodes:
        said = chained(_said("", as_mapping(each)) for each in as_list(chat.get("messages")))
    system = [as_mapping(chat.get("params")).get("system"), chat.get("system")]
    created = given.get("created_at") or chat.get("timestamp")
    return Talk(said, title or None, paragraphs(system), created, history.get("currentId") if nodes else None)


def _chat(given: Mapping[str, object]) -> Mapping[str, object]:
    """A record holds the chat beside its id and dates, or is the chat."""
    return as_mapping(given.get("chat")) or given


def _is_chat(chat: Mapping[str, object]) -> bool:
    return isinstance(as_mapping(chat.get("history")).get("messages"), dict)


def _said(key: str, given: Mapping[str, object]) -> Said:
    role, content = given.get("role"), given.get("content")
    text: object = content
    if isinstance(content, list):
        text = paragraphs(as_mapping(part).get("text") for part in content)
    thinking: object = ""
    if role == "assistant":
        thinking, text = _split(text)
    shown = None if role in ("system", "tool") else role
    return Said(key, given.get("parentId"), shown, text, thinking, given.get("timestamp"))


def _split(text: object) -> tuple[object, object]:
    """(thinking, text): reasoning is a folded block of HTML there, quoted line by line."""
    if found := REASONING.match(as_text(text)):
        inner = unescape(QUOTED.sub("", found["thought"])).strip()
        return thought(inner), as_text(text)[found.end() :]
    return split(text)
