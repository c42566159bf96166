"""Reading TOML that somebody else wrote, in a time that follows from its length."""

from __future__ import annotations

import tomllib
from typing import Any

MAX_DOTS_A_LINE = 200
"""Of the parts of a key, which stand on one line with dots between them. The parser's time grows with their square, and
for a table's name with their number times that of its keys: a name of 63,000 parts, which fits in 128 KiB, would keep a
processor busy for a minute."""


def loads(text: str) -> dict[str, Any]:
    """The document's tables.

    Raises:
        ValueError: it is no TOML, has a line with more dots than any document needs, or nests too deeply; the text says
            which, and may quote the document.
    """
    if any(line.count(".") > MAX_DOTS_A_LINE for line in text.split("\n")):
        raise ValueError(f"a line has more than {MAX_DOTS_A_LINE} dots")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
