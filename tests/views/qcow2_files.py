"""qcow2 files as qemu makes them: every feature that the raw view has to know, small enough for a test."""

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

MIB = 1 << 20
SIZE = 6 * MIB


def qemu(*argv: str | Path) -> str:
    """stdout of one of qemu's tools; fails with what it said."""
    done = subprocess.run([str(part) for part in argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def create(path: Path, *options: str, size: int = SIZE) -> None:
    more = ("-o", ",".join(options)) if options else ()
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *more, path, str(size))


def io(path: Path, *commands: str) -> None:
    qemu("qemu-io", "-f", "qcow2", *(part for command in commands for part in ("-c", command)), path)


def random_writes(path: Path, seed: int, *, count: int = 60, size: int = SIZE) -> None:
    """Data, zeros, discards and zero clusters at odd places."""
    rng = random.Random(seed)
    commands = []
    for _ in range(count):
        offset = rng.randrange(size - 512) & ~511
        length = min(rng.choice((512, 1024, 4096, 40960, 131072)), size - offset)
        kind = rng.choice(("write -P {}", "write -P {}", "write -P {}", "write -z", "write -z -u", "discard"))
        commands.append(f"{kind.format(rng.randrange(1, 256))} {offset} {length}")
    io(path, *commands)


def a_disk(path: Path, seed: int, size: int = SIZE) -> Path:
    """A raw file: pieces of random bytes, of text and of zeros."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        while file.tell() < size:
            length = min(rng.choice((4096, 65536, 100_000, 512)), size - file.tell())
            kind = rng.randrange(4)
            file.write(
                rng.randbytes(length) if kind == 0 else bytes(length) if kind == 1 else b"text " * (length // 5 + 1)
            )
            file.truncate(min(size, file.tell()))
            file.seek(0, 2)
    return path


def converted(path: Path, seed: int, *options: str, compressed: bool = False, size: int = SIZE) -> None:
    disk = a_disk(path.with_suffix(".disk"), seed, size)
    more = ("-o", ",".join(options)) if options else ()
    qemu("qemu-img", "convert", *(("-c",) if compressed else ()), "-f", "raw", "-O", "qcow2", *more, disk, path)
    disk.unlink()


def _sparse(path: Path) -> None:
    create(path)
    io(path, "write -P 1 3M 4k")


def _fragmented(path: Path) -> None:
    """Clusters in the file in another order than on the disk."""
    create(path)
    order = list(range(SIZE // 65536))
    random.Random(5).shuffle(order)
    io(path, *(f"write -P {index % 255 + 1} {index * 65536} 65536" for index in order[:70]))


def _resized(path: Path) -> None:
    converted(path, 6)
    qemu("qemu-img", "resize", "-q", path, str(SIZE + MIB + 512))
    io(path, f"write -P 9 {SIZE + MIB - 512} 1024")
    qemu("qemu-img", "resize", "-q", "--shrink", path, str(SIZE - MIB - 1536))


def _snapshots(path: Path) -> None:
    create(path)
    random_writes(path, 7)
    qemu("qemu-img", "snapshot", "-c", "one", path)
    random_writes(path, 8)
    qemu("qemu-img", "snapshot", "-c", "two", path)
    random_writes(path, 9)
    qemu("qemu-img", "snapshot", "-a", "one", path)
    random_writes(path, 10, count=10)


def _bitmaps(path: Path) -> None:
    create(path)
    qemu("qemu-img", "bitmap", "--add", path, "b")
    random_writes(path, 11)


def _partly_compressed(path: Path, *options: str) -> None:
    converted(path, 12, *options, compressed=True)
    random_writes(path, 13, count=30)


def _dirty(path: Path) -> None:
    """Lazy refcounts, and killed while it was written: the dirty bit stays."""
    create(path, "lazy_refcounts=on")
    commands = ("write -P 1 0 1M", "write -P 2 2M 700k", "abort")
    argv = ["qemu-io", "-f", "qcow2", *(part for command in commands for part in ("-c", command)), str(path)]
    subprocess.run(argv, capture_output=True, check=False)
    assert path.read_bytes()[79] & 1, "the dirty bit"


def _compressed_subclusters(path: Path) -> None:
    create(path, "extended_l2=on", "cluster_size=16k")
    io(path, "write -c -P 3 0 16k", "write -P 4 4k 512", "write -c -P 5 64k 16k")
    random_writes(path, 14)


def _written(*options: str, seed: int, size: int = SIZE) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        create(path, *options, size=size)
        random_writes(path, seed, size=size)

    return make


MAKERS: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: create(path),
    "sparse": _sparse,
    "full": lambda path: converted(path, 1),
    "v2": _written("compat=0.10", seed=2),
    "v2-compressed": lambda path: converted(path, 3, "compat=0.10", compressed=True),
    "random-writes": _written(seed=4),
    "fragmented": _fragmented,
    "resized": _resized,
    "snapshots": _snapshots,
    "bitmaps": _bitmaps,
    "dirty": _dirty,
    "preallocated": _written("preallocation=metadata", seed=15),
    "compressed": lambda path: converted(path, 16, compressed=True),
    "compressed-zstd": lambda path: converted(path, 17, "compression_type=zstd", compressed=True),
    "partly-compressed": _partly_compressed,
    "partly-compressed-zstd": lambda path: _partly_compressed(path, "compression_type=zstd"),
    "clusters-512": _written("cluster_size=512", seed=18),
    "clusters-512-compressed": lambda path: converted(path, 19, "cluster_size=512", compressed=True, size=MIB),
    "clusters-4k-compressed": lambda path: converted(path, 20, "cluster_size=4k", compressed=True),
    "clusters-2M": _written("cluster_size=2M", seed=21),
    "clusters-2M-compressed": lambda path: converted(path, 22, "cluster_size=2M", compressed=True),
    "clusters-2M-zstd": lambda path: converted(path, 23, "cluster_size=2M", "compression_type=zstd", compressed=True),
    "subclusters": _written("extended_l2=on", seed=24),
    "subclusters-16k": _written("extended_l2=on", "cluster_size=16k", seed=25),
    "subclusters-2M": _written("extended_l2=on", "cluster_size=2M", seed=26),
    "subclusters-compressed": _compressed_subclusters,
    "odd-size": _written(seed=27, size=SIZE + 512 * 7),
    "odd-size-compressed": lambda path: converted(path, 28, compressed=True, size=SIZE + 512 * 3),
    "many-l2-tables": _written("cluster_size=1k", seed=29),
}


def made(directory: Path, name: str) -> tuple[bytes, bytes]:
    """A file of the matrix, and the disk in it as `qemu-img convert` gives it."""
    path, raw = directory / f"{name}.qcow2", directory / f"{name}.raw"
    MAKERS[name](path)
    return path.read_bytes(), converted_by_qemu(path, raw)


def converted_by_qemu(path: Path, raw: Path) -> bytes:
    """What nova's download would make of it."""
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    return raw.read_bytes()


def format_of(path: Path) -> str:
    """What `qemu-img info` takes a file for."""
    return str(json.loads(qemu("qemu-img", "info", "--output=json", path))["format"])
