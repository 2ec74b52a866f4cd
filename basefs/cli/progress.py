"""Progress of what takes long, on a terminal or in a log."""

import time
from collections.abc import Callable
from typing import Any, Protocol, Self

LINE_INTERVAL_S = 2.0
"""How often a line is written without a terminal."""


class Reporter(Protocol):
    """A context in which progress is shown."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_exc: object) -> None: ...

    def show(self, progress: dict[str, Any]) -> None:
        """How far it is now."""


def progress_reporter(
    stdout: Any,  # noqa: ANN401  # cliff gives whatever file it was given
    state: str,
    done: str,
    total: str,
    describe: Callable[[dict[str, Any]], str],
) -> Reporter:
    """Shows objects whose state is `state`, with `done` and `total` as the names of their byte counts."""
    return _Bar(stdout, done, total) if stdout.isatty() else _Lines(stdout, state, describe)


class _Lines:
    """A line now and then, for logs and pipes."""

    def __init__(self, stdout: Any, state: str, describe: Callable[[dict[str, Any]], str]) -> None:  # noqa: ANN401
        self._stdout = stdout
        self._state = state
        self._describe = describe
        self._shown_at_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        return None

    def show(self, progress: dict[str, Any]) -> None:
        if time.monotonic() - self._shown_at_s >= LINE_INTERVAL_S and progress.get("state") == self._state:
            self._shown_at_s = time.monotonic()
            self._stdout.write(f"{self._describe(progress)}\n")
            self._stdout.flush()


class _Bar:
    """A progress bar with rate and remaining time, for a terminal."""

    def __init__(self, stdout: Any, done: str, total: str) -> None:  # noqa: ANN401
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
        self._task = self._bar.add_task("", total=None)
        self._done = done
        self._total = total

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._bar.stop()

    def show(self, progress: dict[str, Any]) -> None:
        self._bar.update(
            self._task,
            description=str(progress.get("image_id")),
            total=progress.get(self._total),
            completed=progress.get(self._done) or 0,
        )
