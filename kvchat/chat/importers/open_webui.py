"""Open WebUI's exported chats: a tree of messages for each chat."""

import re
from collections.abc import Mapping, Sequence
from html import unescape

from kvchat.chat.importers.parsed import (
    ParsedConversation,
    ParsedMessage,
    as_list,
    as_mapping,
    as_text,
    chained,
    paragraphs,
    split,
    thought,
)
from kvchat.chat.importers.report import Report

REASONING = re.compile(
    r'\A\s*<details type="reasoning"[^>]*>\s*(?:<summary>.*?</summary>)?(?P<thought>.*?)</details>\s*',
    re.DOTALL,
)
QUOTED = re.compile(r"^> ?", re.MULTILINE)


def records(data: object) -> Sequence[object] | None:
    """The chats of a file; None where it is another format."""
    given = as_list(data) or [data]
    return given if any(_is_chat(_chat(as_mapping(each))) for each in given) else None


def read(given: Mapping[str, object], report: Report) -> ParsedConversation | None:
    """One chat, with all its branches."""
    chat = _chat(given)
    title = chat.get("title") or given.get("title")
    report.name(title)
    history = as_mapping(chat.get("history"))
    nodes = as_mapping(history.get("messages"))
    messages = [_message(key, as_mapping(node)) for key, node in nodes.items()]
    if not nodes:
        messages = chained(_message("", as_mapping(each)) for each in as_list(chat.get("messages")))
    system = [as_mapping(chat.get("params")).get("system"), chat.get("system")]
    created = given.get("created_at") or chat.get("timestamp")
    return ParsedConversation(
        messages, title or None, paragraphs(system), created, history.get("currentId") if nodes else None
    )


def _chat(given: Mapping[str, object]) -> Mapping[str, object]:
    """The chat of a record, which is a wrapper with id and dates or the chat itself."""
    return as_mapping(given.get("chat")) or given


def _is_chat(chat: Mapping[str, object]) -> bool:
    return isinstance(as_mapping(chat.get("history")).get("messages"), dict)


def _message(key: str, given: Mapping[str, object]) -> ParsedMessage:
    role, content = given.get("role"), given.get("content")
    text: object = content
    if isinstance(content, list):
        text = paragraphs(as_mapping(part).get("text") for part in content)
    thinking: object = ""
    if role == "assistant":
        thinking, text = _split(text)
    shown = None if role in ("system", "tool") else role
    return ParsedMessage(key, given.get("parentId"), shown, text, thinking, given.get("timestamp"))


def _split(text: object) -> tuple[object, object]:
    """(thinking, text): the format has reasoning in a `<details>` element, quoted line by line."""
    if found := REASONING.match(as_text(text)):
        inner = unescape(QUOTED.sub("", found["thought"])).strip()
        return thought(inner), as_text(text)[found.end() :]
    return split(text)
