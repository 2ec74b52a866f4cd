"""Files that a location names: which are opened, and that no other is, whatever is on the way to it."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basefs import errors
from basefs.sources.file_locations import FileLocations

IMAGE = "11111111-2222-3333-4444-555555555555"
DATA = os.urandom(10_000)


@pytest.fixture
def images(tmp_path):
    directory = tmp_path / "images"
    (directory / "sub").mkdir(parents=True)
    (directory / IMAGE).write_bytes(DATA)
    (tmp_path / IMAGE).write_bytes(b"outside")
    return directory


def locations(*directories, any_name=False):
    return FileLocations(directories, any_name=any_name)


def read(found, location):
    fd = found.open(location, size=len(DATA))
    try:
        with pytest.raises(OSError, match="Bad file"):
            os.write(fd, b"x")
        return os.pread(fd, len(DATA) + 1, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("scheme", ["file", "filesystem"])
def test_an_images_file_is_opened_for_reading(images, scheme):
    found, location = locations(Path("/nowhere"), images), f"{scheme}://{images}/{IMAGE}"
    assert found.refusal(IMAGE, location) is None
    assert read(found, location) == DATA


def test_glances_directory_may_be_a_link_of_the_operators(images, tmp_path):
    (tmp_path / "link").symlink_to(images)
    assert read(locations(tmp_path / "link"), f"file://{tmp_path}/link/{IMAGE}") == DATA


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("file:///etc/shadow", "is not below"),
        ("file://{d}/../" + IMAGE, "holds . or .."),
        ("file://{d}/./" + IMAGE, "holds . or .."),
        ("file://{d}//" + IMAGE, "holds . or .."),
        ("file://{d}/" + IMAGE + "/", "holds . or .."),
        ("file://{d}", "is not below"),
        ("file://{d}x/" + IMAGE, "is not below"),
        ("file://host{d}/" + IMAGE, "names no file"),
        ("file:{d}/" + IMAGE, "names no file"),
        ("FILE://{d}/" + IMAGE, "names no file"),
        ("http://{d}/" + IMAGE, "names no file"),
        ("file://{d}/" + IMAGE + "\0", "names no file"),
        ("file://{d}/%2e%2e/" + IMAGE, None),
        ("file://{d}/22222222-2222-3333-4444-555555555555", "is not the image's id"),
        ("file://{d}/" + IMAGE + "?key=SECRET", "is not the image's id"),
        ("file://{d}/\ud800/" + IMAGE, "names no file"),
        ("", "names no file"),
    ],
)
def test_another_location_is_refused(images, location, why):
    location = location.format(d=images)
    reason = locations(images).refusal(IMAGE, location)
    if why is None:  # nothing is decoded, and there is no such directory
        assert reason is None
        with pytest.raises(errors.StoreGoneError):
            locations(images).open(location, size=len(DATA))
    else:
        assert re.search(re.escape(why), reason)
        assert "SECRET" not in reason


def test_another_name_is_read_where_the_operator_says_so(images):
    (images / "other").write_bytes(DATA)
    found = locations(images, any_name=True)
    assert found.refusal(IMAGE, f"file://{images}/other") is None
    assert read(found, f"file://{images}/other") == DATA


@pytest.mark.parametrize("what", ["link", "link above", "absolute link", "directory", "fifo", "device", "nothing"])
def test_what_is_no_plain_file_or_has_a_link_on_the_way_is_not_opened(images, tmp_path, what):
    (images / IMAGE).unlink()
    location = f"file://{images}/{IMAGE}"
    if what == "link":
        (images / IMAGE).symlink_to(f"../{IMAGE}")
    elif what == "absolute link":
        (images / IMAGE).symlink_to("/etc/shadow")
    elif what == "link above":
        (images / "above").symlink_to("..")
        location = f"file://{images}/above/{IMAGE}"
    elif what == "directory":
        (images / IMAGE).mkdir()
    elif what == "fifo":
        os.mkfifo(images / IMAGE)
    elif what == "device":
        os.mknod(images / IMAGE, 0o600 | 0o020000, os.makedev(1, 3))
    found = locations(images)
    assert found.refusal(IMAGE, location) is None
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(errors.StoreGoneError):
        found.open(location, size=7)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_of_another_size_is_not_the_image(images):
    with pytest.raises(errors.SourceCorruptError, match="has 10000 bytes, the image's metadata say 10001"):
        locations(images).open(f"file://{images}/{IMAGE}", size=10_001)


@given(st.text(alphabet="abc./%\\ \0é-") | st.text())
def test_no_path_leads_out(text):
    directory = Path("/nowhere/images")
    location = f"file:///nowhere/images/{text}"
    if FileLocations([directory], any_name=True).refusal(IMAGE, location) is None:
        path = os.path.normpath(location.removeprefix("file://"))
        assert path.startswith("/nowhere/images/")
        assert path == location.removeprefix("file://")
