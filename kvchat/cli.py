"""The command line: the composition root, and the only place that knows both the screen and the engine.

Everything heavy is imported inside the command that needs it: the child process of the engine imports this
module again, and the screen must paint before torch is there.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from kvchat import settings
from kvchat.cache_commands import cache as cache_commands
from kvchat.cache_commands import collect_garbage
from kvchat.catalog import DEFAULT_MODEL, find_card, load_cards
from kvchat.config_commands import config as config_commands
from kvchat.config_file import read_config
from kvchat.contract import CacheMode, EvictionPolicy, KVPrecision
from kvchat.doctor import doctor
from kvchat.errors import KvchatError
from kvchat.flags import chat_options, data_dir, model_options, screen_options
from kvchat.headless import INTERRUPTED, run_turns
from kvchat.openmp import wait_politely
from kvchat.paths import Paths, find_paths
from kvchat.session_commands import sessions as session_commands
from kvchat.text import megabytes

if TYPE_CHECKING:
    from kvchat.engine.load import LoadedModel
    from kvchat.session import Session
    from kvchat.ui.bridge import EngineFactory
    from kvchat.ui.preferences import Preferences

AS_LINES = "--progress-json"
EXPLICIT = {ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT}
"""Sources that override what a resumed conversation was set to."""


OWN_FLAGS = {"-h", "--help", "--version"}
"""Of `kvchat` itself; any other flag without a command belongs to the chat."""


class ChatByDefault(click.Group):
    """`kvchat` and `kvchat -m MODEL` mean `kvchat chat`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in OWN_FLAGS):
            args = ["chat", *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=ChatByDefault,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="kvchat")
def cli() -> None:
    """Chat with a model that runs on this machine, and see its KV cache work.

    `kvchat` alone opens the chat.
    """


@cli.command()
@model_options
@chat_options
@click.option("--tour", is_flag=True, hidden=True)
@screen_options
@click.option("--plain", is_flag=True, help="Line by line, without a screen: for screen readers.")
@click.pass_context
def chat(ctx: click.Context, /, plain: bool, **given: Any) -> None:  # noqa: ANN401 - click's own
    """Open the chat."""
    from kvchat.diagnose import report_on_signal
    from kvchat.link import EngineOptions, LinkedEngine, allow_spawning
    from kvchat.locate import is_prepared

    if not plain and not all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise KvchatError(
            "The chat needs a terminal. `kvchat chat --plain` and `kvchat run PROMPT` work without one."
        )
    preferences = _preferences(given)
    paths = find_paths(given["data_dir"])
    # opened after the first paint, unless the conversation decides which model it is
    opened = cache(lambda: open_session(ctx, paths))
    resumes = given["resume"] or given["resume_latest"]
    name = opened().current.model if resumes else given["model"] or DEFAULT_MODEL
    folder = is_prepared(name, paths.models)
    if folder is None or (given["precision"] == "auto" and lacks_step(folder)):
        if code := _pull_as_child(name, given["data_dir"]):
            sys.exit(code)
        folder = is_prepared(name, paths.models)
    assert folder is not None
    report_on_signal(paths.logs)
    allow_spawning()
    options = EngineOptions(
        folder,
        name,
        paths.logs / f"engine-{os.getpid()}.log",
        given["precision"],
        given["threads"],
        given["context"],
        given["device"],
        given["kv_budget"],
        None if given["private"] else paths.kv,
        given["kv_disk"],
        given["draft"],
        draft_folder(given["draft"], paths),
        60 * given["unload_after"],
    )

    def engine_of(folder: Path, name: str) -> "EngineFactory":
        wanted = replace(options, folder=folder, name=name)
        return lambda on_status: LinkedEngine(wanted, on_status)

    from kvchat.ui.models import ModelShelf

    shelf = ModelShelf(paths.models, engine_of, lambda wanted: _pull_command(wanted, given["data_dir"]))
    if plain:
        from kvchat.ui.plain import talk

        code = talk(opened(), engine_of(folder, name), shown_name(name), shelf)
    else:
        from kvchat.ui.app import ChatApp

        app = ChatApp(
            opened, engine_of(folder, name), model=shown_name(name), preferences=preferences, shelf=shelf
        )
        if given["tour"]:
            app.begin_with("tour")
        app.run()
        code = app.return_code or 0
    options.log_file.unlink(missing_ok=True)
    with suppress(KvchatError):  # the next chat tries again
        collect_garbage(paths)
    if code:
        sys.exit(code)
    conversation = opened().current
    if conversation.messages and not given["private"]:
        click.echo(f"Continue with: kvchat -r {conversation.id}")


