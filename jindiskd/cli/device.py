"""`jindiskctl device`: volumes on block devices of this host."""

from __future__ import annotations

import os
from operator import itemgetter
from pathlib import Path

import click

from jindiskd.bus.lib import Variant
from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import connected
from jindiskd.cli.completion import devices
from jindiskd.cli.jobs import result, start_and_follow
from jindiskd.cli.objects import Kind, Listing, Properties, show_one
from jindiskd.cli.output import clean, size

DEVICE = "org.jindisk1.Device"
DEVICES = Kind(interface=DEVICE, getter="GetDevice")


@click.group()
@common
def device() -> None:
    """Look at block devices of this host that carry volumes, open and close them."""


def _size(item: Properties) -> str:
    return size(item["SizeBytes"]) if item["SizeBytes"] else ""


LISTING = Listing(
    interface=DEVICE,
    name="devices",
    order=lambda item: (item["Node"] or "~", item["MappedNode"]),
    columns={
        "NODE": itemgetter("Node"),
        "KIND": itemgetter("Kind"),
        "SIZE": _size,
        "VOLUME": itemgetter("Volume"),
        "IMAGE": itemgetter("Image"),
        "STATE": itemgetter("State"),
        "MAPPED": itemgetter("MappedNode"),
    },
    right=("SIZE",),
)


@device.command(name="list")
@common
@pass_app
def list_(app: App) -> None:
    """List the block devices of this host that carry a volume of JinDisk or a LUKS2 volume of ours."""
    run(LISTING.show(app))


@device.command()
@click.argument("name", metavar="DEVICE", shell_complete=devices)
@common
@pass_app
def show(app: App, name: str) -> None:
    """Show DEVICE: a node, a volume's UUID, or the name of the image whose volume it carries."""
    run(show_one(app, DEVICES, name, "device", _fields))


def _fields(found: Properties) -> dict[str, str]:
    is_open = bool(found["MappedNode"])
    return {
        "node": found["Node"],
        "kind": found["Kind"],
        "volume": found["Volume"],
        "label": found["Label"],
        "size": _size(found),
        "image": found["Image"],
        "state": found["State"],
        **({"reason": found["Reason"]} if found["Reason"] else {}),
        "mapped": found["MappedNode"],
        "access": "read only" if found["ReadOnly"] else "read and write",
        **({"opened by": f"user {found['OpenedBy']}"} if is_open else {}),
    }


@device.command(name="open")
@click.argument("name", metavar="DEVICE", shell_complete=devices)
@click.option("--read-only", is_flag=True, help="Write nothing; the state of the volume stays as it is.")
@click.option(
    "--key-file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="The key, raw bytes, from a file or - for standard input; that of the image otherwise.",
)
@click.option("--no-wait", is_flag=True, help="Print the job and leave it to itself.")
@common
@pass_app
def open_(app: App, name: str, read_only: bool, key_file: Path | None, no_wait: bool) -> None:
    """Open the volume on DEVICE as a block device in clear, with the key of the image whose volume it is.

    The key store writes down who opened it. A JinDisk 2 volume must be in the last known state. What is written to it
    is the last known state of the image's disk from then on, and any other copy of that disk is refused as old: open a
    copy with --read-only. It is refused while a domain runs from the image, and no domain starts from the image until
    it is closed.
    """
    run(_open(app, name, read_only, key_file, not no_wait))


async def _open(app: App, name: str, read_only: bool, key_file: Path | None, wait: bool) -> None:
    options = {"read-only": Variant("b", True)} if read_only else {}
    fds: list[int] = []
    async with connected() as client:
        path, _ = await DEVICES.find(client, name)
        if key_file is not None:
            fds.append(os.dup(0) if key_file == Path("-") else os.open(key_file, os.O_RDONLY | os.O_CLOEXEC))
        try:
            job = await start_and_follow(
                client,
                app,
                lambda: (
                    client.call(path, DEVICE, "OpenWithKey", 0, options, fds=fds)
                    if fds
                    else client.call(path, DEVICE, "Open", options)
                ),
                wait=wait,
            )
        finally:
            for fd in fds:
                os.close(fd)
        if job is None:
            return
        found = await client.properties(path, DEVICE)
        mapped = await result(client, job)
    how = " for reading" if read_only else ""
    app.show({"device": found, "mapped": mapped}, lambda: f"{clean(found['Node'])} is open{how} as {clean(mapped)}.")


@device.command()
@click.argument("name", metavar="DEVICE", shell_complete=devices)
@click.option("--no-wait", is_flag=True, help="Print the job and leave it to itself.")
@common
@pass_app
def close(app: App, name: str, no_wait: bool) -> None:
    """Take the block device in clear away and close the volume on DEVICE, once nothing is mounted from it."""
    run(_close(app, name, not no_wait))


async def _close(app: App, name: str, wait: bool) -> None:
    async with connected() as client:
        path, found = await DEVICES.find(client, name)
        if await start_and_follow(client, app, lambda: client.call(path, DEVICE, "Close", {}), wait=wait) is None:
            return
    what = found["Node"] or found["MappedNode"]
    app.show({"closed": what}, lambda: f"{clean(what)} is closed.")
