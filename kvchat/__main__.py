"""The `kvchat` command, and `python -m kvchat`.

Python prints a traceback where Ctrl-C comes during an import: here the signal ends the process instead, until
`main` handles it and after that.
"""

from kvchat.system.interrupts import end_silently


def start() -> None:
    """Runs the command line; ends with its exit code."""
    end_silently()
    from kvchat.cli.main import main

    main()


if __name__ == "__main__":
    start()
