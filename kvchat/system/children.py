"""The import path of Python processes that kvchat starts."""

import os
import sysconfig
from pathlib import Path


def protect_children() -> None:
    """Keeps the current folder off the import path of every Python process that this one starts.

    Otherwise, when kvchat is started in a model's folder, `python -m` and multiprocessing import a `torch.py`
    or `pickle.py` that came with the model. The child processes import this package, installed or not.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    home = str(Path(__file__).resolve().parents[1])
    if home not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        os.environ["PYTHONPATH"] = os.pathsep.join([home, *(path for path in others if path != home)])
