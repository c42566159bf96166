"""virsh alone, with the hook installed: a domain that virt-install made boots its encrypted root, or is refused."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import libvirtd
import pytest

from .conftest import ROOT, Host

pytestmark = [pytest.mark.guest, pytest.mark.host, pytest.mark.slow]
NAME = "theirs"
WRITTEN = "HOST-WROTE-THIS"
CREDENTIAL = (
    "io.systemd.credential.binary:tmpfiles.extra="
    + base64.b64encode(f"w /dev/ttyS0 - - - - {WRITTEN}\\n\n".encode()).decode()
)
"""What systemd would take from SMBIOS, and do (systemd.system-credentials(7), tmpfiles.d(5))."""
OPTIONS = "systemd.log_level=debug systemd.log_target=console"
"""What systemd would take from the EFI variable SystemdOptions."""


def efi_variable(name: str, guid: str, text: str) -> bytes:
    """A variable as OVMF keeps it in the file `NvVars`: lengths and attributes of 32 bits, little-endian; UTF-16.

    The attributes are those of a variable that stays and that the system may read (UEFI, GetVariable()).
    """
    key, value = ((word + "\0").encode("utf-16-le") for word in (name, text))
    head = len(key).to_bytes(4, "little") + key + uuid.UUID(guid).bytes_le
    return head + (7).to_bytes(4, "little") + len(value).to_bytes(4, "little") + value


def write_variable(disk: Path, folder: Path) -> None:
    """Put what the host would have the guest's firmware know on the EFI partition of an image."""
    table = json.loads(subprocess.check_output(["sfdisk", "--json", disk]))["partitiontable"]
    start = next(part["start"] for part in table["partitions"] if part["name"] == "UEFI") * 512
    file = folder / "NvVars"
    file.write_bytes(efi_variable("SystemdOptions", "8cf2644b-4b0b-428f-9387-6d876050dc67", OPTIONS))
    subprocess.run(["mcopy", "-D", "o", "-i", f"{disk}@@{start}", file, "::NvVars"], check=True, capture_output=True)


def virsh(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["virsh", "-c", "qemu:///system", *words], capture_output=True, text=True, check=False, timeout=90
    )


@pytest.fixture(scope="module")
def adopted(host: Host) -> Iterator[str]:
    """A domain made by virt-install, adopted by the command line; the hook is installed and libvirtd has found it."""
    folder = Path("/etc/libvirt/hooks")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "libvirt-hooks/qemu", folder / "qemu")
    (folder / "qemu").chmod(0o755)
    found = libvirtd.pid()
    assert found is not None
    os.kill(found, signal.SIGHUP)
    words = [
        "virt-install", "--connect", "qemu:///system", "--name", NAME, "--memory", "1024", "--virt-type", "qemu",
        "--import", "--osinfo", "generic", "--machine", "q35", "--graphics", "none", "--network", "none",
        "--disk", f"path={host.image('web') / 'disk.img'},format=raw,bus=virtio", "--print-xml", "--check", "all=off",
        f"--qemu-commandline=-smbios type=11,value={CREDENTIAL}",
    ]  # fmt: skip
    text = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    subprocess.run(
        ["virsh", "-c", "qemu:///system", "define", "/dev/stdin"],
        input=text,
        check=True,
        text=True,
        capture_output=True,
        timeout=60,
    )
    said = host.ctl("domain", "adopt", NAME, "web").stdout
    assert "guest of image web" in said
    yield NAME
    virsh("destroy", NAME)
    virsh("undefine", NAME)
    (folder / "qemu").unlink()


@pytest.fixture(autouse=True)
def _off_afterwards(adopted: str) -> Iterator[None]:
    """Each test leaves the domain off."""
    yield
    virsh("destroy", adopted)


def state(host: Host) -> dict[str, object]:
    return next(item for item in host.json("domain", "list")["domains"] if item["Name"] == NAME)


def wait_for(host: Host, wanted: str, within_s: float = 900) -> None:
    end = time.monotonic() + within_s
    while (found := state(host))["State"] != wanted:
        assert time.monotonic() < end, f"{found}\n{host.log.read_text()[-3000:]}"
        time.sleep(0.5)


def test_virsh_start_boots_the_encrypted_root(host: Host, adopted: str, tmp_path: Path) -> None:
    """No command of ours is used: the guest attests, gets its key and runs, and the list follows it to its end.

    What the host says to the system in there, by SMBIOS and by an EFI variable, is not heard.
    """
    write_variable(host.image("web") / "disk.img", tmp_path)
    done = virsh("start", adopted)
    assert done.returncode == 0, done.stderr
    assert CREDENTIAL in virsh("dumpxml", adopted).stdout
    wait_for(host, "running")
    said = host.wait_console(adopted, "witness: / is", within_s=900)
    assert "/ is /dev/" in said
    assert WRITTEN not in said
    assert " changed dead -> " not in said  # as systemd tells of units where it is told to tell all
    assert virsh("suspend", adopted).returncode == 0
    host.until(lambda: f"virsh resume {adopted}" in str(state(host)["Reason"]), "word of the pause")
    assert state(host)["State"] == "running"
    assert virsh("resume", adopted).returncode == 0
    host.until(lambda: state(host)["Reason"] == "", "word of its end")
    rows = host.json("audit", "list")["rows"]
    assert "released" in {row["kind"] for row in rows}
    assert virsh("destroy", adopted).returncode == 0
    wait_for(host, "stopped")


