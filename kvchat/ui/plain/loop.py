"""The chat line by line, for screen readers and dumb terminals: nothing is redrawn, and there are no colours.

What is typed is a line, what is answered is text, and the figures of a turn are one sentence. It has the
controller of the screen.
"""

import asyncio
import errno
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from queue import Empty, SimpleQueue
from typing import Any, TextIO

from kvchat.chat.attachments import mentions
from kvchat.chat.commands import parse_slash
from kvchat.chat.controller import ChatController
from kvchat.chat.conversation_commands import goes_on
from kvchat.chat.engine_supervisor import EngineSupervisor
from kvchat.chat.model_choice import Models, ModelShelf
from kvchat.chat.port import EngineEvent, EngineFactory
from kvchat.chat.session import Session
from kvchat.chat.wording import sentence, tokens
from kvchat.contract import Died, Evicted, FinishReason, Loading, Tokens, TurnFailed, TurnFinished, TurnStats
from kvchat.errors import KvchatError
from kvchat.system.interrupts import Ended, exit_code, on_signals
from kvchat.text import clean, megabytes, one_line
from kvchat.ui.plain.commands import short
from kvchat.ui.plain.port import PlainPort
from kvchat.ui.plain.tour import run_tour
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


@dataclass(frozen=True, slots=True)
class Signalled:
    """A signal came."""

    number: int


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
        self._lines = lines
        self._out = out
        self._inbox: SimpleQueue[EngineEvent | Signalled] = SimpleQueue()
        self._engine = EngineSupervisor(factory, self._inbox.put)
        self._port = PlainPort(self)
        models = Models(shelf, self.write_line, lambda: None) if shelf else None
        self.controller = ChatController(session, self._engine, self._port, model, models)
        self._left = False
        self._reading = False
        """Whether a line is waited for."""
        self._signals: list[int] = []
        """Those that came."""

    def run(self) -> int:
        """Chats; returns the exit code."""
        self.write_line(f"kvchat with {self._title}, line by line. /help lists the commands, /exit leaves.")
        return self._with_engine(self._chat)

    def run_tour(self) -> int:
        """Does the tour and ends; returns the exit code.

        Raises:
            KvchatError: a question was not answered.
        """
        self.write_line(f"The tour of kvchat with {self._title}, line by line.")
        return self._with_engine(lambda: asyncio.run(self.tour()))

    @property
    def _title(self) -> str:
        return one_line(self.controller.state.model_title)

    def _chat(self) -> None:
        going_on = self.controller.session.current.messages
        self._act(self.controller.opened(goes_on(self.controller) if going_on else ""))
        while not self._left and (line := self._next_line()) is not None:
            self._hear()
            self._take(line)

    def _with_engine(self, act: Callable[[], None]) -> int:
        """Acts once the engine is ready, and ends it; returns the exit code."""
        with on_signals(self._signalled):
            self._engine.start()
            try:
                if not self.until_ready():
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
                self.controller.close()

    # --- lines --------------------------------------------------------------------------------------------

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
        self.write(PROMPT)
        line = self._read_line()
        if not line:
            self.write_line("")
        return line.rstrip("\r\n") if line else None

    def ask(self, question: str) -> str:
        """What is typed as an answer."""
        self.write(clean(question))
        return self._read_line().strip()

    def _take(self, line: str) -> None:
        """Does what a line asks for."""
        if line.startswith("/") and (parsed := parse_slash(line)):
            self._act(self.controller.run(*parsed))
        elif line.startswith("/"):
            self.write_line(f"There is no command {one_line(line.split()[0])}. /help lists them.")
        elif line.strip():
            try:
                self._act(self.controller.send(self._with_files(line)))
            except KvchatError as error:
                self.write_line(str(error))

    def _act(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Acts, writes the answer if one begins, and waits for what the engine says about it."""
        sent = self._engine.commands
        asyncio.run(coroutine)
        while self.controller.answering:
            self._on_message(self._inbox.get())
        if self._engine.commands != sent:
            self._settle()

    def _with_files(self, line: str) -> str:
        """The message with every file that it mentions; prints the tokens of each file.

        Raises:
            KvchatError: a file is no text, or larger than the context.
        """
        if not mentions(line):
            return self.controller.prompt_cost.composed(line)
        self.controller.prompt_cost.typed(line, self.controller.editing)
        end = time.monotonic() + COUNT_S
        with suppress(Empty):
            while self.controller.state.ready and self._counting():
                self._on_message(self._inbox.get(timeout=max(0, end - time.monotonic())))
        message = self.controller.prompt_cost.composed(line)
        for name, count in self._port.cost.files:
            self.write_line(
                sentence(f"attached {name}" + (f", {tokens(count)}" if count is not None else ""))
            )
        return message

    def _counting(self) -> bool:
        """Whether the tokens of a file that can be attached are still unknown."""
        return any(count is None for _, count in self._port.cost.files)

    def tour(self) -> Coroutine[Any, Any, None]:
        """Every step of the tour."""
        return run_tour(self.controller, self._hear)

    def leave(self) -> None:
        """Ends after this line."""
        self._left = True

    # --- the engine ---------------------------------------------------------------------------------------

    def _on_message(self, message: EngineEvent | Signalled) -> None:
        if isinstance(message, Signalled):
            self._on_signal(message.number)
        else:
            self._on_event(message)

    def _on_signal(self, number: int) -> None:
        """Ctrl-C stops an answer and keeps what there is of it; everything else ends the chat."""
        if number != signal.SIGINT or not self.controller.stop():
            raise Ended(number)

    def _on_event(self, event: EngineEvent) -> None:
        if isinstance(event, Tokens):
            self.write(clean(event.text))  # shown first: where it can't be saved, it can still be read
        state = self.controller.on_event(event)
        match event:
            case Evicted():
                self.write_line(f"\nThe context was full: {one_line(event.note)}.")
            case TurnFinished():
                self.write_line(f"\n{turn_sentence(event.stats)}")
            case TurnFailed():
                self.write_line(f"\n{one_line(event.reason)}")
                if state.not_sent and not self.controller.session.is_aside:
                    self.controller.editing = state.not_sent.edited
                    how = ASK_AGAIN if state.not_sent.edited else SEND_AGAIN
                    self.write_line(f"Not sent: {short(state.not_sent.text)}\n{how}")
            case Loading():
                self.write_line(f"{one_line(event.stage).capitalize()}.")
            case Died():
                self.write_line("\n".join((one_line(event.reason), *map(one_line, event.log_tail))))
            case _:
                pass

    def until_ready(self) -> bool:
        """Waits for the engine; False where it is not started again."""
        while not self.controller.state.ready and not self.controller.state.gone:
            self._on_message(self._inbox.get())
        return self.controller.state.ready

    def _hear(self) -> None:
        """Takes what the engine reported meanwhile."""
        while not self._inbox.empty():
            self._on_message(self._inbox.get())

    def _settle(self) -> None:
        """Waits for the engine's answer to a command; a later answer is printed with the next line."""
        with suppress(Empty):
            while True:
                self._on_message(self._inbox.get(timeout=SETTLE_S))

    # --- output -------------------------------------------------------------------------------------------

    def write(self, text: str) -> None:
        """Writes text as it is."""
        self._out.write(text)
        self._out.flush()

    def write_line(self, text: str) -> None:
        """Writes a line, and nothing in it but text."""
        self.write(f"{clean(text)}\n")
