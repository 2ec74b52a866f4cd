"""python -m tools.soak [--minutes N] [PHASE ...]: runs the phases named, or all; fails when a bound is missed.

A full run takes at most 30 minutes. Ctrl-C and SIGTERM take everything away that was started.
"""

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tools.bench.report import Report
from tools.mount import ROOT
from tools.soak import churn, kills, outage, storm
from tools.soak.context import FULL_MINUTES, Soak

PHASES: dict[str, Callable[[Soak], None]] = {
    "kills": kills.run,
    "churn": churn.run,
    "storm": storm.run,
    "outage": outage.run,
}


def _interrupted(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=FULL_MINUTES, help="what a full run takes; phases scale with it"
    )
    parser.add_argument(
        "phases", nargs="*", metavar="PHASE", help=f"one of {', '.join(PHASES)}; all of them by default"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.phases) - set(PHASES):
        parser.error(f"no phase named {', '.join(sorted(unknown))}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    root = (ROOT / ".cache" / "soak").resolve()  # as the mount table has it
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=root))
    report = Report()
    soak = Soak(report=report, scratch=scratch, scale=arguments.minutes / FULL_MINUTES)
    try:
        for name in arguments.phases or PHASES:
            PHASES[name](soak)
    except KeyboardInterrupt:
        report.note("interrupted; everything is being taken away")
        return 130
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0 if report.summary() else 1


sys.exit(main())
