"""The Textual application: one screen, the palette, colours, keys, signals, and Ctrl-C's three meanings."""

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from threading import Timer
from typing import TYPE_CHECKING

from textual.app import App, SystemCommand
from textual.binding import Binding
from textual.driver import Driver
from textual.screen import Screen
from textual.theme import Theme
from textual.widgets import Input, TextArea

from kvchat.chat.commands import COMMANDS
from kvchat.chat.port import EngineFactory
from kvchat.chat.session import Session
from kvchat.config.file import write_setting
from kvchat.config.settings import find_setting
from kvchat.errors import KvchatError, as_sentence, cause
from kvchat.system.interrupts import Ended, exit_code, on_signals
from kvchat.text import clean
from kvchat.ui.clipboard import fill_system_clipboard
from kvchat.ui.preferences import Preferences
from kvchat.ui.redraw_rate import keep_still
from kvchat.ui.screens.chat import ChatScreen
from kvchat.ui.themes import OWN

if TYPE_CHECKING:
    from kvchat.chat.model_choice import ModelShelf

QUIT_WITHIN_S = 2.0
"""A second Ctrl-C within this time quits."""
LEAVE_S = 10.0
"""A program that was asked by a signal to end has so long for it."""
NOT_OFFERED = {"Quit", "Theme", "Keys"}
"""Textual's own commands that kvchat has one of its own for."""


def _driver_class() -> type[Driver] | None:
    """What reads and writes the terminal; None leaves the choice to Textual."""
    if sys.platform == "win32" or os.environ.get("TEXTUAL_DRIVER"):
        return None
    from kvchat.ui.terminal_driver import TerminalDriver

    return TerminalDriver


class ChatApp(App[None]):
    """kvchat in a terminal."""

    TITLE = "kvchat"
    CSS_PATH = "kvchat.tcss"
    # of every screen: dialogs are denser where there is less room
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (84, "-medium"), (112, "-wide"), (170, "-vast")]
    VERTICAL_BREAKPOINTS = [(0, "-short"), (26, "-tall")]
    BINDINGS = [
        Binding("ctrl+c", "interrupt", show=False, priority=True),
        Binding("ctrl+z", "suspend_process", show=False, priority=True),
    ]

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
        super().__init__(driver_class=_driver_class())
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
        self._running_loop: asyncio.AbstractEventLoop | None = None

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

    def run_in_terminal(self) -> int:
        """Runs until the user leaves or a signal comes; returns the exit code."""
        with on_signals(self._signalled):
            try:
                self.run()
            finally:
                self.on_unmount()  # where it ended without that
        # only `exit` sets a code
        return 1 if self.return_code is None else self.return_code

    def on_load(self) -> None:
        """Notes the loop that signals are handed to."""
        self._running_loop = asyncio.get_running_loop()

    def on_mount(self) -> None:
        """From here on, a change of theme is the user's, and kept."""
        self.theme_changed_signal.subscribe(self, self._keep_theme)
        for sentence in self.preferences.warnings:
            self.notify(clean(sentence), severity="warning", markup=False)

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
            self._chat.controller.stop()
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

    def action_suspend_process(self) -> None:
        """Gives the terminal back to the shell until `fg`; the engine goes on with its answer meanwhile."""
        super().action_suspend_process()
        self.refresh(layout=True)

    def _signalled(self, number: int) -> None:
        """Ends the program as if the user left, with the signal's exit code.

        Where that takes too long, because the loop is stuck, the terminal is restored and the process ends.
        """
        if self._running_loop is None:
            raise Ended(number)
        with suppress(RuntimeError):  # the loop has ended, and the program is about to
            self._running_loop.call_soon_threadsafe(self._leave_with, exit_code(number))

        def give_up() -> None:
            if restore := getattr(self._driver, "restore_now", None):
                restore()
            os._exit(exit_code(number))

        timer = Timer(LEAVE_S, give_up)
        timer.daemon = True
        timer.start()

    def _leave_with(self, code: int) -> None:
        if self.return_code is None:
            self.exit(return_code=code)

    def _handle_exception(self, error: Exception) -> None:
        """Textual ends the program with a traceback; an error with a reason ends it with a sentence."""
        if cause(error) is None:
            super()._handle_exception(error)
        elif self.return_code is None:
            self.exit(return_code=1, message=f"kvchat: {clean(as_sentence(error))}")

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
            await self._chat.run_action(f"run_command('{name}')")

        return run
