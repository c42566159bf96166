"""virsh alone, with the hook installed: a domain that virt-install made boots its encrypted root, or is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import libvirtd
import pytest

from .conftest import ROOT, Host

pytestmark = [pytest.mark.guest, pytest.mark.host, pytest.mark.slow]
NAME = "theirs"


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


def test_virsh_start_boots_the_encrypted_root(host: Host, adopted: str) -> None:
    """No command of ours is used: the guest attests, gets its key and runs, and the list follows it to its end."""
    done = virsh("start", adopted)
    assert done.returncode == 0, done.stderr
    wait_for(host, "running")
    said = host.wait_console(adopted, "witness: / is", within_s=900)
    assert "/ is /dev/" in said
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
