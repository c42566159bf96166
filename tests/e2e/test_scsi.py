"""A guest whose disks are on a virtio SCSI controller: launched, and adopted with others before them; what has no
driver is refused."""

from __future__ import annotations

import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator

import pytest

from .conftest import BASE, TOOLS, Host, cleared, needed, started, virsh

pytestmark = [pytest.mark.guest, pytest.mark.host, pytest.mark.slow, pytest.mark.long]
USAGE, INTEGRITY = 2, 8


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A service with an image for such disks, `web`, which has a data volume."""
    needed(TOOLS / "bin/vhost-device-vsock", BASE)
    with cleared(started("scsi")) as made:
        words = ("--disk-bus", "scsi", "--volume", "data:32M:/srv/data")
        made.ctl("image", "build", "web", "--base", str(BASE), *words)
        yield made


@pytest.fixture(autouse=True)
def _off_afterwards(host: Host) -> Iterator[None]:
    yield
    for name in ("web", "theirs"):
        virsh("destroy", name, check=False)


def test_a_launched_guest_has_its_disks_there(host: Host) -> None:
    """Root and data are found by what is on them and by their serial numbers."""
    host.ctl("launch", "web")
    said = host.wait_console("web", "witness: done")
    assert "witness: / is /dev/nbd0" in said
    assert "witness: /srv/data is /dev/nbd1" in said
    disks = ET.fromstring(virsh("dumpxml", "web")).findall("devices/disk/target")
    assert {disk.get("bus") for disk in disks} == {"scsi"}
    host.ctl("domain", "stop", "web", check=False)
    host.wait_off("web")


def test_an_adopted_guest_finds_its_root_behind_another_disk(host: Host, tmp_path) -> None:
    """The image's disk is `sdb` here, and the data volume's one of virtio; on other buses it is refused."""
    other = host.state / "other.img"  # where QEMU may read
    other.write_bytes(bytes(4 << 20))
    words = [
        "virt-install", "--connect", "qemu:///system", "--name", "theirs", "--memory", "1024", "--virt-type", "qemu",
        "--import", "--osinfo", "generic", "--machine", "q35", "--graphics", "none", "--network", "none",
        "--controller", "type=scsi,model=virtio-scsi", "--disk", f"path={other},format=raw,bus=scsi",
        "--disk", f"path={host.image('web') / 'disk.img'},format=raw,bus=scsi", "--print-xml", "--check", "all=off",
    ]  # fmt: skip
    text = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    for old, new, word in (
        ("virtio-scsi", "lsilogic", "SCSI controller 0 is 'lsilogic': make it 'virtio-scsi'"),
        ('bus="scsi"', 'bus="sata"', "of the image's disk is 'sata'"),
    ):
        assert old in text
        define(text.replace(old, new), tmp_path)
        done = host.ctl("domain", "adopt", "theirs", "web", check=False)
        assert done.returncode == INTEGRITY, done.stderr
        assert word in done.stderr
        virsh("undefine", "theirs")
    define(text, tmp_path)
    host.ctl("domain", "adopt", "theirs", "web")
    host.ctl("domain", "start", "theirs")
    said = host.wait_console("theirs", "witness: done")
    assert "witness: / is /dev/nbd0" in said
    assert "witness: /srv/data is /dev/nbd1" in said
    virsh("destroy", "theirs")
    virsh("undefine", "theirs")


def define(text: str, folder) -> None:
    """Define a domain as somebody else would."""
    (folder / "theirs.xml").write_text(text)
    virsh("define", str(folder / "theirs.xml"))


def test_an_image_for_virtio_disks_says_how_to_build_it(host: Host) -> None:
    """And a bus that there is none of is refused when the image is asked for."""
    done = host.ctl("image", "build", "no", "--base", str(BASE), "--disk-bus", "sata", check=False)
    assert done.returncode == USAGE
