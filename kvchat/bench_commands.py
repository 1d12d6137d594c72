"""`kvchat bench`: the flags of a measurement, and where its figures go. Imports torch only to measure."""

import json
from pathlib import Path
from typing import Any

import click

from kvchat.catalog import DEFAULT_MODEL
from kvchat.contract import KVPrecision
from kvchat.flags import model_options
from kvchat.paths import find_paths
from kvchat.ready import load_ready
from kvchat.text import megabytes


@click.command()
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
    loaded = load_ready(given["model"] or DEFAULT_MODEL, find_paths(given["data_dir"]), given)
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
