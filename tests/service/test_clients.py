"""Clients that others wrote or that are generated: busctl, gdbus, gdbus-codegen in C, dbus-next's own proxies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jindiskd.system_files import INTERFACES

HERE = Path(__file__).resolve().parent
CONTRACT = HERE.parents[1] / "dbus"
WHERE = ("org.jindisk1", "/org/jindisk1/audit", "org.jindisk1.Audit")
DEADLINE_S = 240


def run(*words: str, status: int = 0) -> str:
    out = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert out.returncode == status, (words, out.stdout, out.stderr)
    return out.stdout + (out.stderr if status else "")


@contextmanager
def listening(*words: str) -> Iterator[Any]:
    """A program that prints signals; it is killed if it prints nothing for too long."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        too_late = threading.Timer(DEADLINE_S, process.kill)
        too_late.start()
        try:
            yield process
        finally:
            too_late.cancel()
            process.terminate()


@pytest.fixture(autouse=True)
def settled(stock: Any) -> None:
    """The bus has told of every row that earlier tests caused."""
    busctl = ("busctl", f"--address={stock.address}", "--json=short")
    until = time.monotonic() + DEADLINE_S
    while True:
        rows = json.loads(run(*busctl, "call", *WHERE, "List", "a{sv}", "1", "limit", "u", "1"))["data"][0]
        told = json.loads(run(*busctl, "get-property", *WHERE, "Last"))["data"]
        if rows[0]["number"]["data"] == told:
            return
        assert time.monotonic() < until, (rows, told)
        time.sleep(0.1)


def test_busctl(stock: Any) -> None:
    """Introspection with the right flags, a call with options and structured results, an error's name, a signal."""
    busctl = ("busctl", f"--address={stock.address}")
    told = run(*busctl, "introspect", "--no-legend", *WHERE[:2])
    assert re.search(r"^\.List +method +a\{sv\} +aa\{sv\}b +-$", told, re.MULTILINE)
    assert re.search(r"^\.Appended +signal +t +- +-$", told, re.MULTILINE)
    assert re.search(r"^\.Last +property +t +\d+ +-$", told, re.MULTILINE)
    assert "/org/jindisk1/audit" in run(*busctl, "--list", "tree", "org.jindisk1").split()
    told = run(*busctl, "--json=short", "call", *WHERE, "List", "a{sv}", "1", "limit", "u", "1")
    row = json.loads(told)["data"][0][0]
    last = int(json.loads(run(*busctl, "--json=short", "get-property", *WHERE, "Last"))["data"])
    assert (row["number"]["type"], row["number"]["data"]) == ("t", last)
    said = run(*busctl, "call", *WHERE, "List", "a{sv}", "1", "limit", "u", "0", status=1)
    assert "limit 0 cannot be used" in said
    rule = "type='signal',interface='org.jindisk1.Audit'"
    with listening(*busctl, "--json=short", "monitor", f"--match={rule}") as monitor:
        path = run(*busctl, "call", "org.jindisk1", "/org/jindisk1", "org.jindisk1.Manager", "GetKey", "s", "stock")
        key = path.split('"')[1]
        # It says nothing when it has begun to listen: the key is changed until it heard of it.
        done = threading.Event()
        changing = threading.Thread(target=_change, args=(busctl, key, done))
        changing.start()
        try:
            line = monitor.stdout.readline()
        finally:
            done.set()
            changing.join()
        message = json.loads(line)
    assert (message["member"], message["payload"]["type"]) == ("Appended", "t")


def _change(busctl: tuple[str, ...], key: str, done: threading.Event) -> None:
    """Revoke and reinstate until it is enough."""
    while not done.is_set():
        for member in ("Revoke", "Reinstate"):
            run(*busctl, "call", "org.jindisk1", key, "org.jindisk1.Key", member, "a{sv}", "0")


