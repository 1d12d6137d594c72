"""ChatGPT's `conversations.json`: a tree of nodes for each conversation.

Exports since 2026 are numbered files that also list folders between the conversations.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from kvchat.chat.importers.parsed import (
    ParsedConversation,
    ParsedMessage,
    as_list,
    as_mapping,
    as_text,
    fenced,
    paragraphs,
    thought,
)
from kvchat.chat.importers.report import Report

NOT_SHOWN = {"reasoning_recap", "user_editable_context", "model_editable_context"}
"""Content types that ChatGPT doesn't show as messages."""


def records(data: object) -> Sequence[object] | None:
    """The conversations of a file; None where it is another format."""
    given = as_list(data) or [data]
    return given if any("mapping" in as_mapping(each) for each in given) else None


def read(given: Mapping[str, object], report: Report) -> ParsedConversation | None:
    """One conversation, with all its branches."""
    if not isinstance(given.get("mapping"), dict):
        kind = as_text(given.get("type"))
        report.skip(f"is a {kind}, no conversation" if kind else "has no messages (no field `mapping`)")
        return None
    without_text = Counter[str]()
    parsed = [
        _message(key, as_mapping(node), report, number, without_text)
        for number, (key, node) in enumerate(as_mapping(given["mapping"]).items(), start=1)
    ]
    for kind, count in (+without_text).items():
        report.note(f"{count:,} parts without text ({kind}) were left out")
    return ParsedConversation(
        parsed, given.get("title") or None, "", given.get("create_time"), given.get("current_node")
    )


def _message(
    key: str, node: Mapping[str, object], report: Report, number: int, without_text: Counter[str]
) -> ParsedMessage:
    message, parent = as_mapping(node.get("message")), node.get("parent")
    role = as_mapping(message.get("author")).get("role")
    hidden = as_mapping(message.get("metadata")).get("is_visually_hidden_from_conversation")
    if role not in ("user", "assistant") or hidden or message.get("recipient", "all") not in ("all", None):
        return ParsedMessage(key, parent, None)
    if not isinstance(message.get("content"), dict):
        report.note("has no content; the message was left out", number)
        return ParsedMessage(key, parent, None)
    content = as_mapping(message["content"])
    text, thinking = _text(content, without_text), _thinking(content)
    # tool calls and pictures have no text
    return ParsedMessage(
        key, parent, role if text or thinking else None, text, thinking, message.get("create_time")
    )


def _thinking(content: Mapping[str, object]) -> str:
    if content.get("content_type") != "thoughts":
        return ""
    thoughts = as_list(content.get("thoughts"))
    return thought(paragraphs(as_mapping(each).get("content") for each in thoughts))


def _text(content: Mapping[str, object], without_text: Counter[str]) -> str:
    kind = as_text(content.get("content_type"))
    if kind == "thoughts" or kind in NOT_SHOWN:
        return ""
    if kind == "code":
        language = as_text(content.get("language"))
        code = as_text(content.get("text"))
        return fenced(code, "" if language == "unknown" else language) if code else ""
    if "parts" not in content:
        text = as_text(content.get("text")) or as_text(content.get("result"))
        without_text[kind or "unknown"] += not text
        return text
    return paragraphs(_part(part, without_text) for part in as_list(content["parts"]))


def _part(part: object, without_text: Counter[str]) -> str:
    """The text of a part: a str, or an object; of those, `audio_transcription` has text, media have none."""
    text = as_text(part) or as_text(as_mapping(part).get("text"))
    if not text and isinstance(part, dict):
        without_text[as_text(part.get("content_type")) or "unknown"] += 1
    return text
