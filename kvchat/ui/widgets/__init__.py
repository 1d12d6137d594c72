"""Parts of the screen: each shows one thing and posts messages about it."""
