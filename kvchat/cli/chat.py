"""The parts that `kvchat chat` is put together from: a model that is ready, its engine, and a front end."""

import gc
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvchat.chat.model_choice import ModelShelf, title_of
from kvchat.config.paths import Paths
from kvchat.engine_process.client import LinkedEngine
from kvchat.engine_process.server import EngineOptions
from kvchat.errors import KvchatError
from kvchat.models.resolve import is_prepared

if TYPE_CHECKING:
    from kvchat.chat.port import EngineFactory
    from kvchat.chat.session import Session
    from kvchat.ui.preferences import Preferences

OpenSession = Callable[[], "Session"]


def ready_folder(name: str, paths: Paths, given: Mapping[str, Any]) -> Path:
    """The folder of a model; one that is not here, or not compiled, is made ready in a process of its own.

    Ends the program where that fails; the process has said why.
    """
    folder = is_prepared(name, paths.models)
    if folder is None or (given["precision"] == "auto" and lacks_step(folder, paths)):
        from kvchat.cli.models import pull_as_child

        if code := pull_as_child(name, given["data_dir"]):
            sys.exit(code)
        folder = is_prepared(name, paths.models)
    assert folder is not None
    return folder


def lacks_step(folder: Path, paths: Paths) -> bool:
    """Whether a model that is here waits to be compiled, perhaps again."""
    from kvchat.engine.compiled.package import wants_step

    return wants_step(paths.compiled, folder)


def engine_options(folder: Path, name: str, paths: Paths, given: Mapping[str, Any]) -> EngineOptions:
    """How the engine is started, by the flags."""
    from kvchat.cli.main import draft_folder

    return EngineOptions(
        folder,
        name,
        paths.logs / f"engine-{os.getpid()}.log",
        given["precision"],
        given["threads"],
        given["context"],
        given["device"],
        given["kv_budget"],
        None if given["private"] else paths.kv,
        given["kv_disk"],
        given["draft"],
        draft_folder(given["draft"], paths),
        60 * given["unload_after"],
        paths.compiled,
    )


def model_shelf(options: EngineOptions, paths: Paths, given: Mapping[str, Any]) -> ModelShelf:
    """The models that can be chosen, with engines like the one of `options`."""

    def engine_of(folder: Path, name: str) -> "EngineFactory":
        wanted = replace(options, folder=folder, name=name)
        return lambda on_event: LinkedEngine(wanted, on_event)

    def fetching(wanted: str) -> list[str]:
        from kvchat.cli.models import pull_command

        return pull_command(wanted, given["data_dir"])

    return ModelShelf(paths.models, engine_of, fetching, paths.compiled)


def talk_in_lines(opened: OpenSession, options: EngineOptions, shelf: ModelShelf, begin_with: str) -> int:
    """Chats line by line; returns the exit code."""
    from kvchat.ui.plain.loop import talk

    factory = shelf.open_engine(options.folder, options.name)
    return talk(opened(), factory, title_of(options.name), shelf, begin_with)


def talk_on_screen(
    opened: OpenSession,
    options: EngineOptions,
    shelf: ModelShelf,
    preferences: "Preferences",
    begin_with: str,
) -> int:
    """Chats on the screen; returns the exit code."""
    gc.disable()  # what is made before the first paint stays, and looking for garbage in it takes a while
    from kvchat.ui.app import ChatApp

    def open_painted() -> "Session":
        gc.freeze()
        gc.enable()
        return opened()

    factory = shelf.open_engine(options.folder, options.name)
    title = title_of(options.name)
    app = ChatApp(open_painted, factory, model=title, preferences=preferences, shelf=shelf)
    if begin_with:
        app.begin_with(begin_with)
    return app.run_in_terminal()


def clean_up(options: EngineOptions, paths: Paths) -> None:
    """Removes the log of an engine that ended in order, and caches of conversations that are gone."""
    from kvchat.cli.cache import collect_garbage

    options.log_file.unlink(missing_ok=True)
    with suppress(KvchatError, OSError):  # the next chat tries again
        collect_garbage(paths)
