"""The commands `chat`, `tour`, `run`, `verify` and `paths`, and the entry point of the command line.

Must import heavy packages inside commands only: the engine's child process imports this module too, and the
screen must appear before torch is imported.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from kvchat.cli.options import chat_options, data_dir, model_options, screen_options
from kvchat.config import settings
from kvchat.config.file import Config, read_config
from kvchat.config.paths import Paths, find_paths
from kvchat.contract import CacheMode, EvictionPolicy, KVPrecision
from kvchat.errors import KvchatError
from kvchat.models.cards import DEFAULT_MODEL, find_card
from kvchat.system.children import protect_children
from kvchat.system.exit_status import SIGPIPE, exit_status, prepare_streams, say
from kvchat.system.interrupts import Ended
from kvchat.validation.checks import refuse_bytes

if TYPE_CHECKING:
    from kvchat.bench.verify import Check
    from kvchat.chat.session import Session
    from kvchat.ui.preferences import Preferences

EXPLICIT = {ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT}
"""Sources of values that override the settings of a resumed conversation."""


OWN_FLAGS = {"-h", "--help", "--version"}
"""Flags of `kvchat` itself; other flags without a command belong to `chat`."""


COMMAND_MODULES = {
    "bench": "kvchat.cli.bench",
    "cache": "kvchat.cli.cache",
    "config": "kvchat.cli.config",
    "doctor": "kvchat.cli.doctor",
    "models": "kvchat.cli.models",
    "sessions": "kvchat.cli.sessions",
}
"""Command → its module, imported when the command is used. The command has the same name there."""


DIAGNOSING = {"config", "doctor", "paths"}
"""Commands that work with an invalid configuration file, so that the user can find the problem."""


class ConfigDefaults(dict[str, Any]):
    """click's default map from the configuration file.

    Reads the file when a command asks for its defaults, so that `--version` and `--help` don't read it.
    """

    def get(self, command: str, default: Any = None) -> dict[str, Any]:  # noqa: ANN401 - dict's own
        """The defaults of a command; for a group also under the name of each of its commands."""
        config = _config_for(command)
        for sentence in config.problems if command in DIAGNOSING else config.unknown:
            say(f"kvchat: warning: {sentence}")
        defaults = dict(config.values)
        if command not in DIAGNOSING:
            defaults |= {key: _usage_error(sentence) for key, sentence in config.wrong.items()}
        group = cli.get_command(click.Context(cli), command)
        inner = group.commands if isinstance(group, click.Group) else ()
        return defaults | dict.fromkeys(inner, defaults)


def _config_for(command: str) -> Config:
    """The configuration; for a command in `DIAGNOSING`, errors become warnings."""
    try:
        return read_config(find_paths().config_file)
    except KvchatError as error:
        if command not in DIAGNOSING:
            raise
        return Config(unknown=(str(error),))


def _usage_error(sentence: str) -> Callable[[], Any]:
    """A default that raises a usage error; click calls it only if nothing overrides the file."""

    def raise_error() -> None:
        raise click.UsageError(sentence)

    return raise_error


class ChatByDefault(click.Group):
    """`kvchat` and `kvchat -m MODEL` mean `kvchat chat`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *COMMAND_MODULES})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMAND_MODULES and cmd_name not in self.commands:
            self.add_command(getattr(import_module(COMMAND_MODULES[cmd_name]), cmd_name), cmd_name)
        return super().get_command(ctx, cmd_name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in OWN_FLAGS):
            args = ["chat", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Runs the command; a closed pipe raises `Ended(SIGPIPE)`, for which click would exit with 1."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise Ended(SIGPIPE) from error


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
@screen_options
@click.option("--plain", is_flag=True, help="Line by line, without a screen: for screen readers.")
@click.pass_context
def chat(ctx: click.Context, /, plain: bool, *, begin_with: str = "", **given: Any) -> None:  # noqa: ANN401
    """Open the chat."""
    if not plain and not has_terminal():
        raise KvchatError(
            "The chat needs a terminal. `kvchat chat --plain` and `kvchat run PROMPT` work without one."
        )
    from kvchat.cli import chat as parts
    from kvchat.engine_process.client import allow_spawning
    from kvchat.engine_process.diagnostics import report_on_signal

    preferences = _preferences(given)
    paths = find_paths(given["data_dir"])
    # opened after the first paint, unless the conversation decides which model it is
    opened = cache(lambda: open_session(ctx, paths))
    resumes = given["resume"] or given["resume_latest"]
    name = opened().current.model if resumes else given["model"] or DEFAULT_MODEL
    folder = parts.ready_folder(name, paths, given)
    report_on_signal(paths.logs)
    allow_spawning()
    options = parts.engine_options(folder, name, paths, given)
    shelf = parts.model_shelf(options, paths, given)
    if plain:
        code = parts.talk_in_lines(opened, options, shelf, begin_with)
    else:
        code = parts.talk_on_screen(opened, options, shelf, preferences, begin_with)
    parts.clean_up(options, paths)
    if code:
        sys.exit(code)
    conversation = opened().current
    if conversation.messages and not opened().is_private(conversation.id):
        click.echo(f"Continue with: kvchat -r {conversation.id}")


@cli.command()
@model_options
@screen_options
@click.option("--plain", is_flag=True, help="Line by line without pauses, as without a terminal.")
@click.pass_context
def tour(ctx: click.Context, /, plain: bool, **given: Any) -> None:  # noqa: ANN401 - click's own
    """See what a KV cache does: eight steps, run and measured with the model, in three minutes.

    Works offline once the model is downloaded. Nothing is saved.
    """
    ctx.invoke(chat, begin_with="tour", plain=plain or not has_terminal(), **given)


def has_terminal() -> bool:
    """Whether stdin, stdout and stderr are terminals."""
    return all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))


