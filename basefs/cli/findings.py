"""What a check of `basefs doctor` says."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line: what was looked at, how it is, what was seen and what to do about it."""

    check: str
    status: Literal["ok", "warning", "error"]
    detail: str


def ok(check: str, detail: str) -> Finding:
    """Nothing to do."""
    return Finding(check=check, status="ok", detail=detail)


def warning(check: str, detail: str) -> Finding:
    """It works, and an operator may want it otherwise."""
    return Finding(check=check, status="warning", detail=detail)


def error(check: str, detail: str) -> Finding:
    """Basefs does not work, or not as configured; the detail says what to do."""
    return Finding(check=check, status="error", detail=detail)
