"""The one exception whose text is meant for the user.

Everything that goes wrong for a reason the user can act on is raised as `KvchatError`: a sentence that says
what is wrong, where, and what to do. The command line prints it and exits with 1; the screen shows it.
"""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""


class KvchatError(Exception):
    """A clear sentence for the user; never a traceback."""


def reason(error: Exception) -> str:
    """What went wrong in the system's own words, without its numbers and the path that the sentence names."""
    return (isinstance(error, OSError) and error.strerror) or str(error)