@cli.command()
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per turn on stdout.")
@model_options
@chat_options
@click.pass_context
def run(ctx: click.Context, /, prompts: Sequence[str], as_json: bool, **given: Any) -> None:  # noqa: ANN401
    """Answer without a screen. Several prompts are turns of one conversation.

    Reads the prompt from standard input for `-`, or without a prompt from a pipe.
    """
    from kvchat.cli.load_model import load_ready

    prompts = read_prompts(prompts)
    paths = find_paths(given["data_dir"])
    session = open_session(ctx, paths)
    guesser = draft_folder(given["draft"], paths)  # looked for before the model is fetched and converted
    loaded = load_ready(session.current.model, paths, given)
    from kvchat.cli.run import run_turns
    from kvchat.engine.factory import load_draft, open_engine

    folder = None if given["private"] else paths.kv
    draft = load_draft(given["draft"], guesser, given["threads"], paths.compiled)
    engine = open_engine(loaded, given["kv_budget"], folder, given["kv_disk"], draft=draft)
    try:
        code = run_turns(session, engine, prompts, as_json=as_json)
    finally:
        engine.close()
        session.note_events(engine.pool().events)
    sys.exit(code)


def _preferences(given: Mapping[str, Any]) -> "Preferences":
    """The validated preferences of the screen.

    Raises:
        KvchatError: there is no such theme, command or key.
    """
    from kvchat.ui.key_bindings import checked_keys
    from kvchat.ui.preferences import Preferences
    from kvchat.ui.themes import checked_theme

    file = find_paths().config_file
    config = read_config(file)
    keys = checked_keys(config.keys)
    writable = None if given["private"] else file
    theme = checked_theme(given["theme"])
    return Preferences(theme, given["reduced_motion"], keys, config.unknown, writable)


@cli.command()
@click.argument("conversation", default="")
@click.option(
    "--tokens", type=click.IntRange(2), default=24, show_default=True, help="Tokens of each answer."
)
@click.option("-m", "--model", help="A card's name, a hub id, a folder, or a GGUF file.")
@click.option("--threads", type=click.IntRange(1), help="Processor threads; default: every physical core.")
@data_dir
def verify(conversation: str, tokens: int, data_dir: Path | None, **given: Any) -> None:  # noqa: ANN401
    """Check that the KV cache does not change answers: compares every token with a run without a cache.

    In fp32 with transformers, then with the compiled code if the model is compiled. Uses the questions of
    CONVERSATION, or three built-in ones. Exit code 1 if anything differs.
    """
    from kvchat.cli.load_model import load_ready

    paths = find_paths(data_dir)
    name, questions = _questions(conversation, paths)
    given |= {"precision": "fp32", "context": None, "device": "cpu"}
    loaded = load_ready(given["model"] or name, paths, given)
    from kvchat.bench.verify import QUESTIONS, can_check_compiled, run_checks, run_compiled_checks

    questions = questions or list(QUESTIONS)
    click.echo(f"{loaded.facts.name}, greedy: every kind of cache against no cache", err=True)
    equal = _print_checks("in fp32", run_checks(loaded, questions, tokens))
    if loaded.facts.gap_refusal:
        click.echo(f"sinks and snapkv can't be used: {loaded.facts.gap_refusal}")
    compiled = load_ready(loaded.facts.name, paths, given | {"precision": "auto"})
    if can_check_compiled(compiled):
        click.echo()
        checks = run_compiled_checks(compiled, questions, tokens)
        equal = _print_checks(compiled.facts.path, checks) and equal
    click.echo("All equal." if equal else "The cache changed an answer.")
    sys.exit(0 if equal else 1)


