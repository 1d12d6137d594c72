"""What the views of commands are where there is no screen: every answer is a line of text."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from kvchat.chat.attachments import mention, mentions, parse_attachments
from kvchat.chat.commands import COMMANDS
from kvchat.chat.conversation import Hit
from kvchat.chat.conversation_commands import goes_on, open_conversation, system_words, use_preset
from kvchat.chat.conversation_files import SWITCHED
from kvchat.chat.wording import sentence, tokens
from kvchat.config.settings import find_setting
from kvchat.errors import KvchatError
from kvchat.text import excerpt, one_line
from kvchat.ui.clipboard import copied
from kvchat.ui.formatting import miss_words
from kvchat.ui.widgets.markdown import code_blocks

if TYPE_CHECKING:
    from kvchat.chat.controller import ChatController

MOST_TOLD = 20
"""Of hits and of events: whoever listens can't skip."""
NO_SEED = "none"
"""The value of `seed` that draws a new one for every turn."""
NO_CLIPBOARD = "There is no clipboard here. /export FILE writes the conversation into a file."

View = Callable[["ChatController", str], object]


def show_help(chat: "ChatController", _argument: str) -> None:
    """Every command, one a line."""
    for command in COMMANDS:
        words = f"/{command.slash} {command.argument}".strip().replace("|", ", ")
        where = f" Needs the screen; without one, {command.instead}." if command.instead else ""
        chat.port.say(f"{words}: {command.help}{where}")


def models(chat: "ChatController", _argument: str) -> None:
    """The models, and which of them answers."""
    assert chat.models is not None
    for choice in chat.models.choices():
        state = "answers" if choice.name == chat.state.model_name else "is here" if choice.here else ""
        chat.port.say(f"{one_line(choice.name)}{', ' * bool(state)}{state}")
    chat.port.say("/model NAME lets one answer that is here; `kvchat models pull NAME` fetches one.")


def copy(chat: "ChatController", _argument: str) -> None:
    """The last answer to the clipboard."""
    chat.port.say("The last answer is in the clipboard." if copied(_answer_text(chat)) else NO_CLIPBOARD)


def code(chat: "ChatController", number: str) -> None:
    """A code block of the last answer to the clipboard."""
    blocks = code_blocks(_answer_text(chat))
    if not blocks:
        raise KvchatError("There is no code block in the last answer; /copy copies all of it.")
    numbered = {str(n): block for n, block in enumerate(blocks, start=1)}
    which = number or "1"
    if which not in numbered:
        raise KvchatError(f"The last answer has {len(blocks)} code blocks; /code 1 copies the first.")
    done = f"Code block {which} of {len(blocks)} is in the clipboard."
    chat.port.say(done if copied(numbered[which]) else NO_CLIPBOARD)


def _answer_text(chat: "ChatController") -> str:
    answers = [m.text for m in chat.session.current.messages if m.role == "assistant"]
    if not answers:
        raise KvchatError("There is no answer to copy yet.")
    return answers[-1]


def why(chat: "ChatController", _argument: str) -> None:
    """The last miss."""
    chat.port.say(str(miss_words(chat.state.last_miss, chat.state.turn.reuse_note)))


def timeline(chat: "ChatController", _argument: str) -> None:
    """What happened to the cache of this conversation last."""
    events = chat.session.events()
    if not events:
        chat.port.say("Nothing has happened to this cache yet.")
    for event in events[-MOST_TOLD:]:
        note = f": {one_line(event.note)}" if event.note else ""
        chat.port.say(sentence(f"{event.kind} {tokens(event.tokens)}{note}"))


