"""What all commands about a broker share: which one, how its images are shown, how documents are written."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from jindiskd.base.files import replace_file
from jindiskd.cli.app import App, common, pass_app
from jindiskd.cli.broker_client import SOCKET, BrokerClient, Where
from jindiskd.cli.output import fields, platform
from jindiskd.cli.parameters import Hex

FILE = click.Path(path_type=Path)
EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)


class Target:
    """The broker that the command is about."""

    def __init__(self, app: App, where: Where) -> None:
        self.app, self.where = app, where

    def call(self, method: str, *path: str, **more: Any) -> Any:
        """Ask it."""
        return BrokerClient(self.where).call(method, *path, **more)


def reached(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which broker; the command gets a `Target`."""

    @click.option(
        "--server",
        default=str(SOCKET),
        metavar="SOCKET|HOST:PORT",
        show_default=True,
        help="The broker's local socket, or where it listens for administrators.",
    )
    @click.option("--pin", type=Hex(32), metavar="HEX", help="Digest of its key, for HOST:PORT.")
    @click.option("--token-file", type=EXISTING, help="File with a token, for HOST:PORT.")
    @common
    @pass_app
    def wrapped(app: App, /, *, server: str, pin: bytes | None, token_file: Path | None, **given: Any) -> None:
        command(Target(app, Where(address=server, pin=pin or b"", token_file=token_file)), **given)

    wrapped.__doc__, wrapped.__name__ = command.__doc__, command.__name__
    return wrapped


def when(seconds: float) -> str:
    """A moment, seconds since the epoch, in the local time zone."""
    return datetime.fromtimestamp(seconds, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def write(output: Path, content: str) -> None:
    """A file for its owner alone, whole or not at all; `-` is standard output."""
    if str(output) == "-":
        click.echo(content, nl=False)
    else:
        replace_file(output, content.encode(), 0o600)


def _image(told: dict[str, Any]) -> str:
    rules = told["rules"]
    pairs = {
        "name": told["name"],
        "id": told["image_id"],
        "platform": platform({"Platform": told["platform"], "Simulated": told["simulated"]}),
        "state": told["state"],
        "released to": " ".join(told["launch_digests"]),
        "resource": told["resource"],
        "further keys": ", ".join(item["resource"] for item in told["keys"]),
        "volumes": ", ".join(
            f"{item['volume']} ({'unknown state' if item['sequence'] is None else 'state ' + str(item['sequence'])})"
            for item in told["volumes"]
        ),
        "approval": "each release waits for one" if rules["approval"] else "not needed",
        "limits": f"{rules['releases_per_hour'] or '-'} an hour, {rules['releases_per_guest'] or '-'} a guest",
        "created": told["created"],
    }
    return fields(pairs)


def show_image(target: Target, told: dict[str, Any]) -> None:
    """Print an image as the broker tells it."""
    target.app.show(told, lambda: _image(told))
