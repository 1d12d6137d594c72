"""`kvchat models`: lists, downloads, compiles and deletes models; also downloads in a child process."""

import signal
import subprocess
import sys
from pathlib import Path

import click

from kvchat.cli.options import data_dir
from kvchat.config import settings
from kvchat.config.paths import find_paths
from kvchat.errors import KvchatError
from kvchat.models.cards import DEFAULT_MODEL, load_cards
from kvchat.system.interrupts import on_signals
from kvchat.text import megabytes

AS_LINES = "--progress-json"


@click.group()
def models() -> None:
    """List, download, compile and delete models."""


@models.command(name="list")
@data_dir
def list_models(data_dir: Path | None) -> None:
    """List the models with a card and all downloaded models."""
    from kvchat.models.resolve import installed, is_prepared

    paths = find_paths(data_dir)
    models_dir, here_now = paths.models, installed(paths.models, paths.compiled)
    sizes = {model.path: model.bytes for model in here_now}
    for card in load_cards():
        folder = is_prepared(card.name, models_dir)
        size = f", {megabytes(sizes[folder])}" if folder in sizes else ""
        notes = [f"installed{size}" if folder else "not installed", f"context {card.context:,}", card.licence]
        notes += ["gated"] if card.gated else []
        notes += [] if card.tried else ["not tested yet"]
        click.echo(f"{card.name:<24}{card.parameters / 1e6:>7,.0f}M  {' · '.join(notes)}")
        click.echo(f"{'':<34}{card.summary}")
    names = {card.name for card in load_cards()}
    for model in here_now:
        if model.name not in names:
            click.echo(f"{model.name:<34}installed, {megabytes(model.bytes)}")


@models.command()
@click.argument("name", default=DEFAULT_MODEL)
@click.option(AS_LINES, is_flag=True, help="Progress as JSON on stdout, one object per line.")
@data_dir
def pull(name: str, progress_json: bool, data_dir: Path | None) -> None:
    """Download a model and prepare it; does nothing if it is ready."""
    from kvchat.cli.progress import reported
    from kvchat.engine.compiled.package import refusal_of
    from kvchat.engine.model.dtypes import weights_of
    from kvchat.engine.setup.prepare import prepare

    paths, reasons = find_paths(data_dir), list[str]()
    with reported(name, as_json=progress_json) as report:
        folder = prepare(name, paths.models, report, paths.compiled, reasons.append)
    reasons = reasons or [refusal_of(paths.compiled, folder, weights_of(folder, "auto"))]
    if reason := reasons[0]:
        click.echo(f"{name} is not compiled, so it is several times slower: {reason}", err=True)
    click.echo(f"{name} is ready in {folder}", err=True)


@models.command()
@click.argument("name", default=DEFAULT_MODEL)
@click.option("--precision", type=click.Choice(settings.PRECISIONS), default="auto", show_default=True)
@click.option("--force", is_flag=True, help="Compile again, even if it failed before.")
@data_dir
def prepare(name: str, precision: str, force: bool, data_dir: Path | None) -> None:
    """Compile a model for this CPU; downloads it first if necessary.

    `auto` uses the precision of the source. `int8` and `int4` quantise the weights; the loss of quality is
    measured and printed.
    """
    from kvchat.cli.progress import reported
    from kvchat.engine.compiled.build import prepare_step
    from kvchat.engine.compiled.runner import Description
    from kvchat.engine.model.dtypes import weights_of
    from kvchat.engine.setup.prepare import prepare

    paths = find_paths(data_dir)
    with reported(name) as report:
        folder = prepare(name, paths.models, report)
        weights = weights_of(folder, precision)
        made = Description.load(prepare_step(paths.compiled, folder, weights, report, force=force))
    cost = made.cost
    click.echo(
        f"{name} runs compiled for this CPU: {made.weights}, {megabytes(made.weights_bytes)}.", err=True
    )
    click.echo(
        f"On {cost.tokens} tokens of prose its KL divergence from the same model in fp32 is {cost.kl:.2g} "
        f"nats, and the most probable next token is the same after {cost.agreeing:.1%} of them.",
        err=True,
    )


@models.command()
@click.argument("name", default=DEFAULT_MODEL)
@click.option("--compiled", is_flag=True, help="Print the folder of its compiled packages.")
@data_dir
def path(name: str, compiled: bool, data_dir: Path | None) -> None:
    """Print the folder of a prepared model."""
    from kvchat.models.resolve import compiled_folder, is_prepared

    paths = find_paths(data_dir)
    folder = is_prepared(name, paths.models)
    if folder is None:
        raise KvchatError(f"{name} is not here yet. `kvchat models pull {name}` fetches it.")
    found = compiled_folder(paths.compiled, folder) if compiled else folder
    if not found.is_dir():
        raise KvchatError(f"{name} is not compiled. `kvchat models prepare {name}` does that.")
    click.echo(str(found))


@models.command()
@click.argument("name")
@data_dir
def rm(name: str, data_dir: Path | None) -> None:
    """Delete a downloaded or converted model and its compiled packages.

    Of a model in another folder, or in the hub's cache, only the compiled packages are deleted.
    """
    from kvchat.models.resolve import remove_compiled, remove_installed

    paths = find_paths(data_dir)
    if (folder := _external_folder(name, paths.models)) and (
        freed := remove_compiled(paths.compiled, folder)
    ):
        click.echo(f"The compiled packages of {name} are deleted; {megabytes(freed)} freed.", err=True)
        click.echo(f"The model itself stays in {folder}.", err=True)
        return
    freed = remove_installed(name, paths.models, paths.compiled)
    click.echo(f"{name} is deleted; {megabytes(freed)} freed.", err=True)


def _external_folder(name: str, models_dir: Path) -> Path | None:
    """The folder of a model outside of `models_dir`; None if it is not prepared, unknown, or inside."""
    from kvchat.models.resolve import is_prepared

    try:
        folder = is_prepared(name, models_dir)
    except KvchatError:
        return None
    return folder if folder and folder.parent != models_dir else None


def pull_as_child(name: str, data_dir: Path | None) -> int:
    """Downloads and converts in a child process, because converting imports torch; returns its exit code.

    SIGTERM and SIGHUP are forwarded to the child; Ctrl-C reaches it from the terminal.
    """
    command = [word for word in pull_command(name, data_dir) if word != AS_LINES]
    with subprocess.Popen(command) as child:

        def forward(number: int) -> None:
            if number != signal.SIGINT:
                child.send_signal(number)

        with on_signals(forward):
            return child.wait()


def pull_command(name: str, data_dir: Path | None) -> list[str]:
    """A command that downloads a model and prints its progress as JSON, one object per line."""
    place = ["--data-dir", str(data_dir)] if data_dir else []
    return [sys.executable, "-m", "kvchat", "models", "pull", name, AS_LINES, *place]
