"""`basefs image list|show|warm|evict`."""

import argparse
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, Protocol, Self

from cliff.lister import Lister
from cliff.show import ShowOne

from basefs.cli.common import FAILURE, INTERRUPTED, BasefsCommand, cell, columns_of, human_bytes, say_error
from basefs.errors import ControlError

LIST_COLUMNS = ("id", "name", "base_name", "disk_format", "size", "cached_bytes", "state")
LINE_INTERVAL_S = 2.0
"""How often a warming without a terminal writes a line."""


class ImageList(BasefsCommand, Lister):
    """List every Glance image that basefs knows, and what is here of it."""

    def take_action(self, _parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], Iterator[tuple[Any, ...]]]:
        """Names and rows for cliff."""
        images = self.client().images()
        rows = (tuple(cell(name, image.get(name)) for name in LIST_COLUMNS) for image in images)
        return LIST_COLUMNS, rows


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


class ImageWarm(_ImageCommand):
    """Fetch every byte of an image into the local cache."""

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
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        """0 when all is here, or was handed over; 1 when it failed, 130 after Ctrl-C."""
        client = self.client()
        if not parsed_args.is_waiting:
            progress = client.start_warm(parsed_args.ref)
            self.app.stdout.write(f"{_describe(progress)}; the server goes on by itself\n")
            return 0
        last: dict[str, Any] = {}
        try:
            with closing(client.warm(parsed_args.ref)) as progresses, _reporter(self.app.stdout) as reporter:
                for last in progresses:
                    reporter.show(last)
        except KeyboardInterrupt:
            here = f"; {_describe(last)} and stays cached" if last else ""
            say_error(f"stopped{here}")
            return INTERRUPTED
        return self._outcome(last)

    def _outcome(self, last: dict[str, Any]) -> int:
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


class _Reporter(Protocol):
    def __enter__(self) -> Self: ...

    def __exit__(self, *_exc: object) -> None: ...

    def show(self, progress: dict[str, Any]) -> None: ...


def _reporter(stdout: Any) -> _Reporter:  # noqa: ANN401  # cliff gives whatever file it was given
    return _Bar(stdout) if stdout.isatty() else _Lines(stdout)


class _Lines:
    """A line now and then, for logs and pipes."""

    def __init__(self, stdout: Any) -> None:  # noqa: ANN401  # as above
        self._stdout = stdout
        self._shown_at_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        return None

    def show(self, progress: dict[str, Any]) -> None:
        if time.monotonic() - self._shown_at_s >= LINE_INTERVAL_S and progress.get("state") == "warming":
            self._shown_at_s = time.monotonic()
            self._stdout.write(f"{_describe(progress)}\n")
            self._stdout.flush()


class _Bar:
    """A progress bar with rate and remaining time, for a terminal."""

    def __init__(self, stdout: Any) -> None:  # noqa: ANN401  # as above
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as RateColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            RateColumn(),
            TimeRemainingColumn(),
            console=Console(file=stdout),
            transient=True,
        )
        self._task = self._bar.add_task("warming", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._bar.stop()

    def show(self, progress: dict[str, Any]) -> None:
        self._bar.update(
            self._task,
            description=str(progress.get("image_id")),
            total=progress.get("size"),
            completed=progress.get("cached_bytes") or 0,
        )
