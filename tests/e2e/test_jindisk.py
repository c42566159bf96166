"""JinDisk 2 volumes, a root and another, of a Debian guest under a real libvirtd: what was flushed stays, and only the
latest state of each boots.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import BASE, Host, cleared, started

pytestmark = [pytest.mark.guest, pytest.mark.host, pytest.mark.slow]


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A service with a Debian image, `web`, which has a data volume."""
    with cleared(started("volumes")) as made:
        made.build_brisk("web", "--volume", "data:64M:/srv/data")
        yield made


def volumes(host: Host) -> dict[str, dict[str, Any]]:
    """What is known of the volumes of the image, by name."""
    return {item["resource"].rpartition("/")[2]: item for item in host.key("web")["volumes"]}


def volume(host: Host, name: str) -> dict[str, Any]:
    """What is known of one of them."""
    return volumes(host)[name]


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
    """A copy of the root's disk as it was built, with one of the data volume's beside it."""
    path = Path(tmp_path_factory.mktemp("old")) / "disk.img"
    copy(host.image("web") / "disk.img", path)
    copy(host.image("web") / "volume-data.img", path.with_name("data.img"))
    return path


def test_a_root_lives_through_resets_restarts_and_ends(host: Host, old: Path) -> None:
    """Booted, reset, its service killed, rebooted in order, shut down: each boot finds what the last one wrote."""
    built = volumes(host)
    assert built.keys() == {"root", "data"}
    assert [(item["state"], item["sequence"]) for item in built.values()] == [("closed", 1)] * 2
    host.ctl("launch", "web")
    said = host.wait_console("web", "witness: done")
    assert "/ is /dev/nbd0" in said
    assert "witness: boots 0" in said
    assert "witness: /srv/data is /dev/nbd1, boots 0" in said
    assert "witness: /dev/disk/by-jindisk/data is /dev/nbd1, active" in said
    running = volumes(host)
    assert [item["state"] for item in running.values()] == ["open", "open"]
    start = ["released", "released", "adopted", "adopted"]
    rows = host.rows("web")
    assert [row["kind"] for row in rows] == ["activated", "volume added", "volume added", *start]
    assert len({row["guest"] for row in rows if row["kind"] == "released"}) == 1
    # A reset tells nobody: the interrupted session's latest state is the one that boots.
    virsh("reset", "web")
    said = host.wait_console("web", "witness: done", times=2)
    assert "witness: boots 1" in said
    assert "witness: /srv/data is /dev/nbd1, boots 1" in said
    assert kinds(host)[7:] == start
    # The service that the guest reports to is killed; the next one hears the end of the session from the same guest.
    assert host.daemon is not None
    host.daemon.kill()
    host.daemon.wait()
    host.start()
    virsh("reboot", "web")
    said = host.wait_console("web", "witness: done", times=3)
    assert "witness: boots 2" in said
    assert "witness: /srv/data is /dev/nbd1, boots 2" in said
    assert kinds(host)[11:] == ["closed", "closed", *start]
    host.ctl("domain", "stop", "web", check=False)  # may give up waiting on a busy machine
    host.wait_off("web")
    after = volumes(host)
    assert [item["state"] for item in after.values()] == ["closed", "closed"]
    assert all(after[name]["sequence"] > before["sequence"] for name, before in running.items())
    rows = host.rows("web")
    assert [row["kind"] for row in rows[17:]] == ["closed", "closed"]
    assert all(row["simulated"] for row in rows[3:])
    assert "(nbd1): unmounting filesystem" in host.ctl("domain", "console", "web").stdout


