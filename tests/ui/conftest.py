"""The screen's tests run without a model: a scripted engine answers."""

import gc
from collections.abc import Iterator

import pytest
from textual.css.model import RuleSet
from textual.css.stylesheet import Stylesheet

from kvchat.config.settings import SETTINGS


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the developer's own terminal is set to changes no picture."""
    for name in ("NO_COLOR", "TEXTUAL", "TEXTUAL_THEME", "TEXTUAL_ANIMATIONS"):
        monkeypatch.delenv(name, raising=False)
    for setting in SETTINGS:
        monkeypatch.delenv(setting.variable, raising=False)


@pytest.fixture(autouse=True)
def clipboard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was put into the system's clipboard; the developer's own one stays as it is."""
    filled: list[str] = []

    def copied(text: str) -> bool:
        filled.append(text)
        return True

    monkeypatch.setattr("kvchat.ui.app.fill_system_clipboard", filled.append)
    monkeypatch.setattr("kvchat.ui.plain.commands.copied", copied)
    return filled


@pytest.fixture(scope="session", autouse=True)
def _style_sheets_parsed_once() -> Iterator[None]:
    """Every app has the same ones; the rules that come of them are only read."""
    parse, parsed = Stylesheet._parse_rules, dict[object, list[RuleSet]]()

    def parse_once(sheet: Stylesheet, *text: object, **how: object) -> list[RuleSet]:
        key = frozenset(sheet._variables.items()), text, frozenset(how.items())
        if key not in parsed:
            parsed[key] = parse(sheet, *text, **how)  # type: ignore[arg-type]
        return parsed[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stylesheet, "_parse_rules", parse_once)
        yield


@pytest.fixture(scope="module", autouse=True)
def _rare_collections() -> Iterator[None]:
    """Every app makes many small objects: looking for garbage among them took a quarter of the time."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
