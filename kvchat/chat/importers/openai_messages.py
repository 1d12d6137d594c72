"""Messages of OpenAI's API: `{"messages": [{"role": …, "content": …}]}`, or the list alone."""

from collections import Counter
from collections.abc import Mapping, Sequence

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

SYSTEM = ("system", "developer")


def records(data: object) -> Sequence[object] | None:
    """The conversations of a file; None where it is another format."""
    given = as_list(data) or [data]
    if any(isinstance(as_mapping(each).get("messages"), list) for each in given):
        return given
    if any({"role", "content"} <= set(as_mapping(each)) for each in given):
        return [{"messages": list(given)}]
    return None


def read(given: Mapping[str, object], report: Report) -> ParsedConversation | None:
    """One conversation."""
    if not isinstance(given.get("messages"), list):
        report.skip("has no messages (no field `messages`)")
        return None
    messages = [as_mapping(each) for each in as_list(given["messages"])]
    system = paragraphs(_text(each.get("content")) for each in messages if each.get("role") in SYSTEM)
    not_shown = Counter(as_text(m.get("role")) for m in messages if m.get("role") in ("tool", "function"))
    for role, count in not_shown.items():
        report.note(f"{count:,} messages of the role {role} were left out")
    created = given.get("created_at") or given.get("created")
    return ParsedConversation(chained(map(_message, messages)), given.get("title") or None, system, created)


def _message(given: Mapping[str, object]) -> ParsedMessage:
    role, text = given.get("role", ""), _text(given.get("content"))
    if role in (*SYSTEM, "tool", "function") or (role == "assistant" and not text):  # a tool's call
        return ParsedMessage(None, None, None)
    thinking: object = ""
    if role == "assistant":
        thinking, text = split(text)
        reasoning = given.get("reasoning_content") or given.get("reasoning")
        thinking = thought(as_text(reasoning)) or thinking
    return ParsedMessage(None, None, role, text, thinking, given.get("created_at") or given.get("timestamp"))


def _text(content: object) -> object:
    """The text of a message, whose content may be a list of parts."""
    if isinstance(content, list):
        return paragraphs(as_mapping(part).get("text") for part in content)
    return content if content is not None else ""
