"""`jindiskctl key`: what is known of the keys and of the volumes they open, never the keys; and what is decided."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import click

from jindiskd.base.files import replace_file
from jindiskd.bus.contract import ROOT_PATH
from jindiskd.bus.lib import Variant
from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import Client, RemoteError, connected
from jindiskd.cli.completion import keys
from jindiskd.cli.objects import MANAGER, Kind
from jindiskd.cli.output import Columns, fields, listing, moment, platform
from jindiskd.errors import EXIT_NOT_FOUND

KEY = "org.jindisk1.Key"
KEYS = Kind(interface=KEY, getter="GetKey")
CARD_LIMIT = 1 << 16
AT_ONCE = 8
"""Keys asked about at the same time."""


@click.group()
@common
def key() -> None:
    """Look at what is known of the keys, never at the keys; and decide about them and the volumes they open."""


async def _described(client: Client, path: str) -> dict[str, Any]:
    """All that is known of keys, with their volumes."""
    found, volumes = await client.call(path, KEY, "Describe", {})
    return {**found, "volumes": volumes}


async def _all(client: Client) -> list[dict[str, Any]]:
    """All that is known of all keys, by the names of their images."""
    paths = list(await client.objects(KEY))
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(path: str) -> dict[str, Any] | None:
        async with turn:
            try:
                return await _described(client, path)
            except RemoteError as exc:
                if exc.exit_code == EXIT_NOT_FOUND:  # removed meanwhile
                    return None
                raise

    # The first alone: where a person is asked for a password, once is enough.
    found = [await one(path) for path in paths[:1]]
    found += await asyncio.gather(*(one(path) for path in paths[1:]))
    return sorted((item for item in found if item is not None), key=lambda item: str(item["name"]))


def _platform(item: Mapping[str, Any]) -> str:
    return platform({"Platform": item["platform"], "Simulated": item["simulated"]})


def _volume(item: Mapping[str, Any]) -> str:
    """A volume's state in a cell of a table."""
    if item["rollback-accepted"]:
        return "any, once"
    return "???" if item["state"] == "unknown" else f"{item['sequence']}, {item['state']}"


def next_start(item: Mapping[str, Any]) -> str:
    """Which states of a volume the next start of its image takes, in words."""
    if item["rollback-accepted"]:
        return "takes whatever authentic state the disk is in, once"
    if item["state"] == "unknown":
        return "is refused: no state is known"
    if item["state"] == "closed":
        return f"takes state {item['sequence']} alone"
    return f"takes state {item['sequence']} or a later one of the session that runs or was interrupted"


@key.command(name="list")
@common
@pass_app
def key_list(app: App) -> None:
    """List the keys: whose they are, what they are released to, and the last known state of their volumes."""
    run(_key_list(app))


async def _key_list(app: App) -> None:
    async with connected() as client:
        found = await _all(client)
    columns: Columns = {
        "IMAGE": itemgetter("name"),
        "PLATFORM": _platform,
        "STATE": itemgetter("state"),
        "RELEASED TO": lambda item: " ".join(digest[:16] for digest in item["launch-digests"]),
        "VOLUME": lambda item: "; ".join(_volume(volume) for volume in item["volumes"]),
        "CREATED": lambda item: moment(item["created"]),
    }
    app.show({"keys": found}, lambda: listing(columns, found, legend=app.legend))


@key.command()
@click.argument("image", shell_complete=keys)
@common
@pass_app
def show(app: App, image: str) -> None:
    """Show what is known of the keys of an IMAGE (a name or an id) and of the volumes they open."""
    run(_show(app, image))


async def _show(app: App, image: str) -> None:
    async with connected() as client:
        path, _ = await KEYS.find(client, image)
        found = await _described(client, path)
    pairs = {
        "image": found["name"],
        "id": found["image-id"],
        "platform": _platform(found),
        "resource": found["resource"],
        "further keys": " ".join(found["further-resources"]),
        "state": found["state"],
        "released to": " ".join(found["launch-digests"]),
        "created": moment(found["created"]),
    }

    def text() -> str:
        return "\n\n".join([fields(pairs), *(fields(_volume_fields(volume)) for volume in found["volumes"])])

    app.show({"key": found}, text)


def _volume_fields(volume: Mapping[str, Any]) -> dict[str, str]:
    return {
        "volume": volume["volume"],
        "resource": volume["resource"],
        "session": volume["state"] + (", another one released" if volume["pending"] else ""),
        "last state": f"{volume['sequence']} {volume['root']}",
        "next start": next_start(volume),
    }


@key.command()
@click.argument("image", shell_complete=keys)
@common
@pass_app
def revoke(app: App, image: str) -> None:
    """Stop release of the keys of an IMAGE. Guests that run keep running."""
    run(_change(app, image, "Revoke", "The key of image {} is no longer released."))


@key.command()
@click.argument("image", shell_complete=keys)
@common
@pass_app
def reinstate(app: App, image: str) -> None:
    """Allow release of the keys of an IMAGE again."""
    run(_change(app, image, "Reinstate", "The key of image {} is released again."))


