"""What Python processes that kvchat starts may import."""

import os
import sysconfig
from pathlib import Path


def protect_children() -> None:
    """Makes every Python process that this one starts ignore modules in the current folder.

    Else `python -m` and multiprocessing import a `torch.py` or `pickle.py` that came with a model, when
    kvchat is started in the model's folder. The processes find this very package, installed or not.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    home = str(Path(__file__).resolve().parents[1])
    if home not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        os.environ["PYTHONPATH"] = os.pathsep.join([home, *(path for path in others if path != home)])
