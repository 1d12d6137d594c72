"""What every test of the engine runs on: the tiny Llama always, the real SmolLM2 where it can be had."""

from typing import cast

import pytest

from kvchat.engine.engine import LocalEngine
from kvchat.engine.load import LoadedModel


@pytest.fixture(scope="session", params=["tiny", pytest.param("smollm2", marks=pytest.mark.model)])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    """A model in fp32."""
    return cast("LoadedModel", request.getfixturevalue(request.param))


@pytest.fixture
def engine(loaded: LoadedModel) -> LocalEngine:
    """An engine that holds nothing yet."""
    return LocalEngine(loaded)
