"""The model picker: a card of each model, what is here, and downloads with their progress in place."""

from collections.abc import Callable
from pathlib import Path

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from kvchat.chat.model_choice import ModelChoice, Models
from kvchat.models.staging import BYTES, Progress
from kvchat.text import megabytes, one_line

HINT = "Enter lets it answer, or fetches it · C cancels a download · Esc back"
FILLED, EMPTY, BAR_CELLS = "█", "░", 16


def facts_line(choice: ModelChoice) -> str:
    """Size, context and licence."""
    billions = round(choice.parameters / 1e9, 1)
    size = f"{billions}B" if billions >= 1 else f"{choice.parameters / 1e6:.0f}M"
    parts = [f"{size} parameters", f"context {choice.context:,}"] if choice.parameters else []
    parts += [choice.licence] if choice.licence else []
    parts += ["gated"] if choice.gated else []
    parts += [] if choice.tried else ["untried"]
    return " · ".join(parts)


def state_words(choice: ModelChoice, *, answers: bool) -> str:
    """Whether it is here, with a glyph."""
    if choice.here:
        size = f", {megabytes(choice.bytes)}" if choice.bytes else ""
        return f"● answers now{size}" if answers else f"● here{size}"
    return f"○ to fetch, about {megabytes(choice.bytes)}" if choice.bytes else "○ to fetch"


def progress_line(progress: Progress | None) -> str:
    """How far a download is."""
    if progress is None:
        return "starting …"
    words = progress.label
    if not progress.total:
        return f"{words} …"
    share = min(1.0, progress.done / progress.total)
    filled = round(share * BAR_CELLS)
    amount = f"  {megabytes(progress.done)} of {megabytes(progress.total)}" if progress.stage in BYTES else ""
    return f"{FILLED * filled}{EMPTY * (BAR_CELLS - filled)} {share:>4.0%}  {words}{amount}"


class ModelScreen(ModalScreen[str | None]):
    """Chooses a model that is here, or fetches one; the answer is the name of the model to switch to."""

    BINDINGS = [Binding("escape,ctrl+l,q", "dismiss(None)", "Back"), Binding("c", "cancel", "Cancel")]

    def __init__(self, models: Models, loaded: str, price: Callable[[ModelChoice], str]) -> None:
        """
        Args:
            models: those that there are.
            loaded: name of the one that answers.
            price: says what letting another one answer costs.
        """
        super().__init__()
        self._models = models
        self._loaded = loaded
        self._price = price
        self._choices: list[ModelChoice] = []

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog models"):
            yield Static("Models", classes="head")
            yield OptionList(id="models")
            yield Static(id="price", classes="note")
            yield Static(Content(HINT), classes="hint")

    def on_mount(self) -> None:
        """Fills the list; the model that answers is marked."""
        self.show()
        names = [choice.name for choice in self._choices]
        listed = self.query_one(OptionList)
        listed.highlighted = next((i for i, name in enumerate(names) if self._answers(name)), 0)

    def show(self) -> None:
        """Draws the models as they are now."""
        self._choices = self._models.choices()
        listed = self.query_one(OptionList)
        if listed.option_count == len(self._choices):
            self.tick()
            return
        chosen = listed.highlighted
        listed.clear_options()
        listed.add_options(Option(self._card(choice), id=choice.name) for choice in self._choices)
        listed.highlighted = chosen

    def tick(self) -> None:
        """Draws what a download changes."""
        listed = self.query_one(OptionList)
        for index, choice in enumerate(self._choices):
            listed.replace_option_prompt_at_index(index, self._card(choice))

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Says what choosing this one costs."""
        choice = self._choices[event.option_index]
        if self._answers(choice.name):
            words = "This model answers now."
        elif choice.here:
            words = self._price(choice)
        else:
            words = "It is fetched first; the chat goes on meanwhile."
        self.query_one("#price", Static).update(Content(words))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Switches to it, or fetches it."""
        choice = self._choices[event.option_index]
        if choice.here:
            self.dismiss(None if self._answers(choice.name) else choice.name)
        else:
            self.app.run_worker(self._models.fetch(choice.name), group="fetch", exit_on_error=False)

    def action_cancel(self) -> None:
        """Ends the marked model's download."""
        marked = self.query_one(OptionList).highlighted
        if marked is not None:
            self._models.cancel(self._choices[marked].name)

    def _answers(self, name: str) -> bool:
        return Path(self._loaded).name == name

    def _card(self, choice: ModelChoice) -> Content:
        fetching = choice.name in self._models.fetching
        state = (
            progress_line(self._models.fetching[choice.name])
            if fetching
            else state_words(choice, answers=self._answers(choice.name))
        )
        colour = "$text-success" if choice.here else "$text-warning" if fetching else "$text-muted"
        lines = [Content.assemble((one_line(choice.title), "bold"), "   ", (state, colour))]
        facts = [line for line in (facts_line(choice), choice.summary) if line]
        lines += [Content.assemble((f"  {line}", "$text-muted")) for line in facts]
        if reason := self._models.failed.get(choice.name):
            lines.append(Content.assemble((f"  ✗ {one_line(reason)}", "$text-error")))
        return Content("\n").join([*lines, Content("")])
