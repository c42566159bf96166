"""Guests that boot by the initramfs of their own distribution, which the distribution's own tools made.

A Debian root, our package installed in it, update-initramfs or dracut run by that, the whole built into an image and
started under a real libvirtd: it attests, opens its root, and closes it at the end; and never gives a shell.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from distribution import make_disk, make_initramfs, make_system

from jindiskd.guest.config import PATH

from .conftest import Host, cleared, started, virsh

pytestmark = [pytest.mark.guest, pytest.mark.host, pytest.mark.slow, pytest.mark.long]

SYSTEMS = [("bookworm", "initramfs-tools"), ("trixie", "initramfs-tools"), ("trixie", "dracut")]


@pytest.fixture(scope="module", params=SYSTEMS, ids="-".join)
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The system's root in the clear, with `disk.img` beside it."""
    directory = tmp_path_factory.mktemp("system")
    root = make_system(*request.param, directory)
    make_disk(root, directory / "disk.img")
    yield root
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def host(system: Path) -> Iterator[Host]:
    """A service with two images of it, `mine` with a JinDisk 2 root and `plain` with a LUKS2 root."""
    disk = system.with_name("disk.img")
    with cleared(started("initramfs")) as made:
        for name, kind in (("mine", "jindisk"), ("plain", "luks2")):
            made.ctl("image", "build", name, "--base", str(disk), "--format", kind, "--initrd", "system")
        yield made


@pytest.fixture(autouse=True)
def _off_afterwards(host: Host) -> Iterator[None]:
    yield
    for name in ("mine", "plain"):
        host.ctl("domain", "stop", name, "--force", "--yes", check=False)


def console(host: Host, name: str) -> str:
    """All that the guest has printed since it was started."""
    return host.wait_console(name, "")


def shut_down(host: Host, name: str) -> None:
    """Press the power button until the system has heard it: a busy machine's may not listen yet."""
    for _ in range(6):
        host.ctl("domain", "stop", name, check=False)
        if host.domain(name)["State"] == "stopped":
            return
    host.wait_off(name)


def wait_for_power_off(host: Host, name: str) -> None:
    """Until the machine is off, whatever the service calls that."""
    host.until(lambda: virsh("domstate", name).strip() == "shut off", f"the end of {name}", within_s=900)


def kinds(host: Host, image: str) -> list[str]:
    return [row["kind"] for row in host.rows(image)]


def test_a_jindisk_root_boots_and_is_closed_at_the_end(host: Host) -> None:
    """Attested, opened before the system's init, served to the end, and closed in order; what it wrote is there."""
    done = host.ctl("launch", "mine")
    assert "runs from its encrypted root" in done.stdout
    said = host.wait_console("mine", "witness: done")
    assert "/ is /dev/nbd0" in said
    assert "served by jindisk-storage, which was there before systemd" in said
    assert host.key("mine")["volumes"][0]["state"] == "open"
    shut_down(host, "mine")
    assert host.key("mine")["volumes"][0]["state"] == "closed", console(host, "mine")[-3000:]
    assert kinds(host, "mine")[-3:] == ["released", "adopted", "closed"]
    host.ctl("launch", "mine")
    said = host.wait_console("mine", "witness: done")
    assert "witness: boots 1" in said


def test_a_luks2_root_boots(host: Host) -> None:
    """The header is checked, and the mapping is where the distribution's scripts look for the root."""
    host.ctl("launch", "plain")
    said = host.wait_console("plain", "witness: done")
    assert "/ is /dev/mapper/root (crypt)" in said
    shut_down(host, "plain")
    assert kinds(host, "plain")[-1] == "released"


