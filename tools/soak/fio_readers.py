"""fio as a reader that trusts nothing: every 4 KiB of its images say where they belong, and have a checksum."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 4096
READ_BYTES = 64 * 1024
END_S = 60.0
"""What fio may need beyond its time: its last read may wait for a server."""
_VERIFY = ("--verify=crc32c", f"--verify_interval={BLOCK_BYTES}", "--verify_state_save=0")


@dataclass(frozen=True, slots=True, kw_only=True)
class FioResult:
    """What the readers saw. `errors` has fio's own words; `stalls_s` is each reader's longest read."""

    reads: int
    stalls_s: tuple[float, ...]
    errors: str

    @property
    def longest_stall_s(self) -> float:
        """The longest read of all."""
        return max(self.stalls_s, default=0.0)


def make_image(path: Path, size: int, *, compressible_percent: int = 0) -> None:
    """Write an image whose every block fio can verify; `size` in bytes, a multiple of 1 MiB."""
    argv = ["fio", "--name=write", f"--filename={path}", "--rw=write", f"--bs={BLOCK_BYTES}", f"--size={size}"]
    if compressible_percent:
        argv += ["--refill_buffers", f"--buffer_compress_percentage={compressible_percent}"]
    subprocess.run([*argv, *_VERIFY, "--do_verify=0"], check=True, capture_output=True)


class FioReaders:
    """`direct` + `buffered` processes that read random 64 KiB pieces of `paths` for `seconds` and verify each."""

    def __init__(self, paths: Sequence[Path], *, direct: int, buffered: int, seconds: float) -> None:
        self._seconds = seconds
        self._output = tempfile.NamedTemporaryFile(suffix=".json")  # noqa: SIM115  (lives as long as we do)
        argv = ["fio", f"--output={self._output.name}", "--output-format=json", "--readonly", *_VERIFY]
        argv += ["--verify_fatal=1", "--rw=randread", f"--bs={READ_BYTES}", "--norandommap", "--randrepeat=0"]
        argv += ["--time_based", f"--runtime={seconds:g}", "--file_service_type=random"]
        argv.append("--filename=" + ":".join(map(str, paths)))
        for name, is_direct, count in (("direct", 1, direct), ("buffered", 0, buffered)):
            if count:
                argv += [f"--name={name}", f"--direct={is_direct}", f"--numjobs={count}"]
        self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    @property
    def pid(self) -> int:
        """fio's own process; its readers are children of it."""
        return self._process.pid

    def result(self) -> FioResult:
        """Wait for the end; fio that does not end is killed, which is an error in the result."""
        try:
            out, err = self._process.communicate(timeout=self._seconds + END_S)
        except subprocess.TimeoutExpired:
            self.stop()
            return FioResult(reads=0, stalls_s=(), errors=f"fio did not end within {self._seconds + END_S:.0f} s")
        text = Path(self._output.name).read_text(encoding="utf-8")
        complaints = (out + err).decode(errors="replace").strip()
        if self._process.returncode:
            complaints = f"fio exited with {self._process.returncode}: {complaints or text[:2000]}"
        if "{" not in text:
            return FioResult(reads=0, stalls_s=(), errors=complaints or "fio said nothing")
        jobs = json.loads(text[text.index("{") :])["jobs"]
        return FioResult(
            reads=sum(job["read"]["total_ios"] for job in jobs),
            stalls_s=tuple(job["read"]["clat_ns"]["max"] / 1e9 for job in jobs),
            errors=complaints,
        )

    def stop(self) -> None:
        """End fio now, if it runs."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.communicate(timeout=END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.communicate()
        self._output.close()
