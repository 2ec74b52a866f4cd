"""Nothing that basefs says or leaves behind holds its password or a token."""

import os
import re
from pathlib import Path

import pytest

from tests.conftest import ExpectedWarnings, MountFactory
from tests.fakes.front import MisbehavingFront
from tests.fakes.keystone import FakeKeystone
from tests.semantics.conftest import eventually, opened
from tests.service.test_metrics import answers, free_port, get
from tools.secrets_used import FAKE_PASSWORD, SECRET, said_files, secrets_in

pytestmark = pytest.mark.mount


def test_password_and_tokens_are_in_no_output_argument_environment_metric_or_core_file(
    basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("Glance is away|answered EIO|Keystone is away|cannot be refreshed|image .*: ")
    port = free_port()
    with MisbehavingFront() as front:
        keystone = FakeKeystone(front)
        image_id = front.glance.add(bytes(range(256)) * 8192)
        other_id = front.glance.add(bytes(2_000_000))
        options = {"DEFAULT.debug": True, "metrics_listen": f"127.0.0.1:{port}", "other_io_deadline_s": 1}
        mount = basefs_mount(keystone.conf_lines(), {**options, "lookup_deadline_s": 60})
        assert mount.path(image_id).read_bytes()
        keystone.revoke()
        assert mount.path(other_id).stat()
        eventually(lambda: answers(port))
        texts = {"metrics": get(port)[1]}
        for command in (["status"], ["image", "list"], ["image", "show", image_id], ["doctor"]):
            done = mount.cli(*command, check=False)
            texts[" ".join(command)] = (done.stdout + done.stderr).encode()
        for pid in mount.pids():
            assert re.search(r"Max core file size +0 +0 ", Path(f"/proc/{pid}/limits").read_text())
            texts[f"process {pid}"] = b"".join(
                Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")
            )
        assert len(keystone.issued) >= 2
    with opened(mount.path(other_id)) as fd, pytest.raises(OSError, match="Input/output error"):
        os.pread(fd, 4096, 1_900_000)
    assert {name: text for name, text in texts.items() if SECRET.search(text)} == {}
    mount.stop()
    assert list(secrets_in(said_files(mount.directory))) == []
    assert list(secrets_in(path for path in mount.cache_dir.rglob("*") if path.is_file())) == []


def test_a_configuration_that_is_refused_does_not_show_its_password(
    basefs_mount: MountFactory, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings("basefs.keeper .*unknown key pasword")
    conf = f"[glance]\nauth_type = password\nauth_url = http://127.0.0.1:1\npasword = {FAKE_PASSWORD}\n"
    mount = basefs_mount(conf, start=False)
    done = mount.cli("mount", "--background", check=False)
    assert done.returncode != 0
    assert "unknown key pasword" in done.stderr
    assert FAKE_PASSWORD not in done.stdout + done.stderr + mount.log_text


def test_the_look_at_secrets_finds_them(tmp_path: Path) -> None:
    log = tmp_path / "basefs.log.1"
    log.write_text(f"fine\npassword={FAKE_PASSWORD}\n")
    assert len(list(secrets_in(said_files(tmp_path)))) == 1
    log.unlink()
