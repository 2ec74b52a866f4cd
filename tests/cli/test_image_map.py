"""`basefs image map`: the letters, the pictures, the numbers, and what it refuses."""

import io
import json
import os
import pty
import re
import subprocess
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from basefs.cli.map_cells import Cell, cells_of, coarser, printable, share_text
from basefs.cli.map_picture import COLOURS, LEFT, TOP, Box, picture_of, svg_text, write_png, write_svg
from basefs.cli.map_text import print_map
from basefs.errors import ControlError

SVG = "{http://www.w3.org/2000/svg}"


def answer_of(runs, *, cell_bytes=65536, size=None, **others):
    """What a server tells of cells (count, present, zero, fetching)."""
    names = ("present_bytes", "zero_bytes", "fetching_bytes")
    totals = {name: sum(run[0] * run[at] for run in runs) for at, name in enumerate(names, 1)}
    size = sum(run[0] for run in runs) * cell_bytes if size is None else size
    return {
        "image_id": "4a425129", "name": "debian", "base_name": "x", "state": "partial", "note": None, "taken_at": 0,
        "size": size, "chunk_bytes": 65536, "cell_bytes": cell_bytes, **totals,
        "missing_bytes": size - sum(totals.values()),
        "runs": [dict(zip(("cells", *names), run, strict=True)) for run in runs],
    } | others  # fmt: skip


@st.composite
def answers(draw):
    cell_bytes = draw(st.sampled_from([16384, 65536, 1 << 28]))
    runs = []
    for _ in range(draw(st.integers(0, 6))):
        present = draw(st.integers(0, cell_bytes))
        zero = draw(st.integers(0, cell_bytes - present))
        fetching = draw(st.integers(0, cell_bytes - present - zero))
        runs.append((draw(st.integers(1, 2000)), present, zero, fetching))
    cells = sum(run[0] for run in runs)
    size = cells * cell_bytes
    if cells and draw(st.booleans()):
        runs.append((1, 0, 0, 0))
        size += draw(st.integers(1, cell_bytes))
    return answer_of(runs, cell_bytes=cell_bytes, size=size, name=draw(st.text(max_size=200)))


@settings(deadline=None)
@given(answer=answers(), cells_max=st.integers(1, 5000))
def test_coarser_cells_hold_the_same_bytes(answer, cells_max):
    cells = cells_of(answer)
    fewer = coarser(cells, cells_max)
    assert len(fewer) <= cells_max
    for name in ("present", "zero", "fetching", "missing"):
        assert sum(getattr(cell, name) for cell in fewer) == answer[f"{name}_bytes"]
    assert sum(cell.length for cell in fewer) == answer["size"]
    assert len({cell.length for cell in fewer[:-1]}) <= 1
    assert all(cell.length > 0 for cell in fewer)


@settings(deadline=None, max_examples=15)
@given(answer=answers())
def test_every_map_can_be_drawn_and_says_nothing_to_a_terminal(answer):
    out = io.StringIO()
    print_map(answer, out)
    assert all(line.isprintable() for line in out.getvalue().split("\n"))
    assert all(len(line) <= 130 for line in out.getvalue().split("\n"))
    ET.fromstring(svg_text(picture_of(answer)))


