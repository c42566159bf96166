"""`jindisksetup format`, `load`, `export` and `rekey`."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from jindiskd.base.secret import Secret
from jindiskd.cli.app import App, common, pass_app
from jindiskd.cli.output import fields, size
from jindiskd.cli.parameters import Size
from jindiskd.errors import AlreadyExists, InvalidArgument, JindiskError
from jindiskd.jindisk import anchor_file
from jindiskd.jindisk.anchor import Reporting
from jindiskd.jindisksetup import keys, options
from jindiskd.jindisksetup.format2 import remembered
from jindiskd.jindisksetup.formats import Document, NewVolume, Serving, VolumeFormat
from jindiskd.jindisksetup.progress import progress
from jindiskd.jindisksetup.streams import Stream, check_size, pour
from jindiskd.jindisksetup.targets import Target, make_zero, overwriting, same_file

target_options = options.add(
    options.anchor,
    click.option("--size", "size_", type=Size(), help="Logical size, such as 20G."),
    click.option("--label", default="", help="For people; anybody can read it. At most 64 bytes."),
    click.option("--uuid", type=options.Uuid(), help="Identity of the volume; drawn if not given."),
    click.option(
        "--reserve", type=click.IntRange(20, 200), default=50, help="Room for cleaning, in thousandths of the size."
    ),
    options.offset,
    options.overwriting,
)
new_volume = options.add(
    options.key_file,
    click.option("--generate-key", type=options.PATH, help="Draw the key, and keep it in this new file."),
    target_options,
    options.version,
    options.new_kdf,
)


@contextlib.contextmanager
def _key(app: App, form: VolumeFormat, given: dict[str, Any]) -> Iterator[Secret]:
    if given["generate_key"] is None:
        with options.obtain_key(app, form, given) as key:
            yield key
        return
    if given["key_file"] is not None or given["kdf"] is not None:
        raise InvalidArgument("--generate-key", "with --key-file or --kdf", "give one of them")
    path = given["generate_key"]
    with keys.generate_key(path, form.key_bytes) as key:
        try:
            yield key
        except BaseException:
            path.unlink(missing_ok=True)  # nothing was made that it could open
            raise


@contextlib.contextmanager
def making(app: App, path: Path, what: str, given: dict[str, Any]) -> Iterator[tuple[VolumeFormat, Target, NewVolume]]:
    """The target and what shall be made there."""
    form = options.pick(app, given["format_version"])
    options.no_anchor(form, given)
    if given["anchor"] is not None and not given["force"] and given["anchor"].exists():
        raise AlreadyExists("the anchor file", os.fspath(given["anchor"]))
    with (
        overwriting(
            app, path, offset_bytes=given["offset"], force=given["force"], yes=given["yes"], what=what
        ) as target,
        _key(app, form, given) as key,
    ):
        if given["anchor"] is not None:  # before anything is overwritten: the target and a new key are there already
            anchor_file.check_place(given["anchor"], replace=given["force"])
        yield (
            form,
            target,
            NewVolume(
                key=key,
                uuid=given["uuid"] or uuid.uuid4(),
                label=given["label"],
                size_bytes=given["size_"],
                reserve_per_mille=given["reserve"],
                offset_bytes=given["offset"],
            ),
        )


def keep(document: Document, given: dict[str, Any]) -> None:
    """Keep the state of a new volume, if that was asked for."""
    if given["anchor"] is not None:
        anchor_file.write(given["anchor"], remembered(document), replace=given["force"])


def show_made(app: App, document: Document, verb: str, path: Path) -> None:
    """Print what a new volume is."""
    pairs = {
        "format": document["format"],
        "uuid": document.get("uuid", ""),
        "size": f"{size(document['size_bytes'])} ({document['size_bytes']} bytes)",
        "on the device": f"{size(document['device_bytes'])} ({document['device_bytes']} bytes)",
    }
    if "root" in document:
        pairs["state"] = f"{document['sequence']} {document['root']}"
    app.show({"volume": document}, lambda: f"{verb} {path}.\n{fields(pairs)}")


@click.command(name="format")
@click.argument("device", type=options.PATH)
@new_volume
@common
@pass_app
def format_(app: App, /, device: Path, **given: Any) -> None:
    """Make an empty volume on DEVICE, a block device or file. A file that does not exist is made.

    Without --size it becomes as large as the device permits.
    """
    with making(app, device, "formatting", given) as (form, target, new):
        document = form.create(target, new)
        keep(document, given)
    show_made(app, document, "Formatted", device)


@click.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@click.argument("device", type=options.PATH)
@new_volume
@common
@pass_app
def load(app: App, /, source: Path, device: Path, **given: Any) -> None:
    """Make a volume on DEVICE with the content of SOURCE, a raw disk image or block device, or - for standard input.

    Zeros are not stored. Without --size the volume is as large as the source, and at least 16 MiB; with standard input
    the size must be said.
    """
    if source == keys.STDIN:
        _load_stream(app, device, given)
        return
    source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        length = os.lseek(source_fd, 0, os.SEEK_END)
        if same_file(source, device):
            raise InvalidArgument("the target", os.fspath(device), "it is the source itself")
        with making(app, device, "loading", given) as (form, target, new):
            with progress(app, "loading") as tell:
                document = form.load(source_fd, length, target, new, tell)
            keep(document, given)
    finally:
        os.close(source_fd)
    show_made(app, document, f"Loaded {source} into", device)


def _load_stream(app: App, device: Path, given: dict[str, Any]) -> None:
    if given["key_file"] == keys.STDIN:
        raise InvalidArgument("--key-file", "-", "standard input is the content")
    stream = Stream(sys.stdin.buffer, check_size(given["size_"]))
    with making(app, device, "loading", given) as (form, target, new):
        with progress(app, "loading") as tell:
            document = form.fill(stream, target, new, tell)
        keep(document, given)
    if stream.given_bytes < stream.size_bytes:
        app.say(
            f"standard input ended after {stream.given_bytes} bytes; "
            f"the rest of the volume's {stream.size_bytes} bytes is zeros"
        )
    show_made(app, document, "Loaded standard input into", device)


@click.command()
@click.argument("device", type=options.PATH)
@click.argument("target", type=click.Path(allow_dash=True, path_type=Path))
@options.access
@options.overwriting
@click.option("--target-offset", type=options.Offset(), default=0, help="Where the content goes in the target.")
@common
@pass_app
def export(app: App, /, device: Path, target: Path, **given: Any) -> None:
    """Write the content of the volume on DEVICE to TARGET, a raw image or block device, or - for standard output.

    Holes stay holes, except on standard output. If it fails, a new TARGET is removed again; what went to standard
    output is right but not all: look at the exit status.
    """
    if target == keys.STDIN:
        _export_stream(app, device, given)
        return
    offset = given["target_offset"]
    if same_file(device, target):
        raise InvalidArgument("the target", os.fspath(target), "it is the source itself")
    with options.accessing(app, device, given) as (form, access):
        length = form.size_bytes(access)  # before anything is overwritten: the key and the state are right
        with overwriting(
            app, target, offset_bytes=offset, force=given["force"], yes=given["yes"], what="exporting"
        ) as opened:
            if opened.is_block and opened.size_bytes < offset + length:
                raise InvalidArgument("the target", os.fspath(target), f"it must have {offset + length} bytes")
            if stat.S_ISREG(os.fstat(opened.fd).st_mode) and offset and offset + length < opened.size_bytes:
                raise InvalidArgument("the target", os.fspath(target), "something lies behind where the content goes")
            make_zero(opened, offset, length)
            with progress(app, "exporting") as tell:
                written = form.export(access, opened.fd, offset, tell)
    document = {"target": os.fspath(target), "size_bytes": length, "data_bytes": written}
    app.show({"export": document}, lambda: f"Exported {size(length)}, {size(written)} of data, to {target}.")


def _export_stream(app: App, device: Path, given: dict[str, Any]) -> None:
    if sys.stdout.isatty():
        raise InvalidArgument("standard output", "-", "it is a terminal")
    with options.accessing(app, device, given) as (form, access):
        reading = Serving(read_only=True, reporting=Reporting.CLOSE, interval_s=60.0)
        with form.open_served(access, reading) as volume, progress(app, "exporting") as tell:
            try:
                written = pour(volume, sys.stdout.buffer, tell)
            except OSError as exc:
                if isinstance(exc.__cause__, JindiskError):
                    raise exc.__cause__ from None
                exc.filename = exc.filename or "standard output"
                raise
    app.say(f"Exported {size(volume.size_bytes)}, {size(written)} of data.")


@click.command()
@click.argument("device", type=options.PATH)
@options.access
@click.option("--new-key-file", type=options.PATH, help="The new key, as raw bytes; - is standard input.")
@click.option("--generate-key", type=options.PATH, help="Draw the new key, and keep it in this new file.")
@common
@pass_app
def rekey(app: App, /, device: Path, new_key_file: Path | None, generate_key: Path | None, **given: Any) -> None:
    """Put the volume on DEVICE under a new key. The data are not encrypted anew.

    That protects against a leaked old key only those disks of which nobody has a copy. Keep the old key until this
    command has succeeded: if it is interrupted, the volume opens with one of the two. For more, export and load.
    """
    if (new_key_file is None) == (generate_key is None):
        raise click.UsageError("give either --new-key-file or --generate-key")
    with options.accessing(app, device, given) as (form, access):
        form.size_bytes(access)  # the old key and the state are right
        if generate_key is not None:
            # The file stays, whatever happens: from the first write on it may be the only key.
            new_key = keys.generate_key(generate_key, form.key_bytes)
        else:
            new_key = keys.read_key(app, new_key_file, form.key_bytes, what="new key")
        with new_key:
            document = form.rekey(access, new_key)
    app.show({"volume": document}, lambda: f"The volume on {device} is under its new key.")
