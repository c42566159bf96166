"""`jindisksetup open` and `close`: a volume as a block device of the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

import click

from jindiskd.base.process import ToolFailed, ToolMissing, run
from jindiskd.base.secret import Secret
from jindiskd.cli.app import App, common, pass_app
from jindiskd.cli.output import table
from jindiskd.errors import InvalidArgument, NotFound
from jindiskd.jindisk.device import OpenFile
from jindiskd.jindisk.nbd_server import Tell
from jindiskd.jindisk.v1.keys import Kdf, derive
from jindiskd.jindisk.v1.layout import SECTOR_BYTES, available_sectors
from jindiskd.jindisk.v1.volume import open_volume
from jindiskd.jindisksetup import attached, mapped, options, server_process
from jindiskd.jindisksetup.formats import Access, Serving, VolumeFormat
from jindiskd.jindisksetup.serve import serving, serving_of
from jindiskd.jindisksetup.server_process import Ready
from jindiskd.jindisksetup.targets import overwriting

LOAD_S = 30.0
LOOK_S = 0.1
"""How soon it is noticed that the kernel has let go."""


def load_module(name: str) -> None:
    """Have the kernel load a module, where there is one to be loaded."""
    if not Path("/sys/module", name).exists():
        with contextlib.suppress(ToolFailed, ToolMissing):
            asyncio.run(run(["modprobe", "--quiet", name], timeout_s=LOAD_S))


def _compatible(app: App, words: tuple[str, ...], verb: str) -> tuple[Secret | None, Path, str]:
    """The arguments of open and create: DEVICE NAME, or with a password before them."""
    device, name = Path(words[-2]).absolute(), attached.check_name(words[-1])
    if len(words) == 2:
        return None, device, name
    app.say(
        f"warning: everybody on this machine can see the password among the arguments of {verb}; "
        "give it by --key-file with --kdf instead"
    )
    return Secret(bytearray(os.fsencode(words[0]))), device, name


via = click.option(
    "--via",
    type=click.Choice(["nbd", "dm"]),
    help="By our own engine, or by the kernel's target for version 1. Default: nbd for version 2, dm for version 1.",
)


@click.command(name="open")
@click.argument("words", nargs=-1, required=True, metavar="[PASSWORD] DEVICE NAME")
@via
@serving
@options.access
@common
@pass_app
def open_(app: App, /, words: tuple[str, ...], via: str | None, **given: Any) -> None:
    """Attach the volume on DEVICE as a block device called NAME.

    By the kernel's network block device it becomes /dev/jindisk/NAME; a process in the background serves it until it is
    closed. A volume of version 1 becomes /dev/mapper/NAME if the kernel has the reference's target.

    With PASSWORD it is as the reference's tool has it: version 1, by the kernel's target; --kdf says whose derivation
    is used, and without it both are tried.
    """
    if not 2 <= len(words) <= 3:
        raise click.UsageError("give DEVICE and NAME, or PASSWORD, DEVICE and NAME")
    password, device, name = _compatible(app, words, "open")
    if password is not None:
        given["format_version"] = "1"
    given["anchor"] = given["anchor"] and given["anchor"].absolute()
    if (via or ("dm" if given["format_version"] == "1" else "nbd")) == "dm":
        _open_mapped(app, password, device, name, given)
        return
    registry = attached.Registry()
    with contextlib.ExitStack() as stack:
        if password is not None:
            stack.enter_context(password)
        form, access = stack.enter_context(options.accessing(app, device, given, password=password))
        registry.take(name)
        load_module("nbd")
        try:
            server_process.daemonize(
                lambda ready: _attach(form, access, serving_of(given), name, ready, server_process.to_syslog),
                name="jindisksetup",
            )
        except BaseException:
            registry.remove(name)
            raise
    record = registry.find(name)
    document = {"name": name, "device": os.fspath(record.node), "link": os.fspath(record.link), "pid": record.process}
    app.show({"device": document}, lambda: f"{record.link} is {record.node}.")


@click.command(name="list")
@common
@pass_app
def list_(app: App) -> None:
    """List the volumes that open has attached by our own engine."""
    found = attached.Registry().all()
    alive = {record.name: attached.started(record.process) == record.started for record in found}
    documents = [
        {
            "name": record.name,
            "device": os.fspath(record.node),
            "link": os.fspath(record.link),
            "pid": record.process,
            "state": "open" if alive[record.name] else "killed",
        }
        for record in found
    ]
    rows = [[str(item[key]) for key in ("name", "device", "pid", "state")] for item in documents]
    head = ("NAME", "DEVICE", "PID", "STATE")
    app.show({"devices": documents}, lambda: table(head, rows, legend=app.legend, right=(2,)))


def _attach(form: VolumeFormat, access: Access, serving: Serving, name: str, ready: Ready, tell: Tell) -> None:
    server_process.harden(io_flusher=True)
    server_process.hold_signals()
    with (
        form.open_served(access, serving) as volume,
        attached.attach(volume, name, attached.Registry()) as server,
    ):
        ready()
        server_process.wait(volume, tell, goes_on=lambda: server.connected > 0, look_s=LOOK_S)


def _open_mapped(app: App, password: Secret | None, device: Path, name: str, given: dict[str, Any]) -> None:
    """Open a volume of version 1 by the kernel's target."""
    if given["format_version"] != "1":
        raise InvalidArgument("--via", "dm", "the kernel's target knows version 1 alone")
    if given["offset"] or given["read_only"]:
        raise InvalidArgument("--offset and --read-only", "with --via dm", "the kernel's target has neither")
    load_module("dm-jindisk")
    mapped.require_target()
    with contextlib.ExitStack() as stack:
        if password is not None:
            stack.enter_context(password)
        _, access = stack.enter_context(options.accessing(app, device, given, password=password))
        with OpenFile(device, writable=False) as opened:
            size = open_volume(opened, key=access.key, size_bytes=access.size_bytes).size_bytes
        link = _activate(access.key, device, name, size // SECTOR_BYTES, create=False)
    app.show({"device": {"name": name, "link": os.fspath(link)}}, lambda: f"{link} is open.")


def _activate(key: Secret, device: Path, name: str, sectors: int, *, create: bool) -> Path:
    return mapped.activate(name, sectors=sectors, table=mapped.parameters(key, device, create=create))


@click.command()
@click.argument("password")
@click.argument("device", type=options.PATH)
@click.argument("name")
@click.option("--kdf", type=click.Choice([item.value for item in Kdf]), default=Kdf.C.value, help="Whose derivation.")
@options.overwriting
@common
@pass_app
def create(app: App, /, password: str, device: Path, name: str, kdf: str, force: bool, yes: bool) -> None:
    """Format DEVICE as version 1 by the kernel's target and open it as /dev/mapper/NAME, as the reference's tool does.

    Use format instead: there a password need not stand among the arguments, where everybody on this machine sees it.
    """
    secret, device, name = _compatible(app, (password, os.fspath(device), name), "create")
    assert secret is not None
    options.pick(app, "1")
    load_module("dm-jindisk")
    mapped.require_target()
    with secret, derive(secret, Kdf(kdf)) as key:
        with overwriting(app, device, offset_bytes=0, force=force, yes=yes, what="creating") as target:
            sectors = available_sectors(target.size_bytes // SECTOR_BYTES)
            if not target.is_block or not sectors:
                raise InvalidArgument(
                    "the device", os.fspath(device), "it must be a block device of 1397.5 MiB or more"
                )
        link = _activate(key, device, name, sectors, create=True)
    app.show({"device": {"name": name, "link": os.fspath(link)}}, lambda: f"{link} is made and open.")


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="[PASSWORD DEVICE] NAME")
@common
@pass_app
def close(app: App, /, words: tuple[str, ...]) -> None:
    """Detach the block device NAME that open made, and close its volume.

    PASSWORD and DEVICE are accepted for the sake of the reference's tool, and not needed.
    """
    if len(words) not in {1, 3}:
        raise click.UsageError("give NAME, or PASSWORD, DEVICE and NAME")
    name, whole = attached.check_name(words[-1]), True
    try:
        whole = attached.close(name, attached.Registry())
    except NotFound:
        mapped.remove(name)
    if not whole:
        app.say(f"warning: the server of {name} was killed; what was not flushed is lost")
    app.show({"closed": {"name": name, "whole": whole}}, lambda: f"Closed {name}.")