def test_an_old_copy_is_refused_and_accepted_once(host: Host, old: Path, tmp_path: Path) -> None:
    """The guest sees it and says it; the owner may take it once; what it replaced is an old copy from then on."""
    disk = host.image("web") / "disk.img"
    if volume(host, "root")["sequence"] == 1:  # no test before this one
        host.ctl("launch", "web")
        host.wait_console("web", "witness: done")
        host.ctl("domain", "stop", "web", check=False)
        host.wait_off("web")
    data, data_now = host.image("web") / "volume-data.img", tmp_path / "data.img"
    copy(data, data_now)
    copy(old.with_name("data.img"), data)
    done = host.ctl("launch", "web", check=False)
    assert done.returncode == 7
    for words in ("the disk of its volume 'data' is not in the latest state", "--volume data", "volume.stale"):
        assert words in done.stderr
    assert subprocess.run(["cmp", "-s", data, old.with_name("data.img")]).returncode == 0
    assert volume(host, "data")["state"] == "closed"
    # The root was open by then: it is closed, or its session is one that was interrupted.
    host.until(lambda: "shut off" in virsh("domstate", "web"), "the machine's end", within_s=600)
    copy(data_now, data)
    latest = tmp_path / "latest.img"
    copy(disk, latest)
    last = volume(host, "root")["sequence"]
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
    host.ctl("key", "accept-rollback", "web", "--volume", "root", "--reason", "restored", "--yes")
    accepted = volumes(host)
    assert (accepted["root"]["rollback-accepted"], accepted["data"]["rollback-accepted"]) == (True, False)
    host.ctl("launch", "web")
    said = host.wait_console("web", "witness: done")
    assert "witness: boots 0" in said
    assert "witness: /srv/data is /dev/nbd1, boots 0" not in said
    assert not volume(host, "root")["rollback-accepted"]
    expected = ["refused", "rollback accepted", "released", "released", "adopted", "adopted"]
    assert kinds(host)[-6:] == expected
    busy = host.ctl("key", "accept-rollback", "web", "--yes", check=False)
    assert busy.returncode == 6
    host.ctl("domain", "stop", "web", "--force", "--yes")
    # The disk that was the latest before is of a history that was given up.
    copy(latest, disk)
    done = host.ctl("launch", "web", check=False)
    assert done.returncode == 7
    assert "volume.stale" in done.stderr
    shutil.rmtree(tmp_path)


@pytest.mark.long
def test_the_disk_of_another_image_is_refused(host: Host, tmp_path: Path) -> None:
    """Another image's volume of the same name is none of this one's; with the right disk it starts as ever."""
    host.ctl("image", "build", "other", "--base", str(BASE), "--volume", "data:64M:/srv/data")
    host.ctl("key", "accept-rollback", "web", "--yes")  # whatever the tests before have left
    disk, own = host.image("web") / "volume-data.img", tmp_path / "own.img"
    copy(disk, own)
    copy(host.image("other") / "volume-data.img", disk)
    before = kinds(host)
    done = host.ctl("launch", "web", check=False)
    assert done.returncode == 1
    assert "a data volume's disk is not the one that the image was built with" in done.stderr
    assert kinds(host) == before, "no key is asked for"
    copy(own, disk)
    host.ctl("launch", "web")
    assert "witness: /srv/data is /dev/nbd1" in host.wait_console("web", "witness: done")
    host.ctl("domain", "stop", "web", check=False)
    host.wait_off("web")


@pytest.mark.long
def test_luks2_and_raw_data_volumes(host: Host) -> None:
    """Beside a LUKS2 root: one that the agent mounts, one on JinDisk 2 without a file system, over a reboot."""
    volumes = ("--volume", "logs:64M:luks2:/srv/logs", "--volume", "raw:32M")
    host.ctl("image", "build", "mixed", "--base", str(BASE), "--format", "luks2", *volumes)
    host.ctl("launch", "mixed")
    said = host.wait_console("mixed", "witness: done")
    assert "witness: / is /dev/mapper/root" in said
    assert "witness: /srv/logs is /dev/mapper/jindisk-logs, boots 0" in said
    assert "witness: /dev/disk/by-jindisk/raw is /dev/nbd2, active" in said
    virsh("reboot", "mixed")
    said = host.wait_console("mixed", "witness: done", times=2)
    assert "witness: boots 1" in said
    assert "witness: /srv/logs is /dev/mapper/jindisk-logs, boots 1" in said
    (raw,) = host.key("mixed")["volumes"]
    assert raw["state"] == "open"
    host.ctl("domain", "stop", "mixed", check=False)
    host.wait_off("mixed")
    (raw,) = host.key("mixed")["volumes"]
    assert raw["state"] == "closed"
