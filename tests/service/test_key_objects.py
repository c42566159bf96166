"""Keys, policies and the audit log as objects: who may do what, what is told, and in which portions."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rawbus
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from jindiskd.base import document
from jindiskd.base.secret import Secret
from jindiskd.bus.contract import path_label
from jindiskd.keys import handover
from jindiskd.keys.handover import HandedVolume, Handover

AUDIT, KEY, POLICY, MANAGER = (f"org.jindisk1.{name}" for name in ("Audit", "Key", "Policy", "Manager"))
PROPERTIES, OBJECTS = "org.freedesktop.DBus.Properties", "org.freedesktop.DBus.ObjectManager"
ERROR = "org.jindisk1.Error."
AUDIT_PATH = "/org/jindisk1/audit"


class Listener:
    """A client that hears every signal of the service."""

    def __init__(self, address: str) -> None:
        self.raw = rawbus.RawBus(address)
        bus = {"destination": "org.freedesktop.DBus", "path": "/org/freedesktop/DBus"}
        rule = "type='signal',sender='org.jindisk1'"
        assert self.raw.call("org.freedesktop.DBus", "AddMatch", "s", (rule,), **bus)[0] == ""

    def until_quiet(self) -> list[tuple[str, str, list[Any]]]:
        """Path, member and body of all signals that were sent before now."""
        time.sleep(0.6)  # what is told at most five times a second may still come
        serial = self.raw.send("org.freedesktop.DBus.Peer", "Ping")
        found = []
        while True:
            kind, header, body = self.raw.receive()
            if kind == rawbus.SIGNAL and header[1].startswith("/org/jindisk1"):
                found.append((header[1], header[3], body))
            if header.get(5) == serial:
                return found


@pytest.fixture
def raw(stock: Any) -> Iterator[Any]:
    found = rawbus.RawBus(stock.address)
    yield found
    found.close()


@pytest.fixture
def listener(stock: Any) -> Iterator[Listener]:
    found = Listener(stock.address)
    found.until_quiet()
    yield found
    found.raw.close()


@pytest.fixture
def image_id(stock: Any) -> str:
    return str(next(item["ImageId"] for item in stock.json("image", "list")["images"] if item["Name"] == "stock"))


def values(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value[1] if isinstance(value, tuple) else value for name, value in body.items()}


def rows(raw: Any, **options: Any) -> tuple[list[dict[str, Any]], bool]:
    kinds = {"limit": "u", "after": "t", "before": "t", "since": "t", "until": "t"}
    asked = {name: (kinds.get(name, "s"), value) for name, value in options.items()}
    error, body = raw.call(AUDIT, "List", "a{sv}", (asked,), path=AUDIT_PATH)
    assert error == "", body
    return body[0], body[1]


def test_a_key_and_a_policy_for_each_image(stock: Any, raw: Any, image_id: str) -> None:
    """Found by name and by id, at paths made of the id; what everybody sees is no more than that they are there."""
    label = path_label(image_id)
    for member, interface, path in (
        ("GetKey", KEY, f"/org/jindisk1/key/{label}"),
        ("GetPolicy", POLICY, f"/org/jindisk1/policy/{label}"),
    ):
        for name in ("stock", image_id):
            assert raw.call(MANAGER, member, "s", (name,)) == ("", [path])
        assert raw.call(MANAGER, member, "s", ("x" * 70_000,))[0] == ERROR + "NotFound"
        _, body = raw.call(PROPERTIES, "GetAll", "s", (interface,), path=path)
        told = values(body[0])
        assert (told["ImageId"], told["Name"]) == (image_id, "stock")
        public = {"ImageId", "Name", "Platform", "Simulated", "State", "Created"}
        assert set(told) == (public if interface == KEY else {"ImageId", "Name", "Digest"})
    key = stock.json("key", "show", "stock")["key"]
    assert key["further-resources"] == []
    assert key["resource"].endswith(f"/{image_id}/root")


def changes(heard: list[Any]) -> list[Any]:
    """Without the rows of the audit log, and without objects of earlier jobs, which may go at any time."""
    return [
        one for one in heard if one[1] != "Appended" and not (one[1] == "InterfacesRemoved" and "/job/" in one[2][0])
    ]


def test_signals_of_keys_are_exact(stock: Any, raw: Any, listener: Listener, image_id: str) -> None:
    """A change is told once, by the objects that changed, with the properties that changed, and rows as one number."""
    label = path_label(image_id)
    key, policy = f"/org/jindisk1/key/{label}", f"/org/jindisk1/policy/{label}"
    before = rows(raw, limit=1)[0][-1]["number"]
    assert raw.call(KEY, "Revoke", "a{sv}", ({},), path=key) == ("", [])
    heard = listener.until_quiet()
    changed = [(path, body[0], values(body[1]), body[2]) for path, _, body in changes(heard)]
    assert sorted(changed) == [
        (f"/org/jindisk1/image/{label}", "org.jindisk1.Image", {"State": "revoked"}, []),
        (key, KEY, {"State": "revoked"}, []),
    ]
    assert [body for path, member, body in heard if member == "Appended"] == [[before + 1]]
    row = rows(raw, after=before)[0][0]
    assert (row["kind"], row["image-id"], row["peer"]) == ("revoked", image_id, f"user {os.getuid()}")
    assert raw.call(KEY, "Reinstate", "a{sv}", ({},), path=key) == ("", [])
    listener.until_quiet()
    text = "[release]\nreleases_per_hour = 77\n"
    assert raw.call(POLICY, "Set", "sa{sv}", (text, {}), path=policy) == ("", [1])
    heard = listener.until_quiet()
    assert [(path, member) for path, member, _ in changes(heard)] == [(policy, "PropertiesChanged")]
    digest = next(values(body[1])["Digest"] for _, member, body in heard if member == "PropertiesChanged")
    assert rows(raw, limit=1)[0][-1]["detail"] == json.dumps({"rules": digest})
    assert raw.call(POLICY, "Set", "sa{sv}", (text, {}), path=policy) == ("", [0])
    assert raw.call(POLICY, "Set", "sa{sv}", ("", {}), path=policy) == ("", [1])
    assert raw.call(POLICY, "Set", "sa{sv}", ("x" * 70_000, {}), path=policy)[0] == ERROR + "BadPolicy"


def test_objects_of_an_image_come_and_go_once(stock: Any, listener: Listener, rootfs: Path) -> None:
    """One InterfacesAdded and one InterfacesRemoved for the image, its keys and its policy each, from the root."""
    stock.ctl("image", "build", "passing", "--rootfs", str(rootfs))
    image_id = next(item["ImageId"] for item in stock.json("image", "list")["images"] if item["Name"] == "passing")
    paths = {f"/org/jindisk1/{kind}/{path_label(image_id)}" for kind in ("image", "key", "policy")}
    heard = listener.until_quiet()
    added = [body[0] for path, member, body in heard if (path, member) == ("/org/jindisk1", "InterfacesAdded")]
    assert sorted(path for path in added if "/job/" not in path) == sorted(paths)
    stock.ctl("image", "remove", "passing", "--yes")
    heard = listener.until_quiet()
    gone = [body[0] for path, member, body in heard if (path, member) == ("/org/jindisk1", "InterfacesRemoved")]
    assert sorted(path for path in gone if "/job/" not in path) == sorted(paths)


def test_the_log_comes_in_pages(stock: Any, raw: Any, image_id: str) -> None:
    """Forwards and backwards, without gap or repetition; never more than a thousand rows; filters narrow it."""
    path = f"/org/jindisk1/key/{path_label(image_id)}"
    began = time.time_ns() // 1000
    for _ in range(4):
        raw.call(KEY, "Revoke", "a{sv}", ({},), path=path)
        raw.call(KEY, "Reinstate", "a{sv}", ({},), path=path)
    everything = rows(raw, limit=1000)[0]
    numbers = [row["number"] for row in everything]
    assert numbers == list(range(1, len(numbers) + 1))
    forwards: list[int] = []
    more = True
    while more:
        page, more = rows(raw, limit=3, after=forwards[-1] if forwards else 0)
        forwards += [row["number"] for row in page]
    assert forwards == numbers
    backwards: list[int] = []
    more = True
    while more:
        page, more = rows(raw, limit=3, **({"before": backwards[0]} if backwards else {}))
        backwards[:0] = [row["number"] for row in page]
    assert backwards == numbers
    assert rows(raw, after=numbers[-1]) == ([], False)
    assert len(rows(raw, since=began, limit=1000)[0]) == 8
    assert [row["number"] for row in rows(raw, until=began, limit=1000)[0]] == numbers[:-8]
    assert {row["image-id"] for row in rows(raw, image=image_id)[0]} == {image_id}
    assert rows(raw, image="nothing")[0] == []
    for options in (
        {"limit": ("u", 0)},
        {"limit": ("u", 1001)},
        {"verdict": ("s", "relased")},
        {"guest": ("s", "%' OR 1=1 --")},
        {"guest": ("s", "a" * 200)},
        {"image": ("s", "x" * 200)},
        {"after": ("t", 1 << 63)},
        {"since": ("t", (1 << 64) - 1)},
        {"follow": ("b", True)},
    ):
        assert raw.call(AUDIT, "List", "a{sv}", (options,), path=AUDIT_PATH)[0] == ERROR + "InvalidArgument", options
    until = time.monotonic() + 240
    while (last := raw.call(PROPERTIES, "Get", "ss", (AUDIT, "Last"), path=AUDIT_PATH)[1][0]) != numbers[-1]:
        assert time.monotonic() < until, last
        time.sleep(0.05)


def test_the_command_line_reads_and_follows_the_log(stock: Any) -> None:
    """By the names of images, times as people write them, and rows as they are added, one JSON object a line."""
    stock.ctl("key", "revoke", "stock")
    last = stock.json("audit", "list", "--image", "stock", "--since", "1h", "--limit", "1")["rows"][0]
    assert last["kind"] == "revoked"
    assert stock.json("audit", "list", "--verdict", "released")["rows"] == []
    assert stock.json("audit", "list", "--until", "2001-02-03")["rows"] == []
    assert "no moment" in stock.ctl("audit", "list", "--since", "yesterday", status=2)
    with stock.spawn("--json", "audit", "list", "--follow", "--limit", "1") as process:
        try:
            assert json.loads(process.stdout.readline())["number"] == last["number"]
            stock.ctl("key", "reinstate", "stock")
            row = json.loads(process.stdout.readline())
            assert (row["kind"], row["number"]) == ("reinstated", last["number"] + 1)
        finally:
            process.send_signal(2)
            process.communicate(timeout=120)
        assert process.returncode == 130


def test_what_a_check_found_is_not_for_everybody(stock: Any, raw: Any) -> None:
    """A job's result is given to who started it and to who may inspect, never broadcast."""
    heard = Listener(stock.address)
    _, body = raw.call(AUDIT, "Verify", "a{sv}", ({},), path=AUDIT_PATH)
    job = body[0]
    checked = json.loads(stock.ctl("--json", "audit", "verify"))
    error, body = raw.call("org.jindisk1.Job", "GetResult", "a{sv}", ({},), path=job)
    assert (error, json.loads(body[0])) == ("", checked)
    signals = heard.until_quiet()
    heard.raw.close()
    assert [member for path, member, _ in signals if path == job][-1] == "Completed"
    assert "Result" not in str([body for _, _, body in signals])
    lines = [body[1] for path, member, body in signals if member == "LogMessage" and path == job]
    assert lines == [f"{checked['rows']} rows fit, the last is {checked['head']}"]


