"""Exit codes of commands, and the translation of errors into one sentence."""

import errno
import os
import signal
import sqlite3
from pathlib import Path

import click
import pytest
from jinja2 import TemplateError
from safetensors import SafetensorError

from kvchat.errors import KvchatError, as_sentence, cause, owner_hint, translating
from kvchat.system.exit_status import exit_status

Printed = pytest.CaptureFixture[str]


def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KvchatError("It is so."), 1, "kvchat: It is so.\n"),
        (OSError(errno.ENOSPC, "Full"), 1, "kvchat: The output can't be written: Full.\n"),
        (PermissionError(errno.EACCES, "Denied", "/x/y"), 1, "kvchat: /x/y: Denied.\n"),
        (sqlite3.OperationalError("disk I/O error"), 1, "kvchat: Disk I/O error.\n"),
        (SafetensorError("cut\nshort"), 1, "kvchat: Cut short.\n"),
        (TemplateError("no"), 1, "kvchat: No.\n"),
        (MemoryError(), 1, "kvchat: There is not enough memory.\n"),
        (BrokenPipeError(), 141, ""),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (click.Abort(), 130, "Interrupted.\n"),
        (SystemExit(3), 3, ""),
        (SystemExit(True), 1, ""),
        (click.UsageError("Wrong."), 2, "Error: Wrong.\n"),
    ],
)
def test_each_error_has_an_exit_code_and_a_message(
    error: BaseException, code: int, words: str, capsys: Printed
) -> None:
    assert exit_status(lambda: raising(error)) == code
    assert capsys.readouterr() == ("", words)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_gives_its_exit_code_even_if_a_library_replaces_the_exception(
    sent: signal.Signals, capsys: Printed
) -> None:
    def importing() -> None:
        try:
            os.kill(os.getpid(), sent)
        except BaseException as error:
            raise ImportError("half imported") from error

    before = signal.getsignal(sent)
    assert exit_status(lambda: os.kill(os.getpid(), sent)) == 128 + sent
    assert exit_status(importing) == 128 + sent
    assert signal.getsignal(sent) is before
    assert capsys.readouterr().err in ("", "Interrupted.\n")


def test_a_defect_keeps_its_traceback() -> None:
    assert cause(TypeError("x")) is None
    assert as_sentence(TypeError("x")) == "TypeError: x"
    with pytest.raises(TypeError):
        exit_status(lambda: raising(TypeError("x")))
    with pytest.raises(TypeError), translating("It failed"):
        raise TypeError("x")


def test_translating_adds_what_failed_to_the_cause() -> None:
    with pytest.raises(KvchatError, match=r"^It failed: /x: Gone\.$"), translating("It failed"):
        raise FileNotFoundError(errno.ENOENT, "Gone", "/x")


def test_owner_hint_names_the_owner_of_another_users_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert owner_hint(tmp_path) == ""
    owner = tmp_path.lstat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert f"({tmp_path} belongs to " in owner_hint(tmp_path / "not" / "there")
