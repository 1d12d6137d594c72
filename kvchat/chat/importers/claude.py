"""Claude's `conversations.json`: a list of messages for each conversation, each with content blocks."""

from collections import Counter
from collections.abc import Mapping, Sequence

from kvchat.chat.attachments import Attachment, compose
from kvchat.chat.importers.parsed import (
    ParsedConversation,
    ParsedMessage,
    as_list,
    as_mapping,
    as_text,
    chained,
    paragraphs,
    thought,
)
from kvchat.chat.importers.report import Report

ROLES = {"human": "user", "assistant": "assistant"}


def records(data: object) -> Sequence[object] | None:
    """The conversations of a file; None where it is another format."""
    given = as_list(data) or as_list(as_mapping(data).get("conversations")) or [data]
    return given if any("chat_messages" in as_mapping(each) for each in given) else None


def read(given: Mapping[str, object], report: Report) -> ParsedConversation | None:
    """One conversation, with branches if the messages have parents."""
    if not isinstance(given.get("chat_messages"), list):
        report.skip("has no messages (no field `chat_messages`)")
        return None
    without_text = Counter[str]()
    messages = [as_mapping(each) for each in as_list(given["chat_messages"])]
    parsed = [_message(each, without_text) for each in messages]
    for kind, count in (+without_text).items():
        report.note(f"{count:,} blocks without text ({kind}) were left out")
    if not all("parent_message_uuid" in each and each.get("uuid") for each in messages):
        parsed = chained(parsed)
    head = given.get("current_leaf_message_uuid")
    return ParsedConversation(parsed, given.get("name") or None, "", given.get("created_at"), head or None)


def _message(given: Mapping[str, object], without_text: Counter[str]) -> ParsedMessage:
    blocks = [as_mapping(each) for each in as_list(given.get("content"))]
    for block in blocks:
        kind = as_text(block.get("type")) or "unknown"
        without_text[kind] += kind not in ("text", "thinking")
    text = paragraphs(block.get("text") for block in blocks if block.get("type") == "text")
    thinking = paragraphs(block.get("thinking") for block in blocks if block.get("type") == "thinking")
    attached = [
        Attachment(as_text(each.get("file_name")).replace('"', "'"), as_text(each["extracted_content"]))
        for each in map(as_mapping, as_list(given.get("attachments")))
        if each.get("extracted_content")
    ]
    whole = compose(text, attached) or given.get("text", "")
    sender = given.get("sender")
    return ParsedMessage(
        given.get("uuid"),
        given.get("parent_message_uuid"),
        ROLES.get(as_text(sender), sender) if whole or thinking else None,
        whole,
        thought(thinking),
        given.get("created_at"),
    )
