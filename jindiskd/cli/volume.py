"""`jindiskctl image volume`: the data volumes of images that exist."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

import click

from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import connected
from jindiskd.cli.completion import images, volumes
from jindiskd.cli.image import IMAGE, IMAGES, check_signing, signed
from jindiskd.cli.jobs import start_and_follow
from jindiskd.cli.output import Columns, listing, size
from jindiskd.cli.parameters import Number, Volume
from jindiskd.errors import NotFound

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(name="volume")
@common
def volume() -> None:
    """Add data volumes to images, and take them away.

    The image measures otherwise then: its keys are released to the new launch digest, and no longer to the old one.
    Domains adopted for it are refused until they are adopted again; launch makes its own domains anew.
    """


def _signing(command: Any) -> Any:
    options = (
        click.option("--id-key", type=_FILE, help="For SEV-SNP: sign the image again with this key (image sign)."),
        click.option("--author-key", type=_FILE, help="Sign the ID key with this one."),
        click.option("--guest-svn", type=Number(), default=0, help="Its security version in that signature."),
        click.option("--no-wait", is_flag=True, help="Print the job and leave it to itself."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@volume.command()
@click.argument("name", metavar="IMAGE", shell_complete=images)
@click.argument("asked", metavar="NAME:SIZE[:FORMAT][:MOUNT]", type=Volume())
@_signing
@common
@pass_app
def add(app: App, /, name: str, asked: tuple[str, int, str, str], no_wait: bool, **given: Any) -> None:
    """Give the guests of IMAGE one more encrypted disk, such as data:20G:/srv/data.

    FORMAT is jindisk or luks2. Without MOUNT it gets no file system, and is /dev/disk/by-jindisk/NAME. The disks that
    the image has are not touched.
    """
    run(_change(app, name, asked[0], list(asked), not no_wait, given))


@volume.command()
@click.argument("name", metavar="IMAGE", shell_complete=images)
@click.argument("gone", metavar="NAME", shell_complete=volumes)
@click.option("--yes", is_flag=True, help="Do not ask.")
@_signing
@common
@pass_app
def remove(app: App, /, name: str, gone: str, yes: bool, no_wait: bool, **given: Any) -> None:
    """Take the data volume NAME from IMAGE, with its disk and its key.

    What copies of the disk hold can never be read again. An entry for it in the guest's /etc/fstab is the guest's to
    remove, before.
    """
    run(_change(app, name, gone, None, not no_wait, {**given, "yes": yes}))


async def _change(
    app: App, name: str, about: str, asked: list[Any] | None, wait: bool, given: dict[str, Any]
) -> None:
    async with connected() as client:
        path, found = await IMAGES.find(client, name)
        check_signing({**given, "platform_": found["Platform"]}, no_wait=not wait)
        if asked is None:
            old = next((one for one in found["Volumes"] if one["name"] == about), None)
            if old is None:
                raise NotFound(f"volume of image {found['Name']!r}", about)
            what = f"volume {about} ({size(old['size-bytes'])}) of image {found['Name']}"
            app.confirm(f"Remove {what} and its key for good?", f"removing volume {about}", yes=given["yes"])
        words = ("AddVolume", *asked) if asked is not None else ("RemoveVolume", about)
        if await start_and_follow(client, app, lambda: client.call(path, IMAGE, *words, {}), wait=wait) is None:
            return
        properties = await signed(client, name, given)
    done = "Added" if asked is not None else "Removed"
    app.show(
        {"image": properties},
        lambda: f"{done} volume {about}: image {properties['Name']} measures as {properties['LaunchDigest']}.",
    )


@volume.command(name="list")
@click.argument("name", metavar="IMAGE", shell_complete=images)
@common
@pass_app
def list_(app: App, name: str) -> None:
    """List the data volumes of IMAGE."""
    run(_list(app, name))


async def _list(app: App, name: str) -> None:
    async with connected() as client:
        _, found = await IMAGES.find(client, name)
    columns: Columns = {
        "NAME": itemgetter("name"),
        "FORMAT": itemgetter("format"),
        "SIZE": lambda item: size(item["size-bytes"]),
        "MOUNT": itemgetter("mount"),
        "UUID": itemgetter("uuid"),
    }
    rows = sorted(found["Volumes"], key=itemgetter("name"))
    app.show({"volumes": rows}, lambda: listing(columns, rows, legend=app.legend, right=("SIZE",)))
