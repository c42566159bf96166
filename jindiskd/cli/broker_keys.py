"""`jindiskctl broker key`, `volume`, `recovery` and `token`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from jindiskd.base import document
from jindiskd.base.files import replace_file
from jindiskd.cli.app import App, common, pass_app
from jindiskd.cli.broker_target import EXISTING, FILE, Target, reached, show_image, when, write
from jindiskd.cli.output import table
from jindiskd.cli.parameters import Hex
from jindiskd.errors import InvalidArgument
from jindiskd.keys import handover
from jindiskd.keys.roles import Role

DAY_S = 86400

# Keys


@click.group()
@common
def key() -> None:
    """The keys of an image: stop, resume and replace them, add further ones, hand them on."""


@key.command()
@click.argument("name")
@reached
def revoke(target: Target, name: str) -> None:
    """Stop all release of an image's keys, at once. Guests that run keep running."""
    told = target.call("POST", "images", name, "revoke")
    target.app.show(told, lambda: f"The keys of {name} are revoked.")


@key.command()
@click.argument("name")
@reached
def reinstate(target: Target, name: str) -> None:
    """Allow release of a revoked image's keys again."""
    told = target.call("POST", "images", name, "reinstate")
    target.app.show(told, lambda: f"The keys of {name} are released again.")


@key.command()
@click.argument("name")
@click.argument("file", type=click.File("rb"))
@click.option("--yes", is_flag=True, help="Do not ask.")
@reached
def rotate(target: Target, name: str, file: Any, yes: bool) -> None:
    """Put the keys and launch digests of the handover in FILE in place of an image's old ones, which are gone."""
    target.app.confirm(f"Replace the keys of {name} for good?", f"replacing the keys of {name}", yes=yes)
    show_image(target, target.call("POST", "images", name, "rotate", body=file.read()))


@key.command(name="add")
@click.argument("name")
@click.argument("key_name", metavar="KEY")
@click.option("--file", type=click.File("rb"), required=True, help="File with the key's bytes; - is standard input.")
@reached
def key_add(target: Target, name: str, key_name: str, file: Any) -> None:
    """Add a further KEY, a name or repository/type/tag, to an image: for another volume, or anything else."""
    show_image(target, target.call("PUT", "images", name, "keys", *key_name.split("/"), body=file.read(4097)))


@key.command(name="remove")
@click.argument("name")
@click.argument("key_name", metavar="KEY")
@click.option("--yes", is_flag=True, help="Do not ask.")
@reached
def key_remove(target: Target, name: str, key_name: str, yes: bool) -> None:
    """Forget a further KEY of an image for good."""
    target.app.confirm(f"Forget the key {key_name} for good?", f"forgetting the key {key_name}", yes=yes)
    show_image(target, target.call("DELETE", "images", name, "keys", *key_name.split("/")))


@key.command()
@click.argument("name")
@click.option("--to", "card_file", type=EXISTING, required=True, help="Card of the broker that it is for.")
@click.option("--output", type=FILE, required=True, help="The file to write; - for standard output.")
@reached
def export(target: Target, name: str, card_file: Path, output: Path) -> None:
    """Seal the keys of an image for another broker. By the local socket alone."""
    recipient = handover.read_card(card_file.read_bytes()).transfer_key
    told = target.call("POST", "images", name, "export", body={"recipient": recipient})
    write(output, json.dumps(told, indent=2, sort_keys=True) + "\n")


@key.command()
@click.argument("file", type=EXISTING)
@click.option("--key", "private", type=EXISTING, required=True, help="Private key, PEM, that FILE is sealed to.")
@click.option("--to", "card_file", type=EXISTING, required=True, help="Card of the broker that it is for.")
@click.option("--output", type=FILE, required=True, help="The file to write; - for standard output.")
@common
@pass_app
def reseal(_app: App, file: Path, private: Path, card_file: Path, output: Path) -> None:
    """Seal the handover in FILE, made for a key of yours, for a broker: to restore a recovery copy. Works offline."""
    recipient = handover.read_card(card_file.read_bytes()).transfer_key
    opener = handover.private_key_of_pem(private.read_bytes())
    made = handover.reseal(handover.read(file.read_bytes()), opener, recipient)
    write(output, document.dump(made).decode())


