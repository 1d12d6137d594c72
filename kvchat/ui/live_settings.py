"""A changed setting, as far as it holds before the next start."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from textual.app import App

from kvchat.chat.cache_commands import set_budget
from kvchat.config.settings import Holds, Setting, Value, sampling_of, shown
from kvchat.contract import CacheMode, EvictionPolicy, KVPrecision
from kvchat.models.cards import find_card
from kvchat.ui.redraw_rate import keep_still
from kvchat.ui.themes import DARK

if TYPE_CHECKING:
    from kvchat.chat.controller import ChatController


class Tuning:
    """Knows the app's looks, the session's defaults and the budget; the file was written before."""

    def __init__(self, app: App[Any], controller: "ChatController") -> None:
        self._app = app
        self._controller = controller

    def changed(self, setting: Setting, value: Value | None) -> None:
        """Does what can be done at once."""
        match setting.name:
            case "theme":
                self._app.theme = shown(value or DARK.name)
            case "reduced-motion":
                keep_still(self._app, bool(value))
            case "kv-budget" if value is not None:
                set_budget(self._controller, shown(value))
            case _ if setting.holds is Holds.NEW:
                self._set_default(setting, value)

    def _set_default(self, setting: Setting, value: Value | None) -> None:
        defaults = self._controller.session.defaults
        match setting.name:
            case "system":
                defaults = replace(defaults, system_prompt=shown(value or ""))
            case "cache":
                defaults = replace(defaults, mode=CacheMode(shown(value or CacheMode.ON)))
            case "kv":
                defaults = replace(defaults, kv=KVPrecision(shown(value or KVPrecision.AUTO)))
            case "policy":
                defaults = replace(defaults, policy=EvictionPolicy(shown(value or EvictionPolicy.TURNS)))
            case _:
                card = sampling_of(find_card(defaults.model))
                given = getattr(card, setting.key) if value is None else value
                sampling = replace(defaults.sampling, **{setting.key: given})  # type: ignore[arg-type]
                defaults = replace(defaults, sampling=sampling)
        self._controller.session.defaults = defaults
