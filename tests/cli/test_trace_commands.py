"""`basefs trace …` and `image warm --boot`: what is shown, written, drawn and refused."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from basefs.cli.map_picture import COLOURS, Box, svg_text
from basefs.cli.trace_picture import HEIGHT, LEFT, TOP, WIDTH, picture_of
from tests.cli.conftest import Cli, ServedView

UNIT = 65536


def test_traces_are_listed_shown_and_exported(cli: Cli, view: ServedView, tmp_path: Path) -> None:
    rows = cli.json("trace", "list")
    assert isinstance(rows, list)
    assert [(row["image_id"], row["traced_bytes"], row["by"]) for row in rows] == [
        ("one", 17 * UNIT, "guest"),
        ("open", 17 * UNIT, "guest"),
    ]
    shown = cli.json("trace", "show", "one")
    assert isinstance(shown, dict)
    table = cli.run("trace", "show", "one").stdout
    assert "1.1 MiB" in table
    assert "unit_bytes" not in table
    file = tmp_path / "one.json"
    assert cli.run("trace", "export", "one", str(file)).returncode == 0
    assert json.loads(file.read_text()) == shown["trace"]
    assert cli.run("trace", "export", "one", "-").stdout == file.read_text()
    assert "no boot trace" in cli.error("trace", "export", "a/b", "-")
    assert "cannot write /nowhere/x: No such file" in cli.error("trace", "export", "one", "/nowhere/x")


def test_a_trace_is_imported_or_refused_with_the_member(cli: Cli, view: ServedView, tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    cli.run("trace", "export", "one", str(file))
    done = cli.run("trace", "import", str(file))
    assert (done.returncode, done.stdout) == (0, f"one: {17 * UNIT} bytes in 2 ranges\n")
    assert view.imported == [("one", file.read_bytes())]
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "version": 7}))
    assert f"{file}: not a boot trace: version: 7 is not 1" in cli.error("trace", "import", str(file))
    file.write_text(json.dumps({**document, "os_hash_value": "00"}))
    assert "os_hash_value: '00', the image has '0f'" in cli.error("trace", "import", str(file))
    file.write_bytes(bytes(1 << 20))
    assert "65537 bytes, a trace has at most 65536" in cli.error("trace", "import", str(file))
    assert "cannot read /nowhere: No such file" in cli.error("trace", "import", "/nowhere")


def test_the_boot_of_an_image_is_warmed(cli: Cli, view: ServedView) -> None:
    done = cli.run("image", "warm", "--boot", "one")
    assert (done.returncode, done.stdout) == (0, "one: 300 B of 1000 B (30 %) is here\n")
    assert "open: Glance is away; open: 0 B of 1000 B (0 %) is here" in cli.error("image", "warm", "--boot", "open")
    assert "no boot trace" in cli.error("image", "warm", "--boot", "a/b")
    assert "not allowed with" in cli.run("image", "warm", "--boot", "--no-wait", "one").stderr


def test_a_trace_is_drawn(cli: Cli, view: ServedView, tmp_path: Path) -> None:
    svg, png = tmp_path / "trace.svg", tmp_path / "trace.png"
    assert cli.run("trace", "show", "one", "--svg", str(svg), "--png", str(png)).returncode == 0
    texts = [text.text for text in ET.parse(svg).getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "name of one"
    assert "1.1 MiB of 8.5 MiB are read: 12.5 %, in 2 ranges" in texts
    with Image.open(png) as image:
        assert image.getpixel((LEFT + 1, TOP + HEIGHT * 130 // 136)) == COLOURS[0], "the first range, at the end"
        assert image.getpixel((LEFT + WIDTH - 2, TOP + HEIGHT * 62 // 136)) == COLOURS[0], "the last, in the middle"
        assert image.getpixel((LEFT + WIDTH // 2, TOP + 20)) == COLOURS[3]
    assert "the name does not end in .png" in cli.error("trace", "show", "one", "--png", "map")


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9000)), max_size=30),
    st.integers(99 * UNIT + 1, 100 * UNIT),
    st.text(max_size=100),
)
def test_every_trace_can_be_drawn_and_stays_in_its_frame(points: list[tuple[int, int]], size: int, name: str) -> None:
    ranges = [[first, 1, at_ms, 0] for first, at_ms in sorted(points, key=lambda point: point[1])]
    answer = {
        "image_id": "1", "name": name, "size": size, "traced_bytes": UNIT * len(ranges), "traced_percent": 1.0,
        "ranges": len(ranges), "seconds": ranges[-1][2] / 1000 if ranges else 0.0, "boots": 2, "by": "guest",
        "trace": {"unit_bytes": UNIT, "ranges": ranges},
    }  # fmt: skip
    picture = picture_of(answer)
    ET.fromstring(svg_text(picture))
    for part in picture.parts:
        if isinstance(part, Box):
            assert part.x >= LEFT - 1
            assert part.x + part.width <= LEFT + WIDTH + 1
            assert part.y + part.height <= picture.height
