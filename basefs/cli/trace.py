"""`basefs trace list|show|export|import`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cliff.lister import Lister
from cliff.show import ShowOne

from basefs.cli.cells import columns_of, rows_of
from basefs.cli.common import BasefsCommand
from basefs.cli.picture_options import add_picture_options, check_picture_options
from basefs.core.trace_file import FILE_BYTES_MAX, parse_trace
from basefs.errors import ControlError

LIST_COLUMNS = ("image_id", "name", "size", "traced_bytes", "traced_percent", "seconds", "boots", "by")


class TraceList(BasefsCommand, Lister):
    """List the images of which it is known what a boot reads."""

    def take_action(self, _parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
        """Names and rows for cliff."""
        return LIST_COLUMNS, rows_of(LIST_COLUMNS, self.client().traces())


class TraceShow(BasefsCommand, ShowOne):
    """Show what a boot of an image reads; as a picture: where it reads, over time."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """See cliff."""
        parser = super().get_parser(prog_name)
        parser.add_argument("ref", metavar="IMAGE", help="image id, name in _base, or unique image name")
        add_picture_options(parser, ", too")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """Names and values for cliff; pictures are written.

        Raises:
            ControlError: a picture's name does not end as its format does, or it cannot be written.
        """
        check_picture_options(parsed_args)
        answer = self.client().trace(parsed_args.ref)
        if parsed_args.svg is not None or parsed_args.png is not None:
            _write_pictures(answer, parsed_args.svg, parsed_args.png)
        if parsed_args.formatter not in ("json", "yaml"):
            del answer["trace"]  # hundreds of ranges, which are no cell of a table
        return columns_of(answer)


def _write_pictures(answer: dict[str, Any], svg: Path | None, png: Path | None) -> None:
    from basefs.cli.map_picture import write_png, write_svg
    from basefs.cli.trace_picture import picture_of

    picture = picture_of(answer)
    if svg is not None:
        write_svg(picture, svg)
    if png is not None:
        write_png(picture, png)


class TraceExport(BasefsCommand):
    """Write what a boot of an image reads to a file, for another node to import."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """See cliff."""
        parser = super().get_parser(prog_name)
        parser.add_argument("ref", metavar="IMAGE", help="image id, name in _base, or unique image name")
        parser.add_argument("file", metavar="FILE", help="where to; - is standard output")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Returns when it is written; ControlError if the file cannot be."""
        text = json.dumps(self.client().trace(parsed_args.ref)["trace"], separators=(",", ":")) + "\n"
        if parsed_args.file == "-":
            self.app.stdout.write(text)
            return
        try:
            Path(parsed_args.file).write_text(text, encoding="ascii")
        except OSError as exc:
            raise ControlError(f"cannot write {parsed_args.file}: {exc.strerror}") from None


class TraceImport(BasefsCommand):
    """Have what a boot of an image reads from a file that another node exported."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """See cliff."""
        parser = super().get_parser(prog_name)
        parser.add_argument("file", metavar="FILE", help="what `basefs trace export` wrote; - is standard input")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Returns when the server has it, which takes the place of the one it had.

        Raises:
            ControlError: the file cannot be read, is no trace, or is of other bytes than this Glance's image.
        """
        data = _content_of(parsed_args.file)
        try:
            image_id = parse_trace(data).image.image_id
        except ValueError as exc:
            raise ControlError(f"{parsed_args.file}: not a boot trace: {exc}") from None
        answer = self.client().put_trace(image_id, data)
        self.app.stdout.write(f"{image_id}: {answer['traced_bytes']} bytes in {answer['ranges']} ranges\n")


def _content_of(file: str) -> bytes:
    try:
        if file == "-":
            return sys.stdin.buffer.read(FILE_BYTES_MAX + 1)
        with open(file, "rb") as source:
            return source.read(FILE_BYTES_MAX + 1)
    except OSError as exc:
        raise ControlError(f"cannot read {file}: {exc.strerror}") from None
