"""The house rules of prose that a program can hold: how docstrings begin, and how long the names of tests are."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGINNING = re.compile(r"(Of|What|Whoever|The same|Its)\b")
NAME_MAX = 60


def parsed(folder: str) -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            yield path.relative_to(ROOT), node


def docstrings(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and text of each docstring of a module, class or function, those of attributes and constants too."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        for each in node.body:
            if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant) and isinstance(each.value.value, str):
                yield each.lineno, each.value.value


def test_no_docstring_begins_with_a_genitive_or_pronoun():
    """A first line that begins with Of, What, Whoever, The same or Its needs the line above it to be understood."""
    found = [
        f"{path}:{line}: {text.strip().splitlines()[0]}"
        for path, node in parsed("gateway_addon")
        for line, text in docstrings(node)
        if BEGINNING.match(text.strip())
    ]
    assert found == []


def test_names_of_tests_have_at_most_60_characters():
    """The name says condition and result; the story is in the docstring."""
    long = [
        f"{path}:{node.lineno}: {node.name} ({len(node.name)})"
        for path, node in parsed("tests")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_") and len(node.name) > NAME_MAX
    ]
    assert long == []