async def _change(app: App, image: str, member: str, sentence: str) -> None:
    async with connected() as client:
        path, _ = await KEYS.find(client, image)
        await client.call(path, KEY, member, {})
        found = await client.properties(path, KEY)
    app.show({"key": found}, lambda: sentence.format(found["Name"]))


@key.command()
@click.argument("image", shell_complete=keys)
@click.argument("file", type=click.File("rb"))
@click.option("--yes", is_flag=True, help="Do not ask.")
@common
@pass_app
def rotate(app: App, image: str, file: Any, yes: bool) -> None:
    """Put the keys in the handover FILE in place of those of an IMAGE, whose disk was encrypted anew; - for stdin."""
    run(_rotate(app, image, file, yes))


async def _rotate(app: App, image: str, file: Any, yes: bool) -> None:
    async with connected() as client:
        path, found = await KEYS.find(client, image)
        question = f"Delete the keys of image {found['Name']} and use those of the handover?"
        app.confirm(question, f"rotating the keys of image {found['Name']}", yes=yes)
        await client.call(path, KEY, "Rotate", 0, {}, fds=(file.fileno(),))
    app.show({"key": found}, lambda: f"The keys of image {found['Name']} are those of the handover now.")


@key.command()
@common
@pass_app
def card(app: App) -> None:
    """Print the card of the broker that has the keys: what a handover for it is sealed to. Nothing in it is secret."""
    run(_card(app))


async def _card(app: App) -> None:
    async with connected() as client:
        text = await client.call(ROOT_PATH, MANAGER, "GetCard", {})
    app.show(json.loads(text), lambda: str(text))


@key.command()
@click.argument("image", shell_complete=keys)
@click.option(
    "--to",
    "card_file",
    type=click.File("r", encoding="utf-8"),
    help="Card of the broker that it is for; where the deployment is a relay, it is sealed already.",
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The file to write; - for stdout.")
@common
@pass_app
def export(app: App, image: str, card_file: Any, output: Path) -> None:
    """Write the handover of an IMAGE: its keys, sealed for a broker, which takes them over with broker image import."""
    run(_export(app, image, card_file.read(CARD_LIMIT) if card_file is not None else "", output))


async def _export(app: App, image: str, told: str, output: Path) -> None:
    async with connected() as client:
        path, found = await KEYS.find(client, image)
        options = {"card": Variant("s", told)} if told else {}
        data = _content(await client.call(path, KEY, "Export", options))
    if str(output) == "-":
        click.echo(data.decode(), nl=False)
        return
    replace_file(output, data, 0o600)
    document = {"image_id": found["ImageId"], "output": str(output)}
    app.show(document, lambda: f"The sealed keys of image {found['Name']} are in {output}.")


def _content(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as stream:
        return stream.read()


@key.command(name="accept-rollback")
@click.argument("image", shell_complete=keys)
@click.option("--reason", default="", help="One line for the audit log.")
@click.option("--volume", default="", metavar="NAME", help="This volume alone: root, or the name of a data volume.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common
@pass_app
def accept_rollback(app: App, image: str, reason: str, volume: str, yes: bool) -> None:
    """Let the next start of an IMAGE take an older state of its disks, once; for disks restored from a backup."""
    run(_accept_rollback(app, image, reason, volume, yes))


async def _accept_rollback(app: App, image: str, reason: str, volume: str, yes: bool) -> None:
    async with connected() as client:
        path, found = await KEYS.find(client, image)
        name = found["Name"]
        state = f"whatever authentic state its {f'volume {volume}' if volume else 'disk'} is in"
        question = f"Let the next start of image {name} take {state}?"
        app.confirm(question, f"accepting another state of the disk of image {name}", yes=yes)
        options = {"volume": Variant("s", volume)} if volume else {}
        await client.call(path, KEY, "AcceptRollback", reason, options)
        item = await _described(client, path)
    app.show({"key": item}, lambda: f"The next start of image {name} takes {state}.")


@key.group()
@common
def recovery() -> None:
    """Copies of all keys, sealed to a key that you keep offline."""


@recovery.command(name="set-key")
@click.argument("file", type=click.File("rb"))
@common
@pass_app
def recovery_set(app: App, file: Any) -> None:
    """Have recovery copies sealed to the public key, PEM, in FILE, from now on."""
    run(_recovery_set(app, file))


async def _recovery_set(app: App, file: Any) -> None:
    async with connected() as client:
        await client.call(ROOT_PATH, MANAGER, "SetRecoveryKey", 0, {}, fds=(file.fileno(),))
    app.show({"recovery_key": "set"}, lambda: "Recovery copies are sealed to this key from now on.")


@recovery.command(name="copy")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The file to write.")
@common
@pass_app
def recovery_copy(app: App, output: Path) -> None:
    """Write all keys, sealed to the recovery key; keep the file off this machine."""
    run(_recovery_copy(app, output))


async def _recovery_copy(app: App, output: Path) -> None:
    async with connected() as client:
        data = _content(await client.call(ROOT_PATH, MANAGER, "RecoveryCopy", {}))
    replace_file(output, data, 0o600)
    app.show({"output": str(output)}, lambda: f"All keys, sealed to the recovery key, are in {output}.")
