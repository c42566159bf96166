"""Volumes written by the reference module, and its constants."""

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jd1 import BLOCK, Vector, recorded_pattern
from second_reader import open_path

from jindiskd.base.secret import Secret
from jindiskd.jindisk.errors import VolumeUnauthentic
from jindiskd.jindisk.v1 import superblock
from jindiskd.jindisk.v1.catalogue import Entry, decode_entry
from jindiskd.jindisk.v1.export import bulk_export
from jindiskd.jindisk.v1.identification import Certainty, Detection, dump, identify
from jindiskd.jindisk.v1.keys import Kdf, data_aad, derive, seal, unseal
from jindiskd.jindisk.v1.layout import SECTOR_BYTES, Layout, available_sectors
from jindiskd.jindisk.v1.nodes import build_inner, parse_inner
from jindiskd.jindisk.v1.volume import measurement, open_volume, root_from_password, salvage_volume

NAMES = ["01-fresh", "02-sequential", "04-ext4", "06-password", "07-reopened"]
Unpack = Callable[[str], Vector]


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_volume_has_the_recorded_content(name: str, vector: Unpack, tmp_path: Path) -> None:
    """The whole logical device, its single blocks, its files and its measurement are those recorded."""
    found = vector(name)
    with found.device() as device, (tmp_path / "out").open("w+b") as out:
        volume = open_volume(device, key=found.key())
        assert found.entry["table_sectors"] * SECTOR_BYTES == volume.size_bytes
        assert bytes.fromhex(found.entry["measurement"]) == measurement(device)
        fields = superblock.fields_of(volume.layout)
        expected = {name: value for name, value in found.entry["superblock"].items() if name != "checksum"}
        assert expected == {name: value for name, value in fields.items() if name != "checksum"}
        files = [
            {key: getattr(e, key) for key in ("level", "version", "first", "last", "records", "root", "slot")}
            for e in volume.levels.entries
        ]
        assert sorted(found.entry["index_files"], key=str) == sorted(files, key=str)
        assert found.entry["mapped_blocks"] == sum(len(keys) for keys, _ in volume.chunks())
        for probe in found.entry["probes"]:
            block = volume.read(probe["lba"] * BLOCK, BLOCK)
            assert probe["sha256"] == hashlib.sha256(block).hexdigest()
            assert probe["written"] == (volume.record(probe["lba"]) is not None)
        written = bulk_export(volume, out.fileno(), workers=1)
        assert found.entry["mapped_blocks"] * BLOCK == written
        out.seek(0)
        assert found.entry["plaintext_sha256"] == hashlib.file_digest(out, "sha256").hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_the_root_key_is_not_needed_to_read_a_volume(name: str, vector: Unpack, tmp_path: Path) -> None:
    """What the documents say of this format: the keys of all data are on the disk in clear."""
    found = vector(name)
    with found.device() as device, (tmp_path / "out").open("w+b") as out:
        bulk_export(salvage_volume(device, layout=Layout(328)), out.fileno(), workers=1)
        out.seek(0)
        assert found.entry["plaintext_sha256"] == hashlib.file_digest(out, "sha256").hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_the_second_reader_agrees_with_the_module(name: str, vector: Unpack) -> None:
    """The tests' own reader, which judges what we write, reads what the module wrote."""
    found = vector(name)
    reader = open_path(found.path, bytes.fromhex(found.entry["key"]), bytes.fromhex(found.entry["iv"]))
    reader.check_rules(module_wrote=True)
    assert found.entry["mapped_blocks"] == len(reader.map)
    for probe in found.entry["probes"]:
        assert probe["sha256"] == hashlib.sha256(reader.block(probe["lba"])).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_volume_is_recognised_without_its_key(name: str, vector: Unpack) -> None:
    with vector(name).device() as device:
        expected = Certainty.POSSIBLE if name == "01-fresh" else Certainty.CERTAIN
        assert Detection(expected, Layout(328)) == identify(device)


def test_pattern_blocks_are_where_they_were_written(vector: Unpack) -> None:
    """The newer of two sessions counts."""
    found = vector("07-reopened")
    latest = {}
    for word, seed, generation, first, count in found.entry["contents"]:
        assert word == "fill"
        latest.update(dict.fromkeys(range(first, first + count), (seed, generation)))
    with found.device() as device:
        volume = open_volume(device, key=found.key())
        for lba, (seed, generation) in latest.items():
            assert recorded_pattern(seed, lba, generation) == volume.read(lba * BLOCK, BLOCK)


def test_the_file_system_in_a_volume_is_sound(vector: Unpack, tmp_path: Path) -> None:
    """As the kernel left it, with the files that were put there."""
    found = vector("04-ext4")
    image = tmp_path / "ext4"
    with found.device() as device, image.open("w+b") as out:
        bulk_export(open_volume(device, key=found.key()), out.fileno(), workers=1)
    environment = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    subprocess.run(["e2fsck", "-fn", image], check=True, capture_output=True, env=environment)
    assert found.entry["files_sha256"]
    for name, digest in found.entry["files_sha256"].items():
        subprocess.run(
            ["debugfs", "-R", f"dump /{name} {tmp_path}/file", image], check=True, capture_output=True, env=environment
        )
        assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest(), name
        (tmp_path / "file").unlink()


