"""Options that several commands share, and what they add up to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import click

from jindiskd.base.secret import Secret
from jindiskd.cli.app import App
from jindiskd.cli.parameters import Size
from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.device import OpenFile
from jindiskd.jindisk.v1.keys import Kdf, derive
from jindiskd.jindisk.v1.volume import root_from_password
from jindiskd.jindisksetup import formats
from jindiskd.jindisksetup.formats import Access, VolumeFormat
from jindiskd.jindisksetup.keys import read_key, read_password

Command = Callable[..., Any]
UNANCHORED_WARNING = (
    "warning: nothing says whether this is the newest state of the volume: an older copy would be accepted. "
    "Keep its state with --anchor FILE, or say --unanchored"
)


class Offset(Size):
    """A size that may be zero."""

    name = "offset"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, a multiple of 4096."""
        found = 0 if value in {0, "0"} else super().convert(value, param, ctx)
        if found % 4096:
            self.fail(f"{value!r} is no multiple of 4096", param, ctx)
        return found


class Uuid(click.ParamType):  # type: ignore[type-arg]  # as above
    """A UUID."""

    name = "uuid"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> UUID:
        """As an object."""
        try:
            return value if isinstance(value, UUID) else UUID(value)
        except ValueError:
            self.fail(f"{value!r} is not a UUID", param, ctx)


PATH = click.Path(path_type=Path)


def add(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several decorators as one; the first is the first in the help."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


key_file = click.option(
    "--key-file", type=PATH, help="The key, as raw bytes; - is standard input. Without it you are asked."
)
offset = click.option("--offset", type=Offset(), default=0, help="Where the volume begins on the device.")
version = click.option(
    "--format-version",
    type=click.Choice([str(number) for number in formats.VERSIONS]),
    default=str(formats.DEFAULT),
    help="Version of the format; it is never guessed.",
)
anchor = click.option(
    "--anchor", type=PATH, help="The file that keeps the volume's newest state; keep it away from the disk."
)
AUTO = "auto"


def _kdf(choices: list[str], more: str) -> Callable[[Command], Command]:
    return click.option(
        "--kdf",
        type=click.Choice(choices),
        help=f"Version 1: the key is a password, used as the reference's tool in C or in Rust does{more}.",
    )


new_kdf = _kdf([item.value for item in Kdf], "")
kdf = _kdf([*(item.value for item in Kdf), AUTO], ", or as either of the two does (auto)")
access = add(
    key_file,
    anchor,
    click.option("--unanchored", is_flag=True, help="Take whatever state the disk has, even an old one."),
    click.option("--uuid", type=Uuid(), help="Accept no other volume than this."),
    offset,
    version,
    kdf,
    click.option(
        "--size", "size_", type=Size(), help="Logical size of a version 1 volume, if it is not a multiple of 4 MiB."
    ),
)
overwriting = add(
    click.option("--force", is_flag=True, help="Overwrite what is known to be a file system, volume or the like."),
    click.option("--yes", is_flag=True, help="Do not ask before overwriting a target that is not empty."),
)


def pick(app: App, format_version: str) -> VolumeFormat:
    """The format asked for; it says at once what it does not protect."""
    found = formats.get(int(format_version))
    if found.warning:
        app.say(f"warning: {found.warning}")
    return found


def obtain_key(app: App, form: VolumeFormat, given: dict[str, Any], *, volume: Path | None = None) -> Secret:
    """The key that `key_file` and `kdf` name; `volume`, at `offset`, is what a password is tried on."""
    if given["kdf"] is None:
        return read_key(app, given["key_file"], form.key_bytes)
    if form.anchored:
        raise InvalidArgument("--kdf", given["kdf"], "only volumes of version 1 have passwords; give the key itself")
    with read_password(given["key_file"]) as password:
        return from_password(password, given["kdf"], volume, given["offset"])


def from_password(password: Secret, kdf: str, volume: Path | None, offset_bytes: int) -> Secret:
    """The key of a version 1 volume; with `auto` the one that opens it.

    Raises:
        VolumeUnauthentic: none does.
    """
    if kdf != AUTO:
        return derive(password, Kdf(kdf))
    assert volume is not None, "only an existing volume's tool can be found out"
    with OpenFile(volume, writable=False, offset_bytes=offset_bytes) as device:
        return root_from_password(device, password)[1]


def no_anchor(form: VolumeFormat, given: dict[str, Any]) -> None:
    """Refuse an anchor file for a format whose state cannot be remembered. Raises `InvalidArgument`."""
    if given["anchor"] is not None and not form.anchored:
        raise InvalidArgument("--anchor", os.fspath(given["anchor"]), "a volume of version 1 has no state to be kept")


@contextlib.contextmanager
def accessing(
    app: App, device: Path, given: dict[str, Any], *, password: Secret | None = None
) -> Iterator[tuple[VolumeFormat, Access]]:
    """The format and volume that the options of `access` name; the key is wiped at the end.

    `password` is for version 1, and comes instead of a key file; it stays the caller's.

    Raises:
        InvalidArgument: they contradict each other, or the key is unusable.
    """
    form = pick(app, given["format_version"])
    no_anchor(form, given)
    if given["anchor"] is not None and given["unanchored"]:
        raise InvalidArgument("--unanchored", "with --anchor", "give one of the two")
    if given["anchor"] is None and not given["unanchored"] and form.anchored:
        app.say(UNANCHORED_WARNING)
    if password is not None and (given["key_file"] is not None or form.anchored):
        raise InvalidArgument("a password", "with --key-file", "give one of the two")
    with (
        obtain_key(app, form, given, volume=device)
        if password is None
        else from_password(password, given["kdf"] or AUTO, device, given["offset"])
    ) as key:
        yield (
            form,
            Access(
                device=device,
                offset_bytes=given["offset"],
                key=key,
                uuid=given["uuid"],
                anchor_file=given["anchor"],
                size_bytes=given["size_"],
            ),
        )