def test_an_altered_kernel_is_refused_by_virsh(host: Host, adopted: str) -> None:
    """With our sentence, and nothing was started."""
    path = host.image("web") / "vmlinuz"
    original = path.read_bytes()
    path.write_bytes(original + b"\0")
    try:
        done = virsh("start", adopted)
    finally:
        path.write_bytes(original)
    assert done.returncode != 0
    assert f"jindisk: domain '{adopted}' is not started: its kernel, {path}, is not what image 'web'" in done.stderr
    assert "shut off" in virsh("domstate", adopted).stdout


def test_a_revoked_image_is_refused_by_virsh(host: Host, adopted: str) -> None:
    """The sentence names the command that undoes it."""
    host.ctl("key", "revoke", "web")
    done = virsh("start", adopted)
    host.ctl("key", "reinstate", "web")
    assert done.returncode != 0
    assert "the key of image 'web' is revoked: 'jindiskctl key reinstate web' undoes that" in done.stderr


@pytest.mark.long
def test_without_the_service(host: Host, adopted: str) -> None:
    """Ours is refused, the service that comes back starts it."""
    host.stop()
    done = virsh("start", adopted)
    host.start()
    assert done.returncode != 0
    assert "the service jindiskd is not running" in done.stderr
    end = time.monotonic() + 60
    while not any(item["Name"] == adopted for item in host.json("domain", "list")["domains"]):
        assert time.monotonic() < end
        time.sleep(0.2)
    done = virsh("start", adopted)
    assert done.returncode == 0, done.stderr
    wait_for(host, "running")
    virsh("destroy", adopted)
    wait_for(host, "stopped")


@pytest.mark.long
def test_launch_starts_the_same_domain(host: Host, adopted: str) -> None:
    """The definition stays its owner's."""
    before = virsh("dumpxml", "--inactive", adopted).stdout
    host.ctl("launch", "web", "--name", adopted)
    assert virsh("dumpxml", "--inactive", adopted).stdout == before
    host.ctl("domain", "stop", adopted, "--force", "--yes")


@pytest.mark.long
def test_volumes_come_and_go_and_another_disk_is_first(host: Host, adopted: str) -> None:
    """The image's disk is the second, behind one of three partitions that the owner put there; with a data volume that
    the image was given since. Each change is refused by virsh until the domain is adopted again.
    """
    own = host.state / "own.img"
    own.write_bytes(bytes(64 << 20))
    layout = "label: gpt\n" + "size=8MiB\n" * 3
    subprocess.run(["sfdisk", "-q", own], input=layout, text=True, check=True, capture_output=True, timeout=60)
    root = ET.fromstring(virsh("dumpxml", "--inactive", "--security-info", adopted).stdout)
    devices = root.find("devices")
    assert devices is not None
    for disk in devices.findall("disk"):
        for address in disk.findall("address"):
            disk.remove(address)
        disk.find("target").set("dev", "vdb")  # type: ignore[union-attr]  # each has one
    first = ET.fromstring(
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{own}'/>"
        "<target dev='vda' bus='virtio'/></disk>"
    )
    devices.insert(0, first)
    file = host.state / "domain.xml"
    file.write_text(ET.tostring(root, encoding="unicode"))
    assert virsh("define", str(file)).returncode == 0

    host.ctl("image", "volume", "add", "web", "data:32M:/srv/data")
    again = f"jindiskctl domain adopt {adopted} web"
    done = virsh("start", adopted)
    assert done.returncode != 0
    assert "<serial>jd-data</serial> stands there 0 times" in done.stderr
    assert again in done.stderr
    host.ctl("domain", "adopt", adopted, "web")
    done = virsh("start", adopted)
    assert done.returncode == 0, done.stderr
    wait_for(host, "running")
    said = host.wait_console(adopted, "witness: done")
    assert "witness: /srv/data is /dev/nbd1" in said
    assert "witness: /dev/disk/by-jindisk/data is /dev/nbd1, active" in said
    busy = host.ctl("image", "volume", "remove", "web", "data", "--yes", check=False)
    assert busy.returncode == 6, busy.stderr
    virsh("destroy", adopted)
    wait_for(host, "stopped")

    host.ctl("image", "volume", "remove", "web", "data", "--yes")
    done = virsh("start", adopted)
    assert done.returncode != 0
    assert "volume-data.img', which is no volume of the image any more" in done.stderr
    assert again in done.stderr
    host.ctl("domain", "adopt", adopted, "web")
    assert "jd-data" not in virsh("dumpxml", "--inactive", adopted).stdout
    done = virsh("start", adopted)
    assert done.returncode == 0, done.stderr
    virsh("destroy", adopted)
