"""Types of parameters that several commands have."""

from __future__ import annotations

from typing import Any

import click

from jindiskd.cli.output import parse_size


class Volume(click.ParamType):  # type: ignore[type-arg]  # as below
    """A data volume, `NAME:SIZE[:FORMAT][:MOUNT]`, as the service takes it: name, bytes, format and mount point."""

    name = "volume"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int, str, str]:
        """What is left out is empty. The service says which values there may be."""
        if isinstance(value, tuple):
            return value
        name, _, rest = str(value).partition(":")
        size, _, rest = rest.partition(":")
        form, _, mount = ("", "", rest) if rest.startswith("/") else rest.partition(":")
        try:
            size_bytes = parse_size(size)
        except ValueError:
            size_bytes = 0
        if not name or not size_bytes:
            self.fail(f"{value!r} is no volume: write NAME:SIZE, such as data:20G:/srv/data", param, ctx)
        return name, size_bytes, form, mount


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.2
    """A size such as `20G`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        try:
            return value if isinstance(value, int) else parse_size(value)
        except ValueError:
            self.fail(f"{value!r} is not a size: write 20G, 512M or a number of bytes", param, ctx)


class Hex(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.2
    """Bytes in hexadecimal, of a fixed length."""

    name = "hex"

    def __init__(self, length: int) -> None:
        self.length = length

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """The bytes."""
        try:
            data = value if isinstance(value, bytes) else bytes.fromhex(value)
        except ValueError:
            data = b""
        if len(data) != self.length:
            self.fail(f"{value!r} is not {self.length} bytes in hexadecimal", param, ctx)
        return data


class Number(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.2
    """A number, decimal or with 0x."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number."""
        try:
            return value if isinstance(value, int) else int(value, 0)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
