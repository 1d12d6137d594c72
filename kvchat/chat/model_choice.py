"""Which models there are, and how they are fetched.

It knows where models lie and the command that fetches one; it knows no widgets.
"""

import asyncio
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvchat.chat.port import EngineFactory
from kvchat.chat.wording import about, tokens
from kvchat.errors import KvchatError
from kvchat.models.cards import ModelCard, WheelSource, find_card, load_cards
from kvchat.models.resolve import installed, is_prepared
from kvchat.system.interrupts import exit_code
from kvchat.text import one_line

if TYPE_CHECKING:
    from kvchat.models.staging import Progress

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model that the user may choose."""

    name: str
    title: str
    summary: str = ""
    licence: str = ""
    parameters: int = 0
    """0 where there is no card that says so."""
    context: int = 0
    here: bool = False
    bytes: int = 0
    """On disk where it is here, else of the download; 0 where that is not known."""
    gated: bool = False
    tried: bool = True


@dataclass(frozen=True, slots=True)
class ModelShelf:
    """Where models lie and how engines are made of them: what the command line knows and a screen doesn't."""

    folder: Path
    open_engine: Callable[[Path, str], EngineFactory]
    """Of a prepared folder and the model's name."""
    pull: Callable[[str], Sequence[str]]
    """The command that fetches a model and prints its progress, an object a line."""
    compiled: Path | None = None
    """Where compiled code is kept; it counts as part of a model's bytes."""

    def choices(self) -> list[ModelChoice]:
        """Every card, the smallest first, then what else is here."""
        sizes = {model.name: model.bytes for model in installed(self.folder, self.compiled)}
        cards = load_cards()
        own = sorted(set(sizes) - {card.name for card in cards})
        others = [ModelChoice(name, name, here=True, bytes=sizes[name]) for name in own]
        return [self._of_card(card, sizes) for card in cards] + others

    def _of_card(self, card: ModelCard, sizes: dict[str, int]) -> ModelChoice:
        here = is_prepared(card.name, self.folder) is not None
        fetched = card.source.wheel_bytes if isinstance(card.source, WheelSource) else 2 * card.parameters
        return ModelChoice(
            card.name,
            card.title,
            card.summary,
            card.licence,
            card.parameters,
            card.context,
            here,
            sizes.get(card.name, fetched),
            card.gated,
            card.tried,
        )

    def find(self, name: str) -> tuple[Path, str]:
        """(folder, name) of a model that is here, by whatever it may be called.

        Raises:
            KvchatError: there is no such model, or it must be fetched first.
        """
        kept = self.folder / name
        folder = kept if (kept / "kvchat.json").is_file() else is_prepared(name, self.folder)
        if folder is None:
            raise KvchatError(f"{name} is not here yet. Ctrl+L or `kvchat models pull` fetches it.")
        return folder, name if find_card(name) else str(folder)


class Models:
    """The models that can be chosen, and the downloads under way."""

    def __init__(self, shelf: ModelShelf, say: Say, changed: Callable[[], None]) -> None:
        """`changed` is called when a download went on or ended."""
        self._shelf = shelf
        self._say = say
        self._changed = changed
        self.fetching: dict[str, Progress | None] = {}
        """Downloads under way; None before their first news."""
        self.failed: dict[str, str] = {}
        """Why the last download of a model failed."""
        self._children: dict[str, asyncio.subprocess.Process] = {}

    def choices(self) -> list[ModelChoice]:
        """What there is."""
        return self._shelf.choices()

    def open(self, name: str) -> tuple[str, EngineFactory]:
        """(lasting name, how its engine is made) of a model that is here, by whatever it may be called.

        Raises:
            KvchatError: there is no such model, or it must be fetched first.
        """
        folder, lasting = self._shelf.find(name)
        return lasting, self._shelf.open_engine(folder, lasting)

    async def fetch(self, name: str) -> None:
        """Fetches a model and makes it ready, in a process of its own; returns when that is over."""
        if name in self.fetching:
            return
        self.fetching[name] = None
        self.failed.pop(name, None)
        self._changed()
        child = await asyncio.create_subprocess_exec(
            *self._shelf.pull(name),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self._children[name] = child
        try:
            said = await self._follow(name, child)
        finally:
            del self.fetching[name], self._children[name]
        if child.returncode == 0:
            self._say(f"{title_of(name)} is here. Ctrl+L lets it answer.")
        elif child.returncode in (-signal.SIGTERM, exit_code(signal.SIGTERM)):
            self._say(f"{title_of(name)}: the download was cancelled; nothing of it stays.")
        else:
            self.failed[name] = one_line(said) or f"{title_of(name)} could not be fetched."
            self._say(self.failed[name])
        self._changed()

    def cancel(self, name: str) -> bool:
        """Ends a download; False where there is none. The child cleans up after itself.

        By SIGTERM: whoever started kvchat in the background had SIGINT ignored, here and in every child.
        """
        child = self._children.get(name)
        if child is None or child.returncode is not None:
            return False
        child.terminate()
        return True

    def close(self) -> None:
        """Ends every download."""
        for name in list(self._children):
            self.cancel(name)

    async def _follow(self, name: str, child: asyncio.subprocess.Process) -> str:
        """Notes the progress of a download; returns the last thing it said."""
        assert child.stdout is not None
        assert child.stderr is not None
        errors = asyncio.create_task(child.stderr.read())
        async for line in child.stdout:
            if progress := progress_of(line):
                self.fetching[name] = progress
                self._changed()
        said = (await errors).decode(errors="replace").strip().splitlines()
        await child.wait()
        return said[-1].removeprefix("kvchat: ") if said else ""


def progress_of(line: bytes) -> "Progress | None":
    """One line of a child's report; None where it is none."""
    from kvchat.models.staging import Progress

    try:
        given = json.loads(line)
        return Progress(str(given["stage"]), int(given["done"]), given["total"] and int(given["total"]))
    except (ValueError, KeyError, TypeError):
        return None


def title_of(name: str) -> str:
    """What the screen calls a model: a card's title, the last part of a path or a hub id."""
    card = find_card(name)
    return card.title if card else one_line(Path(name).name)


def switch_price(choice: ModelChoice, loaded: str, context: int, rate: float) -> str:
    """What letting `choice` answer costs.

    Args:
        choice: the model that would answer.
        loaded: name of the one that answers now.
        context: tokens of the open conversation.
        rate: tokens a second that the loaded model reads; 0 where that was not measured.
    """
    words = "The engine starts again with it."
    if not context:
        return words
    now = find_card(loaded)
    scale = choice.parameters / now.parameters if now and choice.parameters else 0
    seconds = context * scale / rate if rate and scale else None
    estimate = f"{about(seconds)} (an estimate from both sizes)" if seconds else ""
    return f"{words} This conversation, {tokens(context)}, is encoded anew and read again, once{estimate}."
