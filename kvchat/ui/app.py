"""The Textual application: one screen, the palette, colours and keys, and Ctrl-C's three meanings."""

import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from textual.app import App, SystemCommand
from textual.binding import Binding
from textual.screen import Screen
from textual.theme import Theme
from textual.widgets import Input, TextArea

from kvchat.chat.session import Session
from kvchat.config.file import write_setting
from kvchat.config.settings import find_setting
from kvchat.errors import KvchatError
from kvchat.text import clean
from kvchat.ui.clipboard import fill_system_clipboard
from kvchat.ui.commands import COMMANDS
from kvchat.ui.preferences import Preferences
from kvchat.ui.redraw_rate import keep_still
from kvchat.ui.screens.chat import ChatScreen
from kvchat.ui.themes import OWN
from kvchat.ui.turn_thread import EngineFactory

if TYPE_CHECKING:
    from kvchat.ui.model_switch import ModelShelf

QUIT_WITHIN_S = 2.0
"""A second Ctrl-C within this time quits."""
NOT_OFFERED = {"Quit", "Theme", "Keys"}
"""Textual's own commands that kvchat has one of its own for."""


class ChatApp(App[None]):
    """kvchat in a terminal."""

    TITLE = "kvchat"
    CSS_PATH = "kvchat.tcss"
    # of every screen: dialogs are denser where there is less room
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (84, "-medium"), (112, "-wide"), (170, "-vast")]
    VERTICAL_BREAKPOINTS = [(0, "-short"), (26, "-tall")]
    BINDINGS = [Binding("ctrl+c", "interrupt", show=False, priority=True)]

    def __init__(
        self,
        open_session: Callable[[], Session],
        factory: EngineFactory,
        *,
        model: str,
        preferences: Preferences | None = None,
        shelf: "ModelShelf | None" = None,
    ) -> None:
        """`open_session` is called after the first paint: opening the file of conversations takes a while."""
        super().__init__()
        self.preferences = preferences or Preferences()
        for theme in OWN:
            self.register_theme(theme)
        self.theme = self.preferences.theme
        # parsed with these the first time already
        self._variables = self.get_css_variables()
        self.stylesheet.set_variables(self._variables)
        self.set_keymap(self.preferences.keys)
        keep_still(self, self.preferences.reduced_motion or self.animation_level == "none")
        self._chat = ChatScreen(open_session, factory, model, self.preferences, shelf)
        self._interrupted_at = 0.0

    def begin_with(self, command: str) -> None:
        """A command that is run as soon as the chat is there."""
        self._chat.first_command = command

    def get_default_screen(self) -> Screen[None]:
        """The chat is the only screen there is; dialogs open over it."""
        return self._chat

    def refresh_css(self, animate: bool = True) -> None:
        """Parses the style sheets again where their variables changed: at the start they are as they were."""
        if (variables := self.get_css_variables()) != self._variables:
            self._variables = variables
            super().refresh_css(animate)

    def on_mount(self) -> None:
        """From here on, a change of theme is the user's, and kept."""
        self.theme_changed_signal.subscribe(self, self._keep_theme)

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The palette: every command, then Textual's own."""
        for command in COMMANDS:
            yield SystemCommand(command.title, command.help, self._runner(command.name))
        for system in super().get_system_commands(screen):
            if system.title not in NOT_OFFERED:
                yield system

    def action_interrupt(self) -> None:
        """Copies a selection; else stops the answer; else asks once more before it quits."""
        if selected := self._selected_text():
            self.copy_to_clipboard(selected)
            self.notify("Sent to the clipboard.", markup=False)
        elif self._chat.answering:
            self._chat.action_stop()
        elif time.monotonic() - self._interrupted_at < QUIT_WITHIN_S:
            self.exit()
        else:
            self._interrupted_at = time.monotonic()
            self.notify("Ctrl+C again quits.", timeout=QUIT_WITHIN_S, markup=False)

    def copy_to_clipboard(self, text: str) -> None:
        """Fills the terminal's clipboard and the system's."""
        super().copy_to_clipboard(clean(text))
        fill_system_clipboard(clean(text))

    def on_unmount(self) -> None:
        """However it ends, nothing unsaved is lost and no process stays."""
        self._chat.leave()

    def _keep_theme(self, theme: Theme) -> None:
        if self.preferences.config_file is None:
            return
        try:
            write_setting(self.preferences.config_file, find_setting("theme"), theme.name)
        except KvchatError as error:
            self.notify(str(error), markup=False)

    def _selected_text(self) -> str:
        if isinstance(self.focused, TextArea | Input) and self.focused.selected_text:
            return self.focused.selected_text
        return self.screen.get_selected_text() or ""

    def _runner(self, name: str) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            await self._chat.run_action(name)

        return run