def options(chat: "ChatController", given: str) -> None:
    """How this conversation answers; `NAME VALUE` changes it, the name of a preset takes that."""
    name, _, value = given.partition(" ")
    field = name.replace("-", "_")
    sampling = chat.session.current.sampling
    preset = next((each for each in chat.session.presets() if each.name == given), None)
    if preset:
        use_preset(chat, preset)
    elif field in asdict(sampling) and value:
        unset = (field, value) == ("seed", NO_SEED)
        changed = None if unset else find_setting(field.replace("_", "-")).parse(value)
        chat.session.configure(sampling=replace(sampling, **{field: changed}))  # type: ignore[arg-type]
    elif given:
        raise KvchatError(f"{one_line(given)} is neither a preset nor an option with a value.")
    _tell_options(chat)


def _tell_options(chat: "ChatController") -> None:
    chat.port.say(system_words(chat))
    for name, value in asdict(chat.session.current.sampling).items():
        chat.port.say(f"{name.replace('_', ' ')}: {NO_SEED if value is None else value}")
    presets = ", ".join(one_line(each.name) for each in chat.session.presets())
    chat.port.say("/options NAME VALUE changes one of them" + (f"; presets: {presets}." if presets else "."))


async def conversations(chat: "ChatController", given: str) -> None:
    """Lists the conversations, or opens one by the beginning of its id, or where a hit is."""
    conversation, _, message = given.partition("/")
    if message:
        await _open_at(chat, conversation, message)
    elif conversation:
        await open_conversation(chat, conversation)
    else:
        for summary in chat.session.conversations():
            private = ", private" * summary.private
            chat.port.say(f"{summary.id}: {one_line(summary.title)}, {summary.messages} messages{private}")
        chat.port.say("/sessions ID opens one.")


async def _open_at(chat: "ChatController", conversation: str, message: str) -> None:
    """Opens the branch that a message is on, and reads it out."""
    if not (message.isascii() and message.isdigit()):
        raise KvchatError("/search WORDS tells what can be opened.")
    switched = chat.session.open_at(conversation, int(message))
    await chat.opened(goes_on(chat))
    if switched:
        chat.port.say(SWITCHED)
    found = next(m for m in chat.session.current.messages if m.id == int(message))
    you = "You, not sent" if found.not_sent else "You"
    chat.port.say(f"{you if found.role == 'user' else 'The answer'}: {found.text}")


def search(chat: "ChatController", given: str) -> None:
    """Where words stand in all conversations."""
    words = given.split()
    if not words:
        raise KvchatError("/search WORDS finds them in all conversations.")
    hits = chat.session.search(words)
    for hit in hits[:MOST_TOLD]:
        chat.port.say(hit_line(hit, words))
    count = f"{len(hits)} hit{'s' * (len(hits) != 1)}"
    told = f"The first {MOST_TOLD} of {count}" if len(hits) > MOST_TOLD else count
    opens = f"{told}. /sessions and what a hit begins with opens it."
    chat.port.say(opens if hits else "Nothing has them.")


VIEWS: dict[str, View] = {
    "help": show_help,
    "model": models,
    "copy": copy,
    "code": code,
    "why": why,
    "timeline": timeline,
    "options": options,
    "conversations": conversations,
    "search": search,
}
"""Views that are text; `tour` and `leave` belong to the loop, and everything else to the screen."""


def short(text: str) -> str:
    """A message on one line: what was written and, as mentions, the files that nobody wants to hear again."""
    written, attached = parse_attachments(text)
    unmentioned = [each.name for each in attached if each.name not in mentions(written)]
    return one_line(" ".join([written, *map(mention, unmentioned)]))


def hit_line(hit: Hit, words: list[str]) -> str:
    """A search hit as one line; it begins with the words that open it."""
    if hit.message is None:
        return f"{hit.conversation}: the title “{one_line(hit.title)}”"
    who = "you" if hit.role == "user" else "the answer"
    branch = ", not sent" * hit.not_sent + ", on another branch" * hit.other_branch
    title = one_line(hit.title)
    return f"{hit.conversation}/{hit.message}: “{title}”{branch}, {who}: {excerpt(hit.text, words)}"
