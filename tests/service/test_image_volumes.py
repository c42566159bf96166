"""Data volumes added to an image and taken away, by the command line: what is asked, what is said, what is signed."""

from __future__ import annotations

import signal
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

USAGE, NOT_FOUND, BUSY, INTERRUPTED = 2, 3, 6, 130


def serials(daemon: Any) -> list[str | None]:
    """Of the disks of the domain that a launch would define."""
    root = ET.fromstring(daemon.ctl("domain", "xml", "--image", "web"))
    return [disk.findtext("serial") for disk in root.iterfind("devices/disk")]


def test_volumes_come_and_go(daemon: Any, rootfs: Path, tmp_path: Path) -> None:
    """The image measures otherwise, and its keys are released to that alone; a signature goes, or is made again."""
    key = ec.generate_private_key(ec.SECP384R1())
    id_key = tmp_path / "id.pem"
    id_key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    before = daemon.json("image", "build", "web", "--rootfs", str(rootfs), "--id-key", str(id_key))["image"]
    add, remove = ("image", "volume", "add", "web"), ("image", "volume", "remove", "web")
    assert "no volume" in daemon.ctl(*add, "data", status=USAGE)
    assert "between 16777216" in daemon.ctl(*add, "data:1M", status=USAGE)
    assert "choose jindisk or luks2" in daemon.ctl(*add, "data:16M:jindisk1", status=USAGE)
    assert "--no-wait" in daemon.ctl(*add, "data:16M", "--id-key", str(id_key), "--no-wait", status=USAGE)
    daemon.ctl("image", "volume", "add", "none", "data:16M", status=NOT_FOUND)
    with daemon.spawn(*add, "data:16M:/srv/data") as process:
        said, heard = process.communicate(timeout=300)
    assert process.returncode == 0
    after = daemon.json("image", "show", "web")["image"]
    assert said == f"Added volume data: image web measures as {after['LaunchDigest']}.\n"
    assert f"no longer released to {before['LaunchDigest']}" in heard
    assert "its signature was for the old digest and is gone" in heard
    assert "adopted again" in heard
    assert after["IdKeyDigest"] == ""
    assert daemon.json("image", "measure", "web")["launch_digest"] == after["LaunchDigest"] != before["LaunchDigest"]
    shown = daemon.json("key", "show", "web")["key"]
    assert shown["launch-digests"] == [after["LaunchDigest"]]
    assert shown["further-resources"] == [f"default/{after['ImageId']}/data"]
    assert [volume["state"] for volume in shown["volumes"]] == ["closed", "closed"]
    assert serials(daemon) == ["jd-root", "jd-data"]
    assert "exists already" in daemon.ctl(*add, "data:16M", status=BUSY)
    policy = tmp_path / "policy.toml"
    policy.write_text('[snp]\nmeasurements = ["' + "00" * 48 + '"]\n')
    daemon.ctl("policy", "set", "web", str(policy))
    with daemon.spawn(*add, "raw:16M", "--id-key", str(id_key)) as process:
        _, heard = process.communicate(timeout=300)
    assert "its policy names measurements of its own" in heard
    signed = daemon.json("image", "show", "web")["image"]
    assert signed["IdKeyDigest"] == before["IdKeyDigest"]
    assert [volume["name"] for volume in daemon.json("image", "volume", "list", "web")["volumes"]] == ["data", "raw"]
    assert "/srv/data" in daemon.ctl("image", "volume", "list", "web")
    assert "--yes" in daemon.ctl(*remove, "data", status=USAGE)
    daemon.ctl(*remove, "none", "--yes", status=NOT_FOUND)
    assert daemon.ctl(*remove, "data", "--yes").startswith("Removed volume data: image web measures as ")
    assert serials(daemon) == ["jd-root", "jd-raw"]
    assert daemon.json("key", "show", "web")["key"]["further-resources"] == [f"default/{after['ImageId']}/raw"]
    kinds = [row["kind"] for row in daemon.json("audit", "list")["rows"]]
    assert kinds.count("volumes changed") == 3
    assert sorted(path.name for path in (daemon.state / "images/web").iterdir()) == [
        "cmdline", "disk.img", "initrd", "manifest.json", "vmlinuz", "volume-raw.img",
    ]  # fmt: skip
    # ^C while it is made changes nothing.
    last = daemon.json("image", "show", "web")["image"]
    with daemon.spawn("--log-json", *add, "late:64M:luks2") as process:
        for line in process.stderr:
            if '"decrypt"' in line:
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=300)
    assert process.returncode == INTERRUPTED
    assert daemon.json("image", "show", "web")["image"] == last
