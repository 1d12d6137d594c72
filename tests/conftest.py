"""Fixtures that every test may use. torch is imported inside them: the tests of the screen need none."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from kvchat.engine_process.openmp import limit_spinning

if TYPE_CHECKING:
    from kvchat.contract import Engine
    from kvchat.engine.model.loader import LoadedModel

REQUIRE_MODEL = "KVCHAT_REQUIRE_MODEL"
THREADS = 1
"""Of torch, in each process: two of them run tests."""
LONG = (
    *("test_compiled.py", "test_machine.py", "test_link.py", "test_cli.py", "test_quantize.py"),
    *("test_equalities.py", "test_shapes.py", "test_policies.py", "test_pictures.py", "test_verify.py"),
)
"""Files that take long, the longest first: what is begun last leaves the other process without work."""

# a run in the background has it ignored, and so would every program that a test starts and interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
limit_spinning()  # tests run where other things run too
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
settings.register_profile("kvchat", deadline=None, derandomize=True)
settings.load_profile("kvchat")
gc.disable()  # what is imported stays: looking for garbage in it took half of the time of collecting


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The processes take files in this order."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


def pytest_collection_finish() -> None:
    """From here on only what tests make is looked through."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    """All processes of a run share what the C++ compiler makes of the kernels."""
    real = shutil.which(os.environ.get("CXX", "g++"))
    if hasattr(config, "workerinput") or real is None or sys.platform == "win32":
        return
    from tests.support.compile_once import install

    folder = tempfile.TemporaryDirectory(prefix="kvchat-compiler-")
    config.add_cleanup(folder.cleanup)
    os.environ["CXX"] = str(install(Path(folder.name), real))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Where the real model is required, it is fetched and compiled before tests share the cores with that."""
    if os.environ.get(REQUIRE_MODEL) == "1" and not hasattr(session.config, "workerinput"):
        from kvchat.config.paths import find_paths
        from kvchat.engine.setup.prepare import prepare

        paths = find_paths()
        prepare("smollm2-135m-instruct", paths.models, lambda _progress: None, paths.compiled)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Some tests take more, and whoever loads a model: small ones are several times slower with them."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def tiny() -> LoadedModel:
    """The tiny Llama with its tokenizer."""
    from tests.support.tiny import tiny_loaded

    return tiny_loaded()


@pytest.fixture(scope="session")
def tiny_engine(tiny: LoadedModel) -> Engine:
    """One engine for the whole run: use a conversation id of your own."""
    from kvchat.engine.engine import LocalEngine

    return LocalEngine(tiny)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a model folder, for `load_model` and for `-m FOLDER`."""
    from tests.support.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The real SmolLM2 in fp32, for tests marked `model`; without it they skip, or fail where required."""
    from kvchat.config.paths import find_paths
    from kvchat.engine.model.loader import load_model
    from kvchat.engine.setup.prepare import prepare
    from kvchat.errors import KvchatError

    try:
        paths = find_paths()
        folder = prepare("smollm2-135m-instruct", paths.models, lambda _progress: None, paths.compiled)
    except KvchatError as error:
        if os.environ.get(REQUIRE_MODEL) == "1":
            pytest.fail(f"{REQUIRE_MODEL}=1, and SmolLM2 can't be had: {error}")
        pytest.skip(f"SmolLM2 can't be had: {error}")
    return load_model(folder, "smollm2-135m-instruct", precision="fp32", threads=THREADS)
