"""What belongs to the program as a whole: help, settings, colours, the model, the panel, leaving."""

from kvchat.ui.actions.base import ActionBase
from kvchat.ui.themes import checked_theme


class ProgramActions(ActionBase):
    """Acts on the program."""

    def action_help(self) -> None:
        """Shows the keys."""
        from kvchat.ui.screens.dialogs import Help

        self.app.push_screen(Help(self._commands))

    def action_settings(self) -> None:
        """Shows every setting."""
        from kvchat.ui.live_settings import Tuning
        from kvchat.ui.screens.settings import SettingsScreen

        tuning = Tuning(self.app, self._session, self._desk.budget)
        self.app.push_screen(SettingsScreen(self._preferences, tuning.changed))

    def action_theme(self, name: str = "") -> None:
        """Takes other colours, or offers them."""
        with self._telling():
            if name:
                self.app.theme = checked_theme(name)
            else:
                self.app.search_themes()

    def action_model(self, name: str = "") -> None:
        """Lets another model answer, or offers the models."""
        from kvchat.ui.model_switch import switch_price
        from kvchat.ui.screens.models import ModelScreen

        if not self._shelf:
            self._say("No other model can be had here.")
        elif name:
            self._switch_model(name)
        else:
            state = self._turns.figures.state
            desk, context, rate = self._models, state.turn.context, state.prefill_rate
            screen = ModelScreen(desk, lambda choice: switch_price(choice, desk.loaded, context, rate))
            self.app.push_screen(screen, self._switch_model)

    def _switch_model(self, name: str | None) -> None:
        with self._telling():
            if name:
                self._model = self._turns.who = self._models.switch(name)
                self._turns.lost("starting …")
                self._say(f"{self._model} answers from now on; the engine starts with it.")
                self._refresh_all()

    def _download_went_on(self) -> None:
        from kvchat.ui.screens.models import ModelScreen

        for screen in self.app.screen_stack:
            if isinstance(screen, ModelScreen) and screen.is_mounted:
                screen.show()

    def action_panel(self) -> None:
        """Shows or hides the panel, whatever the width would have it be."""
        self._toggle("panel")

    def action_leave(self) -> None:
        """Leaves kvchat."""
        self.app.exit()
