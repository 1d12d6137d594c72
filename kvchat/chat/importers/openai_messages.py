"""Messages as OpenAI's API takes them: `{"messages": [{"role": …, "content": …}]}`, or the list alone."""

from collections import Counter
from collections.abc import Mapping, Sequence

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

SYSTEM = ("system", "developer")


def records(data: object) -> Sequence[object] | None:
    """The conversations of a file; None where it is another format."""
    given = as_list(data) or [data]
    if any(isinstance(as_mapping(each).get("messages"), list) for each in given):
        return given
    if any({"role", "content"} <= set(as_mapping(each)) for each in given):
        return [{"messages": list(given)}]
    return None


def read(given: Mapping[str, object], report: Report) -> Talk | None:
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
    return Talk(chained(map(_said, messages)), given.get("title") or None, system, created)


def _said(given: Mapping[str, object]) -> Said:
    role, text = given.get("role", ""), _text(given.get("content"))
    if role in (*SYSTEM, "tool", "function") or (role == "assistant" and not text):  # a tool's call
        return Said(None, None, None)
    thinking: object = ""
    if role == "assistant":
        thinking, text = split(text)
        reasoning = given.get("reasoning_content") or given.get("reasoning")
        thinking = thought(as_text(reasoning)) or thinking
    return Said(None, None, role, text, thinking, given.get("created_at") or given.get("timestamp"))


def _text(content: object) -> object:
    """The text of a message, which may be in parts."""
    if isinstance(content, list):
        return paragraphs(as_mapping(part).get("text") for part in content)
    return content if content is not None else ""
