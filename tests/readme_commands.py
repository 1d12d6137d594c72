"""Runs every command of README and docs on the real model, and compares what they promise.

Run as `python -m tests.readme_commands`, with the names of some steps or with none for all of them. Each step
declares the commands that it runs; `test_readme.py` compares these with the pages. Everything is written
into a folder of its own; only the models are those of the user.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.generated_docs import keys, pages

PAGES = "\n".join(page.read_text(encoding="utf-8") for page in pages())
"""README, docs and the other pages, as one text."""
QUESTIONS = ("Name three rivers of Europe.", "Which of them is the longest?")
MODEL = "smollm2-135m-instruct"
BRIEFLY = ("--contexts", "64", "--turns", "2", "--answer-tokens", "4", "--row-seconds", "0")
ROWS = {
    *(("prefill", "on"), ("decode", "on"), ("decode", "off")),
    *(("turn", "on"), ("turn", "turn"), ("turn", "off")),
    *(("restore", "cold"), ("restore", "restored"), ("draft, copies", "lookup")),
}
"""(case, mode) that `kvchat bench` measures."""


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # noqa: ANN401 - whatever it printed
        return json.loads(self.out)


@dataclass(frozen=True)
class Shell:
    """Runs `kvchat` with folders of its own under `home`."""

    home: Path

    def __call__(self, *arguments: str | Path, stdin: str = "", code: int = 0, **variables: str) -> Done:
        """Runs a command that has to end with `code`; `variables` are added to the environment."""
        own = {f"XDG_{name}_HOME": str(self.home / name.lower()) for name in ("DATA", "CONFIG", "STATE")}
        done = subprocess.run(
            [sys.executable, "-m", "kvchat", *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            env=os.environ | own | variables,
            check=False,
        )
        assert done.returncode == code, (arguments, done)
        assert "Traceback" not in done.stderr, (arguments, done)
        return Done(done.returncode, done.stdout, done.stderr)

    def turns(self, *arguments: str, stdin: str = "") -> list[dict[str, Any]]:
        """What `kvchat run --json` printed, an object a turn."""
        greedy = ("run", "--json", "--temperature", "0", "--max-tokens", "24")
        return [json.loads(line) for line in self(*greedy, *arguments, stdin=stdin).out.splitlines()]

    def conversations(self) -> list[dict[str, Any]]:
        """What `kvchat sessions` lists, the last used first."""
        found: list[dict[str, Any]] = self("sessions", "--json").json
        return found


Step = Callable[[Shell], None]
STEPS: list[tuple[tuple[str, ...], Step]] = []
"""Commands, and what runs them and compares what they promise; in this order."""


def runs(*commands: str) -> Callable[[Step], Step]:
    """Declares a step."""

    def declare(step: Step) -> Step:
        STEPS.append((commands, step))
        return step

    return declare


@runs("models list", "models path", "models pull")
def finds_the_model(kvchat: Shell) -> None:
    assert re.search(rf"^{MODEL} .* installed", kvchat("models", "list").out, re.MULTILINE)
    folder = Path(kvchat("models", "path").out.strip())
    assert (folder / "config.json").is_file()
    assert f"{MODEL} is ready in {folder}" in kvchat("models", "pull").err
    assert "is not here yet" in kvchat("models", "path", "qwen3-0.6b", code=1).err


@runs("models prepare")
def says_what_compiled_weights_cost(kvchat: Shell) -> None:
    said = kvchat("models", "prepare").err
    assert f"{MODEL} runs compiled for this CPU: int4, head int8" in said
    agreeing = re.search(r"the same after (\d+\.\d)% of them", said)
    assert agreeing, said
    assert float(agreeing[1]) > 97
    nats = re.search(r"KL divergence from the same model in fp32 is (\S+) nats", said)
    assert nats, said
    assert float(nats[1]) < 0.001


@runs("run")
def answers_as_on_the_page(kvchat: Shell) -> None:
    done = kvchat("run", "--private", "--temperature", "0", "--max-tokens", "32", *QUESTIONS)
    counts = r"reused (\d+) · read (\d+) · wrote (\d+) tokens"
    promised = re.findall(counts, PAGES)
    assert len(promised) == len(QUESTIONS)
    assert re.findall(counts, done.err) == promised, done
    assert kvchat.conversations() == []


@runs("run")
def reuses_the_cache_within_a_run(kvchat: Shell) -> None:
    first, second = (turn["stats"] for turn in kvchat.turns("--private", *QUESTIONS))
    assert second["reused_tokens"] == first["kv_tokens"] > 0
    assert second["prompt_tokens"] == second["reused_tokens"] + second["prefilled_tokens"]
    assert second["reuse_note"] == ""
    assert second["generated_tokens"] > 0
    assert second["path"].startswith("compiled"), second["path"]
    assert {"text", "conversation", "stats"} == set(kvchat.turns("--private", "Hi")[0])


@runs("run")
def continues_from_disk(kvchat: Shell) -> None:
    """-c, -r, a pipe and `-`."""
    (first,) = kvchat.turns(stdin=QUESTIONS[0])
    (second,) = kvchat.turns("-c", QUESTIONS[1])
    (third,) = kvchat.turns("-r", first["conversation"], "-", stdin="And the shortest?")
    for before, after in ((first, second), (second, third)):
        assert after["conversation"] == before["conversation"]
        kept = before["stats"]["kv_tokens"]
        assert after["stats"]["restored_tokens"] == after["stats"]["reused_tokens"] == kept > 0
    assert [each["messages"] for each in kvchat.conversations()] == [6]


@runs("run")
def computes_without_a_cache_the_same_text(kvchat: Shell) -> None:
    """And evaluates as many tokens as the table of docs/kv-cache.md says, one row per cache mode."""
    promised = re.findall(r"^\| `(on|turn|off)`: [^|]+\| (\d+) \| (\d+) \|$", PAGES, re.MULTILINE)
    assert [mode for mode, *_ in promised] == ["on", "turn", "off"]
    texts = {}
    for mode, *evaluated in promised:
        flags = ("--private", "--draft", "off", "--max-tokens", "32", "--cache", mode)
        first, second = kvchat.turns(*flags, *QUESTIONS)
        texts[mode] = first["text"], second["text"]
        assert second["stats"]["cache_mode"] == mode
        assert (second["stats"]["reused_tokens"] == 0) == (mode != "on")
        assert [str(turn["stats"]["evaluated_tokens"]) for turn in (first, second)] == evaluated, mode
    assert texts["on"] == texts["turn"] == texts["off"]


@runs("run")
def ends_with_the_promised_exit_codes(kvchat: Shell) -> None:
    kvchat("run", "--nonsense", code=2)
    failed = kvchat("run", "-r", "zzzz", "Hi", code=1)
    assert re.fullmatch(r"kvchat: .*\n", failed.err), failed


@runs("chat")
def chats_line_by_line(kvchat: Shell) -> None:
    assert "needs a terminal" in kvchat(code=1).err
    lines = "Say hello.\n/cache off\nAgain.\n/nonsense\n/exit\n"
    said = kvchat("chat", "--plain", "--private", "--max-tokens", "8", stdin=lines).out
    assert len(re.findall(r"Reused 0 tokens, read \d+, wrote \d+; ", said)) == 2, said
    assert "the cache is off and holds 0.0 MB" in said
    assert "There is no command /nonsense." in said


@runs("tour")
def tours_without_a_terminal(kvchat: Shell) -> None:
    from kvchat.ui.tour import STEPS as TOLD

    before = kvchat.conversations()
    said = kvchat("tour").out
    places = [said.index(f"{n} of {len(TOLD)}: {step.title}.") for n, step in enumerate(TOLD, start=1)]
    assert places == sorted(places)
    assert re.search(r"\d+ tokens were reused \(▒\), only \d+ were read", said), said
    assert said.endswith("That was the tour.\n")
    assert kvchat.conversations() == before


@runs("sessions", "sessions search", "sessions export", "sessions import")
def keeps_conversations(kvchat: Shell) -> None:
    (known,) = kvchat.conversations()
    assert known["id"] in kvchat("sessions").out
    hits = kvchat("sessions", "search", "--json", "rivers").json
    assert {hit["conversation"] for hit in hits} == {known["id"]}
    kvchat("sessions", "search", "nowhereatall", code=1)
    assert QUESTIONS[0] in kvchat("sessions", "export", known["id"]).out
    file = kvchat.home / "one.json"
    file.write_text(kvchat("sessions", "export", known["id"], "--format", "json").out, encoding="utf-8")
    elsewhere = ("--data-dir", kvchat.home / "elsewhere")
    assert "1 of 1 are new" in kvchat("sessions", *elsewhere, "import", file).err
    assert "0 of 1 are new" in kvchat("sessions", *elsewhere, "import", file).err
    (imported,) = kvchat("sessions", "--json", *elsewhere).json
    assert (imported["title"], imported["messages"]) == (known["title"], known["messages"])


@runs("cache ls", "cache show", "cache gc", "cache rm")
def keeps_caches(kvchat: Shell) -> None:
    (known,) = kvchat.conversations()
    (saved,) = kvchat("cache", "ls", "--json").json
    assert saved["conversation"] == known["id"]
    assert saved["tokens"] > 0
    assert known["id"] in kvchat("cache", "ls").out
    shown = kvchat("cache", "show", known["id"], "--json").json
    assert shown["saved"]["tokens"] == saved["tokens"]
    rows = list(csv.DictReader(kvchat("cache", "show", known["id"], "--csv").out.splitlines()))
    assert [row["kind"] for row in rows] == [event["kind"] for event in shown["events"]]
    assert {"save", "restore", "reuse"} <= {row["kind"] for row in rows}
    assert f"{saved['tokens']:,} tokens" in kvchat("cache", "show", known["id"]).out
    assert "0.0 MB freed" in kvchat("cache", "gc").err
    assert "1 cache deleted" in kvchat("cache", "rm", known["id"]).err
    assert kvchat("cache", "ls", "--json").json == []
    (again,) = kvchat.turns("-c", "And the deepest?")
    assert again["stats"]["reused_tokens"] == 0
    assert again["stats"]["reuse_note"], "it does not say why everything was read again"


@runs("verify")
def proves_what_the_page_shows(kvchat: Shell) -> None:
    row = re.compile(r"^(\S.*?) {2,}(\d+) +(none|token \d+) +(\d\.\d{6})$", re.MULTILINE)
    shown = kvchat("verify").out
    assert [found[0] for found in row.findall(shown)] == [found[0] for found in row.findall(PAGES)]
    assert {found[2] for found in row.findall(shown)} == {"none"}
    assert shown.endswith("All equal.\n")
    (known,) = kvchat.conversations()
    assert kvchat("verify", known["id"], "--tokens", "6").out.endswith("All equal.\n")


@runs("bench")
def measures(kvchat: Shell) -> None:
    plot, trace = kvchat.home / "bench.svg", kvchat.home / "trace.json"
    rows = kvchat("bench", *BRIEFLY, "--kv", "int8", "--json", "--plot", plot).json["rows"]
    cases = {(each["case"], each["mode"]) for each in rows}
    assert cases >= ROWS, cases
    assert any(each["case"] == "decode" and each.get("kv") == "int8" for each in rows)
    assert "<svg" in plot.read_text(encoding="utf-8")
    kvchat("bench", "--profile", trace)
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]


@runs("config list", "config get", "config set", "config unset", "config keys", "config path")
def keeps_settings(kvchat: Shell) -> None:
    names = {each["name"] for each in kvchat("config", "list", "--json").json}
    assert {"model", "temperature", "unload-after"} <= names
    assert all(name in kvchat("config", "list").out for name in names)
    default = kvchat("config", "get", "max-tokens").out
    kvchat("config", "set", "max-tokens", "3")
    assert kvchat("config", "get", "max-tokens").out == "3\n"
    told = json.loads(kvchat("run", "--private", "--json", "Count to twenty.").out)
    assert told["stats"]["generated_tokens"] == 3
    assert kvchat("config", "get", "max-tokens", KVCHAT_MAX_TOKENS="5").out == "5\n"
    kvchat("config", "set", "max-tokens", "many", code=1)
    kvchat("config", "unset", "max-tokens")
    assert kvchat("config", "get", "max-tokens").out == default
    assert kvchat("config", "keys", "--markdown").out.strip() == keys()
    assert kvchat("config", "path").out.endswith("config.toml\n")


@runs("doctor", "paths")
def looks_at_the_machine(kvchat: Shell) -> None:
    assert "✗" not in kvchat("doctor").out
    paths = dict(line.split(maxsplit=1) for line in kvchat("paths").out.splitlines())
    assert set(paths) == {"config", "database", "models", "compiled", "kv", "logs"}
    assert all(Path(path).is_relative_to(kvchat.home) for path in paths.values()), paths


@runs("models rm")
def removes_a_model(kvchat: Shell) -> None:
    elsewhere = kvchat.home / "elsewhere"
    copy = elsewhere / "models" / MODEL
    copy.mkdir(parents=True)
    for file in Path(kvchat("models", "path").out.strip()).iterdir():
        (copy / file.name).symlink_to(file)
    assert kvchat("models", "path", "--data-dir", elsewhere).out == f"{copy}\n"
    assert f"{MODEL} is deleted" in kvchat("models", "rm", MODEL, "--data-dir", elsewhere).err
    kvchat("models", "path", "--data-dir", elsewhere, code=1)
    kvchat("models", "path")


def main() -> None:
    """Runs the steps, or those whose names are given."""
    from kvchat.config.paths import find_paths

    chosen = sys.argv[1:]
    models, compiled = find_paths().models.resolve(), find_paths().compiled
    with tempfile.TemporaryDirectory(prefix="kvchat-readme-") as folder:
        shell = Shell(Path(folder).resolve())
        data = shell.home / "data" / "kvchat"
        data.mkdir(parents=True)
        (data / "models").symlink_to(models)
        shutil.copytree(compiled, data / "compiled")  # compiled code is never loaded through a link
        for commands, step in STEPS:
            if not chosen or step.__name__ in chosen:
                started = time.monotonic()
                step(shell)
                print(f"{time.monotonic() - started:5.1f} s  {', '.join(commands)}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
