"""Fuzzing with atheris: `python -m tools.fuzz run TARGET SECONDS`, `python -m tools.fuzz all MINUTES`."""