def test_keys_are_rotated_by_a_handover(stock: Any, image_id: str, tmp_path: Path) -> None:
    """Sealed to the card of the service, for this image alone; then the old keys are gone, and a row says so."""
    key = stock.json("key", "show", "stock")["key"]
    card = handover.read_card(stock.ctl("key", "card").encode())
    told = Handover(
        image_id=image_id,
        name="stock",
        platform=stock.json("image", "show", "stock")["image"]["Platform"],
        resource=key["resource"],
        launch_digests=tuple(bytes.fromhex(digest) for digest in key["launch-digests"]),
        created="2026-01-01T00:00:00+00:00",
        volumes=(HandedVolume(volume=key["volumes"][0]["volume"], resource=key["resource"]),),
    )

    def sealed(document_: Handover, recipient: dict[str, str]) -> str:
        path = tmp_path / "handover.json"
        path.write_bytes(document.dump(handover.seal(document_, {told.resource: Secret(bytes(32))}, {}, recipient)))
        return str(path)

    other = {"EC": ec.generate_private_key(ec.SECP256R1()).public_key()}["EC"]
    pem = other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    strange = sealed(told, handover.recipient_of_pem(pem))
    assert "--yes" in stock.ctl("key", "rotate", "stock", strange, status=2)
    assert "does not open" in stock.ctl("key", "rotate", "stock", strange, "--yes", status=8)
    foreign = sealed(document.load(Handover, document.dump(told).replace(image_id.encode(), b"0" * 8), document="x"),
                     card.transfer_key)  # fmt: skip
    assert "is of image" in stock.ctl("key", "rotate", "stock", foreign, "--yes", status=8)
    (tmp_path / "none.json").write_text("{}")
    stock.ctl("key", "rotate", "stock", str(tmp_path / "none.json"), "--yes", status=8)
    assert stock.json("key", "show", "stock")["key"] == key, "nothing was changed"
    stock.ctl("key", "rotate", "stock", sealed(told, card.transfer_key), "--yes")
    assert stock.json("audit", "list", "--limit", "1")["rows"][0]["kind"] == "rotated"
    assert stock.json("key", "show", "stock")["key"]["volumes"][0]["state"] == "unknown"


def test_a_recovery_copy_needs_a_recovery_key(stock: Any, image_id: str, tmp_path: Path) -> None:
    """It opens with the private half, which never was here."""
    private = ec.generate_private_key(ec.SECP256R1())
    public = tmp_path / "recovery.pem"
    copy = tmp_path / "copy.json"
    assert "no recovery key" in stock.ctl("key", "recovery", "copy", "--output", str(copy), status=1)
    public.write_text("-----BEGIN NONSENSE-----")
    stock.ctl("key", "recovery", "set-key", str(public), status=2)
    public.write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    stock.ctl("key", "recovery", "set-key", str(public))
    stock.ctl("key", "recovery", "copy", "--output", str(copy))
    assert copy.stat().st_mode & 0o777 == 0o600
    found = [handover.read(json.dumps(item).encode()) for item in json.loads(copy.read_text())["handovers"]]
    mine = next(item for item in found if item.image_id == image_id)
    opened = handover.open_(mine, private)
    assert len(opened.keys[mine.resource]) == 32
    opened.close()
