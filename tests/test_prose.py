"""The house rules of prose that a program can hold: how docstrings begin, and how long the names of tests are."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGINNING = re.compile(r"(Of|What|Whoever|The same|Its)\b")
OF_A_NOUN = re.compile(r"(A|An|All|Each|Every|How|One|Raises|The|These|True|Where|Whether)\b")
NAME_MAX = 60

Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def parsed(folder: str) -> Iterator[tuple[Path, Scope]]:
    """Yield every module, class and function below a folder, nested ones too, with its file."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        where = path.relative_to(ROOT)
        left: list[ast.AST] = [ast.parse(path.read_text())]
        while left:
            node = left.pop()
            left += [each for each in ast.iter_child_nodes(node) if isinstance(each, ast.stmt | ast.ExceptHandler | ast.match_case)]
            if isinstance(node, Scope):
                yield where, node


def docstrings(node: Scope) -> Iterator[tuple[int, str]]:
    """Yield the line and text of each docstring of a module, class or function, those of attributes and constants too."""
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


def test_the_docstring_of_a_function_begins_with_a_verb():
    """Those of commands are their help, and say what there is."""
    found = [
        f"{path}:{node.lineno}: {text.splitlines()[0]}"
        for path, node in parsed("gateway_addon")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not any("click" in ast.unparse(each) or "main." in ast.unparse(each) for each in node.decorator_list)
        if OF_A_NOUN.match(text := ast.get_docstring(node) or "")
    ]
    assert found == []


def test_names_of_tests_have_at_most_60_characters():
    """The name says condition and result; the story is in the docstring."""
    long = [
        f"{path}:{node.lineno}: {node.name} ({len(node.name)})"
        for path, node in parsed("tests")
        if not isinstance(node, ast.Module) and node.name.startswith("test_") and len(node.name) > NAME_MAX
    ]
    assert long == []