@cli.command()
@model_options
@screen_options
@click.pass_context
def tour(ctx: click.Context, /, **given: Any) -> None:  # noqa: ANN401 - click's own
    """See what a KV cache does: eight steps, done and measured with the model, in three minutes.

    Works offline once the model is here; nothing of it is kept.
    """
    ctx.invoke(chat, tour=True, **given)


@cli.command()
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a turn on stdout.")
@model_options
@chat_options
@click.pass_context
def run(ctx: click.Context, /, prompts: Sequence[str], as_json: bool, **given: Any) -> None:  # noqa: ANN401
    """Answer without a screen. Several prompts are several turns of one conversation.

    `-`, or a pipe and no prompt, reads the prompt from standard input.
    """

    prompts = read_prompts(prompts)
    paths = find_paths(given["data_dir"])
    session = open_session(ctx, paths)
    loaded = _load(session.current.model, paths, given)
    from kvchat.engine.build import load_draft, open_engine

    folder = None if given["private"] else paths.kv
    draft = load_draft(given["draft"], draft_folder(given["draft"], paths), given["threads"])
    engine = open_engine(loaded, given["kv_budget"], folder, given["kv_disk"], draft=draft)
    try:
        code = run_turns(session, engine, prompts, as_json=as_json)
    finally:
        engine.close()
        session.note_events(engine.pool().events)
    sys.exit(code)


def _preferences(given: Mapping[str, Any]) -> "Preferences":
    """How the screen is to be, checked.

    Raises:
        KvchatError: there is no such theme, command or key.
    """
    from kvchat.ui.keys import checked_keys
    from kvchat.ui.preferences import Preferences
    from kvchat.ui.themes import checked_theme

    file = find_paths().config_file
    keys = checked_keys(read_config(file).keys)
    kept = None if given["private"] else file
    return Preferences(checked_theme(given["theme"]), given["reduced_motion"], keys, kept)


def _load(name: str, paths: Paths, given: Mapping[str, Any]) -> "LoadedModel":
    """Makes the model ready if it isn't, with progress on stderr, and loads it into this process."""
    wait_politely()
    from kvchat.engine.load import load_model
    from kvchat.engine.prepare import prepare
    from kvchat.progress import reported

    with reported(name) as report:
        folder = prepare(name, paths.models, report)
    return load_model(
        folder,
        name,
        precision=given["precision"],
        threads=given["threads"],
        context=given["context"],
        device=given["device"],
    )


@cli.command()
@click.option("--contexts", default="256,1024,4096", show_default=True, help="Cached tokens to measure at.")
@click.option("--turns", type=click.IntRange(1), default=8, show_default=True, help="Of the chat.")
@click.option(
    "--answer-tokens", type=click.IntRange(2), default=96, show_default=True, help="Of each answer."
)
@click.option("--fill", is_flag=True, help="No answer ends before --answer-tokens.")
@click.option("--kv", default="", help="Precisions of keys and values to decode with too, such as int8,int4.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw curves into this .svg or .png file.")
@click.option("--peers", type=click.Path(path_type=Path), help="Rows of another engine; prints the ratios.")
@click.option("--profile", type=click.Path(path_type=Path), help="Write a trace of one turn; that is all.")
@model_options
def bench(
    contexts: str,
    turns: int,
    answer_tokens: int,
    fill: bool,
    kv: str,
    as_json: bool,
    plot: Path | None,
    peers: Path | None,
    profile: Path | None,
    **given: Any,  # noqa: ANN401
) -> None:
    """Measure prefill, decode and turns, with the KV cache and without."""
    lengths, precisions = parse_contexts(contexts), parse_precisions(kv)
    from rich.console import Console

    from kvchat.bench_report import draw, ratios, read_peers, refuse_plot, report

    others = read_peers(peers) if peers else None
    if plot:
        refuse_plot(plot)
    loaded = _load(given["model"] or DEFAULT_MODEL, find_paths(given["data_dir"]), given)
    from kvchat.bench import profile_turn, run_bench

    if profile:
        profile_turn(loaded, profile)
        click.echo(f"Open {profile} in https://ui.perfetto.dev or chrome://tracing.", err=True)
        return

    def note(words: str) -> None:
        click.echo(f"measuring: {words}", err=True)

    measured = run_bench(
        loaded,
        lengths,
        turns=turns,
        answer_tokens=answer_tokens,
        fill=fill,
        precisions=precisions,
        note=note,
    )
    rows, console = measured["rows"], Console(stderr=as_json)
    if as_json:
        click.echo(json.dumps(measured, indent=1))
    else:
        console.print(report(rows))
        console.print(
            f"{megabytes(measured['rss_bytes'])} of memory with the model loaded and nothing cached"
        )
    if others:
        console.print(ratios(rows, *others))
    if plot:
        draw(rows, plot)


