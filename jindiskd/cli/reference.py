"""Reference documents made from what they describe: the bus from its contract, the errors from their tree.

`python -m jindiskd.cli.reference DIRECTORY` writes dbus.md, errors.md and json.md. A test compares the committed ones.
"""

from __future__ import annotations

import importlib
import importlib.resources
import inspect
import pkgutil
import re
import sys
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import jindiskd
from jindiskd.bus.contract import ACTION, ACTION_UNLESS_OWNER, EMITS, ERROR_PREFIX, OPTIONS
from jindiskd.cli import schemas
from jindiskd.cli.exits import MEANINGS
from jindiskd.errors import JindiskError

MEMBERS = ("method", "signal", "property")
NOT_FOR_IMPORT = re.compile(r"\.__main__$")


class Undocumented(Exception):
    """A member of the contract has no comment before it."""


def dbus() -> str:
    """The reference of the bus, Markdown.

    Raises:
        Undocumented: names the member.
    """
    lines = [
        "# The D-Bus service org.jindisk1",
        "",
        "Made from `dbus/*.xml`, which is the contract: the service does not start where its classes differ from it.",
        "",
    ]
    folder = importlib.resources.files("jindiskd.interfaces")
    for file in sorted((f for f in folder.iterdir() if f.name.endswith(".xml")), key=lambda f: (
        "Manager" not in f.name, f.name
    )):  # fmt: skip
        parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))  # noqa: S314 (as below)
        text = file.read_text(encoding="utf-8")
        lines += _preface(text)
        root = ET.fromstring(text, parser)  # noqa: S314 (the program's own file)
        for interface, about in _commented(root, ("interface",)):
            lines += [f"## {interface.get('name')}", "", *_prose(about), ""]
            for member, comment in _commented(interface, MEMBERS):
                if not comment.strip():
                    raise Undocumented(f"{interface.get('name')}.{member.get('name')}")
                lines += _member(member, comment)
    return "\n".join(lines).rstrip() + "\n"


def _preface(text: str) -> list[str]:
    """The comment before the root element: the conventions."""
    found = re.search(r"<!--(.*?)-->\s*<node>", text, re.DOTALL)
    if found is None:
        return []
    return [*textwrap.dedent(found.group(1).strip("\n")).strip().splitlines(), ""]


def _commented(parent: ET.Element, tags: tuple[str, ...]) -> Iterator[tuple[ET.Element, str]]:
    """The children of these kinds, each with the comment before it."""
    comment = ""
    for child in parent:
        tag: object = child.tag  # of a comment it is the function that makes them
        if tag is ET.Comment:
            comment = textwrap.dedent((child.text or "").strip("\n"))
        elif tag in tags:
            yield child, comment
            comment = ""
        else:
            comment = ""


def _member(member: ET.Element, comment: str) -> list[str]:
    name, kind = member.get("name", ""), member.tag
    arguments = [(arg.get("name", ""), arg.get("type", ""), arg.get("direction", "out")) for arg in member.iter("arg")]
    if kind == "property":
        signature = f"{name}: {member.get('type')} ({member.get('access')})"
    else:
        given = ", ".join(f"{arg} {kind_}" for arg, kind_, way in arguments if way == "in" or kind == "signal")
        back = ", ".join(f"{arg} {kind_}" for arg, kind_, way in arguments if way == "out" and kind != "signal")
        signature = f"{name}({given})" + (f" → ({back})" if back else "")
    lines = [f"### {kind} {name}", "", f"    {signature}", "", *_prose(comment), ""]
    notes = {item.get("name", ""): item.get("value", "") for item in member.iter("annotation")}
    for annotation, words in (
        (ACTION, "Needs the polkit action"),
        (ACTION_UNLESS_OWNER, "Needs, of others than the one who started it, the polkit action"),
        (OPTIONS, "Options:"),
        (EMITS, "Changes are signalled:"),
    ):
        if annotation in notes:
            lines += [f"{words} `{notes[annotation]}`.", ""]
    return lines


def _prose(comment: str) -> list[str]:
    """A comment as Markdown: its paragraph, then a line each for what begins with an @."""
    lines: list[str] = []
    for raw in comment.strip().splitlines():
        line = raw.strip()
        for part in re.split(r"(?<=[.;]) (?=@[a-z]+:)", line):
            if part.startswith("@"):
                name, _, text = part[1:].partition(":")
                lines.append(f"* `{name}`:{text}")
            elif raw.startswith("  ") and lines:
                option = re.match(r"([a-z][a-z-]*): (.*)", part)
                lines.append(f"    * `{option.group(1)}`: {option.group(2)}" if option else f"      {part}")
            else:
                lines.append(part)
    first = next((at for at, line in enumerate(lines) if line.startswith("* ")), None)
    if first:
        lines.insert(first, "")
    return lines


def errors() -> str:
    """The reference of the errors, Markdown: every condition with its name on the bus and its exit status."""
    for module in pkgutil.walk_packages(jindiskd.__path__, "jindiskd."):
        if not NOT_FOR_IMPORT.search(module.name):
            importlib.import_module(module.name)
    lines = [
        "# Errors",
        "",
        f"Every condition that is raised on purpose. On the bus its name is `{ERROR_PREFIX}` and the word in the first",
        "column; on the command line `--log-json` shows the word.",
        "",
        "| error | exit status | meaning |",
        "|---|---|---|",
    ]
    ours = {code: kind for code, kind in JindiskError.by_code.items() if kind.__module__.startswith("jindiskd.")}
    for code, kind in sorted(ours.items()):
        about = " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split()).replace("|", "\\|")
        lines.append(f"| {code} | {kind.exit_code} | {about} |")
    lines += ["", "## Exit statuses", "", "| status | meaning |", "|---|---|"]
    lines += [f"| {status} | {meaning} |" for status, meaning in MEANINGS.items()]
    return "\n".join(lines) + "\n"


DOCUMENTS = {"dbus.md": dbus, "errors.md": errors, "json.md": schemas.document}


def main() -> int:
    """Write all documents into the directory named on the command line."""
    if len(sys.argv) != 2:
        print("usage: python -m jindiskd.cli.reference DIRECTORY", file=sys.stderr)
        return 2
    for name, make in DOCUMENTS.items():
        (Path(sys.argv[1]) / name).write_text(make(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
