"""Every test that README's promises name is there, and every promise names one."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def promises() -> list[str]:
    """The rows of the table in the section Promises."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Promises\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def functions_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_promise_names_a_test() -> None:
    assert promises()
    assert [row for row in promises() if not _NAMED.search(row)] == []


def test_every_named_test_exists() -> None:
    named = [pair for row in promises() for pair in _NAMED.findall(row)]
    missing = [
        f"{path}::{name}" for path, name in named if not (ROOT / path).exists() or name not in functions_in(ROOT / path)
    ]
    assert missing == []
