"""ChatGPT's `conversations.json`: a tree of nodes for each conversation.

Exports of 2026 come in numbered files, and list folders between the conversations.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from kvchat.chat.importers.report import Report
from kvchat.chat.importers.talk import Said, Talk, as_list, as_mapping, as_text, fenced, paragraphs, thought

NOT_SHOWN = {"reasoning_recap", "user_editable_context", "model_editable_context"}
"""Kinds of content that ChatGPT doesn't show as messages."""


def records(data: object) -> Sequence[object] | None:
    """The conversations of a file; None where it is another format."""
    given = as_list(data) or [data]
    return given if any("mapping" in as_mapping(each) for each in given) else None


def read(given: Mapping[str, object], report: Report) -> Talk | None:
    """One conversation, with all its branches."""
    if not isinstance(given.get("mapping"), dict):
        kind = as_text(given.get("type"))
        report.skip(f"is a {kind}, no conversation" if kind else "has no messages (no field `mapping`)")
        return None
    without_text = Counter[str]()
    said = [
        _said(key, as_mapping(node), report, number, without_text)
        for number, (key, node) in enumerate(as_mapping(given["mapping"]).items(), start=1)
    ]
    for kind, count in (+without_text).items():
        report.note(f"{count:,} parts without text ({kind}) were left out")
    return Talk(said, given.get("title") or None, "", given.get("create_time"), given.get("current_node"))


def _said(
    key: str, node: Mapping[str, object], report: Report, number: int, without_text: Counter[str]
) -> Said:
    message, parent = as_mapping(node.get("message")), node.get("parent")
    role = as_mapping(message.get("author")).get("role")
    hidden = as_mapping(message.get("metadata")).get("is_visually_hidden_from_conversation")
    if role not in ("user", "assistant") or hidden or message.get("recipient", "all") not in ("all", None):
        return Said(key, parent, None)
    if not isinstance(message.get("content"), dict):
        report.note("has no content; the message was left out", number)
        return Said(key, parent, None)
    content = as_mapping(message["content"])
    text, thinking = _text(content, without_text), _thinking(content)
    # an empty message stands for a tool's call, or for a picture
    return Said(key, parent, role if text or thinking else None, text, thinking, message.get("create_time"))


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
    """A part is a text, or an object: `audio_transcription` has a text, pictures and sounds have none."""
    text = as_text(part) or as_text(as_mapping(part).get("text"))
    if not text and isinstance(part, dict):
        without_text[as_text(part.get("content_type")) or "unknown"] += 1
    return text
