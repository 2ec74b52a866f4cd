"""`run` fuzzes one target in this process, which libFuzzer ends; `all` runs every target in a process of its own."""

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

MEMORY_MIB_MAX = 2048
INPUT_BYTES_MAX = 65_536
END_S = 60.0


def run(name: str, seconds: float) -> None:
    """Does not return: exit code 0 when nothing was found."""
    import atheris

    with atheris.instrument_imports(include=["basefs"]):
        from tools.fuzz.targets import made

        target, seeds, remove = made(name)
    for seed in seeds:  # by themselves, for a finding in a seed is the plainest one
        target(seed)
    with TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds):
            Path(corpus, str(number)).write_bytes(seed)
        # libFuzzer goes by the highest there ever was, which is that of who started us (a test suite: 2 GB).
        memory_mib_max = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 + MEMORY_MIB_MAX
        argv = [
            sys.argv[0], "-seed=1", "-close_fd_mask=1", "-print_final_stats=1",
            f"-max_total_time={max(1, round(seconds))}",
            f"-max_len={INPUT_BYTES_MAX}", f"-rss_limit_mb={memory_mib_max}", f"-artifact_prefix={corpus}/", corpus,
        ]  # fmt: skip
        atheris.Setup(argv, target)
        try:
            atheris.Fuzz()
        finally:
            remove()


def run_apart(name: str, seconds: float) -> str:
    """What libFuzzer said. CalledProcessError: it found something; its `stderr` has the traceback and the input."""
    command = [sys.executable, "-m", "tools.fuzz", "run", name, str(seconds)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + END_S, check=False, errors="replace"
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stderr


def main() -> int:
    """0 when nothing was found."""
    parser = argparse.ArgumentParser(prog="tools.fuzz", description="Fuzzes what basefs reads.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("target")
    one.add_argument("seconds", type=float)
    every = commands.add_parser("all")
    every.add_argument("minutes", type=float)
    options = parser.parse_args()
    if options.command == "run":
        run(options.target, options.seconds)
        return 0
    from tools.fuzz.targets import TARGETS

    found = 0
    for name in TARGETS:
        try:
            said = run_apart(name, options.minutes * 60 / len(TARGETS))
        except subprocess.CalledProcessError as error:
            found = 1
            print(f"{name}: FOUND\n{error.stderr[-6000:]}", flush=True)
        else:
            runs = [line for line in said.splitlines() if "number_of_executed_units" in line]
            print(f"{name}: nothing found; {' '.join(runs)}", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
