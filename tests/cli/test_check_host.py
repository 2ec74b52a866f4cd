"""What `basefs doctor` says of the machine."""

from basefs.cli.check_host import check_config_files


def test_passwords_that_every_user_can_read_are_told(tmp_path):
    files = [tmp_path / "basefs.conf", tmp_path / "passwords.conf"]
    for path in files:
        path.touch(mode=0o600)
    paths = [str(path) for path in files]
    assert check_config_files(paths).status == "ok"
    files[0].chmod(0o640)
    assert check_config_files(paths).status == "ok", "a group of the operator's choice"
    files[1].chmod(0o644)
    finding = check_config_files(paths)
    assert finding.status == "warning"
    assert str(files[1]) in finding.detail
    assert str(files[0]) not in finding.detail
