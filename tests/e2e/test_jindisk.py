"""JinDisk 2 roots of a Debian guest under a real libvirtd: what was flushed stays, and only the latest state boots."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import Host

pytestmark = [pytest.mark.guest, pytest.mark.host, pytest.mark.slow]


def virsh(*words: str) -> str:
    return subprocess.run(
        ["virsh", "-c", "qemu:///system", *words], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def copy(source: Path, target: Path) -> None:
    """As a host does: the bytes, holes left out."""
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


def kinds(host: Host) -> list[str]:
    """What became of the image's key, and of the sessions of its volume."""
    return [row["kind"] for row in host.rows("web")]


@pytest.fixture(scope="module")
def old(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the disk as it was built."""
    path = Path(tmp_path_factory.mktemp("old")) / "disk.img"
    copy(host.image("web") / "disk.img", path)
    return path


def test_a_root_lives_through_resets_restarts_and_ends(host: Host, old: Path) -> None:
    """Booted, reset, its service killed, rebooted in order, shut down: each boot finds what the last one wrote."""
    built = host.key("web")
    assert (built["volumes"][0]["state"], built["volumes"][0]["sequence"]) == ("closed", 1)
    host.ctl("launch", "web")
    said = host.wait_console("web", "witness: done")
    assert "/ is /dev/nbd0" in said
    assert "witness: boots 0" in said
    running = host.key("web")
    assert running["volumes"][0]["state"] == "open"
    assert kinds(host) == ["activated", "volume added", "released", "adopted"]
    # A reset tells nobody: the interrupted session's latest state is the one that boots.
    virsh("reset", "web")
    said = host.wait_console("web", "witness: done", times=2)
    assert "witness: boots 1" in said
    assert kinds(host)[4:] == ["released", "adopted"]
    # The service that the guest reports to is killed; the next one hears the end of the session from the same guest.
    assert host.daemon is not None
    host.daemon.kill()
    host.daemon.wait()
    host.start()
    virsh("reboot", "web")
    said = host.wait_console("web", "witness: done", times=3)
    assert "witness: boots 2" in said
    assert kinds(host)[6:] == ["closed", "released", "adopted"]
    host.ctl("domain", "stop", "web", check=False)  # may give up waiting on a busy machine
    host.wait_off("web")
    ended = host.key("web")
    assert ended["volumes"][0]["state"] == "closed"
    assert ended["volumes"][0]["sequence"] > running["volumes"][0]["sequence"]
    assert kinds(host)[9:] == ["closed"]
    assert all(row["simulated"] for row in host.rows("web")[2:])


def test_an_old_copy_is_refused_and_accepted_once(host: Host, old: Path, tmp_path: Path) -> None:
    """The guest sees it and says it; the owner may take it once; what it replaced is an old copy from then on."""
    disk = host.image("web") / "disk.img"
    if host.key("web")["volumes"][0]["sequence"] == 1:  # no test before this one
        host.ctl("launch", "web")
        host.wait_console("web", "witness: done")
        host.ctl("domain", "stop", "web", check=False)
        host.wait_off("web")
    latest = tmp_path / "latest.img"
    copy(disk, latest)
    last = host.key("web")["volumes"][0]["sequence"]
    copy(old, disk)
    done = host.ctl("launch", "web", check=False)
    assert done.returncode == 7
    for words in ("not in the latest state", "it holds state 1", f"known is {last}", "volume.stale"):
        assert words in done.stderr
    (finding,) = host.refusal()
    assert finding.startswith("volume.stale: ")
    # The firmware keeps variables of its own on the EFI partition.
    partitions = json.loads((host.image("web") / "manifest.json").read_text())["partitions"]
    (offset,) = (part["offset_bytes"] for part in partitions if part["name"] == "jindisk-rootfs")
    same = subprocess.run(["cmp", "-s", f"--ignore-initial={offset}", disk, old]).returncode == 0
    assert same, "a refused volume is not written to"
    host.ctl("key", "accept-rollback", "web", "--reason", "restored", "--yes")
    assert host.key("web")["volumes"][0]["rollback-accepted"]
    host.ctl("launch", "web")
    said = host.wait_console("web", "witness: done")
    assert "witness: boots 0" in said
    assert not host.key("web")["volumes"][0]["rollback-accepted"]
    assert kinds(host)[-4:] == ["refused", "rollback accepted", "released", "adopted"]
    busy = host.ctl("key", "accept-rollback", "web", "--yes", check=False)
    assert busy.returncode == 6
    host.ctl("domain", "stop", "web", "--force", "--yes")
    # The disk that was the latest before is of a history that was given up.
    copy(latest, disk)
    done = host.ctl("launch", "web", check=False)
    assert done.returncode == 7
    assert "volume.stale" in done.stderr
    shutil.rmtree(tmp_path)
