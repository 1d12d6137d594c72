"""`kvchat bench`: flags and output of the benchmarks. Must import torch only inside the command."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvchat.cli.load_model import load_ready
from kvchat.cli.options import model_options
from kvchat.config import settings
from kvchat.config.paths import Paths, find_paths
from kvchat.contract import KVPrecision
from kvchat.errors import KvchatError
from kvchat.models.cards import DEFAULT_MODEL
from kvchat.models.resolve import is_prepared
from kvchat.text import megabytes
from kvchat.validation.plain_json import write_json

if TYPE_CHECKING:
    from kvchat.engine.model.loader import LoadedModel


@click.command()
@click.option("--contexts", default="256,1024,4096", show_default=True, help="Context lengths in tokens.")
@click.option("--turns", type=click.IntRange(1), default=8, show_default=True, help="Turns of the chat.")
@click.option(
    "--answer-tokens", type=click.IntRange(2), default=96, show_default=True, help="Tokens of each answer."
)
@click.option("--fill", is_flag=True, help="Ignore end-of-turn ids: all answers get --answer-tokens.")
@click.option("--kv", default="", help="Also decode with these KV cache precisions, such as int8,int4.")
@click.option("--weights", default="", help="Also measure these compiled weight precisions.")
@click.option(
    "--row-seconds",
    type=click.FloatRange(0),
    default=20,
    show_default=True,
    help="Time limit for the repetitions of a row; there is at least one.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write plots to this .svg or .png file.")
@click.option("--peers", type=click.Path(path_type=Path), help="Compare with the rows of another engine.")
@click.option("--profile", type=click.Path(path_type=Path), help="Only write a trace of one turn.")
@model_options
def bench(
    contexts: str,
    turns: int,
    answer_tokens: int,
    fill: bool,
    kv: str,
    weights: str,
    row_seconds: float,
    as_json: bool,
    plot: Path | None,
    peers: Path | None,
    profile: Path | None,
    **given: Any,  # noqa: ANN401
) -> None:
    """Measure prefill, decode and turns, with and without the KV cache."""
    lengths, precisions = parse_contexts(contexts), parse_precisions(kv, "--kv", KVPrecision)
    weight_precisions = parse_precisions(weights, "--weights", settings.PRECISIONS[1:])
    from rich.console import Console

    from kvchat.bench.report import draw, ratios, read_peers, refuse_folder, refuse_plot, report

    others = read_peers(peers) if peers else None
    if plot:
        refuse_plot(plot)
    if profile:
        refuse_folder(profile)
    name, paths = given["model"] or DEFAULT_MODEL, find_paths(given["data_dir"])
    loaded = load_ready(name, paths, given)
    from kvchat.bench.rows import Runner
    from kvchat.bench.run import BenchOptions, profile_turn, run_bench

    if profile:
        profile_turn(loaded, profile)
        click.echo(f"Open {profile} in https://ui.perfetto.dev or chrome://tracing.", err=True)
        return

    loaders = weight_loaders(weight_precisions, name, paths, given)
    options = BenchOptions(lengths, turns, answer_tokens, fill, precisions, loaders)
    measured = run_bench(loaded, options, Runner(ProgressLog(options.cases), row_seconds))
    rows, console = measured["rows"], Console(stderr=as_json)
    if as_json:
        click.echo(write_json(measured, indent=1))
    else:
        console.print(report(rows, console.width))
        console.print(f"{megabytes(measured['rss_bytes'])} of memory with the model loaded and empty caches")
    if others:
        console.print(ratios(rows, *others))
    if plot:
        draw(rows, plot)


class ProgressLog:
    """Prints a line on stderr for each case: its number, the elapsed time, and its description."""

    def __init__(self, cases: int) -> None:
        self._cases = cases
        self._count = 0
        self._started = time.monotonic()

    def __call__(self, description: str) -> None:
        """Prints the line of the next case."""
        self._count += 1
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        at = f"[{self._count:>{len(str(self._cases))}}/{self._cases} {minutes}:{seconds:02}]"
        click.echo(f"{at} measuring: {description}", err=True)


def weight_loaders(
    precisions: Sequence[str], name: str, paths: Paths, given: Mapping[str, Any]
) -> dict[str, Callable[[], "LoadedModel"]]:
    """Precision → function that loads the model with its weights in that precision.

    Raises:
        KvchatError: it is not compiled in one of them; checked before a measurement that takes minutes.
    """
    from kvchat.engine.compiled.package import find_package, refusal_of

    folder = is_prepared(name, paths.models)
    assert folder is not None
    for precision in precisions:
        if not find_package(paths.compiled, folder, precision):
            if reason := refusal_of(paths.compiled, folder, precision):
                raise KvchatError(reason)
            command = f"`kvchat models prepare {name} --precision {precision}`"
            raise KvchatError(f"{name} is not compiled with weights in {precision}. {command} does that.")
    return {each: partial(load_ready, name, paths, {**given, "precision": each}) for each in precisions}


def parse_precisions(text: str, flag: str, known: Iterable[str]) -> list[str]:
    """`int8,int4` → ["int8", "int4"].

    Raises:
        click.BadParameter: one of them is not in `known`.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in set(known)]:
        raise click.BadParameter(
            f"{unknown[0]!r} is not a precision. Precisions: {', '.join(known)}.", param_hint=flag
        )
    return names


def parse_contexts(text: str) -> list[int]:
    """`256,1024` → [256, 1024].

    Raises:
        click.BadParameter: one of them is not a positive whole number.
    """
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise click.BadParameter(
            f"{text!r} is not a list of token counts such as 256,1024.", param_hint="--contexts"
        )
    return lengths
