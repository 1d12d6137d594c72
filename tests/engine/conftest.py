"""Fixtures of the engine tests: the tiny Llama, and the real SmolLM2 where it is available."""

import os
from collections.abc import Iterator
from typing import cast

import pytest

from kvchat.engine.compiled.build import compile_kernels
from kvchat.engine.compiled.package import compiler
from kvchat.engine.compiled.runner import KERNELS, load_kernels
from kvchat.engine.engine import LocalEngine
from kvchat.engine.model.loader import LoadedModel
from kvchat.engine.speculative import PromptLookup
from tests.conftest import REQUIRE_MODEL


@pytest.fixture(scope="session")
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    """The tiny model in fp32; where a test is marked `on_both_models`, the real one too."""
    return cast("LoadedModel", request.getfixturevalue(getattr(request, "param", "tiny")))


@pytest.fixture
def engine(loaded: LoadedModel) -> LocalEngine:
    """An engine that holds nothing yet."""
    return LocalEngine(loaded)


@pytest.fixture(autouse=True, scope="module")
def no_drafts() -> Iterator[None]:
    """One token for each pass of the model, which many tests count; `test_draft` has it otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptLookup, "propose", lambda *_: [])
        yield


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The operators of `kernels/ops.cpp`, compiled for this machine."""
    need_compiler()
    folder = tmp_path_factory.mktemp("kernels")
    compile_kernels(folder / KERNELS)
    load_kernels(folder)


def need_compiler() -> None:
    """Skips, or fails where everything is required."""
    if not compiler():
        give_up = pytest.fail if os.environ.get(REQUIRE_MODEL) == "1" else pytest.skip
        give_up("a C++ compiler is needed: apt-get install g++")
