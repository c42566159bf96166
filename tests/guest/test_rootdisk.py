"""Which disk has the root: by what is on it; the host's word for its place decides which of two alike."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from jindiskd.guest import rootdisk
from jindiskd.guest.codes import Code, GuestFailure

ROOT = "the root"


class Block:
    """A /sys/class/block, and what is on the disks that it names."""

    def __init__(self, path: Path) -> None:
        self.path, self.contents = path, {}
        self.looked: list[str] = []

    def add(self, name: str, content: str = "", serial: bytes | None = b"") -> None:
        (self.path / name).mkdir()
        if serial is not None:
            (self.path / name / "serial").write_bytes(serial)
        self.contents[name] = content

    def part(self, disk: str, number: int, content: str = "") -> None:
        self.add(f"{disk}{number}", content, None)

    def look(self, node: Path) -> str:
        self.looked.append(node.name)
        if self.contents[node.name] != ROOT:
            raise GuestFailure(Code.HEADER)
        return f"seen on {node.name}"

    def find(self, device: str = "/dev/vda3", within_s: float = 0.0) -> rootdisk.Root[str]:
        return rootdisk.find(device, time.monotonic() + within_s, self.look, self.path)

    def refused(self, code: Code, device: str = "/dev/vda3", within_s: float = 0.0) -> None:
        with pytest.raises(GuestFailure) as failure:
            self.find(device, within_s)
        assert failure.value.code is code


@pytest.fixture
def block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Block:
    monkeypatch.setattr(Path, "is_block_device", lambda node: node.parent == Path("/dev"))
    return Block(tmp_path)


def disks(block: Block, contents: dict[str, str], serials: dict[str, bytes] | None = None) -> None:
    for name, content in contents.items():
        block.add(name, "", (serials or {}).get(name, b""))
        for number in (1, 2):
            block.part(name, number)
        block.part(name, 3, content)


@pytest.mark.parametrize("name", ["vda", "vdb", "sdc", "vdab"])
def test_wherever_it_is(block: Block, name: str) -> None:
    """Among disks that are not it."""
    disks(block, {"vda": "", "vdb": "", "sdc": "", "vdab": ""} | {name: ROOT})
    found = block.find(within_s=300)
    assert (found.node, found.seen) == (Path(f"/dev/{name}3"), f"seen on {name}3")
    assert len(block.looked) == len(set(block.looked))


def test_at_its_place_no_other_is_waited_for(block: Block) -> None:
    """The host's own disks may look as they like, and are looked at once."""
    disks(block, {"vda": ROOT, "vdb": ROOT, "vdc": ROOT})
    assert block.find().node == Path("/dev/vda3")
    for name in ("vdb", "vdc"):
        (block.path / name / "serial").write_bytes(b"jd-root")
        if name == "vdb":
            assert block.find().node == Path("/dev/vdb3"), "the serial number says which of two alike"
    block.refused(Code.ROOT_DOUBLE)


def test_a_false_hint_leads_nowhere(block: Block) -> None:
    """A disk that says to be it, and is not, hides none; nor does one that is at its place."""
    disks(block, {"vda": "", "vdb": "", "vdc": ROOT}, {"vdb": b"jd-root\n"})
    assert block.find().node == Path("/dev/vdc3")
    assert set(block.looked) == {"vda3", "vdb3", "vdc3"}


def test_two_alike_elsewhere_are_refused(block: Block) -> None:
    """Neither place nor serial number says which."""
    disks(block, {"vda": "", "vdb": ROOT, "vdc": ROOT})
    block.refused(Code.ROOT_DOUBLE)
    block.refused(Code.ROOT_DOUBLE, within_s=300)


def test_none_is_waited_for_where_one_may_come(block: Block) -> None:
    """Without a disk at its place the time is waited for; what is there and is not it is refused by what is wrong."""
    began = time.monotonic()
    block.refused(Code.DEVICE_MISSING, within_s=0.2)
    assert time.monotonic() - began >= 0.2
    disks(block, {"vdb": ""})
    block.refused(Code.DEVICE_MISSING, within_s=0.2)
    disks(block, {"vda": ""})
    block.refused(Code.HEADER, within_s=300)


def test_other_partitions_are_not_looked_at(block: Block) -> None:
    """Nor whole disks, nor devices of other kinds; and where the root is a whole disk, no partitions."""
    disks(block, {"vda": "", "vdb": ROOT})
    block.contents["vda"] = block.contents["vda1"] = ROOT
    for name in ("nbd0", "nbd0p3", "dm-3", "loop3", "vd3", "vdabc3", "md3"):
        block.add(name, ROOT)
    assert block.find().node == Path("/dev/vdb3")
    assert set(block.looked) == {"vda3", "vdb3"}
    block.looked.clear()
    assert block.find("/dev/vdb").node == Path("/dev/vda")
    assert set(block.looked) == {"vda", "vdb"}


def test_any_number_of_disks_costs_little(block: Block) -> None:
    """So many are looked at, and no more, however many a host attaches or exchanges."""
    names = [f"vd{first}{second}" for first in "abcdefghij" for second in "abcdefghijkl"]
    disks(block, dict.fromkeys(names, ""))
    block.refused(Code.DEVICE_MISSING)
    assert len(block.looked) == rootdisk.MAX_CANDIDATES