def test_a_password_opens_the_volume_of_the_tool_that_made_it(vector: Unpack) -> None:
    """The C tool's derivation opens it, the other one does not."""
    found = vector("06-password")
    password = Secret(found.entry["password"].encode())
    with found.device() as device:
        assert (Kdf.C, found.key()) == root_from_password(device, password)
        with pytest.raises(VolumeUnauthentic):
            root_from_password(device, Secret(b"wrong"))
        assert derive(password, Kdf.C) == found.key()
        open_volume(device, key=derive(password, Kdf.C))
        with pytest.raises(VolumeUnauthentic):
            open_volume(device, key=derive(password, Kdf.RUST))


def test_passwords_give_the_recorded_keys(constants: dict[str, Any]) -> None:
    for case in constants["kdf"]:
        derived = derive(Secret(case["password"].encode()), Kdf(case["tool"]))
        assert bytes.fromhex(case["key"] + case["iv"]) == bytes(derived.reveal())


def test_the_checksum_is_the_recorded_one(constants: dict[str, Any]) -> None:
    for case in constants["crc32_be"]:
        assert case["crc"] == superblock.crc32(bytes.fromhex(case["data"]), case["init"])


def test_layouts_are_the_recorded_ones(constants: dict[str, Any]) -> None:
    for case in constants["layout"]:
        layout = Layout(case["segments"])
        found = {
            "table_segments": layout.logical_segments,
            "file_slots": layout.slots,
            "level1_capacity": layout.cap,
            "journal_start": layout.journal_start,
            "svt_start": layout.svt_start,
            "svt_blocks": layout.svt_blocks,
            "dst_start": layout.dst_start,
            "dst_blocks": layout.dst_blocks,
            "rit_start": layout.rit_start,
            "rit_blocks": layout.rit_blocks,
            "bit_validity_start": layout.bvt_start,
            "bit_validity_blocks": layout.bvt_blocks,
            "catalogue_start": layout.bitc_start,
            "catalogue_blocks": layout.bitc_blocks,
            "data_start": layout.data_start,
            "total_blocks": layout.end,
            "total_sectors": layout.end * 8,
        }
        assert {name: case[name] for name in found} == found


def test_available_sizes_are_those_of_the_module(constants: dict[str, Any]) -> None:
    pairs = constants["calc_avail_sectors"]["pairs"]
    assert len(pairs) > 200
    assert pairs == [[real, available_sectors(real)] for real, _ in pairs]


def test_superblocks_are_the_recorded_ones(constants: dict[str, Any]) -> None:
    for case in constants["superblock"]:
        layout = Layout(case["table_segments"] + 320)
        root = Secret(bytes.fromhex(case["key"] + case["iv"]))
        sealed = superblock.seal(layout, root)
        assert bytes.fromhex(case["measurement"]) == sealed[-16:]
        if "on_disk" in case:
            assert bytes.fromhex(case["on_disk"]) == sealed
        assert layout == superblock.open_sealed(sealed, root)


def test_data_blocks_are_sealed_as_recorded(constants: dict[str, Any]) -> None:
    for case in constants["data_block"]["cases"]:
        sealed = seal(bytes.fromhex(case["key"]), recorded_pattern(1, 2, 3), data_aad(case["pba"]))
        assert case["ciphertext_sha256"] == hashlib.sha256(sealed[:BLOCK]).hexdigest()
        assert bytes.fromhex(case["mac"]) == sealed[BLOCK:]


def test_the_recorded_catalogue_entry_is_read_and_written(constants: dict[str, Any]) -> None:
    case = constants["catalogue_entry"]
    packed = bytes.fromhex(case["packed"])
    entry = decode_entry(packed, Layout(328), case["slot"])
    assert packed == entry.encode()
    assert (
        Entry(
            root=case["root"],
            key=bytes.fromhex(case["key"]),
            slot=case["slot"],
            level=case["level"],
            version=case["version"],
            first=case["first"],
            last=case["last"],
            records=case["count"],
        )
        == entry
    )


def test_the_recorded_nodes_are_read_and_written(constants: dict[str, Any]) -> None:
    nodes = constants["bit_nodes"]
    key = bytes.fromhex(nodes["key"])
    plain, sealed = bytes.fromhex(nodes["inner_plaintext"]), bytes.fromhex(nodes["inner_on_disk"])
    assert plain == unseal(key, sealed)
    inner = parse_inner(plain, 0, 1 << 40)
    assert inner.leaves
    assert sealed == seal(key, build_inner(list(zip(inner.keys, inner.positions, strict=True)), leaves=True))


def test_opening_a_recorded_volume_changes_nothing(vector: Unpack) -> None:
    found = vector("02-sequential")
    before = found.path.stat()
    with found.device() as device:
        open_volume(device, key=found.key()).read(0, 1 << 20)
    assert before.st_mtime_ns == found.path.stat().st_mtime_ns


def test_a_dump_tells_all_but_keys(vector: Unpack) -> None:
    found = vector("07-reopened")
    with found.device() as device:
        volume = open_volume(device, key=found.key())
        told = dump(volume)
        text = json.dumps(told)
        assert found.entry["superblock"] == told["superblock"]
        assert found.entry["index_files"] == told["index_files"]
        for secret in (volume.levels.entries[0].key.hex(), found.entry["key"], found.entry["iv"]):
            assert secret not in text
