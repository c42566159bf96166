"""`jindisksetup serve`: a volume for NBD clients."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import click

from jindiskd.base.notify import notify
from jindiskd.cli.app import App, common, pass_app
from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.anchor import Reporting
from jindiskd.jindisk.nbd_server import CLIENTS, Server, Tell, listen
from jindiskd.jindisksetup import options, server_process
from jindiskd.jindisksetup.formats import Access, Serving, VolumeFormat
from jindiskd.jindisksetup.server_process import Ready

serving = options.add(
    click.option("--read-only", is_flag=True, help="Permit no changes; the volume's file or device is not written."),
    click.option(
        "--report",
        type=click.Choice([item.value for item in Reporting]),
        default=Reporting.INTERVAL.value,
        help="When the anchor file is written: at the end, at intervals, or before each flush is answered.",
    ),
    click.option("--interval", type=click.FloatRange(1, 86400), default=60.0, help="Seconds, for --report interval."),
)


def serving_of(given: dict[str, Any]) -> Serving:
    """What the options of `serving` say."""
    return Serving(read_only=given["read_only"], reporting=Reporting(given["report"]), interval_s=given["interval"])


@click.command()
@click.argument("device", type=options.PATH)
@click.option("--socket", "socket_", type=options.PATH, required=True, help="The unix socket to listen on.")
@click.option("--socket-mode", type=click.Choice(["0600", "0660", "0666"]), default="0600", help="Who may connect.")
@click.option("--name", default="", help="Name of the export, beside the empty one.")
@click.option("--clients", type=click.IntRange(1, 256), default=CLIENTS, help="Connections at a time.")
@click.option("--daemon", is_flag=True, help="Return when clients can connect, and serve in the background.")
@click.option("--pid-file", type=options.PATH, help="Holds the server's process number while it serves.")
@click.option("--ready-file", type=options.PATH, help="Is there while clients can connect; holds the socket's URI.")
@serving
@options.access
@common
@pass_app
def serve(app: App, /, device: Path, **given: Any) -> None:
    """Serve the volume on DEVICE to NBD clients on a unix socket, until SIGTERM or ^C.

    What a client flushed is durable. Every client sees what all others wrote. The volume is closed at the end; if the
    server is killed, nothing is lost that was flushed, and the volume opens again.
    """
    if len(given["name"].encode()) > 256:
        raise InvalidArgument("--name", given["name"], "it has at most 256 bytes")
    for name in ("socket_", "pid_file", "ready_file", "anchor"):  # the process in the background has another directory
        given[name] = given[name] and given[name].absolute()
    with options.accessing(app, device.absolute(), given) as (form, access):
        if given["daemon"]:
            process = server_process.daemonize(
                lambda ready: _serve(form, access, given, ready, server_process.to_syslog), name="jindisksetup"
            )
            document = {"pid": process, "socket": os.fspath(given["socket_"]), "uri": _uri(given["socket_"])}
            app.show({"server": document}, lambda: f"Serving {device} at {document['uri']} as process {process}.")
        else:
            _serve(form, access, given, lambda: app.say(f"serving {device} at {_uri(given['socket_'])}"), app.say)


def _uri(path: Path) -> str:
    return f"nbd+unix:///?socket={path}"


def _serve(form: VolumeFormat, access: Access, given: dict[str, Any], ready: Ready, tell: Tell) -> None:
    path: Path = given["socket_"]
    server_process.harden(io_flusher=False)
    server_process.hold_signals()
    with contextlib.ExitStack() as stack:
        # Before the volume: a second server must not begin a session.
        listener = listen(path, mode=int(given["socket_mode"], 8))
        stack.callback(path.unlink, missing_ok=True)
        stack.callback(listener.close)
        volume = stack.enter_context(form.open_served(access, serving_of(given)))
        server = Server(listener, volume, name=given["name"], clients=given["clients"], tell=tell)
        server.start()
        try:
            stack.enter_context(server_process.announced(given["pid_file"], f"{os.getpid()}\n"))
            stack.enter_context(server_process.announced(given["ready_file"], _uri(path) + "\n"))
            ready()
            notify("READY=1", f"MAINPID={os.getpid()}")
            server_process.wait(volume, tell)
            notify("STOPPING=1")
        finally:
            server_process.end(server, volume)
