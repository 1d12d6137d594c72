"""The map of a conversation's cache: what it holds, token by token, and what each piece of it costs."""

from collections.abc import Callable, Sequence

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from kvchat.chat.wording import tokens
from kvchat.contract import CacheBlock, CacheMap, Died, LayerGroup, TurnRequest
from kvchat.text import clean, megabytes, one_line
from kvchat.ui.engine_listener import Heard, Listener
from kvchat.ui.formatting import visible
from kvchat.ui.widgets.cache_grid import CacheGrid, legend, message_names, name_of

WAITING = "Looking at the cache … While an answer is written, this waits for its end."
HINT = "arrows or mouse: look at a cell · Home, End · R look again · Esc back"
NOTHING = "Nothing is cached"
TEXT_CHARACTERS = 300


def size_words(count: int) -> str:
    """Bytes of small and large things: `368.6 KB`, `31.0 MB`."""
    return f"{count / 1000:.1f} KB" if count < 1_000_000 else megabytes(count)


def layer_words(layer: LayerGroup) -> str:
    """`30 full layers, 31.0 MB`."""
    window = f" (the latest {layer.window:,} tokens)" if layer.window else ""
    plural = "s" * (layer.layers != 1)
    return f"{layer.layers} {layer.kind} layer{plural}{window}, {megabytes(layer.bytes)}"


def summary(told: CacheMap) -> str:
    """What all of it is."""
    if not told.blocks:
        why = one_line(told.note)
        return f"{NOTHING}{f': {why}' if why else ''}. The next turn reads the whole conversation."
    held = sum(block.tokens for block in told.blocks if block.in_memory)
    gone = sum(block.tokens for block in told.blocks if not block.in_memory and not block.on_disk)
    parts = [f"{tokens(held)} in {megabytes(told.bytes)} of memory"]
    parts += [f"{megabytes(told.disk_bytes)} on disk"] if told.disk_bytes else []
    parts += [f"{tokens(gone)} evicted"] if gone else []
    return " · ".join(parts)


def block_words(block: CacheBlock, name: str, sharers: Sequence[str]) -> str:
    """Everything about one cell but its text."""
    last = block.start + block.tokens - 1
    place = f"token {block.start:,}" if block.tokens == 1 else f"tokens {block.start:,}–{last:,}"
    parts = [f"{place} ({block.tokens})", name]
    if block.in_memory:
        parts += [f"{block.precision}, {size_words(block.bytes)} in memory"]
    elif not block.on_disk:
        parts += ["evicted: the model doesn't see it any more"]
    parts += ["on disk"] if block.on_disk else []
    parts += ["a sink: attention leans on the first tokens"] if block.sink else []
    if block.shared:
        parts += [f"shared with {', '.join(f'“{one_line(title)}”' for title in sharers)}"]
    parts += ["no part of the conversation any more"] if block.message is None else []
    return " · ".join(parts)


class MapScreen(Listener, ModalScreen[None]):
    """F5: the picture, and under it whatever the cursor stands on."""

    BINDINGS = [Binding("escape,f5,q", "dismiss(None)", "Back"), Binding("r", "look", "Look again")]

    def __init__(
        self,
        request: TurnRequest | None,
        look: Callable[[TurnRequest], None],
        title_of: Callable[[str], str],
    ) -> None:
        """
        Args:
            request: the next turn as it would be; None where nothing was written yet.
            look: asks the engine for the map of that.
            title_of: what a conversation is called.
        """
        super().__init__()
        self._request = request
        self._look = look
        self._title_of = title_of
        self._map: CacheMap | None = None
        self._names = message_names(request.messages) if request else []

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog map"):
            yield Static("cache map", classes="head")
            yield Static(Content(WAITING), id="map-summary")
            with VerticalScroll(can_focus=False):
                yield CacheGrid()
            yield Static(id="map-legend", classes="note")
            yield Static(id="map-cell")
            yield Static(Content(HINT), classes="note")

    def on_mount(self) -> None:
        """Looks."""
        self.query_one(CacheGrid).focus()
        self.action_look()

    def action_look(self) -> None:
        """Asks the engine."""
        summary = self.query_one("#map-summary", Static)
        if self._request is None:
            summary.update(Content(f"{NOTHING} yet: write a message, and its tokens appear here."))
            return
        summary.update(Content(WAITING))
        self._look(self._request)

    def hear(self, told: Heard) -> None:
        """The map came, or the engine that could draw one died."""
        if isinstance(told, CacheMap) and self._request and told.conversation == self._request.conversation:
            self._show(told)
        elif isinstance(told, Died):
            self.query_one("#map-summary", Static).update(
                Content("The engine ended, and its caches with it.")
            )

    def _show(self, told: CacheMap) -> None:
        self._map = told
        lines = [
            Content(summary(told)),
            *(Content.assemble((layer_words(g), "$text-muted")) for g in told.layers),
        ]
        self.query_one("#map-summary", Static).update(Content("\n").join(lines))
        self.query_one(CacheGrid).show(told, self._names)
        self._explain()

    def on_resize(self) -> None:
        """Another width has other lines."""
        self.call_after_refresh(self._explain)

    def _explain(self) -> None:
        explained = self.query_one("#map-legend", Static)
        if self._map and self._map.blocks:
            explained.update(Content(legend(self._map, explained.size.width)))

    @on(CacheGrid.Moved)
    def _moved(self, message: CacheGrid.Moved) -> None:
        """Tells what the cursor stands on."""
        assert self._map is not None
        block = self._map.blocks[message.index]
        sharers = [self._title_of(name) for name in self._map.shared_with]
        self.query_one("#map-cell", Static).update(
            Content("\n").join(
                [
                    Content.assemble((block_words(block, name_of(block, self._names), sharers), "bold")),
                    Content(clean(visible(block.text))[:TEXT_CHARACTERS]),
                ]
            )
        )
