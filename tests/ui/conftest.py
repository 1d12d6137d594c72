"""The screen's tests run without a model: a scripted engine answers."""

import gc
from collections.abc import Iterator

import pytest

from kvchat.settings import SETTINGS


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
    monkeypatch.setattr("kvchat.ui.plain_acts.copied", copied)
    return filled


@pytest.fixture(scope="module", autouse=True)
def _rare_collections() -> Iterator[None]:
    """Every app makes many small objects: looking for garbage among them took a quarter of the time."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
