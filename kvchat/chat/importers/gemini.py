"""Gemini: `MyActivity.json` of Google Takeout, chats of AI Studio, and `contents` of the API."""

from collections.abc import Mapping, Sequence

from kvchat.chat.importers.page import markdown_of
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

PRODUCTS = ("Gemini", "Bard")
PROMPTED = "Prompted "
"""Prefix of the user's text in the title of an entry."""
ROLES = {"user": "user", "model": "assistant"}


def records(data: object) -> Sequence[object] | None:
    """The conversations of a file; None where it is another format."""
    given = as_list(data) or [data]
    found = any(_is_activity(each) or _chunks(each) is not None for each in map(as_mapping, given))
    return given if found else None


def read(given: Mapping[str, object], report: Report) -> ParsedConversation | None:
    """An entry of the activity (one question and its answer), or a whole chat."""
    if _is_activity(given):
        return _activity(given, report)
    chunks = _chunks(given)
    if chunks is None:
        report.skip("is no chat")
        return None
    system = as_mapping(given.get("systemInstruction") or given.get("system_instruction"))
    messages = chained(_chunk(as_mapping(each)) for each in chunks)
    return ParsedConversation(
        messages, given.get("title") or None, _parts(system)[1], given.get("createTime")
    )


def _is_activity(given: Mapping[str, object]) -> bool:
    header = as_text(given.get("header"))
    return "time" in given and (header.startswith(PRODUCTS) or "safeHtmlItem" in given)


def _activity(given: Mapping[str, object], report: Report) -> ParsedConversation | None:
    title = as_text(given.get("title"))
    report.name(title)
    items = given.get("safeHtmlItem")
    pages = [as_mapping(each) for each in (as_list(items) or [items])]
    answer = paragraphs(markdown_of(as_text(page.get("html") or page.get("htmlValue"))) for page in pages)
    if not title or not (answer or title.startswith(PROMPTED)):
        report.skip("is no question")
        return None
    messages = [ParsedMessage(1, None, "user", title.removeprefix(PROMPTED), "", given.get("time"))]
    if answer:
        messages.append(ParsedMessage(2, 1, "assistant", answer, "", given.get("time")))
    return ParsedConversation(messages, None, "", given.get("time"))


def _chunks(given: Mapping[str, object]) -> Sequence[object] | None:
    prompt = as_mapping(given.get("chunkedPrompt"))
    found = prompt.get("chunks") if prompt else given.get("contents")
    return found if isinstance(found, list) else None


def _chunk(given: Mapping[str, object]) -> ParsedMessage:
    thinking, text = _parts(given)
    role = given.get("role", "user")
    shown = ROLES.get(as_text(role), role) if text or thinking else None
    return ParsedMessage(None, None, shown, text, thought(thinking), given.get("createTime"))


def _parts(given: Mapping[str, object]) -> tuple[str, str]:
    """(thinking, text) of a chunk, from its `parts` if there are any, else from its own text."""
    parts = [as_mapping(each) for each in as_list(given.get("parts"))] or [given]
    thoughts = [part for part in parts if part.get("thought") or given.get("isThought")]
    thinking = paragraphs(part.get("text") for part in thoughts)
    return thinking, paragraphs(part.get("text") for part in parts if part not in thoughts)
