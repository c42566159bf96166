"""Guests that wait for a person: what clients of the bus see of them, and what becomes of them."""

from __future__ import annotations

import concurrent.futures
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rawbus
from ownguest import image_of, played

DEADLINE_S = 240
APPROVAL, PROPERTIES = "org.jindisk1.Approval", "org.freedesktop.DBus.Properties"
NOT_FOUND = 3
UUID = "77777777-7777-4777-8777-777777777777"


@pytest.fixture
def host(daemon: Any, rootfs: Path, tmp_path: Path) -> Any:
    """A service with an image `stock`, whose policy wants a person's approval."""
    daemon.ctl("image", "build", "stock", "--rootfs", str(rootfs), "--vcpus", "2", "--format", "luks2")
    policy = tmp_path / "policy.toml"
    policy.write_text("[release]\napproval = true\n")
    daemon.ctl("policy", "set", "stock", str(policy))
    return daemon


@pytest.fixture
def asking(host: Any, tmp_path: Path) -> Iterator[Any]:
    """A function that has a guest ask for the key of `stock`; it gives a future."""
    manifest, _ = image_of(host, "stock")
    digest = bytes.fromhex(manifest["launch_digest"])
    with concurrent.futures.ThreadPoolExecutor() as threads:

        def ask() -> concurrent.futures.Future[bytes]:
            peer = {"description": f"domain {UUID}"}
            return threads.submit(played, host, manifest["image_id"], digest, tmp_path, **peer)

        yield ask


def listed(host: Any, state: str) -> dict[str, Any]:
    """The approval that is in this state; the service is made to look again until there is one."""
    raw = rawbus.RawBus(host.address)
    key = raw.call("org.jindisk1.Manager", "GetKey", "s", ("stock",))[1][0]
    until = time.monotonic() + DEADLINE_S
    while True:
        assert raw.call("org.jindisk1.Key", "Reinstate", "a{sv}", ({},), path=key) == ("", [])
        _, (objects,) = raw.call("org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
        found = [
            {name: value[1] if isinstance(value, tuple) else value for name, value in there[APPROVAL].items()}
            for there in objects.values()
            if APPROVAL in there
        ]
        if found and found[0]["State"] == state:
            raw.close()
            (one,) = found
            return one
        assert time.monotonic() < until
        time.sleep(0.2)


def test_waiting_guests_are_announced_and_decided_about(host: Any, asking: Any) -> None:
    """Everybody learns that it waits; the one who approves is in the audit log; the guest gets its key."""
    assert host.json("status")["approvals_waiting"] == 0
    raw = rawbus.RawBus(host.address)
    bus = {"destination": "org.freedesktop.DBus", "path": "/org/freedesktop/DBus"}
    rule = "type='signal',sender='org.jindisk1'"
    assert raw.call("org.freedesktop.DBus", "AddMatch", "s", (rule,), **bus)[0] == ""
    with host.spawn("--json", "monitor", "--rows", "0") as monitor:
        assert json.loads(monitor.stdout.readline())["event"] == "service"  # it knows all from here on
        key = asking()
        waits = listed(host, "waiting")
        number = waits["Number"]
        path = f"/org/jindisk1/approval/{number}"
        assert (waits["Image"], waits["Peer"], waits["Simulated"]) == ("stock", f"domain {UUID}", True)
        assert waits["Measurement"] == image_of(host, "stock")[0]["launch_digest"]
        assert host.json("approval", "list")["approvals"] == [{**waits, "Simulated": True}]
        assert not key.done()
        assert host.json("status")["approvals_waiting"] == 1
        assert "1 guest, 1 of them simulated waiting (stock)" in host.ctl("status")
        told = host.json("approval", "approve", str(number))["approved"]
        assert told["Number"] == number
        assert len(key.result(DEADLINE_S)) == 32
        rows = host.json("audit", "list", "--limit", "1000")["rows"]
        (row,) = [row for row in rows if row["kind"] == "approved"]
        assert (row["peer"], json.loads(row["detail"])["approval"]) == (f"user {os.getuid()}", number)
        counts = listed(host, "approved")
        assert counts["Number"] == number
        assert counts["Expires"] >= waits["Expires"]
        assert host.json("approval", "deny", str(number))["denied"]["Number"] == number
        assert host.json("approval", "list")["approvals"] == []
        host.ctl("approval", "deny", str(number), status=NOT_FOUND)
        host.ctl("approval", "approve", str(number), status=NOT_FOUND)
        news = []
        while not news or news[-1]["action"] != "removed":
            item = json.loads(monitor.stdout.readline())
            news += [item] if item["event"] == "approval" else []
        monitor.kill()
    assert [(item["action"], item["data"]["State"]) for item in news] == [
        ("added", "waiting"), ("changed", "approved"), ("removed", "approved"),
    ]  # fmt: skip
    serial = raw.send("org.freedesktop.DBus.Peer", "Ping")
    heard = []
    while True:
        kind, header, body = raw.receive()
        if kind == rawbus.SIGNAL and (header[1] == path or path in body):
            heard.append((header[1], header[3]))
        if header.get(5) == serial:
            break
    raw.close()
    root = "/org/jindisk1"
    assert heard == [
        (root, "InterfacesAdded"), (root, "ApprovalNew"), (path, "PropertiesChanged"), (root, "InterfacesRemoved"),
    ]  # fmt: skip
    _denied_and_asked_again(host, asking)


def _denied_and_asked_again(host: Any, asking: Any) -> None:
    """Nobody approves what waits no longer; the guest asks again by itself."""
    key = asking()
    number = listed(host, "waiting")["Number"]
    raw = rawbus.RawBus(host.address)
    path = f"/org/jindisk1/approval/{number}"
    for options in ({"image": ("s", "stock")}, {"": ("b", True)}):
        assert raw.call(APPROVAL, "Approve", "a{sv}", (options,), path=path)[0] == "org.jindisk1.Error.InvalidArgument"
    assert not key.done()
    assert raw.call(APPROVAL, "Deny", "a{sv}", ({},), path=path) == ("", [])
    assert raw.call(APPROVAL, "Approve", "a{sv}", ({},), path=path)[0] == "org.freedesktop.DBus.Error.UnknownObject"
    raw.close()
    again = listed(host, "waiting")["Number"]
    assert again > number
    host.ctl("approval", "approve", str(again))
    assert len(key.result(DEADLINE_S)) == 32
    assert host.ctl("approval", "list").splitlines()[1].split()[:2] == [str(again), "stock"]
    host.ctl("approval", "deny", str(again))
