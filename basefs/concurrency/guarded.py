"""The one place below the FUSE edge that catches everything: no bug in a task may end the server of all guests."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class Guard:
    """After the body: the bug that ended it, or None."""

    bug: Exception | None = None


@contextmanager
def guarded(
    logger: logging.Logger, message: str, *args: object, foreseen: tuple[type[Exception], ...] = ()
) -> Iterator[Guard]:
    """A bug in the body ends the body, and no more: it is logged, with its traceback and `message % args`.

    What is `foreseen`, and cancellation, pass; so does an ExceptionGroup that has Cancelled in it.
    """
    guard = Guard()
    try:
        yield guard
    except foreseen:
        raise
    except Exception as exc:
        logger.exception(message, *args)
        guard.bug = exc
