"""`jindiskctl device`: volumes on block devices of this host."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from jindiskd.bus.contract import ROOT_PATH
from jindiskd.bus.lib import Variant
from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import Client, connected
from jindiskd.cli.completion import devices
from jindiskd.cli.image import MANAGER
from jindiskd.cli.jobs import result, start_and_follow
from jindiskd.cli.output import clean, fields, size, table

DEVICE = "org.jindisk1.Device"
NOBODY = (1 << 32) - 1


async def find(client: Client, name: str) -> tuple[str, dict[str, Any]]:
    """Path and properties of a device."""
    path: str = await client.call(ROOT_PATH, MANAGER, "GetDevice", name)
    return path, await client.properties(path, DEVICE)


@click.group()
@common
def device() -> None:
    """Look at block devices of this host that carry volumes, open and close them."""


@device.command(name="list")
@common
@pass_app
def list_(app: App) -> None:
    """List the block devices of this host that carry a volume of JinDisk or a LUKS2 volume of ours."""
    run(_list(app))


async def _list(app: App) -> None:
    async with connected() as client:
        found = sorted(
            (await client.objects(DEVICE)).values(), key=lambda item: (item["Node"] or "~", item["MappedNode"])
        )
    head = ("NODE", "KIND", "SIZE", "VOLUME", "IMAGE", "STATE", "MAPPED")
    rows = [
        (
            item["Node"],
            item["Kind"],
            size(item["SizeBytes"]) if item["SizeBytes"] else "",
            item["Volume"],
            item["Image"],
            item["State"],
            item["MappedNode"],
        )
        for item in found
    ]
    app.show({"devices": found}, lambda: table(head, rows, legend=app.legend, right=(2,)))


@device.command()
@click.argument("name", metavar="DEVICE", shell_complete=devices)
@common
@pass_app
def show(app: App, name: str) -> None:
    """Show DEVICE: a node, a volume's UUID, or the name of the image whose volume it carries."""
    run(_show(app, name))


async def _show(app: App, name: str) -> None:
    async with connected() as client:
        _, found = await find(client, name)
    is_open = bool(found["MappedNode"])
    pairs = {
        "node": found["Node"],
        "kind": found["Kind"],
        "volume": found["Volume"],
        "label": found["Label"],
        "size": size(found["SizeBytes"]) if found["SizeBytes"] else "",
        "image": found["Image"],
        "state": found["State"],
        **({"reason": found["Reason"]} if found["Reason"] else {}),
        "mapped": found["MappedNode"],
        "access": "read only" if found["ReadOnly"] else "read and write",
        **({"opened by": f"user {found['OpenedBy']}"} if is_open else {}),
    }
    app.show({"device": found}, lambda: fields(pairs))


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
        path, _ = await find(client, name)
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
    app.show(
        {"device": found, "mapped": mapped}, lambda: f"{clean(found['Node'])} is open{how} as {clean(mapped)}."
    )


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
        path, found = await find(client, name)
        if await start_and_follow(client, app, lambda: client.call(path, DEVICE, "Close", {}), wait=wait) is None:
            return
    what = found["Node"] or found["MappedNode"]
    app.show({"closed": what}, lambda: f"{clean(what)} is closed.")