@pytest.mark.parametrize("word", ["altered", "break=premount rd.break=pre-mount"])
def test_an_altered_command_line_is_refused_without_a_shell(host: Host, word: str) -> None:
    """A word behind the owner's back is another digest; one that asks for a shell is not given one either."""
    cmdline = host.image("mine") / "cmdline"
    original = cmdline.read_bytes()
    released = kinds(host, "mine").count("released")
    cmdline.write_bytes(original + b" " + word.encode())
    try:
        done = host.ctl("launch", "mine", check=False)
    finally:
        cmdline.write_bytes(original)
    assert done.returncode == 7 or "(E47)" in done.stderr, done.stderr
    wait_for_power_off(host, "mine")
    said = console(host, "mine")
    assert kinds(host, "mine").count("released") == released
    for prompt in ("(initramfs)", "sh-5", ":/#", "emergency mode", "Give root password", "BusyBox"):
        assert prompt not in said


def test_a_root_that_does_not_mount_gives_no_shell(host: Host, tmp_path: Path) -> None:
    """With the key released and the volume open, a shell would be the worst: the machine goes off with a code."""
    disk = host.image("plain") / "disk.img"
    manifest = json.loads((host.image("plain") / "manifest.json").read_text())
    (offset,) = (part["offset_bytes"] for part in manifest["partitions"] if part["name"] == "jindisk-rootfs")
    start = offset + manifest["volume"]["header_bytes"]
    with disk.open("r+b") as file:
        file.seek(start)
        superblock = file.read(8192)
        file.seek(start)
        file.write(bytes(8192))
    try:
        done = host.ctl("launch", "plain", check=False)
        wait_for_power_off(host, "plain")
    finally:
        with disk.open("r+b") as file:
            file.seek(start)
            file.write(superblock)
    said = console(host, "plain")
    assert kinds(host, "plain")[-1] == "released"
    assert done.returncode == 1
    assert "(E47)" in done.stderr
    assert "(initramfs)" not in said
    assert ":/#" not in said


def test_an_initramfs_that_the_guest_makes_later_attests(host: Host, system: Path, tmp_path: Path) -> None:
    """As after an update of the kernel inside: the hooks find the configuration in the root, the owner allows the new
    digest, and the guest starts from what it made itself."""
    built = (host.image("plain") / "initrd").read_bytes()
    before = host.json("image", "show", "plain")["image"]["LaunchDigest"]
    words = ["cpio", "-i", "--to-stdout", "--quiet", PATH]
    tail = built[built.rindex(b"07070100000001") :]
    config = subprocess.run(words, input=tail, capture_output=True, check=True).stdout
    (system / PATH).write_bytes(config)
    made = make_initramfs(system)
    (system / PATH).unlink()
    assert not built.startswith(made.read_bytes())
    kernel = made.with_name(made.name.replace("initrd.img", "vmlinuz"))
    host.ctl("image", "update", "plain", "--kernel", str(kernel), "--initrd", str(made))
    digest = host.json("image", "show", "plain")["image"]["LaunchDigest"]
    assert digest != before
    host.ctl("image", "measure", "plain")
    policy = tmp_path / "policy.toml"
    policy.write_text(f'[snp]\nmeasurements = ["{digest}"]\n')
    host.ctl("policy", "set", "plain", str(policy))
    host.ctl("launch", "plain")
    assert "/ is /dev/mapper/root (crypt)" in host.wait_console("plain", "witness: done")


@pytest.mark.parametrize("system", [("trixie", "dracut")], ids="-".join, indirect=True)
def test_dracut_without_systemd_is_told_and_makes_nothing(system: Path) -> None:
    """Nothing would open the root there: the initramfs that was there stays, and a sentence says what to do."""
    (made,) = (system / "boot").glob("initrd.img-*")
    before = made.read_bytes()
    left_out = system / "etc/dracut.conf.d/left-out.conf"
    left_out.write_text('omit_dracutmodules+=" systemd "\n')
    try:
        with pytest.raises(AssertionError, match="have dracut include its module systemd"):
            make_initramfs(system)
    finally:
        left_out.unlink()
    assert made.read_bytes() == before
