"""`jindiskctl key`: what is known of the keys and of the volumes they open; never the keys."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from jindiskd.base.files import replace_file
from jindiskd.bus.contract import ROOT_PATH
from jindiskd.bus.lib import Variant
from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import Client, connected
from jindiskd.cli.completion import images
from jindiskd.cli.image import IMAGE, MANAGER, find
from jindiskd.cli.output import fields, moment, platform, table
from jindiskd.errors import NotFound

CARD_LIMIT = 1 << 16


@click.group()
@common
def key() -> None:
    """Look at what is known of the keys, never at the keys; and decide about the volumes they open."""


async def _keys(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await client.call(ROOT_PATH, MANAGER, "ListKeys", {})
    return found


def _platform(item: Mapping[str, Any]) -> str:
    return platform({"Platform": item["platform"], "Simulated": item["simulated"]})


def _volume(item: Mapping[str, Any]) -> str:
    """A volume's state in a cell of a table."""
    if not item.get("volume"):
        return "-"
    if item["volume-rollback-accepted"]:
        return "any, once"
    if item["volume-state"] == "unknown":
        return "???"
    return f"{item['volume-sequence']}, {item['volume-state']}"


def next_start(item: Mapping[str, Any]) -> str:
    """Which states of its volume the next start of an image takes, in words."""
    if item["volume-rollback-accepted"]:
        return "takes whatever authentic state the disk is in, once"
    if item["volume-state"] == "unknown":
        return "is refused: no state is known"
    if item["volume-state"] == "closed":
        return f"takes state {item['volume-sequence']} alone"
    return f"takes state {item['volume-sequence']} or a later one of the session that runs or was interrupted"


@key.command(name="list")
@common
@pass_app
def key_list(app: App) -> None:
    """List the keys: whose they are, what they are released to, and the last known state of their volumes."""
    run(_key_list(app))


async def _key_list(app: App) -> None:
    async with connected() as client:
        keys = await _keys(client)
    head = ("IMAGE", "PLATFORM", "STATE", "RELEASED TO", "VOLUME", "CREATED")
    rows = [
        (
            item["name"],
            _platform(item),
            item["state"],
            " ".join(digest[:16] for digest in item["launch-digests"]),
            _volume(item),
            moment(item["created"]),
        )
        for item in keys
    ]
    app.show({"keys": keys}, lambda: table(head, rows, legend=app.legend))


@key.command()
@click.argument("image", shell_complete=images)
@common
@pass_app
def show(app: App, image: str) -> None:
    """Show what is known of the key of an IMAGE (a name or an id) and of the volume it opens."""
    run(_show(app, image))


async def _show(app: App, image: str) -> None:
    async with connected() as client:
        found = next((item for item in await _keys(client) if image in {item["name"], item["image-id"]}), None)
    if found is None:
        raise NotFound("key of image", image)
    pairs = {
        "image": found["name"],
        "id": found["image-id"],
        "platform": _platform(found),
        "resource": found["resource"],
        "state": found["state"],
        "released to": " ".join(found["launch-digests"]),
        "created": moment(found["created"]),
    }
    if found.get("volume"):
        pairs |= {
            "volume": found["volume"],
            "session": found["volume-state"] + (", another one released" if found["volume-pending"] else ""),
            "last state": f"{found['volume-sequence']} {found['volume-root']}",
            "next start": next_start(found),
        }
    app.show({"key": found}, lambda: fields(pairs))


@key.command()
@click.argument("image", shell_complete=images)
@click.option(
    "--to",
    "card",
    type=click.File("r", encoding="utf-8"),
    help="Card of the broker that it is for; where the deployment is a relay, it is sealed already.",
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The file to write; - for stdout.")
@common
@pass_app
def export(app: App, image: str, card: Any, output: Path) -> None:
    """Write the handover of an IMAGE: its keys, sealed for a broker, which takes them over with broker image import."""
    run(_export(app, image, card.read(CARD_LIMIT) if card is not None else "", output))


async def _export(app: App, image: str, card: str, output: Path) -> None:
    async with connected() as client:
        path, found = await find(client, image)
        options = {"card": Variant("s", card)} if card else {}
        fd = await client.call(path, IMAGE, "ExportKey", options)
    with os.fdopen(fd, "rb") as stream:
        data = stream.read()
    if str(output) == "-":
        click.echo(data.decode(), nl=False)
        return
    replace_file(output, data, 0o600)
    document = {"image_id": found["ImageId"], "output": str(output)}
    app.show(document, lambda: f"The sealed keys of image {found['Name']} are in {output}.")


@key.command(name="accept-rollback")
@click.argument("image", shell_complete=images)
@click.option("--reason", default="", help="One line for the audit log.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common
@pass_app
def accept_rollback(app: App, image: str, reason: str, yes: bool) -> None:
    """Let the next start of an IMAGE take an older state of its disk, once; for a disk restored from a backup."""
    run(_accept_rollback(app, image, reason, yes))


async def _accept_rollback(app: App, image: str, reason: str, yes: bool) -> None:
    async with connected() as client:
        path, found = await find(client, image)
        name = found["Name"]
        question = f"Let the next start of image {name} take whatever authentic state its disk is in?"
        app.confirm(question, f"accepting another state of the disk of image {name}", yes=yes)
        await client.call(path, IMAGE, "AcceptRollback", reason, {})
        item = next((item for item in await _keys(client) if item["image-id"] == found["ImageId"]), {})
    app.show({"key": item}, lambda: f"The next start of image {name} takes whatever authentic state its disk is in.")
