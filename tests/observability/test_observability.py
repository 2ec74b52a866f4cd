import logging
import subprocess
import sys

import pytest

from basefs.observability import ConditionLog, mask_secrets

SECRET = "Zq7hunter2"


@pytest.fixture
def records():
    """A logger of its own and the lines that its handler writes."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record):
            lines.append(self.format(record))

    logger = logging.getLogger("tests.observability")
    logger.setLevel(logging.DEBUG)
    handler = Handler()
    logger.addHandler(handler)
    yield logger, lines
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    "message",
    [
        f"{{'auth': {{'password': '{SECRET}'}}}}",
        f"password = {SECRET}",
        f'{{"adminPass": "{SECRET}"}}',
        f"{{'X-Auth-Token': '{SECRET}'}}",
        f"application_credential_secret = {SECRET}",
    ],
)
def test_no_handler_writes_a_secret(records, message):
    logger, lines = records
    mask_secrets(logger)
    logger.error("Keystone said %s", message)
    try:
        raise ValueError(message)
    except ValueError:
        logger.exception("bug")
    assert len(lines) == 2
    assert "Traceback" in lines[1]
    assert SECRET not in "".join(lines)


def test_masking_twice_changes_nothing(records):
    logger, _ = records
    mask_secrets(logger)
    formatter = logger.handlers[0].formatter
    mask_secrets(logger)
    assert logger.handlers[0].formatter is formatter


def test_one_condition_gives_one_record(records):
    logger, lines = records
    now = [0.0]
    conditions = ConditionLog(logger, repeat_s=100.0, clock=lambda: now[0])
    told = [conditions.begins("glance", logging.WARNING, "Glance is away: %s", number) for number in range(1000)]
    assert told.count(True) == 1
    assert lines == ["Glance is away: 0"]


def test_a_condition_that_lasts_is_told_again(records):
    logger, lines = records
    now = [0.0]
    conditions = ConditionLog(logger, repeat_s=100.0, clock=lambda: now[0])
    for now[0] in (0.0, 99.0, 100.0, 150.0, 200.0):
        conditions.begins("glance", logging.WARNING, "away at %d", now[0])
    assert lines == ["away at 0", "away at 100", "away at 200"]


def test_conditions_do_not_grow_without_bound(records):
    logger, _ = records
    conditions = ConditionLog(logger, keys_max=10)
    for key in range(1000):
        conditions.begins(key, logging.DEBUG, "x")
    assert len(conditions._told_at_s) == 10


def test_the_server_logs_to_the_configured_file_with_secrets_masked(tmp_path):
    log_path = tmp_path / "log" / "basefs.log"
    log_path.parent.mkdir()
    (tmp_path / "base").mkdir()
    conf = tmp_path / "basefs.conf"
    conf.write_text(
        f"[DEFAULT]\nlog_dir = {log_path.parent}\n[basefs]\nmountpoint = {tmp_path}/base\ncache_dir = {tmp_path}/c\n"
        "[glance]\nauth_type = none\nendpoint_override = http://127.0.0.1:1\n"
    )
    code = (
        "import logging, sys\n"
        "from basefs.config import load_settings\n"
        "from basefs.observability import set_up_logging\n"
        "set_up_logging(load_settings([sys.argv[1]])[0])\n"
        f"logging.getLogger('basefs.x').warning('password = {SECRET}')\n"
        "logging.getLogger('keystoneauth.session').info('chatter')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(conf)], check=True)
    text = log_path.read_text()
    assert "WARNING basefs.x password = ***" in text
    assert "chatter" not in text
