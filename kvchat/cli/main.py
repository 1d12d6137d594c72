"""The command line: the composition root, and the only place that knows both the screen and the engine.

Everything heavy is imported inside the command that needs it: the child process of the engine imports this
module again, and the screen must paint before torch is there.
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

if TYPE_CHECKING:
    from kvchat.bench.verify import Check
    from kvchat.chat.session import Session
    from kvchat.ui.preferences import Preferences

EXPLICIT = {ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT}
"""Sources that override what a resumed conversation was set to."""


OWN_FLAGS = {"-h", "--help", "--version"}
"""Of `kvchat` itself; any other flag without a command belongs to the chat."""


ELSEWHERE = {
    "bench": "kvchat.cli.bench",
    "cache": "kvchat.cli.cache",
    "config": "kvchat.cli.config",
    "doctor": "kvchat.cli.doctor",
    "models": "kvchat.cli.models",
    "sessions": "kvchat.cli.sessions",
}
"""Commands in modules of their own, by their names there too; the chat waits for none of these modules."""


DIAGNOSING = {"config", "doctor", "paths"}
"""Commands that work whatever is wrong with the configuration file: they help to find that out."""


class ConfigDefaults(dict[str, Any]):
    """What the file says, for whichever command is called: every command asks here for its own.

    The file is read when a command asks, so that `--version` and `--help` need none.
    """

    def get(self, command: str, default: Any = None) -> dict[str, Any]:  # noqa: ANN401 - dict's own
        """The settings; of a group also by the name of each of its commands."""
        config = _config_for(command)
        for sentence in config.problems if command in DIAGNOSING else config.unknown:
            say(f"kvchat: warning: {sentence}")
        settled = dict(config.values)
        if command not in DIAGNOSING:
            settled |= {key: _refusing(sentence) for key, sentence in config.wrong.items()}
        group = cli.get_command(click.Context(cli), command)
        inner = group.commands if isinstance(group, click.Group) else ()
        return settled | dict.fromkeys(inner, settled)


def _config_for(command: str) -> Config:
    """What the file says; for a command that helps to find out what is wrong with it, that or nothing."""
    try:
        return read_config(find_paths().config_file)
    except KvchatError as error:
        if command not in DIAGNOSING:
            raise
        return Config(unknown=(str(error),))


def _refusing(sentence: str) -> Callable[[], Any]:
    """A default for a flag: wrong usage, where the command has that flag and nothing overrides the file."""

    def refuse() -> None:
        raise click.UsageError(sentence)

    return refuse


class ChatByDefault(click.Group):
    """`kvchat` and `kvchat -m MODEL` mean `kvchat chat`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *ELSEWHERE})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in ELSEWHERE and cmd_name not in self.commands:
            self.add_command(getattr(import_module(ELSEWHERE[cmd_name]), cmd_name), cmd_name)
        return super().get_command(ctx, cmd_name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in OWN_FLAGS):
            args = ["chat", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Runs the command. click itself would end with 1 after a closed pipe."""
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
@click.option("--plain", is_flag=True, help="Line by line and to the end, as it is without a terminal.")
@click.pass_context
def tour(ctx: click.Context, /, plain: bool, **given: Any) -> None:  # noqa: ANN401 - click's own
    """See what a KV cache does: eight steps, done and measured with the model, in three minutes.

    Works offline once the model is here; nothing of it is kept.
    """
    ctx.invoke(chat, begin_with="tour", plain=plain or not has_terminal(), **given)


def has_terminal() -> bool:
    """Whether a screen can be drawn: all three streams are terminals."""
    return all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))


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
    from kvchat.cli.load_model import load_ready

    prompts = read_prompts(prompts)
    paths = find_paths(given["data_dir"])
    session = open_session(ctx, paths)
    loaded = load_ready(session.current.model, paths, given)
    from kvchat.cli.run import run_turns
    from kvchat.engine.factory import load_draft, open_engine

    folder = None if given["private"] else paths.kv
    draft = load_draft(given["draft"], draft_folder(given["draft"], paths), given["threads"], paths.compiled)
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
    from kvchat.ui.key_bindings import checked_keys
    from kvchat.ui.preferences import Preferences
    from kvchat.ui.themes import checked_theme

    file = find_paths().config_file
    config = read_config(file)
    keys = checked_keys(config.keys)
    kept = None if given["private"] else file
    theme = checked_theme(given["theme"])
    return Preferences(theme, given["reduced_motion"], keys, config.unknown, kept)


@cli.command()
@click.argument("conversation", default="")
@click.option("--tokens", type=click.IntRange(2), default=24, show_default=True, help="Of each answer.")
@click.option("-m", "--model", help="A card's name, a hub id, a folder, or a GGUF file.")
@click.option("--threads", type=click.IntRange(1), help="For torch; default: every physical core.")
@data_dir
def verify(conversation: str, tokens: int, data_dir: Path | None, **given: Any) -> None:  # noqa: ANN401
    """Prove that the KV cache changes nothing, token by token, against no cache.

    In fp32 through transformers; then, where the model is compiled, through the compiled code too. Takes the
    questions of CONVERSATION, or three of its own. Exit code 1 when anything differs.
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
    """Prints a table of them as they come; returns whether all are equal."""
    click.echo(f"{title:<28}{'tokens':>7}  {'first difference':>16}  {'largest logit gap':>17}")
    equal = True
    for check in checks:
        differing = "none" if check.differing is None else f"token {check.differing + 1}"
        click.echo(f"{check.name:<28}{check.compared:>7}  {differing:>16}  {check.gap:>17.6f}")
        equal = equal and check.equal
    return equal


def _questions(conversation: str, paths: Paths) -> tuple[str, list[str]]:
    """(model, what was asked) of a saved conversation; the default model and nothing without one."""
    if not conversation:
        return DEFAULT_MODEL, []
    from kvchat.chat.store import Store

    store = Store(paths.database)
    saved = store.load(store.find(conversation))
    questions = [m.text for m in saved.sent if m.role == "user"]
    if len(questions) < 2:
        raise KvchatError("This conversation has fewer than two questions; there is nothing to keep yet.")
    return saved.model or DEFAULT_MODEL, questions


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
    """Where the model lies that guesses ahead; None where none does.

    Raises:
        KvchatError: it is not here.
    """
    from kvchat.models.resolve import is_prepared

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
    """Print where kvchat keeps its files."""
    for name, path in find_paths(data_dir).described().items():
        click.echo(f"{name:<9}{path}")


def main() -> None:
    """Runs the command line; ends with the exit code that `exit_status` describes."""
    protect_children()
    prepare_streams()
    sys.exit(exit_status(_run_command))


def _run_command() -> object:
    return cli(prog_name="kvchat", default_map=ConfigDefaults(), standalone_mode=False)
