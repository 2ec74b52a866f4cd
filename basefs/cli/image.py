"""`basefs image list|show|warm|evict|pin|unpin`."""

import argparse
from contextlib import closing
from typing import Any

from cliff.lister import Lister
from cliff.show import ShowOne

from basefs.cli.cells import columns_of, human_bytes, rows_of
from basefs.cli.common import FAILURE, INTERRUPTED, BasefsCommand, say_error
from basefs.cli.progress import progress_reporter
from basefs.errors import ControlError

LIST_COLUMNS = ("id", "name", "base_name", "disk_format", "size", "shown_size", "cached_bytes", "state", "in_use")


class ImageList(BasefsCommand, Lister):
    """List every Glance image that basefs knows, and what is here of it."""

    def take_action(self, _parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
        """Names and rows for cliff."""
        return LIST_COLUMNS, rows_of(LIST_COLUMNS, self.client().images())


class _ImageCommand(BasefsCommand):
    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """See cliff."""
        parser = super().get_parser(prog_name)
        parser.add_argument("ref", metavar="IMAGE", help="image id, name in _base, or unique image name")
        return parser


class ImageShow(_ImageCommand, ShowOne):
    """Show everything basefs knows of one image."""

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """Names and values for cliff."""
        return columns_of(self.client().image(parsed_args.ref))


class ImageEvict(_ImageCommand):
    """Drop the local bytes of an image that nobody has open; Glance keeps its own."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Returns when the bytes are gone."""
        answer = self.client().evict(parsed_args.ref)
        self.app.stdout.write(f"evicted {human_bytes(answer['evicted_bytes'])}\n")


class ImagePin(_ImageCommand):
    """Keep what is here of an image: cache limits evict it last, and nova's removal of the base does not drop it."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Returns when the image is pinned."""
        answer = self.client().pin(parsed_args.ref, pinned=True)
        self.app.stdout.write(f"pinned {answer['image_id']}; `basefs image warm` brings all of it\n")


class ImageUnpin(_ImageCommand):
    """Treat an image like all others again."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Returns when the image is pinned no more."""
        answer = self.client().pin(parsed_args.ref, pinned=False)
        self.app.stdout.write(f"unpinned {answer['image_id']}\n")


class ImageWarm(_ImageCommand):
    """Fetch every byte of an image into the local cache, or what a boot of it reads."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """See cliff."""
        parser = super().get_parser(prog_name)
        group = parser.add_mutually_exclusive_group()
        group.add_argument(
            "--wait",
            dest="is_waiting",
            action="store_true",
            default=True,
            help="show the progress until all is here; Ctrl-C stops the fetching (default)",
        )
        group.add_argument(
            "--no-wait",
            dest="is_waiting",
            action="store_false",
            help="hand the work to the server and return; it goes on by itself",
        )
        group.add_argument(
            "--boot",
            dest="is_boot",
            action="store_true",
            help="fetch only what earlier boots have read (`basefs trace show`), and show the progress",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        """0 when all is here, or was handed over; 1 when it failed, 130 after Ctrl-C."""
        client = self.client()
        warm = client.warm_boot if parsed_args.is_boot else client.warm
        if not parsed_args.is_waiting:
            progress = client.start_warm(parsed_args.ref)
            self.app.stdout.write(f"{_describe(progress)}; the server goes on by itself\n")
            return 0
        last: dict[str, Any] = {}
        try:
            with (
                closing(warm(parsed_args.ref)) as progresses,
                progress_reporter(self.app.stdout, "warming", "cached_bytes", "size", _describe) as reporter,
            ):
                for last in progresses:
                    reporter.show(last)
        except KeyboardInterrupt:
            here = f"; {_describe(last)} and stays cached" if last else ""
            say_error(f"stopped{here}")
            return INTERRUPTED
        return self._outcome(last)

    def _outcome(self, last: dict[str, Any]) -> int:
        if last.get("state") == "linked":
            self.app.stdout.write(f"{last['image_id']}: is linked to its volume, nothing has to be fetched\n")
            return 0
        if last.get("state") == "complete":
            self.app.stdout.write(f"{_describe(last)}\n")
            return 0
        if last.get("state") == "failed":
            say_error(f"{last.get('image_id')}: {last.get('error')}; {_describe(last)}")
            return FAILURE
        raise ControlError("the server stopped before the image was complete; see its log")


def _describe(progress: dict[str, Any]) -> str:
    cached, size = progress.get("cached_bytes") or 0, progress.get("size") or 0
    share = f" ({100 * cached // size} %)" if size else ""
    return f"{progress.get('image_id')}: {human_bytes(cached)} of {human_bytes(size)}{share} is here"
