"""`basefs image map`."""

import argparse
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, TextIO

from cliff.formatters.base import SingleFormatter
from cliff.show import ShowOne
from stevedore.extension import Extension, ExtensionManager

from basefs.cli.cells import columns_of
from basefs.cli.common import BasefsCommand
from basefs.cli.picture_options import add_picture_options, check_picture_options

CELLS = 4096
"""What is asked for: as many as a picture has; a terminal takes less, machines can add up."""
_NESTED_FORMATS = ("json", "yaml")


class _MapFormatter(SingleFormatter):
    """The format `map`: drawn with letters, see `map_text`."""

    def add_argument_group(self, parser: argparse.ArgumentParser) -> None:
        """It has no options of its own."""

    def emit_one(
        self, column_names: Sequence[str], data: Sequence[Any], stdout: TextIO, _parsed_args: argparse.Namespace
    ) -> None:
        """Draw what `take_action` gave."""
        from basefs.cli.map_text import print_map

        print_map(dict(zip(column_names, data, strict=True)), stdout)


class ImageMap(BasefsCommand, ShowOne):
    """Show where the bytes of an image are: here, zeros, being fetched, missing; on the terminal or as a picture."""

    @property
    def formatter_default(self) -> str:
        """See cliff."""
        return "map"

    def _load_formatter_plugins(self) -> "ExtensionManager[SingleFormatter]":
        plugins: ExtensionManager[SingleFormatter] = super()._load_formatter_plugins()
        place = EntryPoint("map", f"{__name__}:_MapFormatter", self.formatter_namespace)
        plugins.extensions.append(Extension("map", place, _MapFormatter, _MapFormatter()))
        return plugins

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """See cliff."""
        parser = super().get_parser(prog_name)
        parser.add_argument("ref", metavar="IMAGE", help="image id, name in _base, or unique image name")
        add_picture_options(parser, " instead")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """Names and values for cliff; pictures are written.

        Raises:
            ControlError: a picture's name does not end as its format does, or it cannot be written.
        """
        check_picture_options(parsed_args)
        answer = self.client().image_map(parsed_args.ref, cells_max=CELLS)
        self._write_pictures(answer, parsed_args.svg, parsed_args.png)
        if parsed_args.formatter == "map":
            return tuple(answer), tuple(answer.values())
        if parsed_args.formatter not in _NESTED_FORMATS:
            del answer["runs"]  # thousands, which are no cell of a table
        return columns_of(answer)

    def _write_pictures(self, answer: dict[str, Any], svg: Path | None, png: Path | None) -> None:
        from basefs.cli.map_picture import picture_of, write_png, write_svg

        if svg is not None:
            write_svg(picture_of(answer), svg)
        if png is not None:
            write_png(picture_of(answer), png)

    def produce_output(self, parsed_args: argparse.Namespace, column_names: Sequence[str], data: Sequence[Any]) -> int:
        """As cliff does; a map needs all columns, and a picture takes its place."""
        if parsed_args.formatter != "map":
            return super().produce_output(parsed_args, column_names, data)
        pictures = [path for path in (parsed_args.svg, parsed_args.png) if path is not None]
        for path in pictures:
            self.app.stdout.write(f"wrote {path}\n")
        if not pictures:
            self.formatter.emit_one(column_names, data, self.app.stdout, parsed_args)
        return 0