def parse_precisions(text: str) -> list[str]:
    """`int8,int4` → ["int8", "int4"].

    Raises:
        click.BadParameter: something in it is no precision of keys and values.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in set(KVPrecision)]:
        known = ", ".join(KVPrecision)
        raise click.BadParameter(f"{unknown[0]!r} is no precision; {known} are.", param_hint="--kv")
    return names


@cli.command()
@click.argument("conversation", default="")
@click.option("--tokens", type=click.IntRange(2), default=24, show_default=True, help="Of each answer.")
@click.option("-m", "--model", help="A card's name, a hub id, a folder, or a GGUF file.")
@click.option("--threads", type=click.IntRange(1), help="For torch; default: every physical core.")
@data_dir
def verify(conversation: str, tokens: int, data_dir: Path | None, **given: Any) -> None:  # noqa: ANN401
    """Prove that the KV cache changes nothing: in fp32, against no cache, token by token.

    Takes the questions of CONVERSATION, or three of its own. Exit code 1 when anything differs.
    """
    paths = find_paths(data_dir)
    name, questions = _questions(conversation, paths)
    given |= {"precision": "fp32", "context": None, "device": "cpu"}
    loaded = _load(given["model"] or name, paths, given)
    from kvchat.verify import QUESTIONS, run_checks

    click.echo(f"{loaded.facts.name}, fp32, greedy: every kind of cache against no cache", err=True)
    click.echo(f"{'':<28}{'tokens':>7}  {'first difference':>16}  {'largest logit gap':>17}")
    equal = True
    for check in run_checks(loaded, questions or QUESTIONS, tokens):
        differing = "none" if check.differing is None else f"token {check.differing + 1}"
        click.echo(f"{check.name:<28}{check.compared:>7}  {differing:>16}  {check.gap:>17.6f}")
        equal = equal and check.equal
    if loaded.facts.gap_refusal:
        click.echo(f"sinks and snapkv can't be used: {loaded.facts.gap_refusal}")
    click.echo("All equal." if equal else "The cache changed an answer.")
    sys.exit(0 if equal else 1)


def _questions(conversation: str, paths: Paths) -> tuple[str, list[str]]:
    """(model, what was asked) of a saved conversation; the default model and nothing without one."""
    if not conversation:
        return DEFAULT_MODEL, []
    from kvchat.store import Store

    store = Store(paths.database)
    saved = store.load(store.find(conversation))
    questions = [m.text for m in saved.messages if m.role == "user"]
    if len(questions) < 2:
        raise KvchatError("This conversation has fewer than two questions; there is nothing to keep yet.")
    return saved.model or DEFAULT_MODEL, questions


def parse_contexts(text: str) -> list[int]:
    """`256,1024` → [256, 1024].

    Raises:
        click.BadParameter: something in it is no positive whole number.
    """
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise click.BadParameter(
            f"{text!r} is no list of token counts such as 256,1024.", param_hint="--contexts"
        )
    return lengths


def read_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts, with standard input for `-`, and for none at all.

    Raises:
        KvchatError: there is no prompt, or an empty one.
    """
    if not prompts and (not sys.stdin or sys.stdin.isatty()):
        raise KvchatError('What is the prompt? kvchat run "PROMPT", or pipe it in.')
    texts = [_read_stdin() if prompt == "-" else prompt for prompt in prompts or ["-"]]
    if any(not text.strip() for text in texts):
        raise KvchatError("The prompt is empty.")
    for text in texts:
        refuse_bytes(text, "The prompt")
    return texts


