"""The chat line by line, for screen readers and dumb terminals: nothing is redrawn, and there are no colours.

What is typed is a line, what is answered is text, and the figures of a turn are one sentence. It takes the
same session, engine, prices and slash words as the screen.
"""

import errno
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TextIO

from textual.message import Message

from kvchat.chat.attachments import mentions
from kvchat.chat.session import Session
from kvchat.contract import (
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
    TurnStarted,
    TurnStats,
)
from kvchat.errors import KvchatError
from kvchat.system.interrupts import Ended, exit_code, on_signals
from kvchat.text import clean, megabytes, one_line
from kvchat.ui.cache_actions import CacheDesk
from kvchat.ui.commands import parse_slash
from kvchat.ui.formatting import sentence, tokens
from kvchat.ui.messages import EngineStatus, TurnProgress
from kvchat.ui.model_switch import ModelDesk, ModelShelf
from kvchat.ui.plain.commands import PlainActs, short
from kvchat.ui.plain.tour import PlainTour, PlainTurns
from kvchat.ui.prompt_cost import Reckoner, Reckoning
from kvchat.ui.turn_thread import EngineBridge, EngineFactory
from kvchat.ui.widgets.message import ENDINGS

PROMPT = "you: "
SEND_AGAIN = "/regen sends it again; later answers don't see it."
ASK_AGAIN = "The old question stays. The next line is asked in its place."
HANGUP = 1
"""SIGHUP by number: Windows has none."""
SETTLE_S = 0.3
"""A price comes at once or with the next line."""
COUNT_S = 20.0
"""Longest wait for the tokens of files: counting a megabyte takes a second or two."""


def talk(
    session: Session, factory: EngineFactory, model: str, shelf: ModelShelf, begin_with: str = ""
) -> int:
    """Chats until the input ends, the user leaves or a signal comes; returns the exit code.

    With `begin_with`, does that command (`tour`) instead of reading lines.
    """
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # one wrong byte of a paste must not end the chat
    chat = PlainChat(session, factory, model, sys.stdin, sys.stdout, shelf)
    return chat.run_tour() if begin_with == "tour" else chat.run()


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


