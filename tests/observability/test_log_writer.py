"""A log that hangs or fails is nobody's business but its own."""

import logging
import logging.handlers
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from basefs.log_writer import RECORDS_MAX, LogWriter, write_in_background


class _Held(logging.Handler):
    """Takes records once `go_on` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.go_on.wait()
        self.lines.append(self.format(record))


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("tests.log_writer")
    logger.propagate = False
    yield logger
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def test_a_log_that_hangs_keeps_nobody_waiting_and_loses_what_is_too_much(logger: logging.Logger) -> None:
    held = _Held()
    logger.addHandler(held)
    writer = write_in_background(logger)
    for number in range(RECORDS_MAX + 100):
        logger.warning("record %d", number)
    assert 98 <= writer.lost <= 100
    held.go_on.set()
    logger.removeHandler(writer)
    writer.close()
    assert held.lines[:2] == ["record 0", "record 1"]


def test_a_file_that_cannot_be_opened_anew_is_no_error(logger: logging.Logger, tmp_path: Path) -> None:
    directory = tmp_path / "log"
    directory.mkdir()
    path = directory / "basefs.log"
    file = logging.handlers.WatchedFileHandler(path)
    logger.addHandler(file)
    writer = write_in_background(logger)
    path.rename(tmp_path / "moved")
    directory.rmdir()
    logger.warning("lost")
    while not writer.lost:
        threading.Event().wait(0.01)
    directory.mkdir()
    logger.warning("back")
    logger.removeHandler(writer)
    writer.close()
    file.close()
    assert path.read_text() == "back\n"


def test_arguments_are_those_of_the_moment(logger: logging.Logger) -> None:
    held = _Held()
    logger.addHandler(held)
    writer = write_in_background(logger)
    changing = [1]
    logger.warning("%s", changing)
    changing.append(2)
    held.go_on.set()
    logger.removeHandler(writer)
    writer.close()
    assert held.lines == ["[1]"]


def test_arguments_that_do_not_fit_end_nothing(logger: logging.Logger) -> None:
    held = _Held()
    held.go_on.set()
    logger.addHandler(held)
    writer = write_in_background(logger)
    logger.warning(*("%d of", "x"))
    logger.removeHandler(writer)
    writer.close()
    assert held.lines == ["'%d of' with ('x',)"]
    assert isinstance(writer, LogWriter)
