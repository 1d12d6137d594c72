"""`python -m kvchat` is the `kvchat` command."""

from kvchat.cli.main import main

if __name__ == "__main__":
    main()
