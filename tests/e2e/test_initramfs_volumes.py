"""Data volumes of guests that boot by the initramfs of their own distribution: opened with the root's attestation,
mounted before the system's init, closed at the end; or no boot, and no shell.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
from distribution import make_disk, make_system

from .conftest import Host, cleared, started, virsh

pytestmark = [pytest.mark.guest, pytest.mark.host, pytest.mark.slow, pytest.mark.long]

SYSTEMS = [("trixie", "initramfs-tools", "jindisk"), ("trixie", "dracut", "luks2")]
"""Each with another format of the root."""
VOLUMES = ("data:32M:/srv/data", "logs:32M:luks2:/srv/logs")


@pytest.fixture(scope="module", params=SYSTEMS, ids="-".join)
def root_format(request: pytest.FixtureRequest) -> str:
    """How the root is encrypted."""
    return str(request.param[2])


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest, root_format: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A service with an image, `many`, of a system whose own tools have made its initramfs."""
    ((release, maker, _),) = (one for one in SYSTEMS if one[2] == root_format)
    directory = tmp_path_factory.mktemp("system")
    make_disk(make_system(release, maker, directory), directory / "disk.img")
    words = ["--format", root_format, "--initrd", "system"]
    for volume in VOLUMES:
        words += ["--volume", volume]
    with cleared(started("initramfs-volumes")) as made:
        made.ctl("image", "build", "many", "--base", str(directory / "disk.img"), *words)
        shutil.rmtree(directory)
        yield made


@pytest.fixture(autouse=True)
def _off_afterwards(host: Host) -> Iterator[None]:
    yield
    host.ctl("domain", "stop", "many", "--force", "--yes", check=False)


def console(host: Host) -> str:
    """All that the guest has printed since it was started."""
    return host.wait_console("many", "")


def shut_down(host: Host) -> None:
    """Press the power button until the system has heard it: a busy machine's may not listen yet."""
    for _ in range(6):
        host.ctl("domain", "stop", "many", check=False)
        if host.domain("many")["State"] == "stopped":
            return
    host.wait_off("many")


def wait_for_power_off(host: Host) -> None:
    """Until the machine is off, whatever the service calls that."""
    host.until(lambda: virsh("domstate", "many").strip() == "shut off", "the end of it", within_s=900)


def kinds(host: Host) -> list[str]:
    return [row["kind"] for row in host.rows("many")]


def volumes(host: Host) -> dict[str, str]:
    """The JinDisk 2 volumes by name, each with its state."""
    return {item["resource"].rpartition("/")[2]: item["state"] for item in host.key("many")["volumes"]}


def no_shell(host: Host) -> bool:
    """Whether a guest that was given up has shown no prompt."""
    said = console(host)
    return not any(prompt in said for prompt in ("(initramfs)", "sh-5", ":/#", "emergency mode", "BusyBox"))


def test_data_volumes_are_opened_mounted_and_closed(host: Host, root_format: str) -> None:
    """With the root's attestation and before the system's init; what is written to each is there the next time."""
    host.ctl("launch", "many")
    said = host.wait_console("many", "witness: done")
    root = "/dev/mapper/root (crypt)" if root_format == "luks2" else "/dev/nbd0 (disk)"
    for words in (
        f"/ is {root}",
        "/srv/data is /dev/nbd1, boots 0",
        "/srv/logs is /dev/mapper/jindisk-logs, boots 0",
        "/dev/disk/by-jindisk/data is /dev/nbd1, active",
    ):
        assert f"witness: {words}" in said
    assert re.search(r"witness: /dev/disk/by-jindisk/logs is /dev/dm-\d, active", said)
    wanted = {"data"} | ({"root"} if root_format == "jindisk" else set())
    assert volumes(host) == dict.fromkeys(wanted, "open")
    shut_down(host)
    assert volumes(host) == dict.fromkeys(wanted, "closed"), console(host)[-3000:]
    host.ctl("launch", "many")
    said = host.wait_console("many", "witness: done")
    for words in ("boots 1", "/srv/data is /dev/nbd1, boots 1", "/srv/logs is /dev/mapper/jindisk-logs, boots 1"):
        assert f"witness: {words}" in said
    shut_down(host)


def test_a_wrong_or_old_data_disk_stops_the_boot(host: Host, tmp_path: Path) -> None:
    """Exchanged ones: no key is asked for. An old copy: the broker hears which, and it can be accepted. Another start
    with the right disks is as ever, and no shell is had from any."""
    data, logs = (host.image("many") / f"volume-{name}.img" for name in ("data", "logs"))
    old = tmp_path / "old.img"
    subprocess.run(["cp", "--sparse=always", data, old], check=True)
    before, exchanged = kinds(host), data.with_name(".exchanged")
    data.rename(exchanged)
    logs.rename(data)
    exchanged.rename(logs)
    try:
        done = host.ctl("launch", "many", check=False)
        wait_for_power_off(host)
    finally:
        logs.rename(exchanged)
        data.rename(logs)
        exchanged.rename(data)
    assert done.returncode == 1
    assert "(E62)" in done.stderr
    assert kinds(host) == before, "no key was asked for"
    assert no_shell(host)
    host.ctl("launch", "many")
    host.wait_console("many", "witness: done")
    shut_down(host)
    now = tmp_path / "now.img"
    subprocess.run(["cp", "--sparse=always", data, now], check=True)
    subprocess.run(["cp", "--sparse=always", old, data], check=True)
    done = host.ctl("launch", "many", check=False)
    wait_for_power_off(host)
    assert done.returncode == 7, done.stderr
    for words in ("the disk of its volume 'data' is not in the latest state", "--volume data", "volume.stale"):
        assert words in done.stderr
    assert no_shell(host)
    subprocess.run(["cp", "--sparse=always", now, data], check=True)
    host.ctl("launch", "many")
    assert "/srv/data is /dev/nbd1" in host.wait_console("many", "witness: done")


def test_a_missing_data_disk_stops_the_boot(host: Host, tmp_path: Path) -> None:
    """A host that starts the image behind the service's back without it: the machine goes off before it says anything
    to anybody."""
    domain = ET.fromstring(host.ctl("domain", "xml", "--image", "many").stdout)
    domain.find("name").text = "alone"
    devices = domain.find("devices")
    for disk in devices.findall("disk"):
        if disk.findtext("serial") == "jd-data":
            devices.remove(disk)
    for child in [*domain]:
        if child.tag in {"uuid", "metadata", "launchSecurity"} or child.tag.endswith("commandline"):
            domain.remove(child)
    for child in devices.findall("vsock"):
        devices.remove(child)
    log = host.state / "console/alone.log"  # where QEMU may write
    for serial in devices.findall("serial") + devices.findall("console"):
        devices.remove(serial)
    serial = ET.SubElement(devices, "serial", type="file")
    ET.SubElement(serial, "source", path=str(log))
    (tmp_path / "alone.xml").write_text(ET.tostring(domain, encoding="unicode"))
    before = kinds(host)
    virsh("create", str(tmp_path / "alone.xml"))
    try:
        host.until(lambda: "alone" not in virsh("list", "--name", "--all").split(), "the end of it", within_s=900)
    finally:
        virsh("destroy", "alone", check=False)
    said = log.read_text(errors="replace")
    assert "jindisk: E60" in said
    assert "(initramfs)" not in said
    assert kinds(host) == before
