"""`jindiskctl image clone`, `export` and `import`: further images of the same system, here and elsewhere."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from jindiskd.base.files import fsync_directory, rename_new
from jindiskd.bus.contract import ROOT_PATH
from jindiskd.bus.lib import Variant
from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import connected
from jindiskd.cli.completion import images
from jindiskd.cli.image import IMAGE, IMAGES, described, key_state, opened
from jindiskd.cli.jobs import result, start_and_follow
from jindiskd.cli.objects import MANAGER
from jindiskd.cli.output import size
from jindiskd.errors import AlreadyExists


@click.command()
@click.argument("name", shell_complete=images)
@click.argument("new_name", metavar="NEW")
@click.option("--no-wait", is_flag=True, help="Print the job and leave it to itself.")
@common
@pass_app
def clone(app: App, name: str, new_name: str, no_wait: bool) -> None:
    """Make a second image NEW of the same system as NAME.

    Its disk is encrypted anew under a key of its own, and it measures otherwise; its key is released by the rules of
    NAME. What the system knows of itself, such as its host name, machine id and SSH host keys, is the same.
    """
    run(_clone(app, name, new_name, not no_wait))


async def _clone(app: App, name: str, new_name: str, wait: bool) -> None:
    async with connected() as client:
        path, found = await IMAGES.find(client, name)
        job = await start_and_follow(client, app, lambda: client.call(path, IMAGE, "Clone", new_name, {}), wait=wait)
        if job is None:
            return
        _, properties = await IMAGES.find(client, new_name)
    app.show({"image": properties}, lambda: f"Cloned image {found['Name']} into {described(properties)}.")


@click.command()
@click.argument("name", shell_complete=images)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@common
@pass_app
def export(app: App, name: str, file: Path, force: bool) -> None:
    """Write an image, whole but without its key, to FILE (- for standard output), for image import elsewhere.

    Its guests get their key from the broker that the image pins; see key export for handing keys to one.
    """
    run(_export(app, name, file, force))


async def _export(app: App, name: str, file: Path, force: bool) -> None:
    async with connected() as client:
        path, found = await IMAGES.find(client, name)
        with _written(file, force) as fd:
            job = await start_and_follow(
                client, app, lambda: client.call(path, IMAGE, "Export", 0, {}, fds=[fd]), wait=True
            )
            assert job is not None  # waited for
            digest, size_bytes = await result(client, job), os.fstat(fd).st_size
    if str(file) == "-":
        app.say(f"SHA-256 of the stream: {digest}")
        return
    document = {"image_id": found["ImageId"], "file": str(file), "size_bytes": size_bytes, "sha256": digest}
    app.show(document, lambda: f"Image {found['Name']} without its key is in {file} ({size(size_bytes)}).")


@contextlib.contextmanager
def _written(file: Path, force: bool) -> Iterator[int]:
    """A descriptor for a file that is there once the block has ended well, and not at all otherwise."""
    if str(file) == "-":
        yield sys.stdout.fileno()
        return
    if file.exists() and not force:
        raise AlreadyExists("file", str(file))
    staged = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        if force:
            staged.replace(file)
        else:
            rename_new(staged, file)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    fsync_directory(file.parent)


@click.command(name="import")
@click.argument("file", type=click.Path(exists=True, path_type=Path, dir_okay=False, allow_dash=True))
@click.option("--as", "name", help="Its name here; that in the stream otherwise.")
@click.option("--firmware", type=click.Path(path_type=Path), help="The image's firmware on the service's machine.")
@click.option("--no-wait", is_flag=True, help="Print the job and leave it to itself.")
@common
@pass_app
def import_(app: App, file: Path, name: str | None, firmware: Path | None, no_wait: bool) -> None:
    """Take an image from FILE (- for standard input), which image export wrote.

    All of it is checked. Its key is not in it: guests get that from the broker that the image pins, so that the service
    here must pass them on to that broker.
    """
    run(_import(app, file, name, firmware, not no_wait))


async def _import(app: App, file: Path, name: str | None, firmware: Path | None, wait: bool) -> None:
    options: dict[str, Any] = {}
    if name:
        options["name"] = Variant("s", name)
    if firmware:
        options["firmware"] = Variant("s", os.fspath(firmware.absolute()))
    with contextlib.ExitStack() as stack:
        fd = sys.stdin.fileno() if str(file) == "-" else stack.enter_context(opened(file))
        async with connected() as client:
            job = await start_and_follow(
                client, app, lambda: client.call(ROOT_PATH, MANAGER, "ImportImage", 0, options, fds=[fd]), wait=wait
            )
            if job is None:
                return
            _, properties = await IMAGES.find(client, await result(client, job))
    app.show(
        {"image": properties},
        lambda: f"Imported {described(properties)}. Its key is {key_state(properties)}.",
    )