def refuse_bytes(text: str, what: str) -> None:
    """Passes text; bytes that are none come from the shell as lone surrogates.

    Raises:
        KvchatError: there are some.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise KvchatError(f"{what} is not text: it has bytes that are not UTF-8.") from error


def _read_stdin() -> str:
    if not sys.stdin:
        raise KvchatError("There is no standard input to read a prompt from.")
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise KvchatError(f"Standard input is not text: {error}") from error


def open_session(ctx: click.Context, paths: Paths) -> "Session":
    """The conversation that the flags ask for, set as they say.

    Raises:
        KvchatError: there is no such conversation or model, or the system prompt is no text.
    """
    from kvchat.session import Defaults, Session
    from kvchat.store import Store

    given = ctx.params
    explicit = {k: v for k, v in given.items() if ctx.get_parameter_source(k) in EXPLICIT}
    name = lasting_name(given["model"] or DEFAULT_MODEL, paths.models)
    refuse_bytes(given["system"] or "", "The system prompt")
    defaults = Defaults(
        model=name,
        system_prompt=given["system"] or "",
        mode=CacheMode(given["cache"] or CacheMode.ON),
        sampling=settings.changed(settings.sampling_of(find_card(name)), given),
        kv=KVPrecision(given["kv"] or KVPrecision.AUTO),
        policy=EvictionPolicy(given["policy"] or EvictionPolicy.TURNS),
        private=given["private"],
    )
    session = Session(Store(None if given["private"] else paths.database), defaults)
    if given["resume"]:
        session.open(given["resume"])
    elif given["resume_latest"]:
        session.open_latest()
    session.configure(
        mode=CacheMode(explicit["cache"]) if explicit.get("cache") else None,
        system_prompt=explicit.get("system"),
        sampling=settings.changed(session.current.sampling, explicit),
        kv=KVPrecision(explicit["kv"]) if explicit.get("kv") else None,
        policy=EvictionPolicy(explicit["policy"]) if explicit.get("policy") else None,
        model=name if explicit.get("model") else session.current.model or name,
    )
    return session


def lacks_step(folder: Path) -> bool:
    """Whether a model that was converted here waits to be compiled, perhaps again."""
    from kvchat.engine.prepare import wants_step

    return wants_step(folder)


def draft_folder(draft: str, paths: Paths) -> Path | None:
    """Where the model lies that guesses ahead; None where none does.

    Raises:
        KvchatError: it is not here.
    """
    from kvchat.locate import is_prepared

    if draft in ("lookup", "off"):
        return None
    folder = is_prepared(draft, paths.models)
    if folder is None:
        raise KvchatError(f"{draft} is not here yet. `kvchat models pull {draft}` fetches it.")
    return folder


def lasting_name(model: str, models_dir: Path) -> str:
    """The name by which a conversation finds its model again, in whatever folder kvchat is started.

    Raises:
        KvchatError: there is no such model; a conversation must not remember it.
    """
    from kvchat.locate import FolderModel, GgufModel, find_prepared, recognise

    place = recognise(model)
    find_prepared(place, models_dir)
    if not isinstance(place, FolderModel | GgufModel):
        return model
    refuse_bytes(str(place.path), "The path of the model")
    return str(place.path)


def shown_name(model: str) -> str:
    """What the screen calls a model: a card's title, the last part of a path or a hub id."""
    card = find_card(model)
    return card.title if card else Path(model).name


def _pull_as_child(name: str, data_dir: Path | None) -> int:
    """Fetches and converts in a process of its own: converting imports torch, and the screen must not."""
    command = _pull_command(name, data_dir)
    return subprocess.run([word for word in command if word != AS_LINES], check=False).returncode


def _pull_command(name: str, data_dir: Path | None) -> list[str]:
    """Fetches a model and prints its progress as JSON, an object a line."""
    place = ["--data-dir", str(data_dir)] if data_dir else []
    return [sys.executable, "-m", "kvchat", "models", "pull", name, AS_LINES, *place]


