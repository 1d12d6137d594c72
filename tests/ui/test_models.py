"""Ctrl+L: which model answers, what is here, and what is fetched."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from textual.widgets import OptionList, Static

from kvchat.chat.model_choice import ModelChoice, ModelShelf, progress_of, switch_price
from kvchat.chat.port import EngineFactory, OnEvent
from kvchat.config.settings import sampling_of
from kvchat.models.cards import DEFAULT_MODEL, find_card, load_cards
from kvchat.models.resolve import MARKER
from kvchat.models.staging import Progress
from kvchat.ui.screens.models import ModelScreen, facts_line, progress_line, state_words
from tests.support.screen_driver import Chat, running, saved_conversation, session_over
from tests.support.scripted_engine import ScriptedEngine

OTHER = "qwen3-0.6b"
TITLE = "SmolLM2 135M Instruct"
PULL = "import json, sys, time\n"
REPORTS = PULL + "print(json.dumps({'stage': 'download', 'done': 25, 'total': 100}), flush=True)\n"


class Shop:
    """A folder of models, and the engines that were made of them."""

    def __init__(self, folder: Path, script: str = "") -> None:
        self.folder = folder
        self.opened: list[tuple[str, str]] = []
        self.engines: list[ScriptedEngine] = []
        self._script = script

    def put(self, name: str, size: int = 1_000_000) -> None:
        """Makes a model look as if it were here."""
        made = self.folder / name
        made.mkdir(parents=True)
        (made / MARKER).write_text("{}")
        (made / "model.safetensors").write_bytes(b"\0" * size)

    def shelf(self) -> ModelShelf:
        return ModelShelf(self.folder, self._open, self._pull)

    def _open(self, folder: Path, name: str) -> EngineFactory:
        self.opened.append((folder.name, name))

        def attach(on_event: OnEvent) -> ScriptedEngine:
            self.engines.append(ScriptedEngine())
            return self.engines[-1].attach(on_event)

        return attach

    def _pull(self, name: str) -> Sequence[str]:
        return [sys.executable, "-c", self._script, name]


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path / "models")


async def open_at(chat: Chat, name: str) -> OptionList:
    """Opens the picker and marks a model."""
    await chat.press("ctrl+l")
    await chat.dialog(ModelScreen)
    listed = chat.app.screen.query_one(OptionList)
    listed.highlighted = listed.get_option_index(name)
    await chat.pilot.pause()
    return listed


def card(listed: OptionList, name: str) -> str:
    return str(listed.get_option(name).prompt)


async def test_the_picker_lists_every_card_with_size_licence_and_whether_it_is_here(shop: Shop) -> None:
    shop.put(DEFAULT_MODEL)
    shop.put("gguf-mine-0123456789ab")
    async with running(shelf=shop.shelf()) as chat:
        listed = await open_at(chat, DEFAULT_MODEL)
        for each in load_cards():
            assert each.title in card(listed, each.name)
            assert each.licence in card(listed, each.name)
            assert f"context {each.context:,}" in card(listed, each.name)
        assert "● here, 1.0 MB" in card(listed, DEFAULT_MODEL)
        assert "○ to fetch, about 3.44 GB" in card(listed, "qwen3-1.7b")
        assert "● here" in card(listed, "gguf-mine-0123456789ab")


async def test_choosing_a_model_says_the_price_and_starts_the_engine_with_it(shop: Shop) -> None:
    shop.put(DEFAULT_MODEL)
    async with running(shelf=shop.shelf()) as chat:
        await chat.ask("First")
        await open_at(chat, DEFAULT_MODEL)
        price = str(chat.app.screen.query_one("#price", Static).content)
        assert "The engine starts again with it. This conversation, 6 tokens, is encoded anew" in price
        await chat.press("enter")
        await chat.until(lambda: shop.engines and shop.engines[0].starts, "the new engine starts")
        assert shop.opened == [(DEFAULT_MODEL, DEFAULT_MODEL)]
        assert chat.engine._state == "closed"
        await chat.until(lambda: f"ready · {TITLE}" in chat.status(), "the status says so")
        await chat.send("Second")
        await chat.until(lambda: shop.engines[0].requests, "the new engine is asked")
        await chat.until_idle()
        assert chat.store.load(chat.session.current.id).model == DEFAULT_MODEL
        assert chat.session.current.sampling == sampling_of(find_card(DEFAULT_MODEL))
        await chat.press("ctrl+n")
        assert chat.session.current.model == DEFAULT_MODEL


async def test_slash_model_switches_by_name_or_folder(shop: Shop, tiny_folder: Path) -> None:
    async with running(shelf=shop.shelf()) as chat:
        await chat.send(f"/model {tiny_folder}")
        await chat.until(lambda: shop.opened == [("tiny", str(tiny_folder))], "the engine is made of it")
        await chat.until(lambda: "tiny" in chat.status(), "the status says so")
        await chat.send(f"/model {tiny_folder}")
        await chat.until_said("tiny answers already.")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (OTHER, f"{OTHER} is not here yet. Ctrl+L or `kvchat models pull` fetches it."),
        ("nothing", "There is no model 'nothing'"),
    ],
)
async def test_slash_model_refuses_what_is_not_here(
    shop: Shop, name: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    async with running(shelf=shop.shelf()) as chat:
        await chat.send(f"/model {name}")
        await chat.until_said(words)
        assert shop.opened == []


async def test_an_answer_under_way_is_not_taken_from_its_model(shop: Shop) -> None:
    shop.put(DEFAULT_MODEL)
    engine = ScriptedEngine()
    engine.answers("Half", engine.gate())
    async with running(engine, shelf=shop.shelf()) as chat:
        await chat.send("Go")
        await chat.until_drawn("Half")
        await chat.send(f"/model {DEFAULT_MODEL}")
        await chat.until_said("An answer is still being written")
        assert shop.opened == []


async def test_the_old_engine_says_nothing_more_once_it_is_replaced(shop: Shop) -> None:
    shop.put(DEFAULT_MODEL)
    async with running(shelf=shop.shelf()) as chat:
        await chat.send(f"/model {DEFAULT_MODEL}")
        await chat.until(lambda: f"ready · {TITLE}" in chat.status(), "the new one is ready")
        chat.engine.die("The old one.")
        await chat.pilot.pause()
        assert chat.notices() == []
        assert "ready" in chat.status()


async def test_a_conversation_held_with_another_model_says_so_when_it_is_opened(shop: Shop) -> None:
    shop.put(DEFAULT_MODEL)
    session = session_over()
    saved = saved_conversation(session._store, ("user", "Hi"), ("assistant", "Ho"))
    async with running(session=session, shelf=shop.shelf()) as chat:
        await chat.send(f"/model {DEFAULT_MODEL}")
        await chat.until(lambda: f"ready · {TITLE}" in chat.status(), "the new one is ready")
        session.open(saved.id)
        await chat.screen.controller.opened()
        await chat.until_said(f"This conversation was held with scripted; {TITLE} goes on")


async def test_a_download_shows_its_progress_in_place_and_can_be_cancelled(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "models", REPORTS + "time.sleep(600)")
    async with running(shelf=shop.shelf()) as chat:
        listed = await open_at(chat, OTHER)
        await chat.press("enter")
        await chat.until(lambda: "25%  downloading" in card(listed, OTHER), "the progress is shown")
        await chat.press("escape")
        listed = await open_at(chat, OTHER)
        assert "25%  downloading" in card(listed, OTHER)
        await chat.press("c")
        await chat.until_said("the download was cancelled")
        await chat.until(lambda: "○ to fetch" in card(listed, OTHER), "it can be fetched again")


async def test_a_finished_download_is_here(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "models", REPORTS)
    async with running(shelf=shop.shelf()) as chat:
        listed = await open_at(chat, DEFAULT_MODEL)
        shop.put(DEFAULT_MODEL)
        await chat.press("enter")
        await chat.until_said(f"{TITLE} is here. Ctrl+L lets it answer.")
        await chat.until(lambda: "● here" in card(listed, DEFAULT_MODEL), "the card says so")


async def test_a_failed_download_says_why_and_the_reason_stays(tmp_path: Path) -> None:
    script = REPORTS + "sys.exit('kvchat: No network [/b] \\x1b[31m.')"
    shop = Shop(tmp_path / "models", script)
    async with running(shelf=shop.shelf()) as chat:
        listed = await open_at(chat, OTHER)
        await chat.press("enter")
        await chat.until_said("No network [/b] [31m.")
        await chat.until(lambda: "✗ No network [/b] [31m." in card(listed, OTHER), "the card says why")


async def test_leaving_ends_a_download(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "models", REPORTS + "time.sleep(600)")
    async with running(shelf=shop.shelf()) as chat:
        listed = await open_at(chat, OTHER)
        await chat.press("enter")
        await chat.until(lambda: "25%" in card(listed, OTHER), "it is under way")
        models = chat.screen.controller.models
        assert models
        (child,) = models._children.values()
    assert await child.wait() != 0


async def test_without_a_shelf_there_is_nothing_to_choose() -> None:
    async with running() as chat:
        await chat.press("ctrl+l")
        await chat.until_said("No other model can be had here.")


def test_the_price_is_estimated_from_the_sizes_where_both_are_known() -> None:
    choice = ModelChoice(OTHER, "Qwen3 0.6B", parameters=596_000_000)
    price = switch_price(choice, DEFAULT_MODEL, 1000, 500.0)
    assert price.endswith("read again, once, about 8.9 s (an estimate from both sizes).")
    assert "about" not in switch_price(choice, "my/own", 1000, 500.0)
    assert "about" not in switch_price(choice, DEFAULT_MODEL, 1000, 0.0)
    assert switch_price(choice, DEFAULT_MODEL, 0, 500.0) == "The engine starts again with it."


@pytest.mark.parametrize(
    ("line", "progress"),
    [
        (b'{"stage": "download", "done": 1, "total": 4}\n', Progress("download", 1, 4)),
        (b'{"stage": "save", "done": 0, "total": null}\n', Progress("save", 0, None)),
        (b"no json\n", None),
        (b"[]\n", None),
        (b'{"stage": 1}\n', None),
    ],
)
def test_a_childs_lines_are_read(line: bytes, progress: Progress | None) -> None:
    assert progress_of(line) == progress


def test_words_of_a_card() -> None:
    here = ModelChoice(
        "a", "A", licence="MIT", parameters=999_885_952, context=8192, here=True, bytes=2_000_000
    )
    assert facts_line(here) == "1.0B parameters · context 8,192 · MIT"
    assert state_words(here, answers=False) == "● here, 2.0 MB"
    assert state_words(here, answers=True) == "● answers now, 2.0 MB"
    assert state_words(ModelChoice("b", "B"), answers=False) == "○ to fetch"
    assert progress_line(None) == "starting …"
    assert progress_line(Progress("save", 0, None)) == "saving …"
    assert progress_line(Progress("unpack", 50_000_000, 100_000_000)).endswith(
        " 50%  unpacking  50.0 MB of 100.0 MB"
    )
