"""Fixtures of the whole suite: real services, real mounts, and the checks that no test leaves anything behind."""

import logging
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest
import trio.testing

from tests.fakes.clock import jumping_clock
from tools.mount import BasefsMount, MountError, basefs_mounts
from tools.rig import Rig, radosgw
from tools.rig.leftovers import loop_devices_below
from tools.secrets_used import said_files, secrets_in

IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
MARK_OF_FIXTURE = {
    "basefs_mount": "mount",
    "ext4": "mount",
    "keystone_rig": "keystone",
    "cinder_rig": "cinder",
    "cinder_keystone_rig": "cinder",
}
CINDER_RIGS = {"cinder_rig", "cinder_keystone_rig", "ceph_rig"}
LOG_LINE = re.compile(r"^\S+ \S+ \d+ (?:WARNING|ERROR|CRITICAL) (?P<record>basefs\S* .*)$")


# -- services


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A real Glance with fake auth, a file store (`upload`) and an http store (`upload_web`), for the whole session.

    Do not stop, pause or damage it: take `own_rig` for that.
    """
    with Rig(tmp_path_factory.mktemp("rig")) as running:
        yield running


@pytest.fixture(scope="session")
def glance(rig: Rig) -> Rig:
    """The session's rig by another name."""
    return rig


@pytest.fixture
def own_rig(tmp_path: Path) -> Iterator[Rig]:
    """As `rig`, for one test that stops it, freezes it or counts all its requests (2 s)."""
    with Rig(tmp_path / "rig") as running:
        yield running


@pytest.fixture(scope="session")
def keystone_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A real Glance behind a real Keystone, whose tokens live 34 s: keystoneauth renews them after four."""
    with Rig(tmp_path_factory.mktemp("keystone-rig"), auth="keystone", token_expiration_s=34) as running:
        yield running


@pytest.fixture(scope="session")
def _cinder_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Rig(tmp_path_factory.mktemp("cinder-rig"), nfs=True) as running:
        yield running


@pytest.fixture(scope="session")
def _cinder_keystone_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Rig(tmp_path_factory.mktemp("cinder-keystone-rig"), auth="keystone", cinder=True) as running:
        yield running


@pytest.fixture
def cinder_rig(_cinder_session: Rig) -> Iterator[Rig]:
    """A real Glance and a real Cinder with fake auth, for the whole session (5 s); `upload_cinder`, `place_cinder`.

    With the loop driver's backend, and the stock NFS driver's. Fails a test that left an attachment, a loop device or a
    clone of basefs behind. Who stops or freezes Cinder brings it back.
    """
    yield _cinder_session
    _assert_no_links(_cinder_session)


@pytest.fixture
def cinder_keystone_rig(_cinder_keystone_session: Rig) -> Iterator[Rig]:
    """As `cinder_rig` without NFS, behind a real Keystone: for what roles may do (7 s)."""
    yield _cinder_keystone_session
    _assert_no_links(_cinder_keystone_session)


@pytest.fixture(scope="session")
def _ceph_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Rig(tmp_path_factory.mktemp("ceph-rig"), ceph=True) as running:
        yield running


@pytest.fixture
def ceph_rig(_ceph_session: Rig) -> Iterator[Rig]:
    """As `cinder_rig`, with a Ceph, Cinder's RBD driver and Glance's rbd store on it; 14 s to start."""
    yield _ceph_session
    _assert_no_links(_ceph_session)


@pytest.fixture(scope="session")
def object_stores_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A real Glance behind a real Keystone with its stock rbd, s3, swift stores on a Ceph with radosgw; 25 s to start.

    Who stops or freezes a daemon brings it back.
    """
    with Rig(tmp_path_factory.mktemp("object-stores-rig"), auth="keystone", object_stores=True) as running:
        radosgw.allow_reader(running.ceph.s3_url)
        yield running


def _assert_no_links(rig: Rig) -> None:
    """Fail when an image of the rig is still attached, or was cloned and its clone is there; take that away first."""
    cinder = rig.cinder_api()
    attachments, volumes = cinder.attachments(), cinder.volumes()
    for one in attachments:
        cinder.delete_attachment(one["id"])
    clones = [one for one in volumes if "basefs_host" in one["metadata"] and one["status"] != "deleting"]
    for one in clones:
        cinder.wait_for(one["id"], "available")
        cinder.delete_volume(one["id"])
    devices = loop_devices_below(rig.directory)
    for device in devices:
        subprocess.run(["losetup", "-d", device], check=False)
    assert not attachments, f"attachments left behind: {attachments}"
    assert not clones, f"clones left behind: {[(one['id'], one['name'], one['status']) for one in clones]}"
    assert not devices, f"loop devices left behind: {devices}"


@pytest.fixture
def ext4(tmp_path: Path, _no_leaks: None) -> Iterator[Path]:
    """A directory on an ext4 of 96 MiB, which makes itself read-only after an error."""
    image, directory = tmp_path / "ext4.img", tmp_path / "ext4"
    directory.mkdir()
    with open(image, "wb") as file:
        file.truncate(96 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop,errors=remount-ro", str(image), str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


# -- log records that nobody expected


class ExpectedWarnings:
    """The warnings and errors that one test knows of."""

    def __init__(self) -> None:
        self._patterns: dict[str, bool] = {}

    def __call__(self, pattern: str) -> None:
        """Declare that a record matching `pattern` (re.search in "logger: message") will come, at least once."""
        self._patterns.setdefault(pattern, False)

    def may_come(self, pattern: str) -> None:
        """Declare a record that comes only where the machine is so slow that a limit of basefs's is reached."""
        self._patterns[pattern] = True

    def unexpected(self, records: list[str]) -> list[str]:
        """Return what matches no pattern, and remember which patterns did match."""
        left = []
        for record in records:
            hits = [pattern for pattern in self._patterns if re.search(pattern, record)]
            self._patterns.update(dict.fromkeys(hits, True))
            if not hits:
                left.append(record)
        return left

    def missing(self) -> list[str]:
        """Return the patterns that nothing has matched."""
        return [pattern for pattern, seen in self._patterns.items() if not seen]


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}")


