"""`jindisksetup open` and `close`: a volume as a block device of the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

import click

from jindiskd.base.process import ToolFailed, ToolMissing, run
from jindiskd.cli.app import App, common, pass_app
from jindiskd.jindisk.nbd_server import Tell
from jindiskd.jindisksetup import attached, options, server_process
from jindiskd.jindisksetup.formats import Access, Serving, VolumeFormat
from jindiskd.jindisksetup.serve import serving, serving_of
from jindiskd.jindisksetup.server_process import Ready

LOAD_S = 30.0


def load_module(name: str) -> None:
    """Have the kernel load a module, where there is one to be loaded."""
    if not Path("/sys/module", name).exists():
        with contextlib.suppress(ToolFailed, ToolMissing):
            asyncio.run(run(["modprobe", "--quiet", name], timeout_s=LOAD_S))


@click.command(name="open")
@click.argument("device", type=options.PATH)
@click.argument("name")
@serving
@options.access
@common
@pass_app
def open_(app: App, /, device: Path, name: str, **given: Any) -> None:
    """Attach the volume on DEVICE as the block device /dev/jindisk/NAME, by the kernel's network block device.

    A process in the background serves it until it is closed.
    """
    registry = attached.Registry()
    given["anchor"] = given["anchor"] and given["anchor"].absolute()
    with options.accessing(app, device.absolute(), given) as (form, access):
        registry.take(name)
        load_module("nbd")
        server_process.daemonize(
            lambda ready: _attach(form, access, serving_of(given), name, ready, server_process.to_syslog),
            name="jindisksetup",
        )
    record = registry.find(name)
    document = {"name": name, "device": os.fspath(record.node), "link": os.fspath(record.link), "pid": record.process}
    app.show({"device": document}, lambda: f"{record.link} is {record.node}.")


def _attach(form: VolumeFormat, access: Access, serving: Serving, name: str, ready: Ready, tell: Tell) -> None:
    server_process.harden(io_flusher=True)
    server_process.hold_signals()
    with (
        form.open_served(access, serving) as volume,
        attached.attach(volume, name, attached.Registry()) as server,
    ):
        ready()
        server_process.wait(volume, tell, goes_on=lambda: server.connected > 0)


@click.command()
@click.argument("name")
@common
@pass_app
def close(app: App, /, name: str) -> None:
    """Detach the block device NAME that open made, and close its volume."""
    whole = attached.close(name, attached.Registry())
    if not whole:
        app.say(f"warning: the server of {name} was killed; what was not flushed is lost")
    app.show({"closed": {"name": name, "whole": whole}}, lambda: f"Closed {name}.")
