"""The command line: output streams, precedence of settings, error messages, exit codes."""

import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from kvchat.chat.conversation import Conversation, Message
from kvchat.chat.store import Store
from kvchat.cli.main import main
from kvchat.config.paths import find_paths
from kvchat.contract import CacheEvent, CacheEventKind, CacheMode, EvictionPolicy, KVPrecision
from kvchat.engine.model.loader import LoadedModel
from kvchat.models.resolve import compiled_folder, is_prepared

STATS = {
    "cache_mode",
    "prompt_tokens",
    "reused_tokens",
    "prefilled_tokens",
    "generated_tokens",
    "evaluated_tokens",
    "ttft_s",
    "prefill_s",
    "decode_s",
    "prefill_tok_s",
    "decode_tok_s",
    "kv_tokens",
    "kv_bytes",
    "kv_used_bytes",
    "kv_dtype",
    "weights_dtype",
    "weights_bytes",
    "path",
    "rss_bytes",
    "context_limit",
    "finish_reason",
    "reuse_note",
    "evicted_tokens",
    "restored_tokens",
    "restore_s",
    "drafted_tokens",
    "accepted_tokens",
}
FIRST, SECOND = "Which pass is open?", "How long is the drive?"
LONG = "Which pass over the mountains is open in May? " * 3
SMALL = ("--context", "128")
"""Context limit for two turns with that question."""
PATIENCE_S = 120


