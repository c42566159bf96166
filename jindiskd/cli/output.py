"""Text for people: tables, sizes, times, and the word "simulated" wherever it belongs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from rich.cells import cell_len

NONE = "-"
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
RIGHT = "right"


def clean(text: str) -> str:
    """Text of others on one line, without anything that could steer a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def clean_lines(text: str) -> str:
    """Text of others whose lines may stay, each of them clean."""
    return "\n".join(clean(line) for line in text.split("\n"))


class Styled(str):
    """Text that is clean, but for colours of ours."""


def styled(text: str, colour: str) -> Styled:
    """Text in a colour, where a person looks at it on a terminal and has not set NO_COLOR (no-color.org)."""
    plain = not colour or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return Styled(clean(text) if plain else click.style(clean(text), fg=colour))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, legend: bool, right: Sequence[int] = ()) -> str:
    """Plain columns, two blanks apart, as wide as their widest cell; `right` are the columns aligned there."""
    cells = [[clean(cell) or NONE for cell in row] for row in rows]
    if legend:
        cells.insert(0, list(head))
    widths = [max((cell_len(row[at]) for row in cells), default=0) for at in range(len(head))]
    lines = []
    for row in cells:
        parts = []
        for at, cell in enumerate(row):
            blanks = " " * (widths[at] - cell_len(cell))
            parts.append(blanks + cell if at in right else cell + blanks)
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


Columns = Mapping[str, Callable[[Any], str]]
"""The heads of a table, and what stands below each for one thing."""


def listing(columns: Columns, things: Iterable[Any], *, legend: bool, right: Collection[str] = ()) -> str:
    """A table with a row for each thing; `right` are the heads of the columns aligned there."""
    rows = [[cell(thing) for cell in columns.values()] for thing in things]
    return table(list(columns), rows, legend=legend, right=[at for at, head in enumerate(columns) if head in right])


def fields(pairs: Mapping[str, str]) -> str:
    """Names and values, a line each, the values in one column."""
    width = max(cell_len(name) for name in pairs)
    return "\n".join(f"{name:>{width}}: {_cleaned(value) or NONE}" for name, value in pairs.items())


def _cleaned(value: str) -> str:
    """A value that `styled` made as it is, any other without what could steer a terminal."""
    return value if isinstance(value, Styled) else clean(value)


def size(count: int) -> str:
    """Bytes in the largest binary unit that shows them in few digits: `1.5 GiB`, exact if it can be."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.{0 if value == int(value) else 1}f} {UNITS[unit]}"


def moment(microseconds: int) -> str:
    """A moment of the bus, in the local time zone, to the second."""
    if not microseconds:
        return NONE
    return datetime.fromtimestamp(microseconds / 1e6, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def platform(properties: Mapping[str, Any]) -> str:
    """The platform of an image or domain; a simulated one says so even if its name ever should not."""
    name = str(properties["Platform"])
    return name if not properties["Simulated"] or "simulated" in name else f"{name} (simulated)"


def parse_size(text: str) -> int:
    """`20G`, `512M`, `1.5GiB`, `1000000`: bytes; units are binary.

    Raises:
        ValueError: it is something else.
    """
    word = text.strip().removesuffix("iB").removesuffix("B").strip()
    factor = 1
    if word and word[-1].upper() in "KMGTPE":
        factor = 1024 ** ("KMGTPE".index(word[-1].upper()) + 1)
        word = word[:-1].strip()
    value = float(word) * factor
    if not 0 < value < 1 << 63 or value != int(value):
        raise ValueError(text)
    return int(value)
