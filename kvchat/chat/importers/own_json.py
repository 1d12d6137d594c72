"""kvchat's own JSON, with all branches, statistics and token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import fields

from kvchat.chat.conversation import Message
from kvchat.chat.exporters import VERSION
from kvchat.chat.importers.parsed import ParsedConversation, ParsedMessage, as_list, as_mapping
from kvchat.chat.importers.report import Report
from kvchat.errors import KvchatError

SETTINGS = ("mode", "sampling", "model", "kv", "policy", "evicted_messages")
OLD_NAMES = {"evicted_messages": "left_out"}
"""Setting → its name in older exports."""
READ_APART = {"id", "parent_id", "role", "text", "thinking", "created_at"}
MESSAGE_FIELDS = tuple(each.name for each in fields(Message) if each.name not in READ_APART)


def records(data: object) -> Sequence[object] | None:
    """The conversations of a file; None where it is another format.

    Raises:
        KvchatError: a newer kvchat wrote it.
    """
    document = as_mapping(data)
    if "kvchat" not in document:
        return None
    if document["kvchat"] != VERSION:
        raise KvchatError("This file was written by a newer version of kvchat; update kvchat to import it.")
    return as_list(document.get("conversations"))


def read(given: Mapping[str, object], _report: Report) -> ParsedConversation:
    """One conversation. The shown messages form one branch, whatever their parent ids are."""
    shown = [as_mapping(each) for each in as_list(given.get("messages"))]
    others = [as_mapping(each) for each in as_list(given.get("other_branches"))]
    keys = [_key(each, n) for n, each in enumerate(shown)]
    path = [_message(m, key, above) for m, key, above in zip(shown, keys, [None, *keys], strict=False)]
    rest = [_message(m, _key(m, -1 - n), m.get("parent_id")) for n, m in enumerate(others)]
    return ParsedConversation(
        sorted((*path, *rest), key=_age) if rest else path,
        given.get("title"),
        given.get("system_prompt", ""),
        given.get("created_at"),
        keys[-1] if keys else None,
        shown=bool(keys),
        joins=False,
        more=settings_of(given),
    )


def settings_of(given: Mapping[str, object]) -> dict[str, object]:
    """The settings in `given`, by their current names."""
    found = {name: given.get(name, given.get(OLD_NAMES.get(name, ""))) for name in SETTINGS}
    return {name: value for name, value in found.items() if name in given or OLD_NAMES.get(name) in given}


def _key(message: Mapping[str, object], otherwise: int) -> object:
    """The message's id in the file, or a unique key without one."""
    number = message.get("id")
    return number if isinstance(number, int | str) else f"#{otherwise}"


def _age(message: ParsedMessage) -> float:
    """Sort key: messages of several branches in the order of their ids."""
    return message.key if isinstance(message.key, int) else float("inf")


def _message(given: Mapping[str, object], key: object, parent: object) -> ParsedMessage:
    more = {name: given[name] for name in MESSAGE_FIELDS if name in given}
    role = given.get("role", "")
    return ParsedMessage(
        key, parent, role, given.get("text"), given.get("thinking", ""), given.get("created_at"), more
    )
