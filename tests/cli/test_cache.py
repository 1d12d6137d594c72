"""`kvchat cache`: listing, showing and deleting saved caches without an engine."""

import csv
import io
import json
import re
import shutil
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from kvchat.chat.store import Store
from kvchat.contract import CacheEvent, CacheEventKind
from kvchat.text import megabytes
from tests.cli import test_cli
from tests.cli.test_cli import FIRST, SECOND, Asking, Done, Shell

kvchat = test_cli.kvchat
ask = test_cli.ask

HOSTILE = "\x1b]0;owned\x07\x1b[2JTrip\n\u202eto \x9bthe\rAlps"
TAMED = "]0;owned[2JTrip to theAlps"


def bytes_on_disk(shell: Shell, conversation: str) -> int:
    return sum(path.stat().st_size for path in shell.segments(conversation))


def without_times(done: Done) -> list[str]:
    return [re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?", "WHEN", line) for line in done.out.splitlines()]


def add_events(shell: Shell, *events: CacheEvent) -> None:
    with closing(Store(shell.data / "kvchat.db")) as store:
        store.add_events(events)


# ls


def test_ls_is_sorted_by_last_use(ask: Asking) -> None:
    first, second = (ask.json(text).turn for text in (FIRST, SECOND))
    third = ask.json("-r", first["conversation"], "More").turn
    listed = ask.shell("cache", "ls")
    sizes = [bytes_on_disk(ask.shell, turn["conversation"]) for turn in (third, second)]
    tokens = [turn["stats"]["kv_tokens"] for turn in (third, second)]
    made = f"{ask.folder} · KV fp32"
    assert without_times(listed) == [
        f"{turn['conversation']}  WHEN  {megabytes(size):>9}  {held:>7,} tokens  {made}  {title}"
        for turn, size, held, title in zip((third, second), sizes, tokens, (FIRST, SECOND), strict=True)
    ]
    assert (listed.code, listed.err) == (0, f"2 caches, {megabytes(sum(sizes))}\n")


def test_ls_json_has_all_fields_and_the_title(ask: Asking) -> None:
    turn = ask.json(FIRST, "--kv", "bf16").turn
    (entry,) = json.loads(ask.shell("cache", "ls", "--json").out)
    assert (entry["conversation"], entry["title"], entry["damage"]) == (turn["conversation"], FIRST, "")
    assert entry["tokens"] == turn["stats"]["kv_tokens"]
    assert entry["bytes"] == bytes_on_disk(ask.shell, turn["conversation"]) > 0
    assert (entry["fingerprint"]["kv"], entry["fingerprint"]["weights"]) == ("bf16", "fp32")
    assert isinstance(entry["last_used"], float)


def test_ls_without_saved_caches(kvchat: Shell) -> None:
    assert kvchat("cache", "ls") == Done(
        0, "", "No caches are saved yet. Every turn of a chat saves its cache.\n"
    )
    assert kvchat("cache", "ls", "--json").out == "[]\n"


def test_ls_describes_damaged_caches_and_empty_folders(ask: Asking) -> None:
    talk = ask.json(FIRST).turn["conversation"]
    (segment,) = ask.shell.segments(talk)
    segment.write_bytes(segment.read_bytes()[:-1])
    (ask.shell.data / "kv" / "empty000").mkdir()
    lines = {line.split()[0]: line for line in ask.shell("cache", "ls").out.splitlines()}
    assert f"The saved cache {talk}/{segment.name} can't be used: it has " in lines[talk]
    assert lines[talk].endswith(FIRST)
    assert lines["empty000"].endswith("There is no segment in it.  (no conversation: gc deletes it)")
    entries = {e["conversation"]: e for e in json.loads(ask.shell("cache", "ls", "--json").out)}
    assert (entries[talk]["tokens"], entries[talk]["fingerprint"]) == (0, {})
    assert entries[talk]["damage"].startswith("The saved cache ")
    shown = ask.shell("cache", "show", talk)
    assert (shown.code, shown.out.splitlines()[0]) == (0, entries[talk]["damage"])
    assert "save" in shown.out  # the timeline is there all the same


def test_terminal_escapes_are_not_printed(ask: Asking) -> None:
    folder = ask.shell.home / "tiny\x1b[31m\nmodel"
    shutil.copytree(ask.folder, folder)
    talk = Asking(ask.shell, folder).json(HOSTILE).turn["conversation"]
    with closing(Store(ask.shell.data / "kvchat.db")) as store:
        store.save_settings(replace(store.load(talk), title=HOSTILE))
    add_events(ask.shell, CacheEvent(talk, CacheEventKind.MISS, 5, note=HOSTILE, at=1.0))
    (line,) = ask.shell("cache", "ls").out.splitlines()
    assert line.endswith(f"tiny[31m model · KV fp32  {TAMED}")
    shown = ask.shell("cache", "show", talk).out
    assert f"5 tokens                     {TAMED}\n" in shown
    assert f"  model        {ask.shell.home}/tiny[31m model\n" in shown
    printed = line + shown + ask.shell("cache", "show", talk, "--csv").out
    assert not set(printed) & set("\x1b\x07\x9b\r\u202e")
    for arguments in (("ls", "--json"), ("show", talk, "--json")):
        assert ask.shell("cache", *arguments).out.isascii()
    assert json.loads(ask.shell("cache", "ls", "--json").out)[0]["title"] == HOSTILE


# show


def test_show_prints_fingerprint_segments_and_timeline(ask: Asking) -> None:
    first, second = ask.json(FIRST, SECOND).turns
    talk = first["conversation"]
    held, all_held = (turn["stats"]["kv_tokens"] for turn in (first, second))
    lines = without_times(ask.shell("cache", "show", talk[:6]))
    assert lines[0].startswith(f"{talk}: {all_held:,} tokens, ")
    assert f"  model        {ask.folder}" in lines
    assert "  kv           fp32" in lines
    assert [line for line in lines if ".safetensors" in line] == [
        f"  000000.safetensors  from token 0: {held:,} tokens, {megabytes(1024 * held)}",
        f"  000001.safetensors  from token {held:,}: {all_held - held:,} tokens, "
        f"{megabytes(1024 * (all_held - held))}",
    ]
    kinds = [line.split()[1] for line in lines if line.startswith("WHEN")]
    assert kinds == [event.value for event in ask.shell.happened(talk)]
    assert "reuse" in kinds


def test_show_json_and_csv_match_the_store(ask: Asking) -> None:
    turn = ask.json(FIRST).turn
    talk = turn["conversation"]
    odd = CacheEvent(talk, CacheEventKind.EVICT, 7, 8, 0.5, 'turns, "oldest"; 旅行', 1.5)
    add_events(ask.shell, odd)
    events = ask.shell.events(talk)
    assert odd in events
    shown = json.loads(ask.shell("cache", "show", talk, "--json").out)
    assert shown["events"] == [asdict(event) for event in events]
    assert shown["saved"]["tokens"] == turn["stats"]["kv_tokens"]
    (segment,) = shown["saved"]["segments"]
    held = turn["stats"]["kv_tokens"]
    assert segment == {"file": "000000.safetensors", "start": 0, "rows": held, "bytes": 1024 * held}
    rows = list(csv.DictReader(io.StringIO(ask.shell("cache", "show", talk, "--csv").out)))
    assert list(rows[0]) == [field.name for field in fields(CacheEvent)]
    assert rows == [{name: str(value) for name, value in asdict(event).items()} for event in events]


def test_show_without_a_cache_prints_the_timeline(ask: Asking) -> None:
    talk = ask.json(FIRST).turn["conversation"]
    ask.shell("cache", "rm", talk)
    lines = without_times(ask.shell("cache", "show", talk))
    assert lines[0] == f"{talk}: 0 tokens, 0.0 MB on disk"
    assert [line.split()[1] for line in lines[1:]] == ["save"]
    assert json.loads(ask.shell("cache", "show", talk, "--json").out)["saved"]["segments"] == []


# rm


def test_rm_deletes_the_cache_but_not_the_conversation(ask: Asking) -> None:
    gone, kept = (ask.json(text).turn["conversation"] for text in (FIRST, SECOND))
    saved, size = ask.shell.saved(gone), bytes_on_disk(ask.shell, gone)
    removed = ask.shell("cache", "rm", gone[:6], gone)
    assert removed == Done(0, "", f"1 cache deleted; {megabytes(size)} freed.\n")
    assert {path.parent.name for path in ask.shell.segments()} == {kept}
    assert ask.shell.saved(gone) == saved
    again = ask.json("-r", gone, "More").stats
    assert (again["restored_tokens"], again["reuse_note"]) == (0, "not read since the engine started")


def test_rm_all_deletes_all_caches_but_no_conversation(ask: Asking) -> None:
    talks = [ask.json(text).turn["conversation"] for text in (FIRST, SECOND)]
    assert ask.shell("cache", "rm", "--all").err.startswith("2 caches deleted; ")
    assert ask.shell.segments() == []
    assert [len(ask.shell.saved(talk).messages) for talk in talks] == [2, 2]
    assert ask.shell("cache", "rm", "--all").err.startswith("0 caches deleted; 0.0 MB")


def save_folders(shell: Shell, *names: str) -> list[Path]:
    """Creates folders that look like saved caches."""
    folders = [shell.data / "kv" / name for name in names]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "000000.safetensors").write_bytes(b"\0" * 1_000_000)
    return folders


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("show", "zzz"), "No conversation starts with 'zzz'. `kvchat sessions` lists them."),
        (("show", ""), "No conversation starts with ''. `kvchat sessions` lists them."),
        (("rm", "zzz"), "No saved cache begins with 'zzz'. `kvchat cache ls` lists them."),
        (("rm", ""), "No saved cache begins with ''. `kvchat cache ls` lists them."),
        (("rm", "aaa", "zzz"), "No saved cache begins with 'zzz'. `kvchat cache ls` lists them."),
        (("rm", "../data"), "No saved cache begins with '../data'. `kvchat cache ls` lists them."),
        (("rm", "a"), "2 saved caches begin with 'a'. `kvchat cache ls` lists them."),
        (("rm",), "Which cache? `kvchat cache ls` lists them; --all deletes every one."),
    ],
)
def test_rm_rejects_unknown_and_ambiguous_prefixes(
    kvchat: Shell, arguments: tuple[str, ...], sentence: str
) -> None:
    folders = save_folders(kvchat, "aaa00000", "abb00000")
    assert kvchat("cache", *arguments).complaint == sentence
    assert all(folder.is_dir() for folder in folders)


# gc


def test_gc_deletes_orphaned_caches_and_partial_files(ask: Asking) -> None:
    kept, gone = (ask.json(text).turn["conversation"] for text in (FIRST, SECOND))
    with closing(Store(ask.shell.data / "kvchat.db")) as store:
        store.delete(gone)
    half_written = ask.shell.data / "kv" / kept / "000001.safetensors.tmp"
    before = {path: path.read_bytes() for path in ask.shell.segments(kept)}
    half_written.write_bytes(b"\0" * 2_000_000)
    freed = bytes_on_disk(ask.shell, gone) + 2_000_000
    assert ask.shell("cache", "gc") == Done(0, "", f"{megabytes(freed)} freed.\n")
    assert {path: path.read_bytes() for path in ask.shell.segments()} == before
    assert ask.shell("cache", "gc").err == "0.0 MB freed.\n"
    assert ask.json("-r", kept, "More").stats["restored_tokens"] > 0


def test_gc_without_caches_creates_nothing(kvchat: Shell) -> None:
    assert kvchat("cache", "gc") == Done(0, "", "0.0 MB freed.\n")
    assert kvchat.files() == []
