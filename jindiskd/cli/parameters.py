"""Types of parameters that several commands have."""

from __future__ import annotations

from typing import Any

import click

from jindiskd.cli.output import parse_size


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.2
    """A size such as `20G`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        try:
            return value if isinstance(value, int) else parse_size(value)
        except ValueError:
            self.fail(f"{value!r} is not a size: write 20G, 512M or a number of bytes", param, ctx)
