"""From the name of a model to a folder that can be loaded: download, convert, compile."""
