"""How a command ended, as an exit code: the one place where whatever a command raises is caught.

0: done. 1: it failed, and one sentence on stderr says why. 2: wrong usage. 128 + n: signal n ended it, as
Ctrl-C does (130); a closed pipe on stdout counts as SIGPIPE (141). An error that only a defect of kvchat
raises keeps its traceback, and the code is 1.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper

import click

from kvchat.errors import KvchatError, as_sentence, cause, reason
from kvchat.system.interrupts import Ended, ending_on_signals, exit_code

SIGINT, SIGPIPE = 2, 13
"""By number: Windows has no SIGPIPE."""
PREFIX = "kvchat: "


def prepare_streams() -> None:
    """A terminal that lacks a letter still gets the others, and file names that are no text are shown."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def exit_status(command: Callable[[], object]) -> int:
    """Runs a command that raises what went wrong; returns the exit code. Says why on stderr."""
    with ending_on_signals() as came:
        try:
            code = _code_of(command)
            _flush()
        except Ended as ended:
            code = exit_code(ended.number)
            if ended.number == SIGINT:
                say("Interrupted.")
        except BrokenPipeError:
            code = exit_code(SIGPIPE)
        except Exception as error:
            if came:  # a library made another error of the interruption
                code = exit_code(came[0])
            elif cause(error) is None:
                _discard_output()
                raise
            else:
                code = 1
                say(f"{PREFIX}{_sentence(error)}")
    _discard_output()
    return code or (exit_code(came[0]) if came else 0)


def _code_of(command: Callable[[], object]) -> int:
    """What the command says itself about how it ended."""
    try:
        done = command()
        return done if isinstance(done, int) else 0
    except SystemExit as ending:
        if isinstance(ending.code, str):
            raise KvchatError(ending.code) from ending
        return int(ending.code or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        raise Ended(SIGINT) from error


def say(words: str) -> None:
    """A line on stderr, if there is one that takes it."""
    with suppress(OSError, ValueError):
        click.echo(words, err=True)


def _sentence(error: Exception) -> str:
    """What to say. Where files are written, errors are translated there: one without a name is of stdout."""
    if isinstance(error, OSError) and error.filename is None:
        return f"The output can't be written: {reason(error)}."
    return as_sentence(error)


def _flush() -> None:
    if sys.stdout and not sys.stdout.closed:
        sys.stdout.flush()


def _discard_output() -> None:
    """What can't be written is dropped: at its end Python would try again, and print that it can't."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, TextIOWrapper):
            continue
        try:
            stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
