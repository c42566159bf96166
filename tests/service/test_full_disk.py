"""No space left: what is asked for fails and says so, nothing is half done, and no key leaves that is not recorded."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fulldisk import SmallDisk, small_disk
from serviceprocess import Daemon

from jindiskd.kbs.client import BrokerRefused, BrokerUnreachable
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "broker"))
from brokerprocess import DIGEST, KEY, BrokerProcess, fetched

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root to mount a small file system")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 400) as found:
        yield found


def test_the_service_on_a_full_disk(
    disk: SmallDisk, private_bus: str, firmware: Path, simulated_root: Path, rootfs: Path
) -> None:
    """Builds and decisions fail and change nothing, looking goes on; with space again everything does, by itself."""
    (disk.path / "service").mkdir()
    daemon = Daemon(disk.path / "service", private_bus, firmware, simulated_root)
    try:
        daemon.start()
        daemon.ctl("image", "build", "one", "--rootfs", str(rootfs))
        rows = daemon.json("audit", "verify")["rows"]
        store = sorted(path.name for path in (daemon.state / "images").iterdir())
        disk.fill()
        said = daemon.ctl("image", "build", "two", "--rootfs", str(rootfs), status=None)
        assert "no space left" in said or "database or disk is full" in said, said
        said = daemon.ctl("key", "revoke", "one", status=69)
        assert "the key store's database failed: database or disk is full" in said
        assert daemon.json("key", "show", "one")["key"]["state"] == "active"
        daemon.ctl("policy", "set", "one", os.devnull, status=None)
        assert daemon.json("audit", "verify")["rows"] == rows
        assert daemon.json("image", "list")["images"][0]["State"] == "active"
        assert sorted(path.name for path in (daemon.state / "images").iterdir()) == store, "nothing half is left"
        daemon.ctl("status")
        disk.free()
        daemon.ctl("key", "revoke", "one")
        daemon.ctl("image", "build", "two", "--rootfs", str(rootfs))
        assert [item["State"] for item in daemon.json("image", "list")["images"]] == ["revoked", "active"]
        assert [row["kind"] for row in daemon.json("audit", "list")["rows"]][rows] == "revoked"
        daemon.json("audit", "verify")
        assert "fault in" not in daemon.log.read_text()
    finally:
        daemon.close()


def test_no_key_leaves_a_broker_that_cannot_write_it_down(disk: SmallDisk, simulated_root: Path) -> None:
    """A guest gets no key while the row cannot be written; afterwards it gets it, with its row."""
    root = SimulatedRoot.load_or_create(simulated_root)
    broker = BrokerProcess(disk.path / "broker", root)
    guest = SimulatedSnpFirmware(root, DIGEST)
    try:
        broker.start()
        broker.ctl("image", "import", str(broker.hand_over()))
        rows = broker.json("audit", "verify")["rows"]
        disk.fill()
        with pytest.raises((BrokerRefused, BrokerUnreachable)):
            fetched(broker.client(within_s=5), guest)
        assert broker.json("audit", "verify")["rows"] == rows
        disk.free()
        assert fetched(broker.client(), guest) == KEY
        kinds = [row["kind"] for row in broker.json("audit", "list")["rows"]]
        assert kinds[rows:] == ["released"]
        assert KEY not in broker.log.read_bytes()
    finally:
        broker.close()
        shutil.rmtree(disk.path / "broker", ignore_errors=True)
