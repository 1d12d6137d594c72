"""Makes a model ready and loads it into this process: what `run`, `verify` and `bench` begin with.

Imports torch only when it is called.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvchat.config.paths import Paths
from kvchat.engine_process.openmp import wait_politely

if TYPE_CHECKING:
    from kvchat.engine.model.loader import LoadedModel


def load_ready(name: str, paths: Paths, given: Mapping[str, Any]) -> "LoadedModel":
    """Makes the model ready if it isn't, with progress on stderr, and loads it into this process.

    Raises:
        KvchatError: there is no such model, or it can't be had or run.
    """
    wait_politely()
    from kvchat.cli.progress import reported
    from kvchat.engine.model.loader import load_model
    from kvchat.engine.setup.prepare import prepare

    with reported(name) as report:
        folder = prepare(name, paths.models, report, paths.compiled)
    return load_model(
        folder,
        name,
        precision=given["precision"],
        threads=given["threads"],
        context=given["context"],
        device=given["device"],
        compiled=paths.compiled,
    )
