"""What the text in the prompt is made of and what sending it would cost, before it is sent.

Counting needs the tokenizer, and so the engine; it is asked once the user pauses, and what a file counts is
kept. It knows the session, files and the engine; it knows no widgets.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvchat.chat.attachments import Attachment, compose, mentions, parse_attachments, read_attachment
from kvchat.chat.conversation import Message
from kvchat.chat.port import EngineClient
from kvchat.chat.session import Session
from kvchat.contract import CostEstimate, CountTokens, Died, EstimateCost, Ready, Status, TokenCounts
from kvchat.errors import KvchatError
from kvchat.text import clean, one_line

TYPED = "typed-"
"""How the keys begin of what is asked about text that is not sent yet."""
REMEMBERED = 200
"""Texts whose tokens are remembered."""


@dataclass(frozen=True, slots=True)
class Reckoning:
    """What is known of the text in the prompt."""

    files: tuple[tuple[str, int | None], ...] = ()
    """(name, tokens) of each attached file; None where they aren't counted yet."""
    wrong: tuple[str, ...] = ()
    """Why files that are named can't be attached."""
    tokens: int | None = None
    """Of the text and its files."""
    new: int | None = None
    """Tokens that the next turn would read."""
    refusal: str = ""

    @property
    def lines(self) -> list[str]:
        """As it is shown: the files, then the figures."""
        files = [
            f"▤ {one_line(name)} · {'… tokens' if count is None else f'{count:,} tokens'}"
            for name, count in self.files
        ]
        lines = [*files, *self.wrong]
        if self.refusal:
            return [*lines, one_line(self.refusal)]
        if self.tokens is None:
            return lines
        figures = f"{self.tokens:,} token{'s' * (self.tokens != 1)}"
        return [*lines, figures if self.new is None else f"{figures} · will read {self.new:,} new"]


class PromptCost:
    """Follows the prompt."""

    def __init__(
        self, session: Session, engine: EngineClient, show: Callable[[Reckoning], None], folder: Path
    ) -> None:
        """`folder` is where the paths of mentioned files start."""
        self._session = session
        self._engine = engine
        self._show = show
        self._folder = folder
        self._counts: dict[str, int] = {}
        """Tokens by text."""
        self._limit = 0
        """Tokens that the context holds; 0 while no engine is ready."""
        self._key = ""
        self._asked: tuple[str, ...] = ()
        self._text = ""
        self._attached: tuple[Attachment, ...] = ()
        self._now = Reckoning()

    def composed(self, message: str) -> str:
        """The message with every mentioned file in it, and without control characters.

        Raises:
            KvchatError: a file is no text, or larger than the context.
        """
        written, attached = self._attach(clean(message))
        for each in attached:
            count = self._counts.get(each.text, 0)
            if self._limit and count > self._limit:
                raise KvchatError(
                    f"{one_line(each.name)} has {count:,} tokens; the context holds {self._limit:,}. "
                    "Attach a part of it."
                )
        return compose(written, attached)

    def typed(self, message: str, editing: int | None) -> None:
        """The user paused; `message` is what would be sent, in the place of the question `editing`."""
        self._key = ""
        if not message.strip() or message.startswith("/"):
            self._tell(Reckoning())
            return
        wrong: tuple[str, ...] = ()
        try:
            written, self._attached = self._attach(message)
        except KvchatError as error:
            written, self._attached = parse_attachments(message)
            wrong = (str(error),)
        self._text = compose(written, self._attached)
        self._tell(replace(self._counted(), wrong=wrong))
        if self._limit and not self._session.pending:
            self._ask(editing)

    def on_status(self, status: Status) -> bool:
        """Notes what was counted; True where the status was meant for the prompt alone."""
        match status:
            case Ready():
                self._limit = status.model.context_limit
            case Died():
                self._limit, self._key = 0, ""
            case TokenCounts(key, counts) if key.startswith(TYPED):
                if key == self._key:
                    self._counts |= dict(zip(self._asked, counts, strict=True))
                    self._counts = dict(list(self._counts.items())[-REMEMBERED:])
                    self._tell(replace(self._counted(), new=self._now.new, wrong=self._now.wrong))
                return True
            case CostEstimate() if status.key.startswith(TYPED):
                if status.key == self._key:
                    self._tell(replace(self._now, new=status.prefilled_tokens, refusal=status.refusal))
                return True
        return False

    def _ask(self, editing: int | None) -> None:
        self._key = TYPED + secrets.token_hex(4)
        texts = dict.fromkeys((self._text, *(each.text for each in self._attached)))
        self._asked = tuple(text for text in texts if text not in self._counts)
        if self._asked:
            self._engine.command(CountTokens(self._key, self._asked))
        current = self._session.current
        ids = [message.id for message in current.messages]
        kept = current.messages[: ids.index(editing)] if editing in ids else current.messages
        asked = replace(current, messages=(*kept, Message(0, None, "user", self._text, "")))
        self._engine.command(EstimateCost(self._key, self._session.request_as_if(messages=asked.prompt())))

    def _counted(self) -> Reckoning:
        files = tuple((each.name, self._counts.get(each.text)) for each in self._attached)
        return Reckoning(files, tokens=self._counts.get(self._text))

    def _attach(self, message: str) -> tuple[str, tuple[Attachment, ...]]:
        """(what was written, the files): those that came with the message, else as they are on disk now.

        What is mentioned and is no file stays a word: `@` stands for more than files.
        """
        written, held = parse_attachments(message)
        known = {each.name: each for each in held}
        attached: Sequence[Attachment] = [
            known.pop(name) if name in known else read_attachment(name, self._folder)
            for name in mentions(written)
            if name in known or is_file(name, self._folder)
        ]
        return written, (*attached, *known.values())

    def _tell(self, reckoning: Reckoning) -> None:
        self._now = reckoning
        self._show(reckoning)


def is_file(name: str, folder: Path) -> bool:
    """Whether there is such a file."""
    try:
        return (folder / Path(name).expanduser()).is_file()
    except (OSError, ValueError, RuntimeError):
        return False