@pytest.fixture
def expected_warnings() -> ExpectedWarnings:
    """Call it with a pattern for each record of WARNING or above that the test provokes, in process or in a mount."""
    return ExpectedWarnings()


@pytest.fixture(autouse=True)
def _no_unexpected_warnings(expected_warnings: ExpectedWarnings) -> Iterator[list[str]]:
    """Fail a test in which a `basefs` logger warned and nobody expected it, or in which an expected warning is absent.

    Yields the list to which mounts add the records of their own log files.
    """
    collector = _Collector()
    logger = logging.getLogger("basefs")
    logger.addHandler(collector)
    yield collector.lines
    logger.removeHandler(collector)
    unexpected = expected_warnings.unexpected(collector.lines)
    assert not unexpected, "log records that the test did not expect:\n" + "\n".join(unexpected)
    missing = expected_warnings.missing()
    assert not missing, f"expected log records that did not come: {missing}"


# -- secrets


@pytest.fixture(scope="session", autouse=True)
def _no_secrets_said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the run in which any basefs wrote a password or a token that the tests gave it, or one of Keystone's."""
    yield
    said = list(secrets_in(said_files(tmp_path_factory.getbasetemp())))
    assert not said, "secrets that basefs has written:\n" + "\n".join(said)


# -- time


@pytest.fixture
def clock() -> trio.testing.MockClock:
    """Jumps over waits, but not while a thread is at work."""
    return jumping_clock()


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    """As `clock`, in the place of pytest-trio's, which jumps past threads."""
    return jumping_clock()


# -- mounts


class MountFactory(Protocol):
    """What the fixture `basefs_mount` is."""

    def __call__(
        self,
        glance: Rig | str | None = None,
        options: Mapping[str, object] | None = None,
        *,
        name: str = "basefs",
        start: bool = True,
    ) -> BasefsMount: ...


@pytest.fixture
def _no_leaks(tmp_path: Path) -> Iterator[None]:
    """Fail a test that left a mount or a loop device below its directory."""
    yield
    mounts = [path for path in basefs_mounts() if path.startswith(str(tmp_path))]
    for path in mounts:
        subprocess.run(["umount", "-l", path], check=False)
    loops = subprocess.run(["losetup", "-l", "-n", "-O", "NAME,BACK-FILE"], capture_output=True, text=True, check=True)
    devices = [line.split()[0] for line in loops.stdout.splitlines() if str(tmp_path) in line]
    for device in devices:
        subprocess.run(["losetup", "-d", device], check=False)
    assert not mounts, f"mounts left behind: {mounts}"
    assert not devices, f"loop devices left behind: {devices}"


@pytest.fixture
def basefs_mount(
    request: pytest.FixtureRequest, tmp_path: Path, _no_leaks: None, _no_unexpected_warnings: list[str]
) -> Iterator[MountFactory]:
    """Make mounts: `basefs_mount()` mounts over the session's Glance, and unmounts after the test, however it went.

    `glance` is a Rig or the text of a [glance] section; `options` are [basefs] options (or "SECTION.name"); `name` is
    the directory below tmp_path, the same name again is the same cache; with `start=False` the test starts it. A
    process that has to be killed at the end fails the test.
    """
    made: list[BasefsMount] = []
    for name in CINDER_RIGS & set(request.fixturenames):
        request.getfixturevalue(name)  # now, so that it looks for what was left when we are gone

    def make(
        glance: Rig | str | None = None,
        options: Mapping[str, object] | None = None,
        *,
        name: str = "basefs",
        start: bool = True,
    ) -> BasefsMount:
        if glance is None:
            glance = request.getfixturevalue("rig")
        conf = glance if isinstance(glance, str) else glance.conf_lines()
        mount = BasefsMount(tmp_path / name, conf, options)
        made.append(mount)
        if start:
            mount.start()
        return mount

    yield make
    trouble = []
    for mount in reversed(made):
        try:
            mount.stop()
        except MountError as error:
            trouble.append(f"{mount.directory.name}: {error}")
    for text in {mount.log_path: mount.log_text for mount in made}.values():
        found = (LOG_LINE.match(line) for line in text.splitlines())
        _no_unexpected_warnings.extend(hit["record"] for hit in found if hit)
    assert not trouble, "\n".join(trouble)


# -- what runs beside nothing else


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes one of these fixtures: `tools/test` must not run it at low priority beside guests."""
    for item in items:
        for name in set(MARK_OF_FIXTURE).intersection(getattr(item, "fixturenames", ())):
            item.add_marker(MARK_OF_FIXTURE[name])


# -- nothing is skipped that can run


def _skip_lines(reporter: pytest.TerminalReporter) -> list[str]:
    return [f"{report.nodeid}: {report.longrepr}" for report in reporter.stats.get("skipped", [])]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Make a run in CI fail when a test was skipped: everything can run there."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if IN_CI and reporter is not None and _skip_lines(reporter) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why a run without a failure failed."""
    skipped = _skip_lines(terminalreporter)
    if IN_CI and skipped:
        terminalreporter.section("skipped, which fails a run in CI")
        for line in skipped:
            terminalreporter.write_line(line)
