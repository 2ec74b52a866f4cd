"""What a reader inflates is the cluster or nothing, in bounded memory, and who makes it slow is not inflated again."""

import importlib
import random
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basefs import keeper_reader_process, reader_inflate
from basefs.keeper_reader_process import COMMAND, PACKAGE_PARENT, zlib_ng_directory
from basefs.reader_inflate import CLUSTERS_BYTES_MAX, FAIR_NS, SLOW_NS_MAX, Inflater
from basefs.reader_layout import PACKED, PACKED_BYTES_MAX, PACKED_CLUSTER_BITS_MAX, UNKNOWN, packed_place, packed_word

CLUSTER = 65536
CONTENT = random.Random(1).randbytes(CLUSTER // 2) * 2


def stream_of(content: bytes) -> memoryview:
    deflate = zlib.compressobj(6, zlib.DEFLATED, -12)
    return memoryview(deflate.compress(content) + deflate.flush())


def kept_words(inflater: Inflater, words: range, serial: int = 1) -> list[int]:
    return [word for word in words if inflater.kept(serial, 0, word) is not None]


@pytest.fixture(params=[True, False], ids=["zlib-ng", "zlib"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_inflate, "_zlib", zlib)
    reader_inflate.use_zlib_ng(zlib_ng_directory() if request.param else None)
    assert reader_inflate._zlib.__name__ == ("zlib_ng.zlib_ng" if request.param else "zlib")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("packed", "is_cluster"),
    [
        (stream_of(CONTENT), True),
        (memoryview(bytes(stream_of(CONTENT)) + b"whatever follows"), True),
        (stream_of(CONTENT + b"more than a cluster"), True),
        (stream_of(CONTENT[:-1]), False),
        (stream_of(CONTENT)[:-9], False),
        (memoryview(b"\7no stream"), False),
        (memoryview(b""), False),
    ],
)
def test_a_stream_is_a_cluster_or_nothing(packed: memoryview, is_cluster: bool) -> None:
    inflater = Inflater()
    inflater.inflate(1, 0, 9, packed, CLUSTER)
    assert inflater.kept(1, 0, 9) == (CONTENT if is_cluster else None)


@pytest.mark.usefixtures("library")
def test_a_stream_takes_the_memory_of_a_cluster_whatever_it_would_become() -> None:
    packed = stream_of(bytes(8 << 20))
    assert len(packed) < PACKED_BYTES_MAX
    inflater = Inflater()
    tracemalloc.start()
    inflater.inflate(1, 0, 9, packed, CLUSTER)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert inflater.kept(1, 0, 9) == bytes(CLUSTER)
    assert peak < 4 * CLUSTER


def test_the_clusters_that_were_used_last_are_kept_and_no_more_than_there_is_room_for() -> None:
    inflater, packed = Inflater(), stream_of(CONTENT)
    count = CLUSTERS_BYTES_MAX // CLUSTER
    for word in range(count):
        inflater.inflate(1, 0, word, packed, CLUSTER)
    assert kept_words(inflater, range(1)) == [0], "used again"
    for word in range(count, count + 2):
        inflater.inflate(1, 0, word, packed, CLUSTER)
    assert kept_words(inflater, range(count + 2)) == [0, *range(3, count + 2)]


def test_a_cluster_of_another_generation_or_of_an_image_that_was_closed_is_not_kept() -> None:
    inflater, packed = Inflater(), stream_of(CONTENT)
    for serial in (1, 2):
        inflater.inflate(serial, 5, 9, packed, CLUSTER)
        inflater.inflate(serial, 5, 10, packed, CLUSTER)
    assert inflater.kept(1, 6, 9) is None
    assert inflater.kept(1, 5, 9) is None, "it was given back"
    inflater.inflate(1, 6, 10, packed, CLUSTER)
    assert inflater.kept(1, 6, 10) == CONTENT
    inflater.forget(1)
    assert inflater.kept(1, 6, 10) is None
    assert inflater.kept(2, 5, 9) == CONTENT
    inflater.forget(2)
    assert (inflater._bytes, inflater._clusters) == (0, {})


def test_an_image_whose_clusters_are_made_to_take_long_is_not_inflated_here(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now_ns=0, took_ns=0)

    def thread_time_ns() -> int:
        clock.now_ns += clock.took_ns
        return clock.now_ns

    monkeypatch.setattr(reader_inflate, "_thread_time_ns", thread_time_ns)
    inflater, packed = Inflater(), stream_of(CONTENT)

    def inflate(serial: int, *times_ns: int) -> None:
        for clock.took_ns in times_ns:
            inflater.inflate(serial, 0, 9, packed, CLUSTER)

    for _ in range(20):
        # A processor that was taken away for a second, now and then, is not the image's fault.
        inflate(1, 10**9, *[FAIR_NS // 5] * 20)
    assert not inflater.is_slow(1)
    inflate(2, *[SLOW_NS_MAX] * 3)
    assert not inflater.is_slow(2)
    inflate(2, SLOW_NS_MAX)
    assert inflater.is_slow(2)
    assert not inflater.is_slow(1)
    inflater.forget(2)
    assert not inflater.is_slow(2)


@given(st.integers(0, 1 << 44), st.integers(0, 1 << 18), st.integers(9, 21))
def test_a_word_says_what_it_was_made_of_or_nothing(host: int, length: int, bits: int) -> None:
    word = packed_word(host, length, bits)
    if word == UNKNOWN:
        assert bits > PACKED_CLUSTER_BITS_MAX or host >= 1 << 43 or not 0 < length < (1 << bits) + 512
    else:
        assert PACKED <= word < 1 << 64
        assert packed_place(word, bits) == (host, length)
        assert length < PACKED_BYTES_MAX


@given(st.integers(PACKED, (1 << 64) - 1), st.integers(9, 16))
def test_any_word_is_a_place_within_bounds(word: int, bits: int) -> None:
    host, length = packed_place(word, bits)
    assert 0 <= host < 1 << 43
    assert 0 <= length < min(PACKED_BYTES_MAX, (1 << bits) + 512)


@pytest.mark.parametrize(("directory", "library"), [(zlib_ng_directory(), "zlib_ng.zlib_ng"), ("/nowhere", "zlib")])
def test_a_reader_finds_zlib_ng_where_its_keeper_does(directory: str, library: str) -> None:
    code = (
        "import sys; from basefs import reader_inflate; reader_inflate.use_zlib_ng(sys.argv[1]);"
        "print(reader_inflate._zlib.__name__, sys.argv[1] in sys.path)"
    )
    argv = [*COMMAND[:-2], "-c", code, directory]
    said = subprocess.run(argv, capture_output=True, text=True, check=True, env={"PYTHONPATH": PACKAGE_PARENT})
    assert said.stdout.split() == [library, "False"]


def test_a_keeper_without_zlib_ng_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    assert keeper_reader_process.zlib_ng_directory() == ""
