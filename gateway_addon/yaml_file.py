"""YAML that people write, read as nodes that remember their lines, so that an error can name file, line, key and reason.

Promises that nothing is guessed: scalars are taken as the text that was written (YAML's own reading of `on`, `1:30` or `0o7`
never happens, no price ever becomes a float), and a key given twice is an error. Knows nothing of the keys' meaning.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

TAB = "a tab stands where YAML takes blanks alone; indent with blanks (most editors can turn tabs into them)"

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same nodes, ten times as fast where libyaml is there


class FileError(Exception):
    """A file that cannot be used. The message is `file:line: key: sentence`, a line for each problem."""


class Problems:
    """Collect what is wrong with files, so that a person is told of all of it at once."""

    def __init__(self) -> None:
        self._sentences: dict[str, None] = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Go on behind a part that raises FileError."""
        try:
            yield
        except FileError as error:
            self._sentences |= dict.fromkeys(str(error).split("\n"))

    def say(self) -> None:
        """Raise FileError where anything was noted."""
        if self._sentences:
            raise FileError("\n".join(self._sentences))


@dataclass(frozen=True, slots=True)
class Spot:
    """Where one is in a file: the file as shown to people, and the path of keys."""

    file: str
    path: str = ""

    def at(self, step: str) -> "Spot":
        return Spot(self.file, f"{self.path}.{step}" if self.path else step)

    def error(self, node: Node | None, sentence: str) -> FileError:
        line = "" if node is None else f":{node.start_mark.line + 1}"
        return FileError(f"{self.file}{line}: {self.path}: {sentence}" if self.path else f"{self.file}{line}: {sentence}")


def compose(file: str, text: str) -> Node:
    """Parse one YAML document. Raises FileError with the line where it is not YAML, or is empty."""
    try:
        node: Node | None = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        last = max(1, len(text.splitlines()))  # where the file ends too early, libyaml names the line behind it
        line = f":{min(error.problem_mark.line + 1, last)}" if error.problem_mark else ""
        problem = TAB if _at_a_tab(text, error.problem_mark) else f"not readable as YAML: {error.problem or error.context}"
        raise FileError(f"{file}{line}: {problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise FileError(f"{file}: not readable as YAML: {error}") from None
    if node is None:
        raise FileError(f"{file}:1: the file is empty")
    return node


def _at_a_tab(text: str, mark: yaml.Mark | None) -> bool:
    """Tell whether the parser stopped at a tab, or in a line that is indented with one."""
    line = text.splitlines()[mark.line : mark.line + 1] if mark else []
    indent = line[0][: len(line[0]) - len(line[0].lstrip())] if line else ""
    return mark is not None and bool(line) and ("\t" in indent or line[0][mark.column : mark.column + 1] == "\t")


def entries(
    node: Node, spot: Spot, known: Iterable[str] | None = None, problems: Problems | None = None
) -> dict[str, tuple[Node, Node]]:
    """Return a mapping as {name: (key node, value node)}. Raises FileError for anything else.

    A key given twice, or one that is not `known`, is left out and noted in `problems`; without them it raises, too.
    """
    if not isinstance(node, MappingNode):
        raise spot.error(node, "expected keys with values, like `name: value`")
    found: dict[str, tuple[Node, Node]] = {}
    noting = Problems() if problems is None else problems
    for key, value in node.value:
        with noting.noted():
            name = scalar(key, spot)
            if name in found:
                raise spot.at(name).error(key, f"given twice (first on line {found[name][0].start_mark.line + 1}); keep one")
            if known is not None and name not in known:
                raise spot.at(name).error(key, f"unknown key{suggestion(name, known)}")
            found[name] = (key, value)
    if problems is None:
        noting.say()
    return found


def items(node: Node, spot: Spot) -> list[Node]:
    if not isinstance(node, SequenceNode):
        raise spot.error(node, "expected a list, like [a, b]; write [] for none")
    return list(node.value)


def scalar(node: Node, spot: Spot) -> str:
    """Return the text of a scalar as it was written."""
    if not isinstance(node, ScalarNode) or node.tag == "tag:yaml.org,2002:null":
        raise spot.error(node, "expected one value, found " + ("nothing" if isinstance(node, ScalarNode) else "a list or keys"))
    return str(node.value)


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean month?`, or the known names where none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]}?" if near else f"; known: {', '.join(known) or 'none'}"
