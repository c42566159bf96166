"""SEV through a real libvirtd: paused start, measurement, judgement, injection, and a guest that boots by its secret.

The emulator stands in for one with SEV, behind it is a simulated secure processor; nothing is encrypted. The owner's
side, libvirt, the firmware, the guest's kernel and agent are the real ones.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sevmounts

from jindiskd.sim.sev_platform import SevPlatformKeys

from .conftest import BASE, TOOLS, Host, needed

pytestmark = [pytest.mark.guest, pytest.mark.host, pytest.mark.long]
STATE = Path("/var/lib/jindiskd-sev")
LOG = Path("/var/log/libvirt/qemu/sev.log")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    needed(TOOLS / "share/ovmf/OVMF.amdsev.fd", BASE)
    made = Host(STATE)
    shutil.copy(TOOLS / "share/ovmf/OVMF.amdsev.fd", STATE / "tools/OVMF.amdsev.fd")
    file = STATE / "jindiskd.toml"
    text = file.read_text().replace("launch_timeout_s = 150", "launch_timeout_s = 900")
    text = text.replace('"simulated-snp"', '"simulated-sev"\nformat = "luks2"')
    file.write_text(text.replace("tools/OVMF.fd", "tools/OVMF.amdsev.fd"))
    with sevmounts.sev_machine("e2e", SevPlatformKeys.load_or_create(STATE / "simulated-sev.json")):
        made.start()
        try:
            made.ctl("image", "build", "sev", "--base", str(BASE), "--volume", "data:32M:luks2:/srv/data")
            yield made
        finally:
            made.clear()
            made.stop()


def virsh(*words: str) -> str:
    return subprocess.run(
        ["virsh", "-c", "qemu:///system", *words], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def rows(host: Host) -> list[dict[str, object]]:
    found: list[dict[str, object]] = host.json("audit", "list")["rows"]
    return found


def test_the_guest_boots_by_the_secret_that_was_injected(host: Host) -> None:
    """From its encrypted root; the audit log has the release, marked as simulated, and libvirt the owner's session."""
    done = host.ctl("launch", "sev", check=False)
    assert done.returncode == 0, f"{done.stderr}\n{LOG.read_text()[-3000:]}\n{host.log.read_text()[-2000:]}"
    assert "simulated" in done.stdout
    said = host.wait_console("sev", "witness: / is", within_s=900)
    assert "/ is /dev/mapper/root (crypt)" in said
    assert "witness: /srv/data is /dev/mapper/jindisk-data" in host.wait_console("sev", "witness: done")
    text = virsh("dumpxml", "sev")
    assert "<launchSecurity type='sev' kernelHashes='yes'>" in text
    assert "<session>" in text
    released = [row for row in rows(host) if row["kind"] == "released"]
    assert [row["simulated"] for row in released] == [True, True]
    host.ctl("domain", "stop", "sev", "--force", "--yes")


@pytest.mark.parametrize("file", ["vmlinuz", "initrd", "cmdline"])
def test_what_measures_otherwise_gets_no_secret(host: Host, file: str) -> None:
    """The machine never ran an instruction; the refusal is in the audit log."""
    path = host.image("sev") / file
    original = path.read_bytes()
    path.write_bytes(original + (b" " if file == "cmdline" else b"\0"))
    try:
        done = host.ctl("launch", "sev", check=False)
    finally:
        path.write_bytes(original)
    assert done.returncode == 7, done.stderr
    assert "not the expected ones" in done.stderr
    assert any("sev.measurement" in finding for finding in host.refusal())
    assert "shut off" in virsh("domstate", "sev")


def test_a_revoked_image_is_refused_before_its_machine_is_made(host: Host) -> None:
    """No session is begun for it."""
    host.ctl("key", "revoke", "sev")
    done = host.ctl("launch", "sev", check=False)
    host.ctl("key", "reinstate", "sev")
    assert done.returncode == 7
    assert "the image's key is revoked" in done.stderr
