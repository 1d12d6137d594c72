"""The engine: render → prefix → prefill → decode → detokenise → meter. It knows no screen and no sessions."""