class Signalled(Message):
    """A signal came."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class PlainChat:
    """The loop: a line in, an answer out."""

    def __init__(
        self,
        session: Session,
        factory: EngineFactory,
        model: str,
        lines: TextIO,
        out: TextIO,
        shelf: ModelShelf | None = None,
    ) -> None:
        """Without a `shelf` there is one model, and no other to choose."""
        self._session = session
        self._name = model
        """What the model that answers is called."""
        self._lines = lines
        self._out = out
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._bridge = EngineBridge(factory, self)
        self._turns = PlainTurns(session, self.answer)
        self._desk = CacheDesk(session, self._bridge, lambda: self._turns.warm, self.say, self.confirm)
        self._acts = PlainActs(session, self._bridge, self._desk, self)
        self._models = ModelDesk(session, self._bridge, shelf, self.say, lambda: None) if shelf else None
        self._reckoner = Reckoner(session, self._bridge, self._reckoned, Path.cwd())
        self._reckoning = Reckoning()
        self._ready = False
        self._given_up = False
        self._left = False
        self._reading = False
        """Whether a line is waited for."""
        self._signals: list[int] = []
        """Those that came."""

    def post_message(self, message: Message) -> None:
        """Takes what the engine tells; called from its threads."""
        self._inbox.put(message)

    def run(self) -> int:
        """Chats; returns the exit code."""
        self.say(f"kvchat with {one_line(self._name)}, line by line. /help lists the commands, /exit leaves.")
        return self._with_engine(self._chat)

    def run_tour(self) -> int:
        """Does the tour and ends; returns the exit code.

        Raises:
            KvchatError: a question was not answered.
        """
        self.say(f"The tour of kvchat with {one_line(self._name)}, line by line.")
        return self._with_engine(self.tour)

    def _chat(self) -> None:
        self.tell_where()
        while not self._left and (line := self._next_line()) is not None:
            self._take(line)

    def _with_engine(self, act: Callable[[], None]) -> int:
        """Acts once the engine is ready, and ends it; returns the exit code."""
        with on_signals(self._signalled):
            self._bridge.start()
            try:
                if not self._until_ready():
                    return 1
                act()
                return 0
            except Ended as ended:
                return exit_code(ended.number)
            except OSError as error:
                if error.errno != errno.EIO and HANGUP not in self._signals:
                    raise
                return exit_code(HANGUP)  # the terminal is gone, and takes no words
            finally:
                self._reading = False  # nothing interrupts what is saved now
                with suppress(KvchatError):
                    self._session.abandon_turn()
                self._bridge.close()

    def _signalled(self, number: int) -> None:
        """Ends the wait for a line at once; everything else looks into the inbox soon, and may save first."""
        self._signals.append(number)
        if self._reading:
            raise Ended(number)
        self._inbox.put(Signalled(number))

    def _read_line(self) -> str:
        """What is typed next, with its line end; empty where the input ends."""
        self._reading = True
        try:
            return self._lines.readline()
        except Ended as ended:
            if ended.number != signal.SIGINT:
                raise
            return ""
        finally:
            self._reading = False

    def _next_line(self) -> str | None:
        """What is typed next; None where the input ends."""
        self._out.write(PROMPT)
        self._out.flush()
        line = self._read_line()
        if not line:
            self.say("")
        return line.rstrip("\r\n") if line else None

    def _take(self, line: str) -> None:
        """Does what a line asks for."""
        self._hear()
        try:
            if line.startswith("/") and (parsed := parse_slash(line)):
                self._acts.do(*parsed)
            elif line.startswith("/"):
                self.say(f"There is no command {one_line(line.split()[0])}. /help lists them.")
            elif line.strip():
                self.answer(self._acts.ask(self._with_files(line)))
        except KvchatError as error:
            self.say(str(error))

    def _with_files(self, line: str) -> str:
        """The message with every file that it mentions; what each of them counts is told.

        Raises:
            KvchatError: a file is no text, or larger than the context.
        """
        if not mentions(line):
            return line
        self._reckoner.typed(line, self._acts.editing)
        end = time.monotonic() + COUNT_S
        with suppress(Empty):
            while self._ready and self._counting():
                self._on_message(self._inbox.get(timeout=max(0, end - time.monotonic())))
        message = self._reckoner.composed(line)
        for name, count in self._reckoning.files:
            self.say(sentence(f"attached {name}" + (f", {tokens(count)}" if count is not None else "")))
        return message

    def _counting(self) -> bool:
        """Whether the tokens of a file that can be attached are still unknown."""
        return any(count is None for _, count in self._reckoning.files)

    def _reckoned(self, reckoning: Reckoning) -> None:
        self._reckoning = reckoning

    def answer(self, request: TurnRequest) -> None:
        """Writes the answer as it comes; Ctrl-C stops it and keeps what there is."""
        self._out.write(f"{one_line(self._name)}: ")
        self._out.flush()
        self._bridge.run_turn(request)
        while self._session.pending:
            try:
                self._on_message(self._inbox.get())
            except KvchatError as error:  # it can't be saved, and can still be read
                self.say(f"\n{error}")

    def _on_message(self, message: Message) -> None:
        if isinstance(message, Signalled):
            self._on_signal(message.number)
        elif isinstance(message, TurnProgress):
            self._on_event(message.event)
        elif isinstance(message, EngineStatus):
            self._on_status(message.status)

    def _on_signal(self, number: int) -> None:
        """Ctrl-C stops an answer and keeps what there is of it; everything else ends the chat."""
        if number == signal.SIGINT and self._session.pending:
            self._bridge.stop(self._session.pending.turn)
        else:
            raise Ended(number)

    def _on_event(self, event: TurnEvent) -> None:
        match event:
            case TurnStarted():
                self._session.note_started(event)
            case Tokens():
                self._out.write(clean(event.text))
                self._out.flush()
                self._session.keep_partial(event)
            case Evicted():
                self.say(f"\nThe context was full: {one_line(event.note)}.")
            case TurnFinished():
                self._turns.on_finished(event)
                self._session.finish_turn(event)
                self.say(f"\n{turn_sentence(event.stats)}")
            case TurnFailed():
                not_sent = self._session.fail_turn(event.turn)
                self.say(f"\n{one_line(event.reason)}")
                if not_sent:
                    self._acts.editing = not_sent.edited
                    how = ASK_AGAIN if not_sent.edited else SEND_AGAIN
                    self.say(f"Not sent: {short(not_sent.text)}\n{how}")

    def _on_status(self, status: Status) -> None:
        if self._reckoner.on_status(status):
            return
        self._turns.on_status(status)
        match status:
            case Loading():
                self.say(f"{one_line(status.stage).capitalize()}.")
            case Ready():
                self._ready = True
            case PoolState():
                self._session.note_events(status.events)
            case Died():
                self._ready, self._given_up = False, status.for_good
                self.say("\n".join((one_line(status.reason), *map(one_line, status.log_tail))))
        self._desk.on_status(status)

    def _until_ready(self) -> bool:
        while not self._ready and not self._given_up:
            self._on_message(self._inbox.get())
        return self._ready

    def _hear(self) -> None:
        """Takes what the engine told meanwhile."""
        while not self._inbox.empty():
            self._on_message(self._inbox.get())

    def tell_where(self) -> None:
        """Says which conversation goes on, whether another model held it, and what going on costs."""
        current = self._session.current
        if current.messages:
            self.say(f"“{one_line(current.title)}”, {len(current.messages)} messages, goes on.")
            if self._models:
                self._models.opened()
            self._desk.opened()
            self.settle()

    def settle(self) -> None:
        """Waits for what the engine says about an act; what comes later is told with the next line."""
        with suppress(Empty):
            while True:
                self._on_message(self._inbox.get(timeout=SETTLE_S))

    def model(self, name: str) -> None:
        """Lets another model answer, and waits until it can; without a name, tells which there are.

        Raises:
            KvchatError: it is not here, or answers already.
        """
        if self._models is None:
            self.say("No other model can be had here.")
        elif name:
            self._name = self._models.switch(name)
            self._ready = self._given_up = False
            self._turns.lost("")
            if self._until_ready():
                self.say(f"{one_line(self._name)} answers from now on.")
        else:
            for choice in self._models.choices():
                state = "answers" if choice.name == self._models.loaded else "is here" if choice.here else ""
                self.say(f"{one_line(choice.name)}{', ' * bool(state)}{state}")
            self.say("/model NAME lets one answer that is here; `kvchat models pull NAME` fetches one.")

    def tour(self) -> None:
        """Does every step of the tour.

        Raises:
            KvchatError: a question was not answered.
        """
        PlainTour(self._session, self._bridge, self._turns, self._desk, self.say, self._hear).run()

    def leave(self) -> None:
        """Ends after this line."""
        self._left = True

    def confirm(self, question: str, yes: str, act: Callable[[], None]) -> None:
        """Asks, and acts where the answer is yes."""
        self._out.write(f"{clean(question)} Type yes to do it: ")
        self._out.flush()
        if self._read_line().strip().lower() in ("y", "yes"):
            act()
        else:
            self.say("Nothing was changed.")

    def say(self, text: str) -> None:
        """Writes a line, and nothing in it but text."""
        self._out.write(f"{clean(text)}\n")
        self._out.flush()
