"""`jindisksetup dump`, `check` and `measure`: they never write."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from jindiskd.cli.app import App, common, pass_app
from jindiskd.cli.output import fields, size
from jindiskd.errors import EXIT_INTEGRITY, InvalidArgument, JindiskError
from jindiskd.jindisk import anchor_file
from jindiskd.jindisksetup import options
from jindiskd.jindisksetup.format2 import remembered
from jindiskd.jindisksetup.formats import Document
from jindiskd.jindisksetup.progress import progress


class FaultsFound(JindiskError, code="VolumeFaultsFound", exit_code=EXIT_INTEGRITY):
    """The checker found faults."""

    def __init__(self, count: int, device: Path) -> None:
        """`count` faults on `device`."""
        super().__init__(
            f"{count} fault{'s' if count != 1 else ''} on {device}: export what can be read, and restore the rest"
        )


@click.command()
@click.argument("device", type=options.PATH)
@options.access
@click.option("--header-only", is_flag=True, help="Show what everybody can see, without a key.")
@common
@pass_app
def dump(app: App, /, device: Path, header_only: bool, **given: Any) -> None:
    """Show what the volume on DEVICE says of itself; no keys."""
    if header_only:
        document = options.pick(app, given["format_version"]).describe(device, given["offset"])
    else:
        with options.accessing(app, device, given) as (form, access):
            document = form.dump(access)
    app.show(
        {"volume": document}, lambda: fields({n: t for n, v in document.items() if (t := _text(n, v)) is not None})
    )


def _text(name: str, value: Any) -> str | None:
    """A value for people."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int() if name.endswith("_bytes"):
            return f"{size(value)} ({value} bytes)"
        case int() if name.endswith("_at"):
            return datetime.fromtimestamp(value, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        case list():
            return "; ".join(map(str, value))
        case dict():
            return ", ".join(f"{key} {item:#x}" for key, item in value.items() if item) or "none"
        case None:
            return None
        case _:
            return str(value)


@click.command()
@click.argument("device", type=options.PATH)
@options.access
@click.option("--data", is_flag=True, help="Also read every block of data.")
@common
@pass_app
def check(app: App, /, device: Path, data: bool, **given: Any) -> None:
    """Check the volume on DEVICE: every page of its trees, and that they agree. It is not changed."""
    with options.accessing(app, device, given) as (form, access), progress(app, "checking") as tell:
        document = form.check(access, data=data, progress=tell)
    faults = document["faults"]
    app.show({"check": document}, lambda: _checked(document))
    if faults:
        raise FaultsFound(len(faults), device)


def _checked(document: Document) -> str:
    lines = [*document["faults"]]
    pairs = {name: text for name, value in document.items() if name != "faults" and (text := _text(name, value))}
    return "\n".join([*lines, fields({**pairs, "faults": str(len(lines)) if lines else "none"})])


def _state(document: Document) -> str:
    if "root" in document:
        return f"{document['sequence']} {document['root']}"
    return str(document["measurement"])


@click.command()
@click.argument("device", type=options.PATH)
@options.access
@click.option("--save", type=options.PATH, help="Keep the state in this new anchor file from now on.")
@common
@pass_app
def measure(app: App, /, device: Path, save: Path | None, **given: Any) -> None:
    """Print the state of the volume on DEVICE: its number and root name the whole content.

    With --save this becomes the state that is accepted from now on: look first whether it is the right one.
    """
    with options.accessing(app, device, given) as (form, access):
        document = form.measure(access)
        if save is not None and not form.anchored:
            raise InvalidArgument("--save", str(save), "a volume of version 1 has no state to be kept")
        if save is not None:
            anchor_file.write(save, remembered(document), replace=False)
    app.show({"state": document}, lambda: _state(document))
