"""Block devices of the host on the bus: real udevd, real rules, real helper, a loop device with an image's own root.

Where the kernel has no network block device, opening fails at its very last step, and
all before it must be undone; with one, the guest test shows the rest (tests/device/test_devices_guest.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import devicevolumes
import pytest
from devicehost import BIN, ROOT, UDEVD, DeviceHost, root_of

DEVICE = "org.jindisk1.Device"

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="needs root for namespaces and loop devices"),
    pytest.mark.skipif(not UDEVD.exists(), reason="systemd-udevd is not installed; run scripts/setup"),
]


@pytest.fixture
def host(unstarted) -> Iterator[DeviceHost]:
    found = DeviceHost(unstarted)
    found.start()
    yield found
    found.close()


def audit(host: DeviceHost) -> list[str]:
    return [row["kind"] for row in host.daemon.json("audit", "list")["rows"]]


def test_a_device_comes_is_opened_and_goes(host, rootfs, tmp_path):
    """Seen by its rules, matched to its image, refused or opened as the kernel can, gone with its signals."""
    daemon = host.daemon
    daemon.ctl("image", "build", "web", "--rootfs", str(rootfs), "--vcpus", "1", "--volume", "data:16M")
    disk = daemon.state / "images/web/disk.img"
    offset, size = root_of(disk)
    host.monitor(tmp_path / "signals")
    host.until(lambda: "NameAcquired" in (tmp_path / "signals").read_text(), "the monitor")
    node = host.plug(disk, offset=offset, size=size)
    host.until(lambda: node in host.devices(), "the device")
    found = host.devices()[node]
    manifest = json.loads((disk.parent / "manifest.json").read_text())
    assert (found["Kind"], found["Volume"], found["Image"], found["ImageId"]) == (
        "jindisk2", manifest["volume"]["uuid"], "web", manifest["image_id"],
    )  # fmt: skip
    assert (found["State"], found["MappedNode"], found["OpenedBy"], found["SizeBytes"]) == (
        "closed",
        "",
        4294967295,
        size,
    )
    shown = daemon.json("device", "show", "web")["device"]
    assert shown == found
    assert node in daemon.ctl("device", "list")
    assert "closed" in daemon.ctl("device", "show", node)

    # The contract, as another implementation of D-Bus sees it.
    path = json.loads(
        subprocess.check_output(
            ["busctl", f"--address={daemon.address}", "--json=short", "call", "org.jindisk1", "/org/jindisk1",
             "org.jindisk1.Manager", "GetDevice", "s", node]
        )
    )["data"][0]  # fmt: skip
    words = [
        "gdbus",
        "introspect",
        "--xml",
        "--address",
        daemon.address,
        "--dest",
        "org.jindisk1",
        "--object-path",
        path,
    ]
    node_xml = ET.fromstring(subprocess.check_output(words))
    live = next(item for item in node_xml.findall("interface") if item.get("name") == DEVICE)
    wanted = ET.parse(ROOT / "dbus/org.jindisk1.Device.xml").getroot().find("interface")
    names = [
        [item.get("name") for item in tree.iter() if item.tag in {"method", "property", "arg"}]
        for tree in (live, wanted)
    ]
    assert names[0] == names[1]

    # Others may look, and nothing else: no polkit is on this bus.
    call = ["busctl", f"--address={daemon.address}", "call", "org.jindisk1", path, DEVICE, "Open", "a{sv}", "0"]
    refused = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *call],
                             capture_output=True, text=True, check=False)  # fmt: skip
    assert "denied" in refused.stderr

    if Path("/sys/block/nbd0").exists():
        assert daemon.json("device", "open", "web")["mapped"].startswith("/dev/nbd")
        assert host.devices()[node]["State"] == "open"
        assert daemon.json("device", "close", node) == {"closed": node}
    else:
        text = daemon.ctl("device", "open", "web", status=1)
        assert "modprobe nbd" in text
    # Closed in order, so that the next guest is not told of an interrupted session.
    assert audit(host)[-3:] == ["released", "adopted", "closed"]
    assert host.devices()[node]["State"] == "closed"
    daemon.ctl("device", "close", node, status=3)
    daemon.ctl("device", "open", "/dev/nowhere", status=3)
    (tmp_path / "short").write_bytes(bytes(5))
    daemon.ctl("device", "open", node, "--key-file", str(tmp_path / "short"), status=2)

    # A data volume beside it, by its own key.
    data = host.plug(disk.with_name("volume-data.img"))
    host.until(lambda: data in host.devices(), "the data volume")
    assert (host.devices()[data]["Volume"], host.devices()[data]["Image"]) == (
        manifest["volumes"][0]["volume"]["uuid"], "web",
    )  # fmt: skip
    assert data in daemon.ctl("device", "show", "web", status=2), "which of the two is not for us to say"
    if Path("/sys/block/nbd0").exists():
        assert daemon.json("device", "open", data)["mapped"].startswith("/dev/nbd")
        daemon.ctl("device", "close", data)
    else:
        assert "modprobe nbd" in daemon.ctl("device", "open", data, status=1)
    rows = daemon.json("audit", "list")["rows"][-3:]
    assert [row["kind"] for row in rows] == ["released", "adopted", "closed"]
    assert manifest["volumes"][0]["resource"] in rows[0]["detail"]
    assert host.devices()[data]["State"] == "closed"
    states = {item["resource"]: item["state"] for item in daemon.json("key", "show", "web")["key"]["volumes"]}
    assert states == {manifest["resource"]: "closed", manifest["volumes"][0]["resource"]: "closed"}
    host.unplug(data)

    # A restart finds it again; unplugged, it goes at once.
    host.kill()
    host.start()
    host.until(lambda: node in host.devices(), "the device after a restart")
    before = (tmp_path / "signals").read_text().count("InterfacesRemoved")
    host.unplug(node)
    host.until(lambda: node not in host.devices(), "its going")
    host.until(lambda: (tmp_path / "signals").read_text().count(path) >= 2, "its signals")
    signals = (tmp_path / "signals").read_text()
    assert signals.count("member=InterfacesRemoved") - before >= 1


def test_partitions(host, tmp_path):
    """Of our type and of others, LUKS2 of ours; a file system is left alone. They go with their disk."""
    mib = 1 << 20
    volume = devicevolumes.make_jindisk2(tmp_path / "volume", 16 * mib).read_bytes()
    luks = devicevolumes.luks2_header(8 * mib).ljust(9 * mib, b"\0")
    with (tmp_path / "ext4").open("wb") as file:
        file.truncate(8 * mib)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", tmp_path / "ext4"], check=True)
    parts = [
        ("4A0FEB3F-F302-4B40-A4BA-8B27E42E994B", volume),
        ("0FC63DAF-8483-4772-8E79-3D69D8477DE4", volume),
        ("CA7D7CCB-63ED-4C53-861C-1742536059CC", luks),
        ("0FC63DAF-8483-4772-8E79-3D69D8477DE4", (tmp_path / "ext4").read_bytes()),
        ("4A0FEB3F-F302-4B40-A4BA-8B27E42E994B", bytes(mib)),
    ]
    disk, at, lines = tmp_path / "disk", mib, ["label: gpt"]
    with disk.open("wb") as file:
        for kind, content in parts:
            size = -(-len(content) // mib) * mib
            lines.append(f"start={at // 512}, size={size // 512}, type={kind}")
            file.seek(at)
            file.write(content)
            at += size
        file.truncate(at + mib)
    subprocess.run(["sfdisk", "-q", disk], input="\n".join(lines).encode(), check=True, capture_output=True)
    node = host.plug(disk)
    # Where the kernel has no parser of partition tables, it is told of them.
    subprocess.run(["partx", "--add", node], check=False, capture_output=True)
    wanted = {f"{node}p1": "jindisk2", f"{node}p2": "jindisk2", f"{node}p3": "luks2", f"{node}p5": ""}
    host.until(lambda: {name: item["Kind"] for name, item in host.devices().items()} == wanted, "the partitions")
    (tmp_path / "ext4-key").write_bytes(bytes(32))
    assert "shows no volume" in host.daemon.ctl(
        "device", "open", f"{node}p5", "--key-file", str(tmp_path / "ext4-key"), status=2
    )
    subprocess.run(["partx", "--delete", node], check=True, capture_output=True)
    host.until(lambda: host.devices() == {}, "their going")


def test_nothing_else_is_taken_for_a_volume(host, tmp_path):
    """A file system, a partition table, LUKS of others, zeros, and a volume whose header is damaged."""
    files = {}
    for name in ("ext4", "luks", "zeros", "torn"):
        files[name] = tmp_path / name
        with files[name].open("wb") as file:
            file.truncate(32 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", files["ext4"]], check=True)
    words = ["cryptsetup", "luksFormat", "-q", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000",
             "--key-file=/dev/zero", "--keyfile-size=32", files["luks"]]  # fmt: skip
    subprocess.run(words, check=True, capture_output=True)
    good = tmp_path / "good"
    shutil.copy(files["zeros"], good)
    (tmp_path / "key").write_bytes(bytes(32))
    (tmp_path / "key").chmod(0o600)
    words = [BIN / "jindisksetup", "format", "--yes", "--force", "--key-file", tmp_path / "key", good]
    subprocess.run(words, check=True, capture_output=True)
    head = bytearray(good.read_bytes()[:4096])
    head[100] ^= 1
    files["torn"].write_bytes(bytes(head) + good.read_bytes()[4096:])
    others = [host.plug(file) for file in files.values()]
    node = host.plug(good)
    host.until(lambda: node in host.devices(), "the one that is a volume")
    assert set(host.devices()) == {node}
    assert host.devices()[node]["Image"] == ""
    assert "--key-file" in host.daemon.ctl("device", "open", node, status=2)
    assert others
