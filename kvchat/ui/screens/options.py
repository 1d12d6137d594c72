"""How this conversation answers: its system prompt and its sampling on one screen, with named presets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static, TextArea
from textual.widgets.option_list import Option

from kvchat.chat.conversation import Preset
from kvchat.config.settings import changed, find_setting
from kvchat.contract import Sampling
from kvchat.errors import KvchatError
from kvchat.text import clean, one_line

FIELDS = tuple(field.name for field in fields(Sampling))
HINT = "Ctrl+O uses this · Enter on a preset takes it, D deletes it · Esc leaves all as it was"
NO_PRESETS = "None yet: give what stands here a name below."


@dataclass(frozen=True, slots=True)
class Presets:
    """What the screen can do with presets."""

    found: Callable[[], Sequence[Preset]]
    save: Callable[[Preset], None]
    delete: Callable[[str], None]


class OptionsScreen(ModalScreen[Preset | None]):
    """Answers with what was chosen, or with None where all stays as it was."""

    BINDINGS = [
        Binding("escape", "dismiss(None)", "Back", priority=True),
        Binding("ctrl+o", "use", "Use", priority=True),
        Binding("d,delete", "forget", "Delete preset", show=False),
    ]

    def __init__(self, system_prompt: str, sampling: Sampling, presets: Presets) -> None:
        super().__init__()
        self._begun = Preset("", system_prompt, sampling)
        self._presets = presets
        self._listed: list[Preset] = []

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog options", can_focus=False):
            yield Static("How this conversation answers", classes="head")
            yield Static("System prompt (empty: the model's own)", classes="note")
            yield TextArea(clean(self._begun.system_prompt), id="system", compact=True)
            for name in FIELDS:
                with Horizontal(classes="field"):
                    yield Static(name.replace("_", " "), classes="label")
                    yield Input(shown(self._begun.sampling, name), id=name, compact=True)
            yield Static(" ", id="about", classes="note")
            with Vertical(classes="presets"):
                yield Static("Presets", classes="head")
                yield Static(Content(NO_PRESETS), id="no-presets", classes="note")
                yield OptionList(id="presets", compact=True)
                with Horizontal(classes="field"):
                    yield Static("save as", classes="label")
                    yield Input(id="save-as", placeholder="a name, then Enter", compact=True)
            yield Static(Content(HINT), classes="hint")

    def on_mount(self) -> None:
        """Lists the presets."""
        self._list()

    def on_descendant_focus(self) -> None:
        """Explains the field that has the focus."""
        focused = self.focused
        named = focused.id if isinstance(focused, Input) and focused.id in FIELDS else None
        words = find_setting(named.replace("_", "-")).help if named else " "
        self.query_one("#about", Static).update(Content(words))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter in the last field saves a preset; elsewhere it uses what stands here."""
        event.stop()
        name = one_line(event.value)
        if event.input.id != "save-as":
            self.action_use()
        elif name and (chosen := self._chosen(name)):
            self._presets.save(chosen)
            event.input.value = ""
            self._list()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Takes a preset into the fields."""
        event.stop()
        preset = self._listed[event.option_index]
        self.query_one(TextArea).text = clean(preset.system_prompt)
        for name in FIELDS:
            self.query_one(f"#{name}", Input).value = shown(preset.sampling, name)

    def action_use(self) -> None:
        """Closes the screen with what was chosen, if it can be used."""
        if chosen := self._chosen(""):
            self.dismiss(chosen)

    def action_forget(self) -> None:
        """Deletes the marked preset."""
        listed = self.query_one(OptionList)
        if listed.has_focus and listed.highlighted is not None:
            self._presets.delete(self._listed[listed.highlighted].name)
            self._list()

    def _list(self) -> None:
        self._listed = list(self._presets.found())
        listed = self.query_one(OptionList)
        listed.clear_options()
        listed.add_options(Option(label(preset)) for preset in self._listed)
        listed.display = bool(self._listed)
        self.query_one("#no-presets").display = not self._listed

    def _chosen(self, name: str) -> Preset | None:
        """What stands in the fields; None where one of them is wrong, which is said."""
        begun = self._begun
        system = self.query_one(TextArea).text
        given: dict[str, object] = {}
        for field in FIELDS:
            text = self.query_one(f"#{field}", Input).value.strip()
            try:
                given[field] = find_setting(field.replace("_", "-")).parse(text) if text else None
            except KvchatError as error:
                self.notify(clean(str(error)), markup=False)
                self.query_one(f"#{field}", Input).focus()
                return None
        sampling = changed(Sampling(seed=None), given)
        kept = system == clean(begun.system_prompt)
        return Preset(name, begun.system_prompt if kept else system, sampling)


def shown(sampling: Sampling, name: str) -> str:
    """A value as it is written; no seed is nothing."""
    value = getattr(sampling, name)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def label(preset: Preset) -> Content:
    """A preset on one line."""
    about = f"temperature {preset.sampling.temperature:g}"
    system = one_line(preset.system_prompt)
    return Content.assemble(
        (one_line(preset.name), "bold"), (f" · {about}" + (f" · {system}" if system else ""), "$text-muted")
    )