@dataclass(frozen=True)
class Done:
    """The result of a command."""

    code: int
    out: str
    err: str

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The objects that `--json` printed."""
        assert self.code == 0, self.err
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def turn(self) -> dict[str, Any]:
        (turn,) = self.turns
        return turn

    @property
    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.turn["stats"]
        return stats

    @property
    def complaint(self) -> str:
        """The one sentence of a failure."""
        assert (self.code, self.out) == (1, ""), self
        (line,) = self.err.splitlines()
        assert line.startswith("kvchat: ")
        return line.removeprefix("kvchat: ")


class Terminal(io.StringIO):
    """Standard input of a terminal without input."""

    def isatty(self) -> bool:
        return True


@dataclass
class Shell:
    """Runs `kvchat` in this process, with its own folders and environment."""

    home: Path
    monkeypatch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str | Path, stdin: io.StringIO | str | None = "") -> Done:
        self.capture.readouterr()
        given = io.StringIO(stdin) if isinstance(stdin, str) else stdin
        with self.monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["kvchat", *map(str, arguments)])
            patch.setattr("sys.stdin", given)
            try:
                main()
                code = 0
            except SystemExit as ending:
                code = int(ending.code or 0)
        return Done(code, *self.capture.readouterr())

    @property
    def data(self) -> Path:
        return self.home / "data"

    def configure(self, text: str) -> Path:
        """Writes the configuration file."""
        file = self.home / "config" / "kvchat" / "config.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    def saved(self, conversation: str = "") -> Conversation:
        """A conversation as it is on disk; the one used last if none is named."""
        with closing(Store(self.data / "kvchat.db")) as store:
            return store.load(conversation or store.summaries()[0].id)

    def events(self, conversation: str) -> list[CacheEvent]:
        """What happened to its cache."""
        with closing(Store(self.data / "kvchat.db")) as store:
            return store.events(conversation)

    def happened(self, conversation: str) -> list[CacheEventKind]:
        """What kinds of things happened to its cache, in their order."""
        return [event.kind for event in self.events(conversation)]

    def segments(self, conversation: str = "*") -> list[Path]:
        """The files of saved caches."""
        return sorted((self.data / "kv").glob(f"{conversation}/*"))

    def files(self) -> list[Path]:
        """Everything that was written."""
        return [path for path in self.home.rglob("*") if path.is_file()]


@pytest.fixture
def kvchat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """The command, in an empty home."""
    for name in [name for name in os.environ if name.startswith("KVCHAT_")]:
        monkeypatch.delenv(name)
    for name in ("CONFIG", "DATA", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("KVCHAT_DATA_DIR", str(tmp_path / "data"))
    return Shell(tmp_path, monkeypatch, capsys)


@dataclass
class Asking:
    """`kvchat run` with the tiny model."""

    shell: Shell
    folder: Path

    def command(self, *arguments: str | Path) -> list[str]:
        # tests count what is read, and a wrong guess is read too
        model = ("-m", self.folder, "--precision", "fp32", "--threads", "1", "--draft", "off")
        return ["run", *map(str, (*model, *arguments))]

    def __call__(self, *arguments: str | Path, stdin: io.StringIO | str = "") -> Done:
        return self.shell(*self.command(*arguments), stdin=stdin)

    def json(self, *arguments: str | Path, tokens: int | None = 8, stdin: str = "") -> Done:
        limit = ("--max-tokens", str(tokens)) if tokens else ()
        return self("--json", *limit, *arguments, stdin=stdin)

    def resumed(self, *arguments: str) -> Done:
        """Without naming the model: the conversation knows it."""
        return self.shell("run", "--json", "--precision", "fp32", "--threads", "1", *arguments)


@pytest.fixture
def ask(kvchat: Shell, tiny_folder: Path) -> Iterator[Asking]:
    import torch

    threads = torch.get_num_threads()
    yield Asking(kvchat, tiny_folder)
    torch.set_num_threads(threads)


def process(*arguments: str | Path, **options: Any) -> "subprocess.Popen[str]":  # noqa: ANN401 - Popen's own
    """`python -m kvchat` as a process of its own."""
    command = [sys.executable, "-m", "kvchat", *map(str, arguments)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, text=True, **(pipes | options))


# kvchat run


def test_run_prints_the_answer_on_stdout_and_statistics_on_stderr(ask: Asking) -> None:
    done = ask(FIRST, "--max-tokens", "8")
    conversation = ask.shell.saved()
    assert done.code == 0
    assert done.out == conversation.messages[-1].text + "\n"
    assert re.fullmatch(
        rf"\[cache on · reused 0 · read \d+ · wrote 8 tokens · .* · ended: length · {conversation.id}\]\n",
        done.err,
    )


def test_run_json_has_the_documented_fields(ask: Asking) -> None:
    first, second = ask.json(FIRST, SECOND).turns
    for turn in (first, second):
        assert list(turn) == ["text", "conversation", "stats"]
        assert set(turn["stats"]) == STATS
    assert first["conversation"] == second["conversation"]


def test_the_second_turn_prefills_only_new_tokens(ask: Asking) -> None:
    first, second = (turn["stats"] for turn in ask.json(FIRST, SECOND).turns)
    assert (first["reused_tokens"], first["prefilled_tokens"]) == (0, first["prompt_tokens"])
    assert second["reused_tokens"] == first["kv_tokens"] == first["prompt_tokens"] + 7
    assert second["prefilled_tokens"] == second["prompt_tokens"] - second["reused_tokens"]
    assert second["evaluated_tokens"] == second["prefilled_tokens"] + 7
    assert second["reuse_note"] == ""


def test_all_fields_of_a_turn_are_saved(ask: Asking) -> None:
    turn = ask.json(FIRST, "-s", "Be brief.").turn
    saved = ask.shell.saved(turn["conversation"])
    assert (saved.title, saved.system_prompt, saved.model) == (FIRST, "Be brief.", str(ask.folder))
    question, answer = saved.messages
    assert (question.text, answer.text) == (FIRST, turn["text"])
    assert answer.stats
    assert {name: getattr(answer.stats, name) for name in STATS} == turn["stats"]


@pytest.mark.parametrize(("mode", "kept"), [("on", True), ("turn", False), ("off", False)])
def test_the_cache_modes(ask: Asking, mode: str, kept: bool) -> None:
    first, second = (turn["stats"] for turn in ask.json(FIRST, SECOND, "--cache", mode).turns)
    assert first["cache_mode"] == second["cache_mode"] == mode
    assert (second["reused_tokens"] > 0) is kept
    assert (second["kv_tokens"] > 0) is (mode != "off")
    read = sum(range(first["prompt_tokens"], first["prompt_tokens"] + 8)) if mode == "off" else 0
    assert first["evaluated_tokens"] == (read or first["prompt_tokens"] + 7)
    assert bool(second["reuse_note"]) is not kept


def test_equal_seeds_give_equal_answers(ask: Asking) -> None:
    hot = (FIRST, "--temperature", "1.5", "--top-p", "1")
    texts = [ask.json(*hot, "--seed", seed).turn["text"] for seed in ("7", "7", "8")]
    assert texts[0] == texts[1] != texts[2]


def test_without_a_seed_answers_differ(ask: Asking) -> None:
    assert len({ask.json(FIRST, "--temperature", "1.5").turn["text"] for _ in range(2)}) == 2


def test_private_writes_nothing(ask: Asking) -> None:
    first, second = ask.json(FIRST, SECOND, "--private").turns
    assert second["stats"]["reused_tokens"] == first["stats"]["kv_tokens"]
    assert ask.shell.files() == []


def test_private_changes_no_saved_data(ask: Asking) -> None:
    ask.json(FIRST)
    before = {path: path.read_bytes() for path in ask.shell.segments()}
    assert before
    stats = ask.json("-c", FIRST, SECOND, "--private").turns[0]["stats"]
    assert (stats["reused_tokens"], stats["restored_tokens"]) == (0, 0)
    assert {path: path.read_bytes() for path in ask.shell.segments()} == before
    assert len(ask.shell.saved().messages) == 2


# where prompts come from


def test_a_dash_or_a_pipe_reads_standard_input(ask: Asking) -> None:
    ask.json(stdin="From a\npipe\n\n")
    assert ask.shell.saved().messages[0].text == "From a\npipe"
    ask.json(FIRST, "-", stdin="From a pipe\n")
    assert [m.text for m in ask.shell.saved().messages if m.role == "user"] == [FIRST, "From a pipe"]


def test_a_prompt_argument_does_not_read_standard_input(ask: Asking) -> None:
    stdin = io.StringIO("For somebody else\n")
    ask(FIRST, "--max-tokens", "1", stdin=stdin)
    assert stdin.read() == "For somebody else\n"


def test_run_without_a_prompt_at_a_terminal_is_an_error(ask: Asking) -> None:
    assert ask(stdin=Terminal()).complaint.startswith("What is the prompt?")


@pytest.mark.parametrize("prompts", [("",), (" \n\t",), (FIRST, ""), ("-",), ()])
def test_an_empty_prompt_is_an_error_before_any_turn(ask: Asking, prompts: tuple[str, ...]) -> None:
    assert ask(*prompts).complaint == "The prompt is empty."
    assert ask.shell.files() == []


# going on


def test_continue_opens_the_most_recently_used_conversation(ask: Asking) -> None:
    first, second = (ask.json(text).turn["conversation"] for text in (FIRST, SECOND))
    assert ask.json("-c", "More").turn["conversation"] == second
    assert ask.json("-r", first[:5], "More").turn["conversation"] == first
    assert ask.json("--continue", "Still more").turn["conversation"] == first
    assert [m.text for m in ask.shell.saved(first).messages if m.role == "user"] == [
        FIRST,
        "More",
        "Still more",
    ]


def test_a_continued_conversation_has_its_history(ask: Asking) -> None:
    first = ask.json(FIRST).turn
    (_, answer) = ask.shell.saved().messages
    second = ask.json("-c", SECOND).turn["stats"]
    assert answer.stats
    held = answer.stats.kv_tokens
    assert held > 0
    assert (second["reused_tokens"], second["restored_tokens"], second["reuse_note"]) == (held, held, "")
    assert second["prefilled_tokens"] == second["prompt_tokens"] - held
    assert second["evaluated_tokens"] == second["prefilled_tokens"] + second["generated_tokens"] - 1
    assert second["restore_s"] > 0
    assert ask.shell.saved().messages[:2] == ask.shell.saved(first["conversation"]).messages[:2]
    assert ask.shell.saved().messages[1] == answer


def test_a_restored_cache_gives_the_same_answer_as_a_resident_one(ask: Asking) -> None:
    together = [turn["text"] for turn in ask.json(FIRST, SECOND, "More").turns]
    apart = [ask.json(FIRST).turn["text"], *(ask.json("-c", text).turn["text"] for text in (SECOND, "More"))]
    assert apart == together
    kinds = ask.shell.happened(ask.shell.saved().id)
    again = [CacheEventKind.RESTORE, CacheEventKind.REUSE, CacheEventKind.SAVE]
    assert kinds == [CacheEventKind.SAVE, *again, *again]


def test_a_conversation_without_saved_cache_is_prefilled_again(ask: Asking) -> None:
    first = ask.json(FIRST).turn["conversation"]
    shutil.rmtree(ask.shell.data / "kv")
    second = ask.json("-c", SECOND).turn
    assert second["conversation"] == first
    note = (second["stats"]["reused_tokens"], second["stats"]["reuse_note"])
    assert note == (0, "not read since the engine started")
    assert CacheEventKind.MISS in ask.shell.happened(first)


def test_a_saved_cache_of_another_model_is_refused_with_a_reason(ask: Asking) -> None:
    ask.json(FIRST)
    stats = ask("--json", "--precision", "bf16", "-c", SECOND, "--max-tokens", "2").stats
    assert (stats["restored_tokens"], stats["weights_dtype"]) == (0, "bf16")
    assert re.match(r"(model weights|weights precision) changed: \w+ → \w+$", stats["reuse_note"])


@pytest.mark.parametrize("where", ["header", "tensors", "end"])
def test_a_damaged_cache_is_refused_and_the_answer_is_the_same(ask: Asking, where: str) -> None:
    together = [turn["text"] for turn in ask.json(FIRST, SECOND).turns]
    talk = ask.json(FIRST).turn["conversation"]
    (segment,) = ask.shell.segments(talk)
    raw = bytearray(segment.read_bytes())
    if where == "end":
        del raw[-1:]
    else:
        raw[60 if where == "header" else -5] ^= 0x40
    segment.write_bytes(raw)
    second = ask.json("-c", SECOND).turn
    assert (second["text"], second["stats"]["restored_tokens"]) == (together[1], 0)
    assert second["stats"]["reuse_note"].startswith(f"The saved cache {talk}/")
    third = ask.json("-c", "More").stats
    assert third["restored_tokens"] == second["stats"]["kv_tokens"]


# what a cache may take


def test_kv_precision_is_saved_with_the_conversation(ask: Asking) -> None:
    plain = ask.json(LONG * 4).stats
    first = ask.json(LONG * 4, "--kv", "int8").stats
    assert (plain["kv_dtype"], first["kv_dtype"]) == ("fp32", "int8")
    assert first["kv_used_bytes"] < plain["kv_used_bytes"] / 2
    assert ask.shell.saved().kv is KVPrecision.INT8
    second = ask.json("-c", SECOND).stats
    assert (second["kv_dtype"], second["restored_tokens"]) == ("int8", first["kv_tokens"])
    third = ask.json("-c", "More", "--kv", "fp32").stats
    assert (third["kv_dtype"], third["restored_tokens"]) == ("fp32", 0)
    assert third["reuse_note"] == "KV precision changed: int8 → fp32"
    assert ask.shell.saved().kv is KVPrecision.FP32


def test_policy_turns_evicts_the_oldest_turns_for_good(ask: Asking) -> None:
    turns = [turn["stats"] for turn in ask.json(LONG, LONG, LONG, LONG, *SMALL).turns]
    assert turns[0]["evicted_tokens"] == 0
    assert sum(stats["evicted_tokens"] for stats in turns) > 0
    saved = ask.shell.saved()
    assert (saved.policy, saved.evicted_messages > 0, len(saved.messages)) == (EvictionPolicy.TURNS, True, 8)
    assert CacheEventKind.EVICT in ask.shell.happened(saved.id)
    following = ask.json("-c", "More", *SMALL).stats
    assert following["restored_tokens"] > 0
    assert following["prompt_tokens"] + following["evicted_tokens"] < sum(t["prompt_tokens"] for t in turns)
    whole = ask.json("-c", "More").stats
    assert whole["prompt_tokens"] < 4 * turns[0]["prompt_tokens"]


def test_policy_none_fails_when_the_context_is_full(ask: Asking) -> None:
    refused = ask(LONG, LONG, LONG, LONG, "--policy", "none", "--max-tokens", "8", *SMALL)
    assert refused.code == 1
    assert "the context holds 128" in refused.err.splitlines()[-1]
    assert ask.shell.saved().policy is EvictionPolicy.NONE
    assert ask.json("-c", "More", "--policy", "turns", *SMALL).stats["evicted_tokens"] > 0


@pytest.mark.parametrize("policy", ["sinks", "snapkv"])
def test_policies_with_gaps_keep_all_messages_in_the_prompt(ask: Asking, policy: str) -> None:
    turns = [turn["stats"] for turn in ask.json(LONG, LONG, LONG, "--policy", policy, *SMALL).turns]
    assert sum(stats["evicted_tokens"] for stats in turns) > 0
    assert all(stats["kv_tokens"] <= 128 for stats in turns)
    saved = ask.shell.saved()
    assert (saved.policy.value, saved.evicted_messages) == (policy, 0)
    assert ask.json("-c", "More", *SMALL).stats["restored_tokens"] > 0


def test_a_small_budget_limits_the_context(ask: Asking) -> None:
    limits = [
        ask.json(FIRST, *budget).stats["context_limit"]
        for budget in ((), ("--kv-budget", "2GB"), ("--kv-budget", "600kB"), ("--kv-budget", "600000"))
    ]
    assert limits[0] == limits[1] == 1024
    assert 256 <= limits[2] == limits[3] < 600


def test_kv_disk_0_saves_nothing(ask: Asking) -> None:
    ask.json(FIRST, "--kv-disk", "0")
    assert ask.shell.segments() == []
    assert ask.json("-c", SECOND).stats["restored_tokens"] == 0


def test_a_cache_above_the_disk_limit_is_reported(ask: Asking) -> None:
    talk = ask.json(FIRST, "--kv-disk", "10 kB").turn["conversation"]
    assert ask.shell.segments() == []
    refusals = ask.shell.events(talk)  # after the turn, and perhaps once more when the engine closes
    assert {refusal.kind for refusal in refusals} == {CacheEventKind.REFUSE}
    assert all("all of them may take 0.0 MB" in refusal.note for refusal in refusals)


def test_the_disk_limit_evicts_least_recently_used_caches(ask: Asking) -> None:
    first = ask.json(FIRST).turn["conversation"]
    size = sum(path.stat().st_size for path in ask.shell.segments(first))
    second = ask.json(FIRST, "--kv-disk", str(int(1.5 * size))).turn["conversation"]
    assert {path.parent.name for path in ask.shell.segments()} == {second}
    assert ask.shell.happened(first)[-1] is CacheEventKind.DROP
    assert ask.json("-r", first, SECOND).stats["restored_tokens"] == 0


def test_continue_without_conversations_starts_one(ask: Asking) -> None:
    assert ask.json("-c", FIRST).turn["conversation"] == ask.shell.saved().id


def test_an_unknown_id_is_one_sentence(ask: Asking) -> None:
    ask.json(FIRST)
    complaint = ask("-r", "zzz", SECOND).complaint
    assert complaint == "No conversation starts with 'zzz'. `kvchat sessions` lists them."
    assert len(ask.shell.saved().messages) == 2


def test_continue_can_be_set_by_the_environment(ask: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ask.json(FIRST).turn["conversation"]
    monkeypatch.setenv("KVCHAT_CONTINUE", "1")
    assert ask.json(SECOND).turn["conversation"] == first


# settings


def test_precedence_is_flag_environment_file_default(ask: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    ask("--context", "40", FIRST)
    assert ask.shell.saved().sampling.max_tokens == 512
    ask.shell.configure("max-tokens = 3\ntemperature = 0.5")
    assert ask.json(FIRST, tokens=None).stats["generated_tokens"] == 3
    monkeypatch.setenv("KVCHAT_MAX_TOKENS", "4")
    assert ask.json(FIRST, tokens=None).stats["generated_tokens"] == 4
    assert ask.json(FIRST, tokens=5).stats["generated_tokens"] == 5
    assert (ask.shell.saved().sampling.temperature, ask.shell.saved().sampling.max_tokens) == (0.5, 5)


def test_every_type_of_setting_can_be_set_by_the_environment(
    ask: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "SYSTEM": "Sing.",
        "CACHE": "turn",
        "TOP_K": "7",
        "SEED": "11",
        "CONTEXT": "100",
        "MAX_TOKENS": "2",
        "KV": "int8",
        "POLICY": "sinks",
        "KV_BUDGET": "100 MB",
        "KV_DISK": "0",
    }
    for name, value in given.items():
        monkeypatch.setenv(f"KVCHAT_{name}", value)
    stats = ask("--json", FIRST).stats
    assert (stats["context_limit"], stats["generated_tokens"], stats["cache_mode"]) == (100, 2, "turn")
    saved = ask.shell.saved()
    assert (saved.system_prompt, saved.sampling.top_k, saved.sampling.seed) == ("Sing.", 7, 11)
    assert (saved.kv, saved.policy, stats["kv_dtype"]) == (KVPrecision.INT8, EvictionPolicy.SINKS, "int8")
    assert ask.shell.segments() == []


def test_sizes_in_the_configuration_are_numbers_or_text(ask: Asking) -> None:
    ask.shell.configure('kv-budget = 600000\nkv-disk = 0\nkv = "int8"\npolicy = "none"')
    stats = ask.json(FIRST).stats
    assert (stats["context_limit"] < 1024, stats["kv_dtype"]) == (False, "int8")
    assert (ask.shell.segments(), ask.shell.saved().policy) == ([], EvictionPolicy.NONE)
    ask.shell.configure('kv-budget = "200 kB"\nkv-disk = "1GB"\nkv = "fp32"')
    assert "KV budget" in ask(FIRST).complaint or ask.json(FIRST).stats["context_limit"] < 1024


def test_a_continued_conversation_has_its_own_settings(ask: Asking) -> None:
    kept = ("--cache", "off", "-s", "Sing.", "--top-k", "7", "--kv", "int8", "--policy", "none")
    ask.json(FIRST, *kept, tokens=3)
    before = ask.shell.saved()
    ask.shell.configure(
        'max-tokens = 9\ncache = "turn"\nsystem = "Shout."\nmodel = "smollm2-135m-instruct"\n'
        'kv = "int4"\npolicy = "sinks"'
    )
    stats = ask.resumed("-c", SECOND).stats
    assert (stats["generated_tokens"], stats["cache_mode"]) == (3, "off")
    after = ask.shell.saved()
    assert (after.id, after.mode, after.sampling) == (before.id, before.mode, before.sampling)
    assert (after.system_prompt, after.model) == ("Sing.", str(ask.folder))
    assert (after.kv, after.policy) == (KVPrecision.INT8, EvictionPolicy.NONE)


def test_explicit_flags_change_the_settings_of_a_continued_conversation(
    ask: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask.json(FIRST, "--cache", "off", "-s", "Sing.", tokens=3)
    stats = ask.resumed("-c", SECOND, "--cache", "turn", "--max-tokens", "2").stats
    assert (stats["generated_tokens"], stats["cache_mode"]) == (2, "turn")
    monkeypatch.setenv("KVCHAT_TOP_K", "5")
    ask.resumed("-c", "More", "-s", "", "--kv", "int4", "--policy", "snapkv")
    saved = ask.shell.saved()
    assert (saved.kv, saved.policy) == (KVPrecision.INT4, EvictionPolicy.SNAPKV)
    assert (saved.mode, saved.sampling.max_tokens, saved.sampling.top_k) == (CacheMode.TURN, 2, 5)
    assert saved.system_prompt == ""


def test_an_unknown_model_is_not_saved(ask: Asking) -> None:
    ask.json(FIRST)
    assert "There is no model 'tinny'" in ask.shell("run", "-c", "-m", "tinny", SECOND).complaint
    assert ask.resumed("-c", SECOND, "--max-tokens", "2").code == 0


def test_a_relative_model_folder_is_saved_as_an_absolute_path(
    ask: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ask.folder.parent)
    assert ask("-m", ask.folder.name, FIRST, "--max-tokens", "2").code == 0
    monkeypatch.chdir(ask.shell.home)
    assert ask.resumed("-c", SECOND).code == 0


def test_a_conversation_longer_than_the_context_is_an_error_and_unchanged(ask: Asking) -> None:
    done = ask("--context", "64", "Which pass over the mountains is open in May? " * 20)
    assert re.fullmatch(r"This conversation is \d{3} tokens and the context holds 64, .*", done.complaint)
    assert [m.role for m in ask.shell.saved().messages] == ["user"]


def test_an_answer_ends_at_the_context_limit(ask: Asking) -> None:
    stats = ask.json(FIRST, "--context", "40", tokens=100).stats
    assert (stats["finish_reason"], stats["context_limit"]) == ("context", 40)
    assert stats["prompt_tokens"] + stats["generated_tokens"] == 40


# what goes wrong


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("run", "-m", "nothing-of-the-kind", "Hello"),
            "There is no model 'nothing-of-the-kind'. kvchat knows",
        ),
        (("run", "-m", "{home}", "Hello"), "is not a model folder: it needs config.json"),
        (("run", "-m", "{home}/none.gguf", "Hello"), "There is no file"),
        (("run", "not \udcff text"), "The prompt is not text"),
        (("run", "-s", "not \udcff text", "Hello"), "The system prompt is not text"),
        (("run", "-m", "nothing \udcff", "Hello"), "There is no model"),
        (("run", "--draft", "nothing", "Hello"), "There is no model 'nothing'"),
        (("sessions", "search", "not \udcff text"), "What to search for is not text: it has bytes"),
        (("config", "set", "system", "not \udcff text"), "The value of system is not text: it has bytes"),
        (("models", "path", "nothing"), "There is no model 'nothing'"),
        (("models", "path"), "is not here yet. `kvchat models pull smollm2-135m-instruct` fetches it."),
        (("models", "rm", "nothing"), "There is no prepared model 'nothing'"),
        (("sessions", "--data-dir", "{home}/file"), "can't be opened"),
        (("sessions", "search", " "), "There are no words to search for."),
        (("sessions", "import", "{home}/none.json"), "none.json can't be read: No such file or directory."),
        (("models", "pull", "--data-dir", "/dev/null/none"), "Models cannot be written to /dev/null/none"),
        (
            ("bench", "--plot", "{home}/none/x.svg"),
            "x.svg can't be written: {home}/none is not a writable folder",
        ),
        (("bench", "--profile", "{home}"), "can't be written"),
        (("run", "--data-dir", "{home}/file", "Hello"), "can't be opened"),
        ((), "The chat needs a terminal. `kvchat chat --plain` and `kvchat run PROMPT` work without one."),
        (("-m", "smollm2-135m-instruct"), "The chat needs a terminal."),
        (("chat", "-c"), "The chat needs a terminal."),
    ],
)
def test_failures_are_one_sentence(kvchat: Shell, arguments: tuple[str, ...], sentence: str) -> None:
    (kvchat.home / "file").write_text("no folder")
    done = kvchat(*(argument.replace("{home}", str(kvchat.home)) for argument in arguments))
    assert sentence.replace("{home}", str(kvchat.home)) in done.complaint


def test_a_file_that_is_not_a_database_is_one_sentence(kvchat: Shell) -> None:
    kvchat.data.mkdir()
    (kvchat.data / "kvchat.db").write_text("This is a letter. " * 100)
    assert "kvchat.db can't be opened: file is not a database." in kvchat("sessions").complaint


@pytest.mark.parametrize(
    "command", [("sessions",), ("sessions", "search", "alps"), ("sessions", "export", "0"), ("cache", "ls")]
)
def test_a_database_with_a_damaged_page_is_one_sentence(kvchat: Shell, command: tuple[str, ...]) -> None:
    save_conversations(kvchat, "Trip to the Alps")
    file = kvchat.data / "kvchat.db"
    with closing(sqlite3.connect(file)) as db:
        db.execute("pragma wal_checkpoint(truncate)")
        (size,) = db.execute("pragma page_size").fetchone()
        pages = db.execute("select rootpage from sqlite_schema where tbl_name = 'conversations'").fetchall()
    raw = bytearray(file.read_bytes())
    for (page,) in pages:
        raw[(page - 1) * size : page * size] = b"A" * size
    file.write_bytes(raw)
    assert "The conversations can't be read: database disk image is malformed." in kvchat(*command).complaint


def test_a_missing_device_is_one_sentence(ask: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "There is no device cuda" in ask("--device", "cuda", FIRST).complaint


def test_bench_checks_compiled_weights_before_measuring(ask: Asking) -> None:
    done = ask.shell("bench", "-m", ask.folder, "--precision", "fp32", "--weights", "int4")
    assert f"`kvchat models prepare {ask.folder} --precision int4` does that." in done.complaint


def test_damaged_weights_are_one_sentence(ask: Asking) -> None:
    damaged = ask.shell.home / "damaged"
    shutil.copytree(ask.folder, damaged)
    (damaged / "model.safetensors").write_bytes(b"\0" * 100)
    assert "the weights in" in ask("-m", damaged, FIRST).complaint


def test_standard_input_that_is_not_utf8_is_one_sentence(ask: Asking) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
    done = ask("-", stdin=stdin)  # type: ignore[arg-type]
    assert done.complaint.startswith("Standard input is not text: ")


def test_an_unknown_flag_suggests_existing_ones(kvchat: Shell) -> None:
    assert "--tour" not in kvchat("--bogus").err
    assert kvchat("--tour").code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("frobnicate",),
        ("run", "--frobnicate", "Hello"),
        ("run", "--max-tokens", "0", "Hello"),
        ("run", "--max-tokens", "many", "Hello"),
        ("run", "--temperature", "-0.1", "Hello"),
        ("run", "--top-p", "0", "Hello"),
        ("run", "--top-k", "-1", "Hello"),
        ("run", "--min-p", "1.5", "Hello"),
        ("run", "--repeat-penalty", "0", "Hello"),
        ("run", "--seed", "-1", "Hello"),
        ("run", "--cache", "sometimes", "Hello"),
        ("run", "--precision", "int3", "Hello"),
        ("run", "--device", "abacus", "Hello"),
        ("run", "--threads", "0", "Hello"),
        ("run", "--context", "15", "Hello"),
        ("run", "--kv", "int3", "Hello"),
        ("run", "--policy", "oldest", "Hello"),
        ("run", "--kv-budget", "much", "Hello"),
        ("run", "--kv-budget", "", "Hello"),
        ("run", "--kv-budget", "-1", "Hello"),
        ("run", "--kv-budget", "2TB", "Hello"),
        ("run", "--kv-disk", "-1GB", "Hello"),
        ("run", "--kv-disk", "inf", "Hello"),
        ("chat", "--kv-disk", "nan"),
        ("verify", "--tokens", "1"),
        ("bench", "--contexts", "256,many"),
        ("bench", "--kv", "int3"),
        ("bench", "--weights", "auto"),
        ("bench", "--row-seconds", "-1"),
        ("cache", "frobnicate"),
        ("cache", "show"),
        ("chat", "Hello"),
        ("models", "frobnicate"),
        ("models", "rm"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_argument(kvchat: Shell, arguments: tuple[str, ...]) -> None:
    done = kvchat(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("Usage: kvchat ")
    assert "Error: " in done.err.splitlines()[-1]
    assert kvchat.files() == []


def test_an_unknown_setting_is_a_warning_with_its_line(kvchat: Shell) -> None:
    file = kvchat.configure("threads = 1\ntemprature = 1")
    done = kvchat("paths")
    assert (done.code, "database" in done.out) == (0, True)
    assert done.err == (
        f"kvchat: warning: {file}, line 2: temprature is not a setting and is ignored. "
        "Did you mean temperature?\n"
    )
    assert kvchat("sessions").code == 0
    assert kvchat("--version").err == ""


@pytest.mark.parametrize("text", ["max-tokens = ", "theme = 5\nmax-tokens = [1]", "private = 'perhaps'"])
def test_diagnosing_commands_work_with_an_invalid_configuration(kvchat: Shell, text: str) -> None:
    file = kvchat.configure(text)
    for command in (("paths",), ("doctor",), ("config", "path")):
        done = kvchat(*command)
        assert done.out
        assert f"kvchat: warning: {'The configuration ' * (text == 'max-tokens = ')}{file}" in done.err
    assert kvchat("--version").code == kvchat("--help").code == 0
    assert kvchat("run", "Hello").code == (1 if text == "max-tokens = " else 2)


@pytest.mark.parametrize("name", ["resume", "continue", "resume-latest", "json"])
def test_flags_of_one_run_are_not_settings(kvchat: Shell, name: str) -> None:
    kvchat.configure(f"{name} = true")
    assert f"line 1: {name} is not a setting" in kvchat("paths").err


def test_an_invalid_value_in_the_configuration_is_a_usage_error(kvchat: Shell) -> None:
    kvchat.configure('max-tokens = "many"')
    done = kvchat("run", "Hello")
    assert done.code == 2
    assert "line 1: max-tokens is a whole number from 1 to 10,000,000; 'many' is not." in done.err
    assert kvchat("sessions").code == 0


@pytest.mark.parametrize("size", ['"much"', "-5", "true", "[1]", "inf"])
def test_an_invalid_size_in_the_configuration_is_a_usage_error(kvchat: Shell, size: str) -> None:
    kvchat.configure(f"kv-budget = {size}")
    done = kvchat("run", "Hello")
    assert (done.code, done.out) == (2, "")
    assert "line 1: kv-budget is a size, such as 2GB or 512MB; " in done.err
    assert len(kvchat.files()) == 1


def test_ctrl_c_during_input_has_no_traceback(kvchat: Shell) -> None:
    class Interrupted(io.StringIO):
        def read(self, size: int | None = -1) -> str:
            raise KeyboardInterrupt

    done = kvchat("run", stdin=Interrupted())
    assert (done.code, done.out, done.err.strip()) == (130, "", "Interrupted.")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_download_with_its_exit_code(
    kvchat: Shell, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals
) -> None:
    unwound = []

    def interrupted(*_: object) -> Path:
        try:
            signal.raise_signal(sent)
            return kvchat.home
        finally:
            unwound.append(sent)

    monkeypatch.setattr("kvchat.engine.setup.prepare.prepare", interrupted)
    before = signal.getsignal(sent)
    done = kvchat("models", "pull", "--progress-json")
    assert (done.code, done.out, unwound) == (128 + sent, "", [sent])
    assert signal.getsignal(sent) is before


# the other commands


def test_help_and_version(kvchat: Shell) -> None:
    helped = kvchat("--help")
    assert helped.code == 0
    assert {"chat", "run", "sessions", "models", "paths", "cache", "verify"} <= {
        line.split()[0] for line in helped.out.splitlines() if line
    }
    assert kvchat("-h").out == helped.out
    assert kvchat("--version").out.split()[-1] == version("kvchat")


def test_paths_are_xdg_folders_or_in_the_data_dir(kvchat: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def paths(*arguments: str | Path) -> dict[str, str]:
        return dict(line.split(maxsplit=1) for line in kvchat("paths", *arguments).out.splitlines())

    home, config = kvchat.home, str(kvchat.home / "config" / "kvchat" / "config.toml")
    own = home / "own"
    assert paths("--data-dir", own) == {
        "config": config,
        "database": str(own / "kvchat.db"),
        "models": str(own / "models"),
        "compiled": str(own / "compiled"),
        "kv": str(own / "kv"),
        "logs": str(own / "log"),
    }
    monkeypatch.delenv("KVCHAT_DATA_DIR")
    assert paths() == {
        "config": config,
        "database": str(home / "data" / "kvchat" / "kvchat.db"),
        "models": str(home / "data" / "kvchat" / "models"),
        "compiled": str(home / "data" / "kvchat" / "compiled"),
        "kv": str(home / "data" / "kvchat" / "kv"),
        "logs": str(home / "state" / "kvchat" / "log"),
    }
    assert kvchat.files() == []


def save_conversations(shell: Shell, *titles: str) -> list[str]:
    """Creates conversations with these titles; returns their ids, last one first."""
    with closing(Store(shell.data / "kvchat.db")) as store:
        for number, title in enumerate(titles):
            store.create(Conversation(f"{number}000abcd", title))
        return [summary.id for summary in store.summaries()]


def test_sessions_are_sorted_by_last_use(kvchat: Shell) -> None:
    ids = save_conversations(kvchat, "Trip to the Alps", "Bread")
    lines = kvchat("sessions").out.splitlines()
    assert [line.split()[0] for line in lines] == ids
    assert [re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "WHEN", line.split(maxsplit=1)[1]) for line in lines] == [
        "WHEN     0  Bread",
        "WHEN     0  Trip to the Alps",
    ]


def test_sessions_as_json(kvchat: Shell) -> None:
    ids = save_conversations(kvchat, "Trip to the Alps", "\x1b[31mBread")
    listed = json.loads(kvchat("sessions", "--json").out)
    assert [each["id"] for each in listed] == ids
    assert {frozenset(each) for each in listed} == {frozenset({"id", "title", "updated_at", "messages"})}
    assert listed[0]["title"] == "\x1b[31mBread"


def test_sessions_without_conversations(kvchat: Shell) -> None:
    assert kvchat("sessions") == Done(0, "", "No conversations yet. `kvchat` starts one.\n")
    assert kvchat("sessions", "--json").out == "[]\n"


def test_terminal_escapes_in_titles_are_not_printed(kvchat: Shell) -> None:
    save_conversations(kvchat, "\x1b]0;owned\x07\x1b[2JTrip\n\u202eto \x9bthe\rAlps")
    assert kvchat("sessions").out.splitlines()[0].endswith("  ]0;owned[2JTrip to theAlps")


def test_sessions_are_exported_imported_and_searched(kvchat: Shell, tmp_path: Path) -> None:
    (name,) = save_conversations(kvchat, "Trip")
    with closing(Store(kvchat.data / "kvchat.db")) as store:
        asked = store.add_message(name, Message(0, None, "user", "Which pass is open?", ""))
        store.add_message(
            name, Message(0, asked.id, "assistant", "The Brenner.\x1b[2J", "", finish_reason="stop")
        )
    assert kvchat("sessions", "export", name).out.startswith("# Trip\n")
    assert kvchat("sessions", "export", name, "--format", "html").out.startswith("<!doctype html>")
    file = tmp_path / "talk.json"
    assert kvchat("sessions", "export", name, file) == Done(0, "", f"{file}\n")
    assert "exists already" in kvchat("sessions", "export", name, file).complaint
    assert kvchat("sessions", "import", file) == Done(0, "", f"{file}: 1 of 1 are new.\n")
    assert kvchat("sessions", "import", file) == Done(0, "", f"{file}: 0 of 1 are new.\n")
    hits = json.loads(kvchat("sessions", "search", "brenner", "the", "--json").out)
    ids = {each["id"] for each in json.loads(kvchat("sessions", "--json").out)}
    assert {hit["conversation"] for hit in hits} == ids
    assert "\x1b" not in kvchat("sessions", "search", "brenner").out
    assert kvchat("sessions", "search", "zzz") == Done(1, "", "No conversation contains zzz.\n")
    assert "has an unknown format" in kvchat("sessions", "import", __file__).complaint


def install(models: Path, name: str) -> Path:
    """Creates a folder that looks like a prepared model."""
    folder = models / name
    folder.mkdir(parents=True)
    for file in ("config.json", "kvchat.json", "tokenizer.json"):
        (folder / file).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\0" * 2_000_000)
    return folder


def test_models_are_listed_found_and_removed(kvchat: Shell) -> None:
    name = "smollm2-135m-instruct"
    folder = install(kvchat.data / "models", name)
    listed = {line.split()[0]: line for line in kvchat("models", "list").out.splitlines()}
    assert "installed, 2.0 MB" in listed[name]
    assert "not installed" in listed["qwen3-0.6b"]
    assert kvchat("models", "path").out == f"{folder}\n"
    removed = kvchat("models", "rm", name)
    assert (removed.code, removed.out) == (0, "")
    assert "2.0 MB freed" in removed.err
    assert not folder.exists()
    assert "not installed" in next(
        line for line in kvchat("models", "list").out.splitlines() if line.startswith(name)
    )


def compiled_of(kvchat: Shell, folder: Path) -> Path:
    """Creates a folder that looks like a model's compiled packages."""
    made = compiled_folder(kvchat.data / "compiled", folder)
    (made / "fp32-some").mkdir(parents=True)
    (made / "fp32-some" / "weights.safetensors").write_bytes(b"\0" * 1_000_000)
    return made


