"""The clipboard of the system, besides the one that the terminal is asked to fill (OSC 52).

Not every terminal obeys, and none says whether it did; not every machine has a clipboard either. Trying both
reaches most of them, and neither failing is worth a word: the text is still there.
"""

from threading import Thread


def fill_system_clipboard(text: str) -> None:
    """Puts `text` there if there is one; asking for it may take a while, so nobody waits."""
    Thread(target=copied, args=(text,), daemon=True, name="clipboard").start()


def copied(text: str) -> bool:
    """Puts `text` there; False where there is none."""
    import pyperclip

    try:
        pyperclip.copy(text)
    except (pyperclip.PyperclipException, OSError, UnicodeError):
        return False
    return True
