"""A Debian guest under a real libvirtd over real AF_VSOCK: it boots when all is right, and never otherwise."""

import subprocess
import time
from pathlib import Path

import pytest

from .conftest import BASE, Host

pytestmark = [pytest.mark.guest, pytest.mark.host, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _off_afterwards(host: Host) -> object:
    """Each test leaves the domains off."""
    yield
    for name in ("web", "plain"):
        host.ctl("domain", "stop", name, "--force", "--yes", check=False)


def virsh(*words: str) -> str:
    return subprocess.run(
        ["virsh", "-c", "qemu:///system", *words], capture_output=True, text=True, check=True, timeout=60
    ).stdout


@pytest.fixture(scope="module")
def plain(host: Host) -> str:
    """An image with a LUKS2 root, of the base as it is."""
    host.ctl("image", "build", "plain", "--base", str(BASE), "--format", "luks2")
    return "plain"


def test_a_luks2_root_boots_and_again_after_a_reset(host: Host, plain: str) -> None:
    """From inside: / is a dm-crypt mapping; after a reset the guest attests anew and finds what it wrote."""
    done = host.ctl("launch", plain)
    assert "simulated" in done.stdout
    said = host.wait_console(plain, "witness: done")
    assert "/ is /dev/mapper/root (crypt)" in said
    assert "witness: boots 0" in said
    virsh("reset", plain)
    said = host.wait_console(plain, "witness: done", times=2)
    assert "witness: boots 1" in said
    released = [row for row in host.rows(plain) if row["kind"] == "released"]
    assert [row["simulated"] for row in released] == [True, True]
    assert "volume" not in host.key(plain)
    host.ctl("domain", "stop", plain, "--force", "--yes")
    refused = host.ctl("key", "accept-rollback", plain, "--yes", check=False)
    assert "only JinDisk 2" in refused.stderr
    assert refused.returncode == 1


@pytest.mark.parametrize("file", ["vmlinuz", "initrd", "cmdline"])
def test_a_changed_boot_file_is_refused_by_the_digest(host: Host, file: str) -> None:
    """One byte more in kernel, initrd or command line, and no key leaves."""
    path = host.image("web") / file
    original = path.read_bytes()
    path.write_bytes(original + (b" " if file == "cmdline" else b"\0"))
    try:
        done = host.ctl("launch", "web", check=False)
    finally:
        path.write_bytes(original)
    assert done.returncode == 7
    assert "launch digest" in done.stderr
    assert any("snp.measurement" in finding for finding in host.refusal())
    assert "running" not in virsh("domstate", "web")


def test_a_revoked_image_is_refused(host: Host) -> None:
    """Revocation counts for the next launch, and reinstating undoes it."""
    host.ctl("key", "revoke", "web")
    try:
        done = host.ctl("launch", "web", check=False)
        assert done.returncode == 7
        assert "revoked" in done.stderr
    finally:
        host.ctl("key", "reinstate", "web")


def test_a_header_with_a_null_cipher_is_refused_by_the_guest(host: Host, plain: str) -> None:
    """The genuine key slot under a cipher that encrypts nothing: the guest sees it before it opens anything."""
    disk = host.image(plain) / "disk.img"
    with disk.open("r+b") as file:
        head = file.read(64 << 20)
        at = head.index(b'"encryption":"aes-xts-plain64"', head.index(b"LUKS\xba\xbe"))
        file.seek(at)
        file.write(b'"encryption":"cipher_null-ecb"')
    try:
        done = host.ctl("launch", plain, check=False)
    finally:
        with disk.open("r+b") as file:
            file.seek(at)
            file.write(b'"encryption":"aes-xts-plain64"')
    assert done.returncode == 1
    assert "(E41)" in done.stderr


def test_a_broker_with_another_key_is_refused_by_the_guest(host: Host) -> None:
    """What answers in the broker's place is not spoken to; the image pins the key it was built for."""
    identity = host.state / "broker.pem"
    original = identity.read_bytes()
    host.stop()
    identity.unlink()
    host.start()
    try:
        done = host.ctl("launch", "web", check=False)
    finally:
        host.stop()
        identity.write_bytes(original)
        host.start()
    assert done.returncode == 1
    assert "(E31)" in done.stderr


def test_one_image_runs_once(host: Host) -> None:
    """A second launch is busy, and does not disturb the first."""
    host.ctl("launch", "web")
    done = host.ctl("launch", "web", "--name", "other", check=False)
    assert done.returncode == 6
    assert "web" in done.stderr
    assert "running" in virsh("domstate", "web")


def test_a_killed_service_leaves_nothing_astray(host: Host) -> None:
    """Killed in the middle of a launch: after the next start no device, no socket, and the image can be launched."""
    launch = subprocess.Popen(
        [Path(__file__).parents[2] / ".venv/bin/jindiskctl", "launch", "web"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while "web" not in virsh("list", "--name"):
        assert launch.poll() is None, "the launch ended before its machine was there"
        time.sleep(0.1)
    assert host.daemon is not None
    host.daemon.kill()
    host.daemon.wait()
    launch.wait(60)
    host.start()
    host.ctl("launch", "web")
    devices = subprocess.run(["pgrep", "-c", "-f", "vhost-device-vsock --vm"], capture_output=True, text=True)
    assert devices.stdout.strip() == "1"


def test_no_secret_is_in_clear_where_others_can_read(host: Host) -> None:
    """The key-encryption key is in no log, no XML, no argument list; plaintext of the root is not on the disk."""
    kek = (host.state / "kek").read_bytes()
    places = [host.log.read_bytes(), virsh("dumpxml", "web", "--security-info").encode()]
    places += [path.read_bytes() for path in Path("/var/log/libvirt").rglob("*.log")]
    places += [path.read_bytes() for path in (host.state / "console").iterdir()]
    for place in places:
        assert kek not in place
        assert kek.hex().encode() not in place
    disk = host.image("web") / "disk.img"
    search = ["grep", "-c", "-a", "guest-witness", str(disk)]
    found = subprocess.run(search, capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "0"


def test_a_clone_boots_from_its_own_key(host: Host) -> None:
    """The same system, attested as another image; and the source's key is not asked for."""
    host.ctl("image", "clone", "web", "copy")
    try:
        before = len(host.rows("web"))
        host.ctl("launch", "copy")
        said = host.wait_console("copy", "witness: done")
        assert "witness: / is /dev/nbd0 (disk)" in said
        assert [row["kind"] for row in host.rows("copy")].count("released") == 1
        assert len(host.rows("web")) == before
    finally:
        host.ctl("domain", "stop", "copy", "--force", "--yes", check=False)
        host.ctl("domain", "undefine", "copy", "--yes", check=False)
        host.ctl("image", "remove", "copy", "--yes", check=False)
