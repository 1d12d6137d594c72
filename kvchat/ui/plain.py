"""The chat line by line, for screen readers and dumb terminals: nothing is redrawn, and there are no colours.

What is typed is a line, what is answered is text, and the figures of a turn are one sentence. It takes the
same session, engine, prices and slash words as the screen.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import TextIO

from textual.message import Message

from kvchat.contract import (
    CacheMode,
    Died,
    Evicted,
    FinishReason,
    Loading,
    PoolState,
    Ready,
    Status,
    Tokens,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnRequest,
    TurnStats,
    WarmCache,
)
from kvchat.errors import KvchatError
from kvchat.session import Session
from kvchat.text import clean, megabytes, one_line
from kvchat.ui.bridge import EngineBridge, EngineFactory
from kvchat.ui.commands import COMMANDS, Command, parse_slash
from kvchat.ui.desk import CacheDesk
from kvchat.ui.messages import EngineStatus, TurnProgress
from kvchat.ui.widgets.message import ENDINGS
from kvchat.ui.words import miss_words, sentence, tokens

PROMPT = "you: "
SETTLE_S = 0.3
"""A price comes at once or with the next line."""


def talk(session: Session, factory: EngineFactory, model: str) -> int:
    """Chats until the input ends or the user leaves; returns the exit code."""
    return PlainChat(session, factory, model, sys.stdin, sys.stdout).run()


def turn_sentence(stats: TurnStats) -> str:
    """The figures of a turn, as one sentence that can be listened to."""
    words = (
        f"Reused {tokens(stats.reused_tokens)}, read {stats.prefilled_tokens:,}, "
        f"wrote {stats.generated_tokens:,}; the first word came after {stats.ttft_s:.1f} seconds, "
        f"then {stats.decode_tok_s:.0f} tokens a second; "
        f"the cache is {stats.cache_mode} and holds {megabytes(stats.kv_used_bytes)}"
    )
    ending = ENDINGS.get(FinishReason(stats.finish_reason), "")
    notes = [stats.reuse_note] * bool(stats.reuse_note) + [f"the answer was {ending}"] * bool(ending)
    return " ".join(map(sentence, [words, *notes]))


class PlainChat:
    """The loop: a line in, an answer out."""

    def __init__(
        self, session: Session, factory: EngineFactory, model: str, lines: TextIO, out: TextIO
    ) -> None:
        self._session = session
        self._model = model
        self._lines = lines
        self._out = out
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._bridge = EngineBridge(factory, self)
        self._warm: dict[str, WarmCache] = {}
        self._desk = CacheDesk(session, self._bridge, lambda: self._warm, self._say, self._confirm)
        self._ready = False
        self._given_up = False
        self._left = False
        self._editing: int | None = None
        """Id of the question that the next line replaces."""

    def post_message(self, message: Message) -> None:
        """Takes what the engine tells; called from its threads."""
        self._inbox.put(message)

    def run(self) -> int:
        """Chats; returns the exit code."""
        self._bridge.start()
        self._say(
            f"kvchat with {one_line(self._model)}, line by line. /help lists the commands, /exit leaves."
        )
        try:
            if not self._until_ready():
                return 1
            self._tell_where()
            while not self._left and (line := self._next_line()) is not None:
                self._take(line)
            return 0
        finally:
            with suppress(KvchatError):
                self._session.abandon_turn()
            self._bridge.close()

    def _next_line(self) -> str | None:
        """What is typed next; None where the input ends."""
        self._out.write(PROMPT)
        self._out.flush()
        try:
            line = self._lines.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:
            self._say("")
        return line.rstrip("\r\n") if line else None

    def _take(self, line: str) -> None:
        """Does what a line asks for."""
        self._hear()
        try:
            if line.startswith("/") and (parsed := parse_slash(line)):
                self._command(*parsed)
            elif line.startswith("/"):
                self._say(f"There is no command {one_line(line.split()[0])}. /help lists them.")
            elif line.strip():
                self._ask(line)
        except KvchatError as error:
            self._say(str(error))

    def _ask(self, text: str) -> None:
        editing, self._editing = self._editing, None
        request = self._session.begin_turn(text) if editing is None else self._session.edit(editing, text)
        self._answer(request)

    def _answer(self, request: TurnRequest) -> None:
        """Writes the answer as it comes; Ctrl-C stops it and keeps what there is."""
        self._out.write(f"{one_line(self._model)}: ")
        self._out.flush()
        self._bridge.run_turn(request)
        while self._session.pending:
            try:
                self._on_message(self._inbox.get())
            except KeyboardInterrupt:
                self._bridge.stop(request.turn)

    def _on_message(self, message: Message) -> None:
        if isinstance(message, TurnProgress):
            self._on_event(message.event)
        elif isinstance(message, EngineStatus):
            self._on_status(message.status)

    def _on_event(self, event: TurnEvent) -> None:
        match event:
            case Tokens():
                self._out.write(clean(event.text))
                self._out.flush()
                self._session.keep_partial(event)
            case Evicted():
                self._say(f"\nThe context was full: {one_line(event.note)}.")
            case TurnFinished():
                self._note_pool(event.pool)
                self._session.finish_turn(event)
                self._say(f"\n{turn_sentence(event.stats)}")
            case TurnFailed():
                self._session.fail_turn(event.turn)
                self._say(f"\n{one_line(event.reason)}")

    def _on_status(self, status: Status) -> None:
        match status:
            case Loading():
                self._say(f"{one_line(status.stage).capitalize()}.")
            case Ready():
                self._ready = True
            case PoolState():
                self._note_pool(status)
                self._session.note_events(status.events)
            case Died():
                self._ready, self._given_up = False, status.for_good
                self._warm.clear()
                self._say("\n".join((one_line(status.reason), *map(one_line, status.log_tail))))
        self._desk.on_status(status)

    def _note_pool(self, pool: PoolState) -> None:
        self._warm = {cache.conversation: cache for cache in pool.caches}

    def _until_ready(self) -> bool:
        while not self._ready and not self._given_up:
            try:
                self._on_message(self._inbox.get())
            except KeyboardInterrupt:
                return False
        return self._ready

    def _hear(self) -> None:
        """Takes what the engine told meanwhile."""
        while not self._inbox.empty():
            self._on_message(self._inbox.get())

    def _tell_where(self) -> None:
        current = self._session.current
        if current.messages:
            self._say(f"“{one_line(current.title)}”, {len(current.messages)} messages, goes on.")

    def _command(self, command: Command, argument: str) -> None:
        acts: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "cache": self._mode,
            "new": self._new,
            "conversations": self._open,
            "regenerate": lambda _: self._answer(self._session.regenerate()),
            "continue": lambda _: self._answer(self._session.continue_answer()),
            "undo": lambda _: self._say(f"Taken back: {one_line(self._session.undo())}"),
            "edit": self._edit,
            "fork": self._fork,
            "why": lambda _: self._why(),
            "policy": self._priced(self._desk.policy),
            "kv": self._priced(self._desk.precision),
            "budget": self._priced(self._desk.budget),
            "system": self._priced(self._system),
            "rename": self._rename,
            "clear": lambda _: self._clear(),
            "delete": lambda _: self._delete(),
            "leave": lambda _: self._leave(),
        }
        act = acts.get(command.name)
        if act is None:
            self._say(f"/{command.slash} belongs to the screen; there is none in plain mode.")
        else:
            act(argument)

    def _priced(self, act: Callable[[str], None]) -> Callable[[str], None]:
        """An act whose price the engine is asked for first: waits for the answer."""

        def do(argument: str) -> None:
            act(argument)
            with suppress(Exception):
                while True:
                    self._on_message(self._inbox.get(timeout=SETTLE_S))

        return do

    def _help(self, _argument: str) -> None:
        for command in COMMANDS:
            words = f"/{command.slash} {command.argument}".strip().replace("|", ", ")
            self._say(f"{words}: {command.help}")

    def _mode(self, mode: str) -> None:
        modes = list(CacheMode)
        if mode and mode not in set(CacheMode):
            self._say(f"The cache modes are on, turn and off; not {one_line(mode)}.")
            return
        following = modes[(modes.index(self._session.current.mode) + 1) % len(modes)]
        self._session.configure(mode=CacheMode(mode) if mode else following)
        self._say(f"The cache is {self._session.current.mode.value} from the next turn on.")

    def _new(self, _argument: str) -> None:
        self._session.new()
        self._say("A new conversation.")

    def _open(self, conversation: str) -> None:
        """Lists the conversations, or opens one by the beginning of its id."""
        if conversation:
            self._session.open(conversation)
            self._tell_where()
            return
        for summary in self._session.conversations():
            self._say(f"{summary.id}: {one_line(summary.title)}, {summary.messages} messages")
        self._say("/sessions ID opens one.")

    def _edit(self, number: str) -> None:
        questions = [m for m in self._session.current.messages if m.role == "user"]
        numbered = {str(n): question for n, question in enumerate(questions, start=1)}
        found = numbered.get(number or str(len(numbered)))
        if found is None:
            raise KvchatError("Which question? They are counted from 1.")
        self._editing = found.id
        self._say(f"It was: {one_line(found.text)}. The next line is asked in its place.")

    def _fork(self, _argument: str) -> None:
        parent = self._session.current.id
        self._session.fork()
        self._desk.fork(parent)
        self._say("This is the fork; the other conversation stays as it is, and they share one cache.")

    def _why(self) -> None:
        stats = [m.stats for m in self._session.current.messages if m.stats]
        self._say(str(miss_words(None, stats[-1].reuse_note if stats else "")))

    def _system(self, text: str) -> None:
        if text:
            self._desk.system_prompt(text)
        else:
            self._say(f"System prompt: {one_line(self._session.current.system_prompt) or 'the model’s own'}")

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
            self._confirm(f"Delete “{title}” for good?", "Delete", delete)

    def _leave(self) -> None:
        self._left = True

    def _confirm(self, question: str, yes: str, act: Callable[[], None]) -> None:
        self._out.write(f"{clean(question)} Type yes to do it: ")
        self._out.flush()
        if self._lines.readline().strip().lower() in ("y", "yes"):
            act()
        else:
            self._say("Nothing was changed.")

    def _say(self, text: str) -> None:
        self._out.write(f"{clean(text)}\n")
        self._out.flush()
