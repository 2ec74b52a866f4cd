"""Every sentence of docs/SEMANTICS.md with an anchor has a test that quotes it; no test quotes anything else."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parents[1] / "docs" / "SEMANTICS.md"
_IN_DOCUMENT = re.compile(r"^- \[(S\d+)\] (.+?)$", re.MULTILINE)
_IN_DOCSTRING = re.compile(r"\[(S\d+)\]\s+(.+?)(?=\[S\d+\]|\Z)", re.DOTALL)


def sentences() -> list[tuple[str, str]]:
    return _IN_DOCUMENT.findall(DOCUMENT.read_text(encoding="utf-8"))


def quotes() -> Iterator[tuple[str, str, str]]:
    """(test, anchor, sentence) of each quote in a test's docstring."""
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for anchor, text in _IN_DOCSTRING.findall(ast.get_docstring(node) or ""):
                    yield f"{path.name}:{node.name}", anchor, " ".join(text.split())


def test_anchors_are_unique_and_ascend() -> None:
    numbers = [int(anchor[1:]) for anchor, _ in sentences()]
    assert numbers == sorted(set(numbers))


def test_every_sentence_is_quoted_by_a_test() -> None:
    quoted = {anchor for _, anchor, _ in quotes()}
    assert [anchor for anchor, _ in sentences() if anchor not in quoted] == []


def test_every_quote_is_in_the_document_word_for_word() -> None:
    document = dict(sentences())
    wrong = [(test, anchor, text) for test, anchor, text in quotes() if document.get(anchor) != text]
    assert wrong == []


def test_every_test_of_semantics_quotes_a_sentence() -> None:
    quoting = {test for test, _, _ in quotes()}
    silent = []
    for path in sorted(HERE.glob("test_*.py")):
        if path != Path(__file__).resolve():
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                    test = f"{path.name}:{node.name}"
                    silent += [] if test in quoting else [test]
    assert silent == []