@contextmanager
def _cleaning_up() -> Iterator[None]:
    """Inside the block, SIGTERM and Ctrl-C unwind and end the program: half a download doesn't stay."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)


@cli.command(name="paths")
@data_dir
def show_paths(data_dir: Path | None) -> None:
    """Print where kvchat keeps its files."""
    for name, path in find_paths(data_dir).described().items():
        click.echo(f"{name:<9}{path}")


@cli.group()
def models() -> None:
    """List, fetch, find and remove models."""


@models.command(name="list")
@data_dir
def list_models(data_dir: Path | None) -> None:
    """The models that have a card, and those that are here."""
    from kvchat.locate import installed, is_prepared

    models_dir = find_paths(data_dir).models
    sizes = {model.path: model.bytes for model in installed(models_dir)}
    for card in load_cards():
        folder = is_prepared(card.name, models_dir)
        here = (
            "not here"
            if folder is None
            else f"here, {megabytes(sizes[folder])}"
            if folder in sizes
            else "here"
        )
        notes = [here, f"context {card.context:,}", card.licence]
        notes += ["gated"] if card.gated else []
        notes += [] if card.tried else ["not tried yet"]
        click.echo(f"{card.name:<24}{card.parameters / 1e6:>7,.0f}M  {' · '.join(notes)}")
        click.echo(f"{'':<34}{card.summary}")
    names = {card.name for card in load_cards()}
    for model in installed(models_dir):
        if model.name not in names:
            click.echo(f"{model.name:<34}here, {megabytes(model.bytes)}")


@models.command()
@click.argument("name", default=DEFAULT_MODEL)
@click.option(AS_LINES, is_flag=True, help="Progress as JSON on stdout, an object a line.")
@data_dir
def pull(name: str, progress_json: bool, data_dir: Path | None) -> None:
    """Fetch a model and make it ready; does nothing if it is."""
    from kvchat.engine.package import package_folder, refusal_of
    from kvchat.engine.precision import weights_of
    from kvchat.engine.prepare import prepare
    from kvchat.progress import reported

    with _cleaning_up(), reported(name, as_json=progress_json) as report:
        folder = prepare(name, find_paths(data_dir).models, report)
    if reason := refusal_of(package_folder(folder, weights_of(folder, "auto"))):
        click.echo(f"{name} is not compiled, and several times slower: {reason}", err=True)
    click.echo(f"{name} is ready in {folder}", err=True)


@models.command()
@click.argument("name", default=DEFAULT_MODEL)
@click.option("--precision", type=click.Choice(settings.PRECISIONS), default="auto", show_default=True)
@data_dir
def prepare(name: str, precision: str, data_dir: Path | None) -> None:
    """Compile a model for this CPU; fetches it first if it isn't here.

    `auto` keeps the precision of the source. `int8` and `int4` round the weights; what that costs in quality
    is measured and said.
    """
    from kvchat.engine.compile import prepare_step
    from kvchat.engine.compiled import Description
    from kvchat.engine.precision import weights_of
    from kvchat.engine.prepare import prepare
    from kvchat.progress import reported

    with reported(name) as report:
        folder = prepare(name, find_paths(data_dir).models, report)
        made = Description.load(prepare_step(folder, weights_of(folder, precision), report))
    cost = made.cost
    click.echo(
        f"{name} runs compiled for this CPU: {made.weights}, {megabytes(made.weights_bytes)}.", err=True
    )
    click.echo(
        f"On {cost.tokens} tokens of prose it is {cost.kl:.2g} nats from the same model in fp32, and finds "
        f"the same next token most probable after {cost.agreeing:.1%} of them.",
        err=True,
    )


@models.command()
@click.argument("name", default=DEFAULT_MODEL)
@data_dir
def path(name: str, data_dir: Path | None) -> None:
    """Print the folder of a model that is ready."""
    from kvchat.locate import is_prepared

    folder = is_prepared(name, find_paths(data_dir).models)
    if folder is None:
        raise KvchatError(f"{name} is not here yet. `kvchat models pull {name}` fetches it.")
    click.echo(str(folder))


@models.command()
@click.argument("name")
@data_dir
def rm(name: str, data_dir: Path | None) -> None:
    """Delete a fetched or converted model."""
    from kvchat.locate import remove_installed

    freed = remove_installed(name, find_paths(data_dir).models)
    click.echo(f"{name} is gone; {megabytes(freed)} are free again.", err=True)


for group in (cache_commands, config_commands, doctor, session_commands):
    cli.add_command(group)


def main() -> None:
    """Runs the command line; a `KvchatError` becomes one line on stderr and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter still gets the others
    try:
        config = dict(read_config(find_paths().config_file).values)
        defaults = dict.fromkeys(cli.commands, config)
        defaults |= {
            group.name: config | dict.fromkeys(group.commands, config)
            for group in (models, cache_commands, session_commands)
            if group.name
        }
        cli(prog_name="kvchat", default_map=defaults)
    except KvchatError as error:
        click.echo(f"kvchat: {error}", err=True)
        sys.exit(1)