def test_gdbus(stock: Any) -> None:
    """The same with GLib's tool."""
    to = ("--address", stock.address, "--dest", "org.jindisk1", "--object-path")
    told = run("gdbus", "introspect", *to, WHERE[1])
    assert "Appended(t number);" in told
    assert "readonly t Last = " in told
    options = "{'limit': <uint32 1>, 'verdict': <'refused'>}"
    said = run("gdbus", "call", *to, WHERE[1], "--method", "org.jindisk1.Audit.List", options)
    assert said == "(@aa{sv} [], false)\n"
    said = run("gdbus", "call", *to, "/org/jindisk1", "--method", "org.jindisk1.Manager.GetKey", "none", status=1)
    assert "org.jindisk1.Error.NotFound" in said
    with listening("gdbus", "monitor", "--address", stock.address, "--dest", "org.jindisk1") as monitor:
        while "is owned by" not in monitor.stdout.readline():
            pass
        stock.ctl("key", "revoke", "stock")
        wanted = (
            "org.jindisk1.Audit.Appended (uint64 ",
            "PropertiesChanged ('org.jindisk1.Key', {'State': <'revoked'>}",
        )
        heard: list[str] = []  # perhaps also the last of what an earlier test did
        while not all(any(words in line for line in heard) for words in wanted):
            heard.append(monitor.stdout.readline())
            assert len(heard) < 30, heard
        stock.ctl("key", "reinstate", "stock")


def test_a_client_generated_by_gdbus_codegen(stock: Any, tmp_path: Path) -> None:
    """C, from the shipped XML alone, compiled without a warning: properties, calls, a job, a signal, an error."""
    files = [str(CONTRACT / f"org.jindisk1.{name}.xml") for name in INTERFACES]
    run(
        "gdbus-codegen", "--interface-prefix", "org.jindisk1.", "--c-namespace", "Jindisk",
        "--generate-c-code", str(tmp_path / "jindisk1"), *files,
    )  # fmt: skip
    flags = run("pkg-config", "--cflags", "--libs", "gio-2.0", "gio-unix-2.0").split()
    program = str(tmp_path / "client")
    run(
        "gcc", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-o", program, str(HERE / "client.c"),
        str(tmp_path / "jindisk1.c"), f"-I{tmp_path}", *flags,
    )  # fmt: skip
    said = run(program, stock.address, "stock", status=2)
    lines = dict(line.split(" ", 1) for line in said.splitlines())
    assert lines["state"] == "active"
    assert json.loads(lines["verified"])["rows"] == int(lines["was"])
    assert int(lines["appended"]) == int(lines["was"]) + 1
    assert "org.jindisk1.Error.NotFound" in said


PROXY = """
import asyncio, sys
from dbus_next import Variant, DBusError
from dbus_next.aio import MessageBus

async def main():
    bus = await MessageBus(bus_address=sys.argv[1]).connect()
    async def proxy(path, interface):
        found = await bus.introspect("org.jindisk1", path)
        return bus.get_proxy_object("org.jindisk1", path, found).get_interface("org.jindisk1." + interface)
    manager = await proxy("/org/jindisk1", "Manager")
    audit = await proxy("/org/jindisk1/audit", "Audit")
    heard = asyncio.get_running_loop().create_future()
    audit.on_appended(lambda number: heard.done() or heard.set_result(number))
    rows, more = await audit.call_list({"limit": Variant("u", 1)})
    key = await proxy(await manager.call_get_key("stock"), "Key")
    print(await manager.get_version(), await key.get_state(), rows[0]["number"].value)
    await key.call_revoke({})
    print(await asyncio.wait_for(heard, 240))
    await key.call_reinstate({})
    try:
        await manager.call_get_key("nothing")
    except DBusError as exc:
        print(exc.type)

asyncio.run(main())
"""


def test_a_client_made_of_the_introspection(stock: Any) -> None:
    """dbus-next builds proxies from what the service says of itself."""
    said = run(sys.executable, "-W", "ignore", "-c", PROXY, stock.address).split()
    assert said[1] == "active"
    assert int(said[3]) == int(said[2]) + 1
    assert said[4] == "org.jindisk1.Error.NotFound"
    assert os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") != stock.address, "the address was given, not inherited"
