"""Commands about whole conversations: open, name, fork, export, import, delete, set up."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from kvchat.chat.conversation import Preset
from kvchat.contract import Fork
from kvchat.text import one_line

if TYPE_CHECKING:
    from kvchat.chat.controller import ChatController

PRIVATE = "A new conversation. Nothing of it is written; it is gone when kvchat ends."
FORKED = "This is the fork; the other conversation stays as it is, and they share one cache."
NO_IMPORT = "/import FILE reads conversations from a file."
NO_RENAME = "/rename TITLE names a conversation that has messages."


async def new(chat: "ChatController", _argument: str) -> None:
    """Opens an empty conversation."""
    chat.port.save_draft()
    chat.session.new()
    await chat.opened("A new conversation.")
    chat.port.focus_prompt()


async def private(chat: "ChatController", _argument: str) -> None:
    """Opens an empty conversation of which nothing is written."""
    chat.port.save_draft()
    chat.session.new_private()
    await chat.opened()
    chat.port.focus_prompt()
    chat.port.say(PRIVATE)


async def open_conversation(chat: "ChatController", conversation: str) -> None:
    """Opens a saved conversation by its id, or by the beginning of that."""
    chat.port.save_draft()
    chat.session.open(conversation)
    await chat.opened(goes_on(chat))
    chat.port.focus_prompt()


def goes_on(chat: "ChatController") -> str:
    """That the open conversation goes on."""
    current = chat.session.current
    return f"“{one_line(current.title)}”, {len(current.messages)} messages, goes on."


async def fork(chat: "ChatController", number: str) -> None:
    """Goes on in a new conversation that shares the cache so far."""
    parent = chat.session.current
    end = parent.answer_to(chat.question(number)).id if number else None
    chat.port.save_draft()
    child = chat.session.fork(end)
    chat.engine.command(Fork(parent.id, child.id))
    await chat.opened()
    chat.port.say(FORKED)


def export(chat: "ChatController", where: str) -> None:
    """Writes the open conversation into a file."""
    chat.archive.export(where)


async def import_file(chat: "ChatController", name: str) -> None:
    """Reads conversations from a file, or asks which one."""
    if name:
        await chat.archive.import_file(name)
    else:
        chat.port.ask_line("File to import", "", partial(_import_if_given, chat), NO_IMPORT)


async def _import_if_given(chat: "ChatController", name: str) -> None:
    if name:
        await chat.archive.import_file(name)


def system(chat: "ChatController", text: str) -> None:
    """Sets the system prompt, or asks for it."""
    if text:
        set_system(chat, text)
    else:
        now = chat.session.current.system_prompt
        question = "System prompt of this conversation (empty: the model's own)"
        chat.port.ask_line(question, now, partial(set_system, chat), system_words(chat))


def system_words(chat: "ChatController") -> str:
    """Which system prompt the open conversation has."""
    return f"System prompt: {one_line(chat.session.current.system_prompt) or 'the model’s own'}"


def set_system(chat: "ChatController", text: str) -> None:
    """Sets the system prompt, once its cost is known."""
    messages = replace(chat.session.current, system_prompt=text).prompt()
    request = chat.costs.next_turn(messages=messages)
    chat.costs.change("New system prompt", request, partial(chat.session.configure, system_prompt=text))


def use_preset(chat: "ChatController", preset: Preset) -> None:
    """Lets the open conversation answer as a preset says."""
    chat.session.configure(sampling=preset.sampling)
    if preset.system_prompt != chat.session.current.system_prompt:
        set_system(chat, preset.system_prompt)


def rename(chat: "ChatController", title: str) -> None:
    """Renames the open conversation, or asks for the title."""
    current = chat.session.current
    if not current.messages:
        chat.port.say(f"This conversation has no messages yet; its first one gives it a title. {NO_RENAME}")
    elif title:
        set_title(chat, current.id, title)
    else:
        chat.port.ask_line("Title", current.title, partial(set_title, chat, current.id), NO_RENAME)


def set_title(chat: "ChatController", conversation: str, title: str) -> None:
    """Renames a conversation; an empty title changes nothing."""
    chat.session.rename(conversation, title)
    if title:
        chat.port.tell(f"It is called {one_line(title)} now.")


async def clear(chat: "ChatController", _argument: str) -> None:
    """Empties the open conversation."""
    chat.stop_in(chat.session.current.id)
    chat.session.clear()
    chat.forget(chat.session.current.id)
    await chat.opened("The conversation is empty.")


def delete(chat: "ChatController", _argument: str) -> None:
    """Asks, then deletes the open conversation."""
    if chat.session.current.messages:
        ask_delete(chat, chat.session.current.id)


def ask_delete(chat: "ChatController", conversation: str) -> None:
    """Asks, then deletes a conversation."""
    act = partial(delete_now, chat, conversation)
    chat.port.confirm(f"Delete “{one_line(chat.title_of(conversation))}” for good?", "Delete", act)


async def delete_now(chat: "ChatController", conversation: str) -> None:
    """Deletes a conversation and its cache for good."""
    was_open = conversation == chat.session.current.id
    chat.stop_in(conversation)
    chat.session.delete(conversation)
    chat.forget(conversation)
    chat.port.messages_deleted()
    if was_open:
        await chat.opened("Deleted. A new conversation.")
