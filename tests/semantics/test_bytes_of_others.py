"""Nothing of one image is ever read through another's name, whatever is done to the files of the cache."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from basefs.cache.chunk_file import data_path, map_path
from tests.conftest import ExpectedWarnings, MountFactory
from tests.fakes.front import MisbehavingFront

pytestmark = pytest.mark.mount
SIZE = 1_500_000
Ways = Callable[[Path, int, int], None]


def _swap(one: Path, other: Path) -> None:
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def swap_data(chunks: Path, one: int, other: int) -> None:
    _swap(data_path(chunks, one), data_path(chunks, other))


def swap_maps(chunks: Path, one: int, other: int) -> None:
    _swap(map_path(chunks, one), map_path(chunks, other))


def swap_both(chunks: Path, one: int, other: int) -> None:
    swap_data(chunks, one, other)
    swap_maps(chunks, one, other)


def same_data(chunks: Path, one: int, other: int) -> None:
    data_path(chunks, other).unlink()
    os.link(data_path(chunks, one), data_path(chunks, other))


def sums_of_the_other(chunks: Path, one: int, other: int) -> None:
    """The other's data and checksums under one's header."""
    shutil.copyfile(data_path(chunks, other), data_path(chunks, one))
    page = 4096
    theirs = map_path(chunks, other).read_bytes()
    with map_path(chunks, one).open("r+b") as ours:
        ours.seek(page)
        ours.write(theirs[page:])


WAYS: list[Ways] = [swap_data, swap_maps, swap_both, same_data, sums_of_the_other]


def test_files_of_the_cache_that_were_exchanged_give_no_other_bytes(
    basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    """[S1701] Nothing of one image is ever read through another's name, also when files of the cache were exchanged or
    copied.
    """
    contents = [Random(seed).randbytes(SIZE) for seed in range(2 * len(WAYS))]
    with MisbehavingFront() as front:
        ids = [front.glance.add(content) for content in contents]
        mount = basefs_mount(front.conf_lines(), {"lookup_deadline_s": 60})
        inodes = [mount.path(image_id).stat().st_ino for image_id in ids]
        assert [mount.path(image_id).read_bytes() for image_id in ids] == contents
        mount.unmount()
        for at, way in enumerate(WAYS):
            way(mount.cache_dir / "chunks", *inodes[2 * at : 2 * at + 2])
        mount.start()
        for at, image_id in enumerate(ids):
            assert mount.path(image_id).read_bytes() == contents[at], WAYS[at // 2].__name__
        expected_warnings(r"cached chunks .* are damaged")
        mount.stop()
