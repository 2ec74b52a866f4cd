"""Figures beside what they must be, printed as they come and once more together at the end."""

import os
import platform
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured value; `bound` is empty where it is only told."""

    part: str
    name: str
    value: str
    bound: str
    met: bool


class Report:
    """Collects the figures of a run."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self._part = ""
        self._begun = time.monotonic()
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "?")
        print(f"{platform.node()}: {os.cpu_count()} cores ({model}), Linux {platform.release()}", flush=True)

    def part(self, name: str, what: str) -> None:
        """Begin a part of the run."""
        self._part = name
        print(f"\n== {name}: {what}", flush=True)

    def note(self, text: str) -> None:
        """Say something that is no figure."""
        print(f"   [{time.monotonic() - self._begun:5.0f} s] {text}", flush=True)

    def tell(self, name: str, value: object) -> None:
        """Add a figure without a bound."""
        self._add(name, str(value), "", met=True)

    def at_most(self, name: str, value: float, bound: float, unit: str = "") -> None:
        """Add a figure that must not be above `bound`."""
        self._add(name, _text(value, unit), f"<= {_text(bound, unit)}", met=value <= bound)

    def at_least(self, name: str, value: float, bound: float, unit: str = "") -> None:
        """Add a figure that must not be below `bound`."""
        self._add(name, _text(value, unit), f">= {_text(bound, unit)}", met=value >= bound)

    def _add(self, name: str, value: str, bound: str, *, met: bool) -> None:
        figure = Figure(part=self._part, name=name, value=value, bound=bound, met=met)
        self.figures.append(figure)
        print("   " + _line(figure), flush=True)

    def summary(self) -> bool:
        """Print everything together; return whether every bound was met."""
        print(f"\n== all figures, one run, {time.monotonic() - self._begun:.0f} s")
        for figure in self.figures:
            print(f"{figure.part:8} {_line(figure)}")
        missed = [figure for figure in self.figures if not figure.met]
        print(f"{len(self.figures)} figures, {len(missed)} bounds missed", flush=True)
        return not missed


def _text(value: float, unit: str) -> str:
    digits = f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.2f}"
    return f"{digits} {unit}".rstrip()


def _line(figure: Figure) -> str:
    verdict = ("met" if figure.met else "MISSED") if figure.bound else ""
    return f"{figure.name:58} {figure.value:>18}  {figure.bound:>16}  {verdict}".rstrip()
