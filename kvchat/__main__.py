"""`python -m kvchat` is the `kvchat` command."""

from kvchat.cli import main

if __name__ == "__main__":
    main()
