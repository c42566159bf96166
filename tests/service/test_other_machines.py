"""`jindiskctl --host`: over the real systemd-stdio-bridge; the log-in on the other machine is played by a script."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import click
import pytest
from serviceprocess import Daemon

from jindiskd.bus.contract import ROOT_PATH
from jindiskd.cli.app import App
from jindiskd.cli.client import connected
from jindiskd.cli.elsewhere import FILES, HERE, check_destination
from jindiskd.cli.lazy import members
from jindiskd.cli.main import cli
from jindiskd.errors import InvalidArgument, NotSupported, ServiceUnavailable

SSH = """#!/bin/sh
echo "$@" >>{log}
[ "$1 $2 $3 $4" = "-xT -- admin@web1 systemd-stdio-bridge" ] || {{ echo "ssh: no route to $3" >&2; exit 255; }}
exec systemd-stdio-bridge --bus-path={bus}
"""


@pytest.fixture
def there(stock: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    """The shared service as `admin@web1`; on this machine there is no bus."""
    (tmp_path / "ssh").write_text(SSH.format(log=tmp_path / "log", bus=stock.address))
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    away = {"PATH": os.environ["PATH"], "DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/x"}
    monkeypatch.setattr(stock, "environment", {**stock.environment, **away})
    return stock


def test_what_the_other_machine_says(there: Daemon, tmp_path: Path) -> None:
    """Objects, calls, jobs that are followed by signals, and errors with their statuses."""
    web = ("--host", "admin@web1")
    there.ctl("status", status=69)
    assert json.loads(there.ctl(*web, "--json", "image", "list"))["images"][0]["Name"] == "stock"
    assert "stock" in there.ctl("-H", "admin@web1", "image", "list")
    assert json.loads(there.ctl(*web, "image", "measure", "--json", "stock"))["image"] == "stock"  # a job
    assert "no image" in there.ctl(*web, "image", "show", "none", status=3)
    assert "PROBLEM" in there.ctl(*web, "doctor", "--platform", "snp", status=1)
    assert (tmp_path / "log").read_text().splitlines()[0] == "-xT -- admin@web1 systemd-stdio-bridge"


def test_machines_that_are_not_there(there: Daemon) -> None:
    """What ssh says is shown, and what must work; nothing that is to be a machine becomes an option of ssh."""
    said = there.ctl("-H", "web2", "status", status=69)
    assert "ssh: no route to web2" in said
    assert "'ssh web2 systemd-stdio-bridge' must work" in said
    said = there.ctl("-H", "web2", "doctor", status=69)  # nor is this machine looked at in its place
    assert "no route" in said
    for text in ("-oProxyCommand=x", "", "a b", "a\nb", "a" * 300):
        with pytest.raises(InvalidArgument, match="ssh"):
            check_destination(text)
    assert check_destination("ssh://admin@web1:2222") == "ssh://admin@web1:2222"


def test_files_do_not_come_through(there: Daemon, tmp_path: Path) -> None:
    """Said before anything is done, with what does it; also by the client, where a command should forget to."""
    said = there.ctl("-H", "admin@web1", "image", "--json", "export", "stock", str(tmp_path / "stream"), status=1)
    assert "image export IMAGE - | ssh admin@web1 jindiskctl image import -" in said
    assert not (tmp_path / "log").exists()
    assert "leave --host out" in there.ctl("-H", "admin@web1", "broker", "key", "add", "x", status=1)

    async def export() -> None:
        async with connected() as client:
            (path,) = await client.objects("org.jindisk1.Image")
            with (tmp_path / "stream").open("wb") as file:
                await client.call(path, "org.jindisk1.Image", "Export", 0, {}, fds=[file.fileno()])

    async def unknown() -> None:
        async with connected() as client:
            await client.properties(ROOT_PATH, "org.jindisk1.Manager")

    app = App()
    app.host = "admin@web1"
    with click.Context(cli, obj=app):
        with pytest.raises(NotSupported, match="Export"):
            asyncio.run(export())
        app.host = "web2"
        with pytest.raises(ServiceUnavailable, match="web2"):
            asyncio.run(unknown())


def test_the_tables_name_commands() -> None:
    """That are there; and each that is of another machine's service alone is none of them."""
    commands: set[str] = set()

    def walk(command: click.Command, names: tuple[str, ...]) -> None:
        commands.add(" ".join(names))
        if isinstance(command, click.Group):
            for name, member in members(command).items():
                walk(member, (*names, name))

    walk(cli, ())
    assert {*HERE, *FILES} <= commands
    assert not {"domain list", "launch", "status", "monitor", "job list"} & {*HERE, *FILES}