def test_letters_say_what_is_where(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    runs = [(1, 65536, 0, 0), (1, 40000, 0, 0), (1, 4096, 0, 0), (1, 0, 65536, 0), (1, 0, 0, 1), (1, 0, 0, 0)]
    runs += [(1, 4096, 61440, 0)]
    out = io.StringIO()
    print_map(answer_of(runs), out)
    assert "0.0 MiB  █▓▒-~·█\n" in out.getvalue()


def test_a_stream_that_cannot_take_blocks_gets_ascii():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    print_map(answer_of([(1, 65536, 0, 0), (3, 0, 0, 0)]), out)
    out.flush()
    assert b"0.0 MiB  #...\n" in raw.getvalue()


@pytest.mark.parametrize(
    ("part", "text"), [(0, "0 %"), (1, "0.1 %"), (10**6 - 1, "99.9 %"), (10**6, "100 %"), (123456, "12.3 %")]
)
def test_a_share_is_all_or_nothing_only_when_it_is(part, text):
    assert share_text(part, 10**6) == text


def test_names_of_images_do_nothing_to_a_terminal():
    assert printable("a\x1b[31m\nb\u202ec") == "a?[31m?b?c"
    assert len(printable("n" * 10_000)) == 120


def test_a_picture_has_a_square_in_the_colour_of_each_kind():
    kinds = [(64, 65536, 0, 0), (64, 0, 65536, 0), (64, 0, 0, 65536), (64, 0, 0, 0)]
    picture = picture_of(answer_of(kinds))
    squares = [part for part in picture.parts if isinstance(part, Box)][: 4 * 64]
    assert [square.fill for square in squares[::64]] == list(COLOURS)
    assert all(square.x >= 0 and square.x + square.width <= picture.width for square in squares)
    assert all(square.y >= 0 and square.y + square.height <= picture.height for square in squares)


def test_what_little_is_here_is_seen():
    little = Cell(length=1 << 28, present=65536, zero=0, fetching=0)
    answer = answer_of([(1, little.present, 0, 0)], cell_bytes=1 << 28)
    first = next(part for part in picture_of(answer).parts if isinstance(part, Box))
    assert abs(first.fill[0] - COLOURS[3][0]) > 30


def test_in_a_pipe_there_is_a_map_of_80_columns_without_colours(cli, view):
    done = subprocess.run(cli.argv("image", "map", "one"), capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout
    rows = [line for line in done.stdout.split("\n") if re.match(r"\d+\.\d\d GiB  ", line.lstrip())]
    assert 4 <= len(rows) <= 16
    assert max(map(len, rows)) <= 80
    assert set("".join(row.split("GiB  ")[1] for row in rows)) == set("█▒-~·")
    assert re.search(r"^being fetched +240\.0 MiB +2\.3 %$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(("environment", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_a_terminal_is_filled_and_has_colours_unless_it_wants_none(cli, view, environment, is_coloured):
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "132", **environment}
    with subprocess.Popen(cli.argv("image", "map", "one"), stdout=theirs, env=env):
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:
            pass  # EIO: the command closed its end
    os.close(ours)
    text = shown.decode()
    assert ("\x1b[34m" in text) == is_coloured
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line.rstrip("\r")) for line in text.split("\n")]
    assert max(len(row) for row in rows if "GiB  " in row) in (130, 131, 132)


async def test_machines_get_every_run(cli, view):
    from basefs.cli.image_map import CELLS

    assert cli.json("image", "map", "one") == await view.image_map("one", cells_max=CELLS)
    table = cli.run("image", "map", "one", "-f", "table").stdout
    assert "10.0 GiB" in table
    assert "runs" not in table


def test_pictures_are_written_where_they_were_asked_for(cli, view, tmp_path):
    svg, png = tmp_path / "map.svg", tmp_path / "map.PNG"
    done = cli.run("image", "map", "one", "--svg", str(svg), "--png", str(png))
    assert (done.returncode, done.stdout) == (0, f"wrote {svg}\nwrote {png}\n")
    texts = [text.text for text in ET.parse(svg).getroot().iter(f"{SVG}text")]
    assert texts[0] == "name of one"
    assert any("one" in text and "10.0 GiB" in text for text in texts)
    assert {"here", "here, zeros", "being fetched", "missing", "0.00 GiB"} <= set(texts)
    with Image.open(png) as image:
        assert image.getpixel((LEFT + 2, TOP + 2)) == COLOURS[0]
    alone = json.loads(cli.run("image", "map", "one", "--svg", str(svg), "-f", "json").stdout)
    assert alone["image_id"] == "one"


def test_what_cannot_be_done_is_said(cli, view, tmp_path):
    assert "no image 'none'" in cli.error("image", "map", "none")
    assert "--png map: the name does not end in .png" in cli.error(
        "image", "map", "one", "--svg", "a.svg", "--png", "map"
    )
    path = tmp_path / "nowhere" / "map.svg"
    text = cli.error("image", "map", "one", "--svg", str(path))
    assert f"cannot write {path}: No such file or directory" in text


@pytest.mark.parametrize("write", [write_svg, write_png])
def test_a_picture_that_cannot_be_written_names_its_file(tmp_path, write):
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    for path, text in ((full, "No space left on device"), (tmp_path, "Is a directory")):
        with pytest.raises(ControlError, match=f"cannot write {path}: {text}"):
            write(picture_of(answer_of([(64, 0, 0, 0)])), path)
