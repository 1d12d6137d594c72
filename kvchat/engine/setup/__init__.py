"""Makes a model ready to load: download, convert, compile."""
