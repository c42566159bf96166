"""The page of figures: sections that are measured one at a time, and tables whose rows are.

The page itself keeps the figures. What is measured again takes the place of what stood there; all else stays.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MEASURED, MISSING = "Measured on ", "Not measured yet"
NOT_RUN = "not run"


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the page says under one heading, figures apart."""

    name: str
    """For the command line."""
    title: str
    text: str
    """What is measured and how."""
    columns: Sequence[str] = ()
    """Of a table: what follows the name of a row; the last column says when the row was measured."""
    rows: Sequence[str] = field(default_factory=tuple)
    """Of a table: the names of all rows."""


def machine() -> str:
    """What kind of machine this is."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / (1 << 20)
    system = platform.freedesktop_os_release()["PRETTY_NAME"]
    return (
        f"{os.cpu_count()} processors ({model}), {memory:.0f} GiB, {system}, Linux {platform.release().split('-')[0]}"
    )


class Page:
    """A page as it is on the disk, to be altered and written."""

    def __init__(self, path: Path, head: str, sections: Sequence[Section]) -> None:
        """Read it; sections that are not in it are not measured yet."""
        self._path, self._head, self._sections = path, head, sections
        self._figures: dict[str, str] = {}
        text = path.read_text() if path.exists() else ""
        for part in text.split("\n## ")[1:]:
            title, _, body = part.partition("\n")
            lines = body.split("\n")
            starts = [number for number, line in enumerate(lines) if line.startswith(MEASURED)]
            if starts:
                self._figures[title] = "\n".join(lines[starts[0] :]).strip("\n")

    def put(self, section: Section, *, date: str, source: str, load: float, lines: Sequence[str]) -> None:
        """Replace the figures of a section that is no table."""
        how = f"{MEASURED}{date}, of {source}: {machine()}; load average before it {load:.0f}."
        self._figures[section.title] = "\n".join([how, "", *lines])

    def rows(self, section: Section) -> dict[str, list[str]]:
        """The rows of a table that are measured, by name."""
        lines = [line for line in self._figures.get(section.title, "").split("\n") if line.startswith("|")][2:]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return {row[0]: row[1:] for row in cells if row[0] in section.rows and row[1] != NOT_RUN}

    def put_rows(self, section: Section, measured: Mapping[str, Sequence[str]]) -> None:
        """Replace rows of a table; those of another machine keep its name."""
        old, here = self.rows(section), f"{MEASURED}{machine()}."
        before = self._figures.get(section.title, here).partition("\n")[0]
        if before != here:
            where = before.removeprefix(MEASURED).rstrip(".")
            old = {name: [*row[:-1], f"{row[-1]} ({where})"] for name, row in old.items()}
        rows = {**old, **measured}
        lines = [here, "", f"| | {' | '.join(section.columns)} |", "|---" * (len(section.columns) + 1) + "|"]
        for name in section.rows:
            cells = rows.get(name, [NOT_RUN] + [""] * (len(section.columns) - 1))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        self._figures[section.title] = "\n".join(lines)

    def write(self) -> None:
        """Put it on the disk."""
        parts = [self._head.strip("\n")]
        for one in self._sections:
            missing = f"{MISSING}: `scripts/reliability --only {one.name}`."
            parts.append(f"## {one.title}\n\n{one.text.strip()}\n\n{self._figures.get(one.title, missing)}")
        self._path.write_text("\n\n".join(parts) + "\n")
