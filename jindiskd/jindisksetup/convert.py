"""`jindisksetup convert`: from version 1 to version 2."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import click

from jindiskd.cli.app import App, common, pass_app
from jindiskd.cli.parameters import Size
from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.anchor import Reporting
from jindiskd.jindisksetup import make, options
from jindiskd.jindisksetup.formats import Access, Serving
from jindiskd.jindisksetup.progress import progress
from jindiskd.jindisksetup.targets import same_file


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("device", type=options.PATH)
@options.key_file
@options.kdf
@click.option("--source-offset", type=options.Offset(), default=0, help="Where the old volume begins.")
@click.option("--source-size", type=Size(), help="Logical size of the old volume, if not a multiple of 4 MiB.")
@click.option("--new-key-file", type=options.PATH, help="The new volume's key, as raw bytes.")
@click.option("--generate-key", type=options.PATH, help="Draw the new volume's key, and keep it in this new file.")
@make.target_options
@common
@pass_app
def convert(app: App, /, source: Path, device: Path, **given: Any) -> None:
    """Make a volume of version 2 on DEVICE with the content of the version 1 volume on SOURCE.

    The content gets on no disk in clear. The key must be a new one: what is known of the old one's volume is known.
    SOURCE is not changed; destroy it afterwards, for whoever has it can read it.
    """
    if (given["new_key_file"] is None) == (given["generate_key"] is None):
        raise click.UsageError("give either --new-key-file or --generate-key")
    if same_file(source, device):
        raise InvalidArgument("the target", os.fspath(device), "it is the source itself")
    old = options.pick(app, "1")
    with contextlib.ExitStack() as stack:
        old_key = stack.enter_context(
            options.obtain_key(app, old, {**given, "offset": given["source_offset"]}, volume=source)
        )
        given.update(format_version="2", key_file=given["new_key_file"], kdf=None)
        access = Access(
            device=source,
            offset_bytes=given["source_offset"],
            key=old_key,
            uuid=None,
            anchor_file=None,
            size_bytes=given["source_size"],
        )
        reading = Serving(read_only=True, reporting=Reporting.CLOSE, interval_s=60.0)
        volume = stack.enter_context(old.open_served(access, reading))
        form, target, new = stack.enter_context(make.making(app, device, "converting", given))
        with progress(app, "converting") as tell:
            document = form.fill(volume, target, new, tell)
        make.keep(document, given)
    make.show_made(app, document, f"Converted {source} into", device)
