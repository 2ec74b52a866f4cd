"""The options `--svg FILE` and `--png FILE` of commands that draw."""

import argparse
from pathlib import Path

from basefs.errors import ControlError


def add_picture_options(parser: argparse.ArgumentParser, beside: str) -> None:
    """`beside` ends the help: what becomes of the text that is printed otherwise."""
    for name in ("svg", "png"):
        parser.add_argument(f"--{name}", metavar="FILE", type=Path, help=f"write a picture to FILE.{name}{beside}")


def check_picture_options(parsed_args: argparse.Namespace) -> None:
    """Return if the names end as their formats do.

    Raises:
        ControlError: one does not; the message names it.
    """
    for path, suffix in ((parsed_args.svg, ".svg"), (parsed_args.png, ".png")):
        if path is not None and path.suffix.lower() != suffix:
            raise ControlError(f"--{suffix[1:]} {path}: the name does not end in {suffix}")
