"""docs/OPERATIONS.md has every log record that asks somebody to act, and every metric; and none that is no more.

A record stands in the first column of its table in backticks, with `…` for what is filled in:
`log.warning("image %s: read as one stream from now on: %s", …)` is `image …: read as one stream from now on: …`,
or shorter, `image …: read as one stream …`.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from basefs.service.metrics_table import METRICS

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "OPERATIONS.md").read_text(encoding="utf-8")
METHODS = {"warning": 0, "error": 0, "exception": 0, "critical": 0, "begins": 2}
"""Methods that log, and which argument is the message."""
GUARD = ROOT / "basefs" / "concurrency" / "guarded.py"
"""Logs what its callers say, by an argument of theirs."""
LITERALS_MIN = 12
"""An entry that stands for longer records has so many letters of its own."""


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def first_column(text: str) -> list[str]:
    """What stands in backticks in the first column of the tables."""
    cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    return [code for cell in cells for code in re.findall(r"`([^`]+)`", cell)]


def messages() -> Iterator[tuple[str, str]]:
    """(place, message with … for what is filled in) of every call that logs at WARNING or above."""
    for path in sorted((ROOT / "basefs").rglob("*.py")):
        if path == GUARD:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id == "guarded":
                yield message_of(path, node, 1)
            if not isinstance(node.func, ast.Attribute):
                continue
            argument = METHODS.get(node.func.attr)
            if argument is None or "log" not in ast.unparse(node.func.value) + node.func.attr.replace("begins", "log"):
                continue
            if argument and "INFO" in ast.unparse(node.args[1]):
                continue
            yield message_of(path, node, argument)


def message_of(path: Path, call: ast.Call, argument: int) -> tuple[str, str]:
    message, place = call.args[argument], f"{path.relative_to(ROOT)}:{call.lineno}"
    assert isinstance(message, ast.Constant), f"{place}: the message is no literal"
    return place, re.sub(r"(?:%[-\d.]*[a-z])+", "…", message.value)


def fits(entry: str, message: str) -> bool:
    if entry == message:
        return True
    pattern = ".*".join(map(re.escape, entry.split("…")))
    return len(entry.replace("…", "")) >= LITERALS_MIN and re.fullmatch(pattern, message) is not None


MESSAGES = [(place, message) for place, message in messages() if message != "…"]
"""A message that is an error's text alone is the reason why a start failed; the document says that once."""
RECORDS = first_column(section("Logs"))


@pytest.mark.parametrize(("place", "message"), MESSAGES)
def test_each_record_says_in_the_document_what_to_do(place: str, message: str) -> None:
    assert any(fits(entry, message) for entry in RECORDS), (
        f"{place} logs a record that docs/OPERATIONS.md, section Logs, does not have:\n| `{message}` | what to do |"
    )


@pytest.mark.parametrize("entry", RECORDS)
def test_each_record_of_the_document_is_logged(entry: str) -> None:
    assert any(fits(entry, message) for _, message in MESSAGES), f"nothing logs {entry!r} (any more)"


def test_the_document_has_each_metric_and_no_other() -> None:
    told = {code.partition("{")[0] for code in first_column(section("Metrics"))}
    assert {name for name in told if name.startswith("basefs_")} == set(METRICS)


def test_the_document_has_the_labels_of_each_metric() -> None:
    told = {code.partition("{")[0]: code.partition("{")[2] for code in first_column(section("Metrics"))}
    assert {name: labels.rstrip("}") for name, labels in told.items() if name.startswith("basefs_")} == {
        metric.name: ",".join(metric.labels) for metric in METRICS.values()
    }
