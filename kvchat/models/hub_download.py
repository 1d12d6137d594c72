"""Downloads a model from the Hugging Face hub into the hub's cache, with progress.

huggingface_hub runs in a child process (`python -m kvchat.models.hub_download REPO`) that prints
`Progress N of M` and is killed when this process is interrupted. Partial downloads stay in the cache, and the
next download continues them.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path

from kvchat.errors import KvchatError
from kvchat.models.resolve import ADAPTER, PICKLES, adapter_refusal, hub_cache, hub_folder, hub_snapshot
from kvchat.models.staging import FULL, HEARTBEAT_S, SPARE_BYTES, Report, require_space
from kvchat.models.wheel_download import follow

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
# other formats of the same weights: in subfolders, and `consolidated*` at the top
HUB_FILES_REFUSED = ("*/*", "consolidated*")


def fetch_hub(repo: str, report: Report) -> Path:
    """Downloads `repo` (`organisation/name`) into the hub's cache and returns the snapshot folder.

    Respects HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and so on. Takes safetensors only, never pickles or code.

    Raises:
        KvchatError: no such repository, no access, no safetensors, no connection, or no room.
    """
    # the library's own progress bars would mix with our lines; the child must import this same package
    modules = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": modules}
    _, said = follow([sys.executable, "-P", "-m", "kvchat.models.hub_download", repo], environment, report)
    outcome, _, rest = (said or [""])[-1].partition(" ")
    if outcome == "Refused":
        raise KvchatError(rest)
    if outcome != "Fetched":
        raise KvchatError(f"Fetching {repo} failed: {(said or ['the download printed no reason'])[-1]}")
    snapshot = hub_snapshot(repo)
    if snapshot is None:
        raise KvchatError(f"{repo} is not a model kvchat can load: it lacks config.json or a tokenizer.")
    return snapshot


def _serve_as_child(repo: str) -> None:
    """The child process of `fetch_hub`: prints progress lines, then one line with the result."""
    try:
        _download_snapshot(repo)
        outcome = "Fetched"
    except KvchatError as refusal:
        outcome = f"Refused {refusal}"
    # the library and its HTTP client raise dozens of types; the parent shows a sentence
    except Exception as error:
        outcome = f"Refused {explain_hub_error(error, repo)}"
    _say(" ".join(outcome.split()))


def _download_snapshot(repo: str) -> None:
    from huggingface_hub import HfApi, snapshot_download

    files = HfApi().model_info(repo, files_metadata=True).siblings or []
    if any(file.rfilename == ADAPTER for file in files):
        raise KvchatError(adapter_refusal(repo))
    wanted = [file for file in files if _is_wanted(file.rfilename)]
    _refuse_without_safetensors(repo, [file.rfilename for file in files], [file.rfilename for file in wanted])
    blobs = {(file.lfs.sha256 if file.lfs else file.blob_id) or "": file.size or 0 for file in wanted}
    present = _bytes_in(hub_folder(repo) / "blobs", blobs)
    hub_cache().mkdir(parents=True, exist_ok=True)
    require_space(hub_cache(), sum(blobs.values()) - present + SPARE_BYTES)
    threading.Thread(target=_print_progress, args=(hub_folder(repo) / "blobs", blobs), daemon=True).start()
    snapshot_download(repo, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_FILES_REFUSED))


def _is_wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in HUB_FILES) and not any(
        fnmatch(name, pattern) for pattern in HUB_FILES_REFUSED
    )


def _refuse_without_safetensors(repo: str, files: Iterable[str], wanted: Iterable[str]) -> None:
    if any(name.endswith(".safetensors") for name in wanted):
        return
    endings = tuple(pattern.removeprefix("*") for pattern in PICKLES)
    pickled = any(name.endswith(endings) for name in files)
    reason = "its weights are pickles, which kvchat does not open" if pickled else "kvchat loads nothing else"
    raise KvchatError(f"{repo} has no *.safetensors files: {reason}.")


def _print_progress(folder: Path, blobs: Mapping[str, int]) -> None:
    total = sum(blobs.values())
    while True:
        _say(f"Progress {min(_bytes_in(folder, blobs), total)} of {total}")
        time.sleep(HEARTBEAT_S / 2)


def _bytes_in(folder: Path, blobs: Mapping[str, int]) -> int:
    """Downloaded bytes of `blobs` (id → size), with those of unfinished files (`<id>.incomplete`)."""
    count = 0
    # files are created and renamed meanwhile
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name.partition(".")[0] in blobs:
                count += path.stat().st_size
    return count


def _say(line: str) -> None:
    try:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # the parent has ended; only this stops the library's threads
        os._exit(1)


def explain_hub_error(error: Exception, repo: str) -> str:
    """One sentence: what failed for `repo`, and what to do about it."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo}"
        return f"{repo} is gated: accept its licence at {page}, then set HF_TOKEN to a token of that account."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"The hub has no model {repo}, or it is private: check the spelling, or set HF_TOKEN."
    if constants.HF_HUB_OFFLINE:
        return f"{repo} is not complete in the hub's cache ({hub_cache()}), and HF_HUB_OFFLINE is set."
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if isinstance(error, OSError) and error.errno in FULL:
        return f"The disk filled up while {repo} was fetched into {hub_cache()}. Free some space."
    if isinstance(error, errors.HfHubHTTPError):
        return f"The hub refused to give {repo}: {reason}"
    # the HTTP client is httpx or its successor, depending on the version of the library
    unreachable = isinstance(error, ConnectionError | errors.LocalEntryNotFoundError)
    if unreachable or type(error).__module__.startswith("httpx"):
        return f"The hub could not be reached to fetch {repo}: {reason}"
    return f"{repo} could not be fetched: {type(error).__name__}: {reason}"


if __name__ == "__main__":
    _serve_as_child(sys.argv[1])
