"""What the slash words do where there is no screen: every answer is a line of text.

It knows the session and who works with it; it refuses to know where lines come from and where they go.
"""

import asyncio
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Protocol

from kvchat.chat.attachments import mention, mentions, parse_attachments
from kvchat.chat.conversation import Hit, Message
from kvchat.chat.session import Session
from kvchat.config.settings import find_setting
from kvchat.contract import CacheMode, TurnRequest
from kvchat.errors import KvchatError
from kvchat.text import excerpt, one_line
from kvchat.ui.cache_actions import CacheDesk
from kvchat.ui.clipboard import copied
from kvchat.ui.commands import COMMANDS, Command
from kvchat.ui.conversation_files import SWITCHED, Archive
from kvchat.ui.formatting import miss_words, sentence, tokens
from kvchat.ui.turn_thread import EngineBridge
from kvchat.ui.widgets.markdown import code_blocks

MOST_TOLD = 20
"""Of hits and of events: whoever listens can't skip."""
NO_SEED = "none"
"""How it is told, and written, that every turn draws a new one."""
NO_CLIPBOARD = "There is no clipboard here. /export FILE writes the conversation into a file."
INSTEAD = {
    "settings": "`kvchat config` lists the settings and changes them",
    "panel": "the figures of a turn stand after its answer",
    "stop": "Ctrl-C stops an answer while it is written",
    "thinking": "what the model thinks is written with its answer",
    "map": "`kvchat cache show` lists what is saved of a cache",
    "compare": "/cache off and then /regen answer the last question without a cache, /cache on with it",
    "caches": "`kvchat cache` lists the caches on disk and deletes them; /budget sets their memory",
    "theme": "there are no colours to choose",
}
"""Commands that belong to the screen, by name: what to do without one."""


class Loop(Protocol):
    """What acts ask of the loop that they are done in."""

    def say(self, text: str) -> None:
        """Writes a line."""
        ...

    def confirm(self, question: str, yes: str, act: Callable[[], None]) -> None:
        """Asks, and acts where the answer is yes."""
        ...

    def answer(self, request: TurnRequest) -> None:
        """Runs a turn, and writes its answer."""
        ...

    def settle(self) -> None:
        """Waits for what the engine says about an act."""
        ...

    def model(self, name: str) -> None:
        """Lets another model answer; without a name, tells which there are."""
        ...

    def tell_where(self) -> None:
        """Says which conversation goes on."""
        ...

    def tour(self) -> None:
        """Does every step of the tour."""
        ...

    def leave(self) -> None:
        """Ends after this line."""
        ...


