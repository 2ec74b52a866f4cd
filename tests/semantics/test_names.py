"""docs/SEMANTICS.md, section 1, over a Glance in memory, where each request is counted."""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tests.fakes import answers
from tests.fakes.front import MisbehavingFront
from tests.semantics.conftest import eventually, front_mount, listing_as
from tools.mount import BasefsMount, base_name

pytestmark = pytest.mark.mount

DATA = Random(3).randbytes(3_000_000)
ASKED_AGAIN_S = 5.0


@pytest.fixture(scope="module")
def front() -> Iterator[MisbehavingFront]:
    with MisbehavingFront() as running:
        running.glance.add(DATA, name="first")
        yield running


@pytest.fixture(scope="module")
def shared(front: MisbehavingFront, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BasefsMount]:
    """Its own refreshes are done with and do not come again during a test."""
    with front_mount(front, tmp_path_factory.mktemp("names") / "basefs", {"catalog_refresh_s": 3600}) as mounted:
        # Whether a whole list is due after a miss is decided once a minute; have that over.
        assert not (mounted.mountpoint / unknown("whole list")).exists()
        yield mounted


@pytest.fixture
def mount(front: MisbehavingFront, shared: BasefsMount) -> BasefsMount:
    quiet(front)
    return shared


def quiet(front: MisbehavingFront) -> None:
    """Return when no request came for 0.3 s."""
    last = [(-1, 0.0)]

    def is_quiet() -> bool:
        if front.count() != last[0][0]:
            last[0] = (front.count(), time.monotonic())
        return time.monotonic() > last[0][1] + 0.3

    eventually(is_quiet)


def unknown(word: object) -> str:
    return hashlib.sha1(f"no image {word}".encode()).hexdigest()


def lists(front: MisbehavingFront) -> int:
    return sum(1 for request in front.requests() if request.path.endswith("/v2/images"))


def test_the_name_of_an_image(front: MisbehavingFront, mount: BasefsMount) -> None:
    """[S101] The name of an image is the SHA-1 of its Glance id as 40 lower-case hex digits, and every image that may
    be shown is a regular file of that name at once.

    [S304] A listing asks Glance nothing.
    """
    ids = [front.glance.add(DATA[:1000], name=str(n), os_hidden=n == 1, visibility="shared") for n in range(3)]
    for image_id in ids:
        path = mount.mountpoint / hashlib.sha1(image_id.encode()).hexdigest()
        assert path.is_file()
        assert path.read_bytes() == DATA[:1000]
    before = front.count()
    assert sorted(os.listdir(mount.mountpoint)) == sorted(listing_as("root", mount.mountpoint))
    assert front.count() == before


def test_names_of_no_image(front: MisbehavingFront, mount: BasefsMount) -> None:
    """[S102] A name that cannot be an image's, such as `<sha1>_sm`, `<sha1>.part`, `<sha1>.converted`, or one with hex
    digits in upper case, never reaches Glance.
    """
    sha1 = unknown("s")
    before = front.count()
    for name in (
        f"{sha1}_sm", f"{sha1}_10", f"{sha1}.part", f"{sha1}.converted", f".{sha1}.Xa3b", sha1.upper(), sha1[:-1],
        f"{sha1}0", f"{sha1[:-1]}g", "ephemeral_1_40d1d2c", "swap_64", ".basefs2", hashlib.sha1(b"").hexdigest(),
    ):  # fmt: skip
        assert not (mount.mountpoint / name).exists()
    assert front.count() == before


def test_an_unknown_name_asks_once(front: MisbehavingFront, mount: BasefsMount) -> None:
    """[S103] A name of 40 hex digits that basefs does not know asks Glance once, however many processes look it up at
    the same time.

    [S105] A name that Glance does not have is ENOENT.
    """
    before = lists(front)
    assert not (mount.mountpoint / unknown("once")).exists()
    cost_of_one = lists(front) - before
    assert cost_of_one > 0
    with ThreadPoolExecutor(30) as pool:
        found = list(pool.map(lambda n: (mount.mountpoint / unknown(f"many{n % 2}")).exists(), range(30)))
    assert found == [False] * 30
    assert lists(front) - before - cost_of_one <= 2 * cost_of_one  # two names may come to two lists, not thirty


def test_unknown_names_are_rate_limited(front: MisbehavingFront, mount: BasefsMount) -> None:
    """[S104] Unknown names ask Glance at most once a second for all of them together, and a name that Glance does not
    have is not asked about again for 5 s.
    """
    before = lists(front)
    assert not (mount.mountpoint / unknown("one")).exists()
    asked = time.monotonic()
    cost_of_one = lists(front) - before
    for n in range(3):
        assert not (mount.mountpoint / unknown(f"row{n}")).exists()
    took_s = time.monotonic() - asked
    assert took_s > 2.5
    assert lists(front) - before <= (took_s + 2) * cost_of_one
    before = lists(front)
    while time.monotonic() < asked + ASKED_AGAIN_S - 0.5:
        assert not (mount.mountpoint / unknown("one")).exists()
        assert lists(front) == before or time.monotonic() > asked + ASKED_AGAIN_S
    eventually(lambda: (mount.mountpoint / unknown("one")).exists() or lists(front) > before)


def test_a_new_image_resolves_at_once(front: MisbehavingFront, mount: BasefsMount) -> None:
    """[S108] An image made in Glance a moment ago resolves when its name is first looked up."""
    queued = front.glance.add(None, size=None)
    image_id = front.glance.add(DATA[:777])
    assert mount.path(image_id).stat().st_size == 777
    assert not mount.path(queued).exists()


def test_names_are_those_of_nova(front: MisbehavingFront, mount: BasefsMount) -> None:
    """[S101] The name of an image is the SHA-1 of its Glance id as 40 lower-case hex digits, and every image that may
    be shown is a regular file of that name at once.
    """
    image_id = front.glance.add(DATA[:10], id="6F0E5C2E-1111-4222-8333-ABCDEFABCDEF")
    assert mount.path(image_id).read_bytes() == DATA[:10]
    assert not (mount.mountpoint / base_name(image_id.lower())).exists()


def test_the_first_listing(basefs_mount: MountFactory, expected_warnings: ExpectedWarnings) -> None:
    """[S305] The first listing on a node that knows no image yet waits for Glance's list, `lookup_deadline_s` at
    most.
    """
    expected_warnings("Glance is away")  # the front is gone before its mounts are
    with MisbehavingFront() as front:
        image_id = front.glance.add(DATA[:1000], name="first")
        mount = basefs_mount(front.conf_lines())
        assert os.listdir(mount.mountpoint) == [".basefs", hashlib.sha1(image_id.encode()).hexdigest()]
        front.on("/v2/images").respond(answers.hang(threading.Event()))
        other = basefs_mount(front.conf_lines(), {"lookup_deadline_s": 1.0}, name="other")
        began = time.monotonic()
        assert os.listdir(other.mountpoint) == [".basefs"]
        assert time.monotonic() - began < 1.0 + 4.0  # what a loaded machine may add
        front.behave()
