"""What commands print with --json, against their schemas."""

import ast
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema

from jindiskd.cli import schemas


def command_of(words: Sequence[str]) -> str:
    """The command that a command line calls; options stand after it."""
    plain = [word for word in words if not word.startswith("-")]
    for count in (3, 2, 1):
        name = " ".join(plain[:count])
        if name in schemas.SHAPES:
            return name
    raise KeyError(f"{words}: what it prints is in no schema")


def check(words: Sequence[str], printed: Any) -> None:
    """Raise unless `printed` is what the command says that it prints."""
    try:
        command = command_of(words)
    except KeyError:
        if words[0] in schemas.NO_OBJECT:
            return
        raise
    jsonschema.validate(printed, schemas.schema(command))


def called_with_json(folder: Path) -> set[str]:
    """The commands that the tests below a folder call with --json, as their sources say it.

    A call is `ANYTHING.json("noun", "verb", …)`, which holds what is printed against the schema, any list or call with
    "--json" among its words, or the list of words that `jsonout.check` gets.
    """
    found = set()
    for path in folder.rglob("test_*.py"):
        for words in _calls(ast.parse(path.read_text())):
            # Tests of the broker name its process, whose commands all begin with that word.
            for line in (words, ["broker", *words]) if path.parent.name == "broker" else (words,):
                with contextlib.suppress(KeyError):  # another program's
                    found.add(command_of(line))
    return found


def _calls(tree: ast.Module) -> Iterator[list[str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call | ast.List | ast.Tuple):
            continue
        parts = node.args if isinstance(node, ast.Call) else node.elts
        words = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
        if name == "json" or "--json" in words:
            yield words
        elif name == "check" and parts and isinstance(parts[0], ast.List):
            yield [part.value for part in parts[0].elts if isinstance(part, ast.Constant)]
