import os
import pty
import re
import signal
import subprocess
import sys

import pytest

from tests.control.fake_view import SIZE


def test_help_lists_every_command(cli):
    done = cli.run("--help")
    assert done.returncode == 0
    for command in ("mount", "unmount", "status", "doctor", "image list", "image show", "image warm", "image evict"):
        assert re.search(rf"^  {command} +\w", done.stdout, re.MULTILINE), command
    assert "Could not load" not in done.stdout


def test_each_command_has_its_own_help(cli):
    assert "--no-wait" in cli.run("image", "warm", "--help").stdout
    assert "--background" in cli.run("mount", "--help").stdout


def test_without_arguments_the_help_is_shown():
    done = subprocess.run([sys.executable, "-m", "basefs"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "image warm" in done.stdout


def test_an_unknown_command_has_suggestions(cli):
    done = cli.run("unmuont")
    assert done.returncode == 2
    assert "unmount" in done.stdout


def test_global_options_may_stand_after_the_command(cli, view):
    done = subprocess.run(
        [*cli.argv()[:1], "status", "--config-file", str(cli.conf_path), "-f", "value", "-c", "state"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "serving\n"


def test_an_unknown_key_stops_every_command(cli):
    cli.conf_path.write_text(cli.conf_path.read_text() + "[basefs]\nchunk_byte = 65536\n")
    for command in (["status"], ["mount"], ["mount", "--background"], ["unmount"], ["image", "list"]):
        assert "did you mean chunk_bytes?" in cli.error(*command)


@pytest.mark.parametrize(
    "command", [["status"], ["image", "list"], ["image", "show", "x"], ["image", "warm", "x"], ["image", "evict", "x"]]
)
def test_without_a_server_a_command_says_how_to_start_one(cli, command):
    assert "basefs is not running" in cli.error(*command)


def test_status_is_shown_in_every_format(cli, view):
    assert cli.json("status") == view.status()
    assert cli.run("status", "-f", "value", "-c", "fetched_bytes").stdout == "2048\n"
    assert "2.0 KiB" in cli.run("status").stdout


def test_images_are_listed_with_numbers_in_json_and_units_in_tables(cli, view):
    listed = cli.json("image", "list")
    assert [image["id"] for image in listed] == ["one", "a/b"]
    assert listed[0]["size"] == SIZE
    assert "1000 B" in cli.run("image", "list").stdout


def test_an_image_is_shown_by_what_names_it(cli, view):
    assert cli.json("image", "show", "a/b") == view.image("a/b")
    assert "no image 'none'" in cli.error("image", "show", "none")
    assert "twice fits 1 and 2" in cli.error("image", "show", "twice")


def test_evict_says_how_much_went(cli, view):
    assert cli.run("image", "evict", "one").stdout == "evicted 4.0 KiB\n"
    assert "image open is open" in cli.error("image", "evict", "open")


def test_detach_says_which_volume_went_and_why_not(cli, view):
    assert cli.run("image", "detach", "one").stdout == "detached volume a volume of image one\n"
    assert "image open is in use (open)" in cli.error("image", "detach", "open")
    assert cli.run("image", "detach", "--force", "open").returncode == 0


def test_warm_waits_until_the_image_is_complete(cli, view):
    for step in (100, SIZE):
        view.steps_send.send_nowait(step)
    done = cli.run("image", "warm", "one")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "one: 1000 B of 1000 B (100 %) is here\n"


def test_warm_without_waiting_hands_the_work_over(cli, view):
    done = cli.run("image", "warm", "one", "--no-wait")
    assert done.returncode == 0
    assert "500 B of 1000 B" in done.stdout
    assert view.kept == ["one"]
    assert not view.is_warming.is_set()


def test_a_warming_that_fails_says_why(cli, view):
    from basefs.errors import SourceCorruptError

    view.steps_send.send_nowait(SourceCorruptError("the image hashes wrongly"))
    assert "the image hashes wrongly" in cli.error("image", "warm", "one")
    assert "Glance is away" in cli.error("image", "warm", "away")


def test_ctrl_c_stops_a_warming_that_is_waited_for(cli, view):
    # A shell that runs the suite in the background has SIGINT ignored, and children inherit that. Not by a preexec_fn:
    # that forks, of which eventlet warns once os-brick is imported here.
    argv = ["env", "--default-signal=INT", *cli.argv("image", "warm", "one")]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as warming:
        assert view.is_warming.wait(60)
        warming.send_signal(signal.SIGINT)
        _, stderr = warming.communicate(timeout=60)
    assert warming.returncode == 130
    assert stderr.startswith(b"basefs: stopped")
    assert stderr.count(b"\n") == 1
    assert view.has_ended.wait(30)


def test_a_terminal_sees_a_progress_bar_with_rate_and_time(cli, view):
    for step in (100, 500, SIZE):
        view.steps_send.send_nowait(step)
    ours, theirs = pty.openpty()
    try:
        warming = subprocess.Popen(
            cli.argv("image", "warm", "one"), stdout=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        )
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:
                break  # EIO: the command closed its end
            if not piece:
                break
            shown += piece
        assert warming.wait(60) == 0
    finally:
        os.close(ours)
    text = shown.decode()
    assert "bytes" in text
    assert re.search(r"B/s|\?", text)
    assert "one: 1000 B of 1000 B (100 %) is here" in text


def test_a_reader_that_leaves_is_no_error(cli, view):
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {' '.join(cli.argv('image', 'list'))} | true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


def test_unmount_of_nothing_is_an_error(cli):
    assert f"basefs is not mounted on {cli.mountpoint}" in cli.error("unmount")


def test_importing_the_command_line_loads_no_library_that_takes_long():
    code = (
        "import sys, basefs.cli.app; slow = {'glanceclient', 'keystoneauth1', 'httpx', 'rich', 'trio', 'pyfuse3', "
        "'oslo_config', 'requests'}; print(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- drain


def test_drain_says_what_it_did_and_that_it_is_safe(cli, view):
    view.drains = ["a/b"]
    done = cli.run("drain")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "a/b: is in the lower directory",
        "all 1 images in use are in the lower directory: it is safe to unmount basefs once no file on it is open",
    ]
    view.drains = []
    assert cli.run("drain").stdout.startswith("no image is in use: it is safe to unmount")


def test_drain_lists_what_cannot_be_had_and_says_that_it_is_not_safe(cli, view):
    done = cli.run("drain")
    assert done.returncode == 1
    assert "safe" not in done.stdout
    assert done.stderr.splitlines() == [
        "basefs: one: not graduated: no room (in use: open)",
        "basefs: not safe to unmount: 1 of 2 images in use are not in the lower directory",
    ]


def test_a_verify_that_did_not_come_to_its_end_is_a_failure(cli, view):
    assert cli.run("image", "verify", "a/b").returncode == 0
    view.verify_stops = True
    done = cli.run("image", "verify", "a/b")
    assert done.returncode == 1
    assert "the server stopped before every image was checked" in done.stderr


def test_a_drain_that_did_not_come_to_its_end_is_not_safe(cli, view):
    view.drains, view.drain_stops = ["a/b"], True
    done = cli.run("drain")
    assert done.returncode == 1
    assert "safe" not in done.stdout
    assert "the server stopped before every image was seen to" in done.stderr
