"""Flags that several commands share, made from the table of settings."""

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import click

from kvchat.config.settings import Kind, Setting, find_setting
from kvchat.text import parse_size

Command = TypeVar("Command", bound=Callable[..., Any])


class Size(click.ParamType[int]):
    """A click type for a number of bytes: `2GB`, `512 MB`, `1e9`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401
        """The number of bytes; 1 MB is 1,000,000 bytes."""
        try:
            return parse_size(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a size. Write 2GB, 512MB or a number of bytes.", param, ctx)


SIZE = Size()


class FiniteRange(click.FloatRange):
    """A click type for a number within bounds; rejects `nan` and `inf`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401
        """The number."""
        number = float(super().convert(value, param, ctx))
        if not isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def option(*names: str, **attributes: Any) -> Callable[[Command], Command]:  # noqa: ANN401 - click's own
    """A flag that can also be set by the environment variable `KVCHAT_NAME`."""
    flag = next(name for name in names if name.startswith("--"))
    variable = "KVCHAT_" + flag.lstrip("-").replace("-", "_").upper()
    return click.option(*names, envvar=variable, **attributes)


def setting(name: str) -> Callable[[Command], Command]:
    """The flag of a setting."""
    declared = find_setting(name)
    unset = "" if declared.kind is Kind.SWITCH or not declared.unset else f" [default: {declared.unset}]"
    return click.option(
        *filter(None, (declared.short, f"--{declared.name}")),
        envvar=declared.variable,
        default=declared.default,
        help=declared.help + unset,
        **_type_of(declared),
    )


def _type_of(declared: Setting) -> dict[str, Any]:
    bounds = declared.bounds
    if declared.name == "data-dir":
        return {"type": click.Path(path_type=Path)}
    match declared.kind:
        case Kind.WHOLE if bounds:
            return {"type": click.IntRange(int(bounds.lowest), int(bounds.highest))}
        case Kind.NUMBER if bounds:
            return {"type": FiniteRange(bounds.lowest, bounds.highest, min_open=bounds.above)}
        case Kind.SIZE:
            return {"type": SIZE}
        case Kind.SWITCH:
            return {"is_flag": True}
        case Kind.CHOICE:
            return {"type": click.Choice(declared.choices)}
        case _:
            return {}


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator."""

    def decorate(command: Command) -> Command:
        for each in reversed(options):
            command = each(command)
        return command

    return decorate


data_dir = setting("data-dir")
model_options = together(
    *(setting(name) for name in ("model", "precision", "threads", "context", "device", "draft")), data_dir
)
chat_options = together(
    setting("system"),
    option("-c", "--continue", "resume_latest", is_flag=True, help="Continue the conversation used last."),
    option("-r", "--resume", metavar="ID", help="Continue this conversation."),
    *(setting(name) for name in ("cache", "kv", "policy", "kv-budget", "kv-disk")),
    *(
        setting(name)
        for name in ("max-tokens", "temperature", "top-p", "top-k", "min-p", "repeat-penalty", "seed")
    ),
    setting("private"),
)
screen_options = together(setting("unload-after"), setting("theme"), setting("reduced-motion"))
