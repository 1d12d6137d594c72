"""The flags that several commands share; each is an environment variable and a setting of the file too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from kvchat.contract import CacheMode, EvictionPolicy, KVPrecision
from kvchat.text import parse_size

PRECISIONS = ("auto", "fp32", "bf16", "int8", "int4")
Command = TypeVar("Command", bound=Callable[..., Any])


class Size(click.ParamType[int]):
    """A number of bytes: `2GB`, `512 MB`, `1e9`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401
        """The number; MB are 1,000,000 bytes."""
        try:
            return parse_size(str(value))
        except ValueError:
            self.fail(f"{value!r} is no size. Write 2GB, 512MB or a number of bytes.", param, ctx)


SIZE = Size()


def option(*names: str, **attributes: Any) -> Callable[[Command], Command]:  # noqa: ANN401 - click's own
    """A flag that `KVCHAT_NAME` and the configuration file set too."""
    flag = next(name for name in names if name.startswith("--"))
    variable = "KVCHAT_" + flag.lstrip("-").replace("-", "_").upper()
    return click.option(*names, envvar=variable, **attributes)


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator."""

    def decorate(command: Command) -> Command:
        for each in reversed(options):
            command = each(command)
        return command

    return decorate


data_dir = option("--data-dir", type=click.Path(path_type=Path), help="Keep everything in this folder.")
model_options = together(
    option("-m", "--model", help="A card's name, a hub id, a folder, or a GGUF file."),
    option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default="auto",
        help="Of the weights; default: auto, no lower than the source has them.",
    ),
    option("--threads", type=click.IntRange(1), help="For torch; default: every physical core."),
    option("--context", type=click.IntRange(16), help="Tokens a conversation may hold at most."),
    option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto"),
    data_dir,
)
chat_options = together(
    option("-s", "--system", help="System prompt."),
    option("-c", "--continue", "resume_latest", is_flag=True, help="Continue the conversation used last."),
    option("-r", "--resume", metavar="ID", help="Continue this conversation."),
    option(
        "--cache",
        type=click.Choice([mode.value for mode in CacheMode]),
        help="What happens to the KV cache; default: on.",
    ),
    option(
        "--kv",
        type=click.Choice([precision.value for precision in KVPrecision]),
        help="Precision of keys and values; default: auto, as the model computes them.",
    ),
    option(
        "--policy",
        type=click.Choice([policy.value for policy in EvictionPolicy]),
        help="What is dropped when the context is full; default: turns.",
    ),
    option("--kv-budget", type=SIZE, help="Memory for all KV caches, such as 2GB; default: a quarter."),
    option(
        "--kv-disk",
        type=SIZE,
        default="4GB",
        show_default=True,
        help="Disk for saved caches; 0 saves none.",
    ),
    option("--max-tokens", type=click.IntRange(1), help="Of an answer; default: the card's."),
    option("--temperature", type=click.FloatRange(0), help="0 is greedy; default: the card's."),
    option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        help="Keep the most probable tokens up to this sum.",
    ),
    option("--top-k", type=click.IntRange(0), help="Keep this many tokens; 0 keeps all."),
    option("--min-p", type=click.FloatRange(0, 1), help="Drop tokens below this share of the best."),
    option("--repeat-penalty", type=click.FloatRange(0, min_open=True), help="1 is none."),
    option("--seed", type=click.IntRange(0), help="The same seed gives the same text."),
    option("--private", is_flag=True, help="Write nothing to disk."),
)
