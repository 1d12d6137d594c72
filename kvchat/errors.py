"""The one exception whose text is meant for the user.

Everything that goes wrong for a reason the user can act on is raised as `KvchatError`: a sentence that says
what is wrong, where, and what to do. The command line prints it and exits with 1; the screen shows it.
"""


class KvchatError(Exception):
    """A clear sentence for the user; never a traceback."""
