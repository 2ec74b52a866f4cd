"""What is shown in the cells of tables: sizes, times and parts for people, in JSON and YAML as the server said it."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from cliff.columns import FormattableColumn

KIB = 1024
_SIZES = ("size", "shown_size")
_NO_LIMIT = "cache_max_bytes"
"""0 means that."""


class Cell(FormattableColumn[object]):
    """A value whose name says what it is: `…_bytes` a size, `…_at` and `since` a moment."""

    def __init__(self, name: str, value: object) -> None:
        super().__init__(value)
        self._name = name

    def human_readable(self) -> str:
        """One line, or one for each part of what has parts."""
        if self._name in ("sources", "stores") and isinstance(self._value, list):
            return "\n".join(_source_said(one) for one in self._value)
        if isinstance(self._value, dict):
            return "\n".join(f"{name}: {_said(name, value)}" for name, value in self._value.items())
        return _said(self._name, self._value)

    def __lt__(self, other: object) -> bool:
        """For `--sort-column`: what is unknown comes last."""
        if not isinstance(other, Cell) or other._value is None:
            return isinstance(other, Cell) and self._value is not None
        return self._value is not None and super().__lt__(other)


def columns_of(values: dict[str, Any]) -> tuple[tuple[str, ...], tuple[Cell, ...]]:
    """Names and values as cliff's ShowOne wants them."""
    return tuple(values), tuple(Cell(name, value) for name, value in values.items())


def rows_of(columns: tuple[str, ...], reports: Iterable[dict[str, Any]]) -> list[tuple[Cell, ...]]:
    """A row for each report as cliff's Lister wants them; what a report lacks is empty."""
    return [tuple(Cell(name, report.get(name)) for name in columns) for report in reports]


def human_bytes(count: float) -> str:
    """`1.5 GiB`, `17 B`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < KIB:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= KIB
    return f"{count:.1f} TiB"


def _said(name: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(key, part)}" for key, part in value.items() if part is not None)
    if isinstance(value, list):
        return ", ".join(_said(name, one) for one in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number_said(name, value)
    return str(value)


def _number_said(name: str, value: float) -> str:
    if name == _NO_LIMIT and value == 0:
        return "no limit"
    if name in _SIZES or name.endswith(("_bytes", "_bytes_max")):
        return human_bytes(value)
    if name == "since" or name.endswith("_at"):
        return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M:%SZ}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _source_said(source: dict[str, Any]) -> str:
    """`rbd at <cluster>: resting: <reason>`."""
    where = f" at {source['endpoint']}" if source["endpoint"] else ""
    why = source.get("reason") or source.get("error")
    return f"{source['source']}{where}: {source['state']}" + (f": {why}" if why else "")
