"""The settings screen: every setting with what it does, changed in place and written to the file."""

import os
from collections.abc import Callable

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from kvchat.config.file import Config, read_config, write_setting
from kvchat.config.settings import SETTINGS, Kind, Setting, Value, effective
from kvchat.errors import KvchatError
from kvchat.text import one_line
from kvchat.ui.preferences import Preferences
from kvchat.ui.screens.dialogs import AskLine
from kvchat.ui.themes import NAMES, checked_theme

HINT = "Enter changes · Delete takes it out of the file · Esc back"
NAME_CELLS = 18
SHOWN_CELLS = 40
Changed = Callable[[Setting, Value | None], None]


class SettingsScreen(ModalScreen[None]):
    """Shows and changes settings; what changes at once is told to whoever opened it."""

    BINDINGS = [
        Binding("escape,f2,q", "dismiss(None)", "Back"),
        Binding("delete,backspace", "unset", "Take out"),
        Binding("space,right", "step(1)", "Next", show=False),
        Binding("left", "step(-1)", "Previous", show=False),
    ]

    def __init__(self, preferences: Preferences, changed: Changed) -> None:
        """`changed` is called with each setting that was changed, and its value or None."""
        super().__init__()
        self._file = preferences.config_file
        self._changed = changed
        self._config = Config()

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog settings"):
            yield Static("Settings", classes="head")
            yield OptionList(id="settings")
            yield Static(id="about", classes="note")
            yield Static(Content(HINT), classes="hint")

    def on_mount(self) -> None:
        """Reads the file and fills the list."""
        listed = self.query_one(OptionList)
        group = ""
        for setting in SETTINGS:
            if setting.group != group:
                group = setting.group
                listed.add_option(Option(Content.assemble((group, "bold $text-accent")), disabled=True))
            listed.add_option(Option("", id=setting.name))
        self._draw()
        listed.highlighted = 1

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Explains the marked setting."""
        self._explain()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Takes the next word, or asks for a value."""
        setting = self._marked()
        if setting is None:
            return
        if self._words(setting):
            self.action_step(1)
        else:
            value, source = effective(setting, self._config.values, os.environ)
            question = f"{setting.name}: {setting.help} It takes {setting.takes}."
            self.app.push_screen(AskLine(question, "" if source == "default" else value), self._answered)

    def action_step(self, by: int) -> None:
        """The next or the previous word of a setting that has some."""
        setting = self._marked()
        words = self._words(setting) if setting else ()
        if setting and words:
            now, _ = effective(setting, self._config.values, os.environ)
            at = words.index(now) if now in words else -1
            self._set(setting, words[(at + by) % len(words)])

    def action_unset(self) -> None:
        """Takes the marked setting out of the file."""
        if setting := self._marked():
            self._write(setting, None)

    def _answered(self, text: str | None) -> None:
        setting = self._marked()
        if text is not None and setting:
            self._set(setting, text) if text.strip() else self._write(setting, None)

    def _set(self, setting: Setting, text: str) -> None:
        try:
            value = setting.parse(text)
            if setting.name == "theme":
                checked_theme(text)
        except KvchatError as error:
            self.notify(str(error), severity="warning", markup=False)
            return
        self._write(setting, value)

    def _write(self, setting: Setting, value: Value | None) -> None:
        try:
            if self._file:
                write_setting(self._file, setting, value)
        except KvchatError as error:
            self.notify(str(error), severity="error", markup=False)
            return
        self._changed(setting, value)
        self._draw()

    def _draw(self) -> None:
        try:
            self._config = read_config(self._file) if self._file else Config()
        except KvchatError as error:
            self.notify(str(error), severity="error", markup=False)
        listed = self.query_one(OptionList)
        for setting in SETTINGS:
            listed.replace_option_prompt(setting.name, self._line(setting))
        self._explain()

    def _line(self, setting: Setting) -> Content:
        value, source = effective(setting, self._config.values, os.environ)
        value = one_line(value)
        value = value if len(value) <= SHOWN_CELLS else f"{value[: SHOWN_CELLS - 1]}…"
        style = "$text-muted" if source == "default" else "bold"
        mark = " " if source == "default" else "●"
        return Content.assemble(
            (f" {mark} ", "$text-success"), f"{setting.name:<{NAME_CELLS}}", (value, style)
        )

    def _explain(self) -> None:
        setting = self._marked()
        if setting is None:
            return
        _, source = effective(setting, self._config.values, os.environ)
        origin = {"file": "set in the file", "default": "not set"}.get(source, f"{source} wins")
        lines = [
            Content(setting.help),
            Content.assemble(("takes ", "$text-muted"), self._takes(setting)),
            Content.assemble(
                ("holds ", "$text-muted"), setting.holds.value, ("  ·  " + origin, "$text-muted")
            ),
        ]
        self.query_one("#about", Static).update(Content("\n").join(lines))

    def _marked(self) -> Setting | None:
        listed = self.query_one(OptionList)
        if listed.highlighted is None:
            return None
        name = listed.get_option_at_index(listed.highlighted).id
        return next((setting for setting in SETTINGS if setting.name == name), None)

    def _takes(self, setting: Setting) -> str:
        return "a theme; Enter goes on to the next one" if setting.name == "theme" else setting.takes

    def _words(self, setting: Setting) -> tuple[str, ...]:
        if setting.name == "theme":
            return NAMES
        return ("true", "false") if setting.kind is Kind.SWITCH else setting.choices