def test_compiled_packages_count_and_are_deleted_with_the_model(kvchat: Shell) -> None:
    name = "smollm2-135m-instruct"
    folder = install(kvchat.data / "models", name)
    assert "not compiled" in kvchat("models", "path", "--compiled").complaint
    made, other = compiled_of(kvchat, folder), compiled_of(kvchat, kvchat.home)
    assert kvchat("models", "path", "--compiled").out == f"{made}\n"
    assert "installed, 3.0 MB" in kvchat("models", "list").out
    assert "3.0 MB freed" in kvchat("models", "rm", name).err
    assert (made.exists(), other.exists()) == (False, True)


def test_rm_of_a_users_folder_deletes_only_compiled_packages(kvchat: Shell) -> None:
    folder = install(kvchat.home, "own")
    made = compiled_of(kvchat, folder)
    removed = kvchat("models", "rm", folder)
    assert removed.code == 0
    assert "1.0 MB freed" in removed.err
    assert f"stays in {folder}" in removed.err
    assert (made.exists(), folder.exists()) == (False, True)
    assert "no prepared model" in kvchat("models", "rm", folder).complaint
    assert folder.exists()


def test_models_commands_use_the_configured_data_dir(kvchat: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVCHAT_DATA_DIR")
    folder = install(kvchat.home / "elsewhere" / "models", "smollm2-135m-instruct")
    kvchat.configure(f'data-dir = "{kvchat.home / "elsewhere"}"')
    assert kvchat("models", "path").out == f"{folder}\n"
    assert str(folder.parent) in kvchat("paths").out


# real processes


LIGHT = """
import io, json, sys
from kvchat.cli.main import main
seen = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ["kvchat", *command]
    try:
        main()
    except SystemExit as ending:
        assert not ending.code, (command, ending.code)
    seen[" ".join(command)] = sorted({"torch", "transformers", "textual"} & set(sys.modules))
print(json.dumps(seen))
"""


def test_listing_commands_import_no_heavy_packages(kvchat: Shell) -> None:
    save_conversations(kvchat, "Trip to the Alps")
    install(kvchat.data / "models", "smollm2-135m-instruct")
    commands = [
        ["--version"],
        ["--help"],
        ["run", "--help"],
        ["paths"],
        ["sessions"],
        ["sessions", "--json"],
        ["models", "list"],
        ["models", "path"],
        ["models", "rm", "smollm2-135m-instruct"],
        ["cache", "ls"],
        ["cache", "ls", "--json"],
        ["cache", "show", "0"],
        ["cache", "show", "0", "--csv"],
        ["cache", "gc"],
        ["cache", "rm", "--all"],
    ]
    script = [sys.executable, "-c", LIGHT, json.dumps(commands)]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {" ".join(command): [] for command in commands}


def test_another_process_restores_the_saved_cache(ask: Asking) -> None:
    """The first prompt is piped into it."""
    done = []
    for stdin, arguments in ((FIRST, ("-",)), (None, ("-c", SECOND))):
        with process(*ask.command("--json", "--max-tokens", "8", *arguments)) as running:
            out, err = running.communicate(stdin, timeout=PATIENCE_S)
        assert err == ""
        done.append(Done(running.returncode, out, err).turn)
    first, second = (turn["stats"] for turn in done)
    assert second["restored_tokens"] == second["reused_tokens"] == first["kv_tokens"] > 0
    assert second["prefilled_tokens"] == second["prompt_tokens"] - first["kv_tokens"]
    assert [turn["text"] for turn in ask.json(FIRST, SECOND).turns] == [turn["text"] for turn in done]


def test_ctrl_c_during_an_answer_saves_the_partial_answer(ask: Asking) -> None:
    with process(*ask.command("--max-tokens", "900", "--cache", "off", FIRST, SECOND)) as running:
        assert running.stdout
        first = os.read(running.stdout.fileno(), 1).decode()
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130
    assert "ended: cancelled" in err
    assert "Traceback" not in err
    question, answer = ask.shell.saved().messages
    assert (question.text, answer.text + "\n") == (FIRST, first + out)
    assert (answer.finish_reason, answer.stats is None) == ("cancelled", False)
    assert 0 < len(answer.token_ids) < 900


def test_a_closed_pipe_has_no_traceback_and_the_answer_is_saved(ask: Asking) -> None:
    with process(*ask.command("--max-tokens", "900", FIRST)) as running:
        assert running.stdout
        first = os.read(running.stdout.fileno(), 1).decode()
        running.stdout.close()
        assert running.stderr
        assert running.stderr.read() == ""
    assert running.returncode == 141
    _, answer = ask.shell.saved().messages
    assert answer.text.startswith(first)
    assert answer.finish_reason == "cancelled"
    assert 0 < len(answer.token_ids) < 900


def test_a_list_into_a_closed_pipe_has_no_traceback(kvchat: Shell) -> None:
    save_conversations(kvchat, *["A long title of a conversation about nothing much"] * 2000)
    with process("sessions") as running:
        assert running.stdout
        assert os.read(running.stdout.fileno(), 1)
        running.stdout.close()
        assert running.stderr
        assert running.stderr.read() == ""
    assert running.returncode == 141


def test_characters_the_terminal_cannot_encode_are_replaced(
    kvchat: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_conversations(kvchat, "Trip 旅行 to the Alps")
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    with process("sessions") as running:
        out, err = running.communicate()
    assert (running.returncode, err) == (0, "")
    assert out.endswith("  Trip ?? to the Alps\n")


@pytest.mark.parametrize("arguments", [("run",), ("run", "-"), ()])
def test_closed_standard_input_is_one_sentence(kvchat: Shell, arguments: tuple[str, ...]) -> None:
    assert kvchat(*arguments, stdin=None).complaint


def test_the_installed_script_is_the_same_command(kvchat: Shell) -> None:
    with process("paths") as running:
        out, _ = running.communicate()
    command = [str(Path(sys.executable).with_name("kvchat")), "paths"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == out != ""


# the real model


@pytest.fixture(scope="session")
def smollm2_paths(smollm2: LoadedModel) -> tuple[Path, Path]:
    """The folders of the real model and of compiled code, found before any test moves home."""
    folder = is_prepared(smollm2.facts.name, find_paths().models)
    assert folder
    return folder, find_paths().compiled


@pytest.mark.model
def test_the_real_model_prefills_only_new_tokens(kvchat: Shell, smollm2_paths: tuple[Path, Path]) -> None:
    smollm2_folder, compiled = smollm2_paths
    shutil.copytree(compiled, kvchat.data / "compiled")  # else it would be compiled again
    questions = ("Name three rivers of Europe.", "Which of them is the longest?")
    flags = ("--precision", "fp32", "--draft", "off", "--max-tokens", "12")
    done = kvchat("run", "--json", "-m", smollm2_folder, *flags, *questions)
    first, second = (turn["stats"] for turn in done.turns)
    assert second["reused_tokens"] == first["kv_tokens"] > first["prompt_tokens"] > 0
    assert second["prefilled_tokens"] == second["prompt_tokens"] - first["kv_tokens"]
    assert second["evaluated_tokens"] == second["prefilled_tokens"] + second["generated_tokens"] - 1
    assert second["reuse_note"] == ""
