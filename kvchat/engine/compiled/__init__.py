"""The compiled path: export, build, package and run a model compiled for this CPU."""