def _print_checks(title: str, checks: "Iterable[Check]") -> bool:
    """Prints a table row after each check; returns whether all are equal."""
    click.echo(f"{title:<28}{'tokens':>7}  {'first difference':>16}  {'largest logit gap':>17}")
    equal = True
    for check in checks:
        differing = "none" if check.differing is None else f"token {check.differing + 1}"
        click.echo(f"{check.name:<28}{check.compared:>7}  {differing:>16}  {check.gap:>17.6f}")
        equal = equal and check.equal
    return equal


def _questions(conversation: str, paths: Paths) -> tuple[str, list[str]]:
    """(model, questions) of a saved conversation; the default model and no questions without one."""
    if not conversation:
        return DEFAULT_MODEL, []
    from kvchat.chat.store import Store

    store = Store(paths.database)
    saved = store.load(store.find(conversation))
    questions = [m.text for m in saved.sent if m.role == "user"]
    if len(questions) < 2:
        raise KvchatError("This conversation has fewer than two questions; nothing would be reused.")
    return saved.model or DEFAULT_MODEL, questions


def read_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts, with standard input in place of `-` and of no prompts.

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


def _read_stdin() -> str:
    if not sys.stdin:
        raise KvchatError("There is no standard input to read a prompt from.")
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise KvchatError(f"Standard input is not text: {error}") from error


def open_session(ctx: click.Context, paths: Paths) -> "Session":
    """A session with the conversation and the settings that the flags select.

    Raises:
        KvchatError: there is no such conversation or model, or the system prompt is not UTF-8.
    """
    from kvchat.chat.session import ConversationDefaults, Session
    from kvchat.chat.store import Store

    given = ctx.params
    explicit = {k: v for k, v in given.items() if ctx.get_parameter_source(k) in EXPLICIT}
    name = lasting_name(given["model"] or DEFAULT_MODEL, paths.models)
    refuse_bytes(given["system"] or "", "The system prompt")
    defaults = ConversationDefaults(
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


def draft_folder(draft: str, paths: Paths) -> Path | None:
    """The folder of the draft model; None without one.

    Raises:
        KvchatError: it is not downloaded.
    """
    from kvchat.models.resolve import is_prepared

    if draft in ("lookup", "off"):
        return None
    folder = is_prepared(draft, paths.models)
    if folder is None:
        raise KvchatError(f"{draft} is not here yet. `kvchat models pull {draft}` fetches it.")
    return folder


def lasting_name(model: str, models_dir: Path) -> str:
    """The model's name for the database: a path becomes absolute, so that it works from every folder.

    Raises:
        KvchatError: there is no such model.
    """
    from kvchat.models.resolve import FolderModel, GgufModel, find_prepared, recognise

    place = recognise(model)
    find_prepared(place, models_dir)
    if not isinstance(place, FolderModel | GgufModel):
        return model
    refuse_bytes(str(place.path), "The path of the model")
    return str(place.path)


@cli.command(name="paths")
@data_dir
def show_paths(data_dir: Path | None) -> None:
    """Print the paths of kvchat's files and folders."""
    for name, path in find_paths(data_dir).described().items():
        click.echo(f"{name:<9}{path}")


def main() -> None:
    """Runs the command line; exits with a code as described in `system.exit_status`."""
    protect_children()
    prepare_streams()
    sys.exit(exit_status(_run_command))


def _run_command() -> object:
    return cli(prog_name="kvchat", default_map=ConfigDefaults(), standalone_mode=False)
