"""`kvchat doctor`: findings and their consequences."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvchat.cli import doctor
from kvchat.cli.doctor import Verdict, compiled, compiler, disk, folders, processor, terminal, weights
from kvchat.cli.main import cli
from kvchat.config.paths import find_paths
from kvchat.engine.compiled.package import make_model_folder, package_folder, refuse
from kvchat.engine.model.dtypes import weights_of
from kvchat.models.cards import DEFAULT_MODEL
from kvchat.models.resolve import MARKER


def test_every_finding_has_a_consequence(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["doctor", "--json", "--data-dir", str(tmp_path)])
    found = {finding["name"]: finding for finding in json.loads(result.stdout)}
    names = ["processor", "cores", "memory", "compiler", "libraries", "model"]
    names += ["compiled", "disk", "folders", "terminal"]
    assert list(found) == names
    assert all(finding["means"].endswith(".") and finding["found"] for finding in found.values())
    assert result.exit_code == 0
    text = CliRunner().invoke(cli, ["doctor", "--data-dir", str(tmp_path)]).stdout
    for finding in found.values():
        assert finding["name"] in text
        assert finding["means"] in text


def test_something_missing_is_exit_code_1(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["doctor", "-m", "nothing", "--data-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "✗ model      nothing" in result.stdout
    assert "There is no model 'nothing'" in result.stdout


@pytest.mark.parametrize(
    ("flags", "verdict", "words"),
    [
        ({"avx2", "avx512f", "avx512_bf16", "amx_tile"}, Verdict.GOOD, "AMX"),
        ({"avx2", "avx512f", "avx512_bf16"}, Verdict.GOOD, "computes in bf16"),
        ({"avx2"}, Verdict.SLOW, "fp32"),
        (set(), Verdict.SLOW, "no known vector instructions"),
    ],
)
def test_the_processor(flags: set[str], verdict: Verdict, words: str) -> None:
    finding = processor(flags)
    assert finding.verdict is verdict
    assert words in finding.means


def test_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)
    assert compiler().verdict is Verdict.SLOW
    assert "apt install g++" in compiler().means
    monkeypatch.setattr("shutil.which", lambda _name: "/nothing/g++")
    assert compiler().found == "/nothing/g++"


def test_a_model_is_downloaded_or_not(tmp_path: Path) -> None:
    paths = find_paths(tmp_path)
    assert "downloads it, 92.9 MB" in weights(paths, DEFAULT_MODEL).means
    folder = paths.models / DEFAULT_MODEL
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("{}")
    assert weights(paths, DEFAULT_MODEL).verdict is Verdict.GOOD


def test_compiled_code_is_missing_trusted_or_refused(tmp_path: Path) -> None:
    paths = find_paths(tmp_path / "data")
    assert compiled(paths, DEFAULT_MODEL).found == "not yet"
    folder = paths.models / DEFAULT_MODEL
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("{}")
    assert compiled(paths, DEFAULT_MODEL).found == "not yet"
    weights = weights_of(folder, "auto")
    made = make_model_folder(paths.compiled, folder)
    package_folder(paths.compiled, folder, weights).mkdir()
    finding = compiled(paths, DEFAULT_MODEL)
    assert (finding.verdict, finding.found.startswith(f"{weights}-")) == (Verdict.GOOD, True)
    made.chmod(0o777)
    finding = compiled(paths, DEFAULT_MODEL)
    assert (finding.verdict, finding.found) == (Verdict.SLOW, "can't be used")
    assert "can be written by other users" in finding.means
    made.chmod(0o700)
    refuse(package_folder(paths.compiled, folder, weights), "It has states.")
    assert compiled(paths, DEFAULT_MODEL).means == "It has states."


def test_disk_space_of_a_folder_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = find_paths(tmp_path / "not" / "yet")
    assert disk(paths).found.endswith("free")
    monkeypatch.setattr(doctor, "ENOUGH_DISK", 1 << 62)
    assert disk(paths).verdict is Verdict.SLOW


def test_a_folder_that_is_not_writable_is_reported_with_advice(tmp_path: Path) -> None:
    assert folders(find_paths(tmp_path / "not" / "yet")).verdict is Verdict.GOOD
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    finding = folders(find_paths(tmp_path / "file" / "data"))
    assert finding.verdict is Verdict.BAD
    assert finding.found == f"{tmp_path / 'file'}: Not a directory"
    assert finding.means.endswith("make it writable, or choose another with --data-dir.")
    (tmp_path / "models").touch()  # the folder itself is fine
    assert folders(find_paths(tmp_path)).found.startswith(str(tmp_path / "models"))


@pytest.mark.parametrize(
    ("environment", "columns", "verdict", "words"),
    [
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, 120, Verdict.GOOD, "with the mouse"),
        ({"TERM": "dumb"}, 80, Verdict.SLOW, "--plain"),
        ({}, 0, Verdict.SLOW, "--plain"),
        ({"TERM": "xterm", "NO_COLOR": ""}, 80, Verdict.GOOD, "NO_COLOR is set"),
        ({"TERM": "xterm"}, 40, Verdict.SLOW, "needs 60 columns"),
    ],
)
def test_the_terminal(environment: dict[str, str], columns: int, verdict: Verdict, words: str) -> None:
    finding = terminal(environment, os.terminal_size((columns, 24)))
    assert finding.verdict is verdict
    assert words in finding.means
