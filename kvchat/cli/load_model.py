"""Prepares a model and loads it into this process, for `run`, `verify` and `bench`.

Must import torch only inside the function: the command line imports this module at start.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvchat.config.paths import Paths
from kvchat.engine_process.openmp import limit_spinning

if TYPE_CHECKING:
    from kvchat.engine.model.loader import LoadedModel


def load_ready(name: str, paths: Paths, given: Mapping[str, Any]) -> "LoadedModel":
    """Downloads, converts and compiles the model if necessary, with progress on stderr, and loads it.

    Args:
        given: the values of the flags `precision`, `threads`, `context` and `device`.

    Raises:
        KvchatError: there is no such model, or it can't be downloaded or run.
    """
    limit_spinning()
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