class PlainActs:
    """Acts on the open conversation and on all of them."""

    def __init__(self, session: Session, bridge: EngineBridge, desk: CacheDesk, loop: Loop) -> None:
        self._session = session
        self._bridge = bridge
        self._desk = desk
        self._loop = loop
        self._say = loop.say
        self._archive = Archive(session, loop.say)
        self.editing: int | None = None
        """Id of the question that the next line replaces."""
        self._acts: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "cache": self._mode,
            "new": self._new,
            "private": self._private,
            "conversations": self._open,
            "model": loop.model,
            "regenerate": lambda _: loop.answer(session.regenerate()),
            "continue": lambda _: loop.answer(session.continue_answer()),
            "undo": lambda _: self._say(f"Taken back: {short(session.undo())}"),
            "edit": self._edit,
            "fork": self._fork,
            "copy": self._copy,
            "code": self._code,
            "search": self._search,
            "export": self._archive.export,
            "import": self._import,
            "why": lambda _: self._why(),
            "timeline": lambda _: self._timeline(),
            "tour": lambda _: loop.tour(),
            "policy": self._priced(desk.policy),
            "kv": self._priced(desk.precision),
            "budget": self._priced(desk.budget),
            "system": self._priced(self._system),
            "options": self._options,
            "rename": self._rename,
            "clear": lambda _: self._clear(),
            "delete": lambda _: self._delete(),
            "leave": lambda _: loop.leave(),
        }

    def do(self, command: Command, argument: str) -> None:
        """Does what a command asks for, or says what to do instead.

        Raises:
            KvchatError: it can't be done.
        """
        act = self._acts.get(command.name)
        if act:
            act(argument)
        else:
            self._say(f"/{command.slash} belongs to the screen. Without one, {INSTEAD[command.name]}.")

    def ask(self, text: str) -> TurnRequest:
        """Saves a question, in the place of the one that is edited if there is one.

        Raises:
            KvchatError: another process deleted the conversation.
        """
        editing, self.editing = self.editing, None
        if any(message.id == editing for message in self._session.current.messages):
            return self._session.edit(editing or 0, text)
        return self._session.begin_turn(text)

    def _priced(self, act: Callable[[str], None]) -> Callable[[str], None]:
        """An act whose price the engine is asked for first: waits for the answer."""

        def do(argument: str) -> None:
            act(argument)
            self._loop.settle()

        return do

    def _help(self, _argument: str) -> None:
        for command in COMMANDS:
            words = f"/{command.slash} {command.argument}".strip().replace("|", ", ")
            instead = INSTEAD.get(command.name)
            where = f" Needs the screen; without one, {instead}." if instead else ""
            self._say(f"{words}: {command.help}{where}")

    # --- the open conversation ---------------------------------------------------------------------------

    def _mode(self, mode: str) -> None:
        modes = list(CacheMode)
        if mode and mode not in set(CacheMode):
            self._say(f"The cache modes are on, turn and off; not {one_line(mode)}.")
            return
        following = modes[(modes.index(self._session.current.mode) + 1) % len(modes)]
        self._session.configure(mode=CacheMode(mode) if mode else following)
        self._say(f"The cache is {self._session.current.mode.value} from the next turn on.")

    def _question(self, number: str) -> Message:
        found = self._session.current.question(number)
        if found is None:
            raise KvchatError("Which question? They are counted from 1.")
        return found

    def _edit(self, number: str) -> None:
        question = self._question(number)
        self.editing = question.id
        self._say(f"It was: {short(question.text)}. The next line is asked in its place.")

    def _fork(self, number: str) -> None:
        current = self._session.current
        end = current.answer_to(self._question(number)).id if number else None
        self._session.fork(end)
        self._desk.fork(current.id)
        self._say("This is the fork; the other conversation stays as it is, and they share one cache.")

    def _answer_text(self) -> str:
        answers = [m.text for m in self._session.current.messages if m.role == "assistant"]
        if not answers:
            raise KvchatError("There is no answer to copy yet.")
        return answers[-1]

    def _copy(self, _argument: str) -> None:
        self._say("The last answer is in the clipboard." if copied(self._answer_text()) else NO_CLIPBOARD)

    def _code(self, number: str) -> None:
        blocks = code_blocks(self._answer_text())
        if not blocks:
            raise KvchatError("There is no code block in the last answer; /copy copies all of it.")
        numbered = {str(n): block for n, block in enumerate(blocks, start=1)}
        which = number or "1"
        if which not in numbered:
            raise KvchatError(f"The last answer has {len(blocks)} code blocks; /code 1 copies the first.")
        done = f"Code block {which} of {len(blocks)} is in the clipboard."
        self._say(done if copied(numbered[which]) else NO_CLIPBOARD)

    def _why(self) -> None:
        stats = [m.stats for m in self._session.current.messages if m.stats]
        self._say(str(miss_words(None, stats[-1].reuse_note if stats else "")))

    def _timeline(self) -> None:
        events = self._session.events()
        if not events:
            self._say("Nothing has happened to this cache yet.")
        for event in events[-MOST_TOLD:]:
            note = f": {one_line(event.note)}" if event.note else ""
            self._say(sentence(f"{event.kind} {tokens(event.tokens)}{note}"))

    def _system(self, text: str) -> None:
        if text:
            self._desk.system_prompt(text)
        else:
            self._say(f"System prompt: {one_line(self._session.current.system_prompt) or 'the model’s own'}")

    def _options(self, given: str) -> None:
        """Tells how this conversation answers; `NAME VALUE` changes it, the name of a preset takes that."""
        name, _, value = given.partition(" ")
        field = name.replace("-", "_")
        sampling = self._session.current.sampling
        preset = next((each for each in self._session.presets() if each.name == given), None)
        if preset:
            self._session.configure(sampling=preset.sampling)
            if preset.system_prompt != self._session.current.system_prompt:
                self._priced(self._desk.system_prompt)(preset.system_prompt)
        elif field in asdict(sampling) and value:
            unset = (field, value) == ("seed", NO_SEED)
            changed = None if unset else find_setting(field.replace("_", "-")).parse(value)
            self._session.configure(sampling=replace(sampling, **{field: changed}))  # type: ignore[arg-type]
        elif given:
            raise KvchatError(f"{one_line(given)} is neither a preset nor an option with a value.")
        self._tell_options()

    def _tell_options(self) -> None:
        self._system("")
        for name, value in asdict(self._session.current.sampling).items():
            self._say(f"{name.replace('_', ' ')}: {NO_SEED if value is None else value}")
        presets = ", ".join(one_line(each.name) for each in self._session.presets())
        self._say("/options NAME VALUE changes one of them" + (f"; presets: {presets}." if presets else "."))

    def _rename(self, title: str) -> None:
        if not self._session.current.messages or not title:
            raise KvchatError("/rename TITLE names a conversation that has messages.")
        self._session.rename(self._session.current.id, title)
        self._say(f"It is called {one_line(self._session.current.title)} now.")

    def _clear(self) -> None:
        self._session.clear()
        self._bridge.forget(self._session.current.id)
        self._say("The conversation is empty.")

    def _delete(self) -> None:
        title = one_line(self._session.current.title)

        def delete() -> None:
            conversation = self._session.current.id
            self._session.delete(conversation)
            self._bridge.forget(conversation)
            self._say("Deleted. A new conversation.")

        if self._session.current.messages:
            self._loop.confirm(f"Delete “{title}” for good?", "Delete", delete)

    # --- all conversations -------------------------------------------------------------------------------

    def _new(self, _argument: str) -> None:
        self._session.new()
        self._say("A new conversation.")

    def _private(self, _argument: str) -> None:
        self._session.new_private()
        self._say("A new conversation. Nothing of it is written; it is gone when kvchat ends.")

    def _open(self, given: str) -> None:
        """Lists the conversations, or opens one by the beginning of its id, or where a hit is."""
        conversation, _, message = given.partition("/")
        if message:
            self._open_at(conversation, message)
        elif conversation:
            self._session.open(conversation)
            self._loop.tell_where()
        else:
            for summary in self._session.conversations():
                private = ", private" * summary.private
                self._say(f"{summary.id}: {one_line(summary.title)}, {summary.messages} messages{private}")
            self._say("/sessions ID opens one.")

    def _open_at(self, conversation: str, message: str) -> None:
        """Opens the branch that a message is on, and reads it out."""
        if not (message.isascii() and message.isdigit()):
            raise KvchatError("/search WORDS tells what can be opened.")
        switched = self._session.open_at(conversation, int(message))
        self._loop.tell_where()
        if switched:
            self._say(SWITCHED)
        found = next(m for m in self._session.current.messages if m.id == int(message))
        you = "You, not sent" if found.not_sent else "You"
        self._say(f"{you if found.role == 'user' else 'The answer'}: {found.text}")

    def _search(self, given: str) -> None:
        words = given.split()
        if not words:
            raise KvchatError("/search WORDS finds them in all conversations.")
        hits = self._session.search(words)
        for hit in hits[:MOST_TOLD]:
            self._say(hit_line(hit, words))
        count = f"{len(hits)} hit{'s' * (len(hits) != 1)}"
        told = f"The first {MOST_TOLD} of {count}" if len(hits) > MOST_TOLD else count
        self._say(f"{told}. /sessions and what a hit begins with opens it." if hits else "Nothing has them.")

    def _import(self, name: str) -> None:
        if not name:
            raise KvchatError("/import FILE reads conversations from a file.")
        asyncio.run(self._archive.import_file(name))


def short(text: str) -> str:
    """A message on one line: what was written and, as mentions, the files that nobody wants to hear again."""
    written, attached = parse_attachments(text)
    unmentioned = [each.name for each in attached if each.name not in mentions(written)]
    return one_line(" ".join([written, *map(mention, unmentioned)]))


def hit_line(hit: Hit, words: list[str]) -> str:
    """A hit as it is told; what it begins with opens it."""
    if hit.message is None:
        return f"{hit.conversation}: the title “{one_line(hit.title)}”"
    who = "you" if hit.role == "user" else "the answer"
    branch = ", not sent" * hit.not_sent + ", on another branch" * hit.other_branch
    title = one_line(hit.title)
    return f"{hit.conversation}/{hit.message}: “{title}”{branch}, {who}: {excerpt(hit.text, words)}"
