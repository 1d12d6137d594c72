"""Exit codes: catches everything that a command raises.

0: success. 1: failure, with one sentence on stderr. 2: wrong usage. 128 + n: ended by signal n, for instance
130 after Ctrl-C; a closed pipe on stdout counts as SIGPIPE (141). A defect of kvchat keeps its traceback and
gives 1.
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
    """Replaces characters that stdout and stderr can't encode, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def exit_status(command: Callable[[], object]) -> int:
    """Runs a command and returns its exit code; prints the reason of a failure on stderr.

    Raises:
        Exception: a defect of kvchat (`errors.cause` is None).
    """
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
            if came:  # a library turned the interruption into another error
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
    """The exit code that the command returned or raised.

    Raises:
        KvchatError: the command exited with a text.
        Ended: it was aborted.
    """
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
    """Prints a line on stderr; does nothing where stderr is closed."""
    with suppress(OSError, ValueError):
        click.echo(words, err=True)


def _sentence(error: Exception) -> str:
    """The sentence for an error. Errors of files carry a name, so one without a name is about stdout."""
    if isinstance(error, OSError) and error.filename is None:
        return f"The output can't be written: {reason(error)}."
    return as_sentence(error)


def _flush() -> None:
    if sys.stdout and not sys.stdout.closed:
        sys.stdout.flush()


def _discard_output() -> None:
    """Discards output that can't be written; otherwise Python retries at exit and prints an error."""
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