@key.command()
@click.argument("file", type=EXISTING)
@click.option("--key", "private", type=EXISTING, required=True, help="Private key, PEM, that FILE is sealed to.")
@click.option("--resource", help="Which of the keys; the root's if not given.")
@click.option("--output", type=FILE, required=True, help="The file to write the key's bytes to; - for standard output.")
@common
@pass_app
def extract(_app: App, file: Path, private: Path, resource: str | None, output: Path) -> None:
    """Write a key out of the handover in FILE in clear: for a broker of another kind, or to open a disk by hand."""
    opened = handover.open_(handover.read(file.read_bytes()), handover.private_key_of_pem(private.read_bytes()))
    try:
        found = opened.keys.get(resource or opened.handover.resource)
        if found is None:
            raise InvalidArgument("--resource", resource, f"known are {', '.join(sorted(opened.keys))}")
        if str(output) == "-":
            if sys.stdout.isatty():
                raise InvalidArgument("--output", "-", "a key is not printed on a terminal: name a file, or a pipe")
            sys.stdout.flush()
            os.write(sys.stdout.fileno(), found.reveal())
        else:
            replace_file(output, found.reveal(), 0o600)
    finally:
        opened.close()


# Volumes


@click.group()
@common
def volume() -> None:
    """The JinDisk volumes that an image's keys open, and their freshness."""


@volume.command(name="add")
@click.argument("name")
@click.argument("volume_uuid", metavar="UUID", type=click.UUID)
@click.option("--key", "key_name", help="The further key that opens it; the root's if not given.")
@click.option("--anchor", type=Hex(73), metavar="HEX", help="Its state, as its builder closed it.")
@reached
def volume_add(target: Target, name: str, volume_uuid: Any, key_name: str | None, anchor: bytes | None) -> None:
    """Begin to remember a volume of an image."""
    body = {"key": key_name or "", "anchor": anchor.hex() if anchor else ""}
    show_image(target, target.call("PUT", "images", name, "volumes", str(volume_uuid), body=body))


@volume.command(name="accept-rollback")
@click.argument("volume_uuid", metavar="UUID", type=click.UUID)
@click.option("--reason", required=True, help="Why an older state is right; goes to the audit log.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@reached
def volume_accept_rollback(target: Target, volume_uuid: Any, reason: str, yes: bool) -> None:
    """Accept, once, whatever authentic state the volume is found in: after a restored backup."""
    target.app.confirm("Accept an older state of the disk, once?", "accepting an older state", yes=yes)
    told = target.call("POST", "volumes", str(volume_uuid), "accept-rollback", body={"reason": reason})
    target.app.show(told, lambda: "The next session may begin from any authentic state.")


# Recovery


@click.group()
@common
def recovery() -> None:
    """Copies of all keys, sealed to a key that you keep offline."""


@recovery.command(name="set-key")
@click.argument("file", type=click.File("rb"))
@reached
def recovery_set(target: Target, file: Any) -> None:
    """Have recovery copies sealed to the public key, PEM, in FILE. By the local socket alone."""
    told = target.call("PUT", "recovery", body=file.read(1 << 16))
    target.app.show(told, lambda: "Recovery copies are sealed to that key from now on.")


@recovery.command()
@click.option("--directory", type=FILE, required=True, help="Where to write a file for each image.")
@reached
def copy(target: Target, directory: Path) -> None:
    """Write a handover of each image, sealed to the recovery key; see `key reseal` for the way back."""
    told = target.call("POST", "recovery", "copy")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for item in told["handovers"]:
        checked = handover.read(json.dumps(item).encode())
        write(directory / f"{checked.image_id}.json", document.dump(checked).decode())
    count = len(told["handovers"])
    target.app.show({"images": count}, lambda: f"{count} image{'' if count == 1 else 's'} copied to {directory}.")


# Tokens


@click.group()
@common
def token() -> None:
    """The tokens by which the broker is administered over the network."""


@token.command(name="add")
@click.argument("name")
@click.option("--role", type=click.Choice([role.value for role in Role]), default="read", help="What it allows.")
@click.option("--days", type=click.IntRange(1, 3650), default=90, show_default=True, help="How long it counts.")
@click.option("--output", type=FILE, required=True, help="The file to write the token to; - for standard output.")
@reached
def token_add(target: Target, name: str, role: str, days: int, output: Path) -> None:
    """Make a token, which is told this once. By the local socket alone."""
    told = target.call("PUT", "tokens", name, body={"role": role, "life_s": days * DAY_S})
    write(output, told["token"] + "\n")


@token.command(name="list")
@reached
def token_list(target: Target) -> None:
    """List the tokens; never the tokens themselves."""
    told = target.call("GET", "tokens")
    rows = [(item["name"], item["role"], item["created"][:19], when(item["expires"])) for item in told["tokens"]]
    target.app.show(told, lambda: table(("NAME", "ROLE", "CREATED", "UNTIL"), rows, legend=target.app.legend))


@token.command(name="remove")
@click.argument("name")
@reached
def token_remove(target: Target, name: str) -> None:
    """Make a token worthless, at once."""
    told = target.call("DELETE", "tokens", name)
    target.app.show(told, lambda: f"The token {name} counts no more.")
