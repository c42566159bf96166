"""The injected secret, read by the guest: tables that the owner's side makes, and tables that nobody should."""

from __future__ import annotations

import random
import uuid
from pathlib import Path

import pytest

from jindiskd.attest.sev import DISK_KEY_GUID, SECRET_TABLE_GUID, secret_table, volume_guid
from jindiskd.base.secret import Secret
from jindiskd.guest.secret import DISK_KEY, HEAD_BYTES, TABLE, NoSecret, disk_keys, entries, volume_key

KEY = bytes(range(32))
DATA, LOGS = "default/image/data", "default/image/logs"
OTHER = "00000000-0000-4000-8000-000000000001"


def test_the_two_sides_name_the_same_things() -> None:
    """The guest imports nothing of the verifier's."""
    assert (str(TABLE), str(DISK_KEY)) == (SECRET_TABLE_GUID, DISK_KEY_GUID)
    for resource in (DATA, LOGS):
        assert str(volume_key(resource)) == volume_guid(resource)
    # Guests of images that were built look for these.
    assert volume_guid(DATA) == "d6b7e976-7654-541c-9afc-0cedfb805718"


def disk_key(*arguments, **more) -> Secret:
    """The root's alone."""
    (key,) = disk_keys([DISK_KEY], *arguments, **more)
    return key


def memory(tmp_path: Path, table: bytes, address: int = 0x810) -> Path:
    file = tmp_path / "mem"
    file.write_bytes(b"\xaa" * address + table + b"\xbb" * 4096)
    return file


def test_the_owners_table_is_read(tmp_path: Path) -> None:
    """From memory, at the address of the configuration; other entries do not matter."""
    table = bytes(secret_table([(OTHER, b"x" * 7), (DISK_KEY_GUID, KEY)]))
    found = disk_key(0x810, 3072, coco=tmp_path / "none", memory=memory(tmp_path, table))
    assert bytes(found.reveal()) == KEY


def test_the_kernels_own_way_is_taken_where_it_is(tmp_path: Path) -> None:
    """The entry is removed, which wipes it; memory is not looked at."""
    coco = tmp_path / "coco"
    coco.mkdir()
    (coco / DISK_KEY_GUID).write_bytes(KEY)
    found = disk_key(0, 0, coco=coco, memory=tmp_path / "none")
    assert bytes(found.reveal()) == KEY
    assert not (coco / DISK_KEY_GUID).exists()


@pytest.mark.parametrize("way", ["memory", "kernel"])
def test_each_volume_has_a_key_of_its_own(tmp_path: Path, way: str) -> None:
    """In whatever order the entries are; one that is missing, or of an impossible length, is as bad as none at all."""
    wanted = [DISK_KEY, volume_key(DATA), volume_key(LOGS)]
    given = [(volume_guid(LOGS), b"l" * 32), (OTHER, b"x"), (DISK_KEY_GUID, KEY), (volume_guid(DATA), b"d" * 32)]

    def read(entries: list[tuple[str, bytes]]) -> list[bytes]:
        if way == "memory":
            table = bytes(secret_table(entries))
            found = disk_keys(wanted, 0x810, 3072, coco=tmp_path / "none", memory=memory(tmp_path, table))
        else:
            coco = tmp_path / f"coco{len(list(tmp_path.iterdir()))}"
            coco.mkdir()
            for name, data in entries:
                (coco / name).write_bytes(data)
            found = disk_keys(wanted, 0, 0, coco=coco, memory=tmp_path / "none")
            assert {path.name for path in coco.iterdir()} == {OTHER}
        return [bytes(key.reveal()) for key in found]

    assert read(given) == [KEY, b"d" * 32, b"l" * 32]
    for left_out in (0, 2, 3):
        with pytest.raises(NoSecret):
            read([one for number, one in enumerate(given) if number != left_out])
    for wrong in (b"", bytes(65)):
        with pytest.raises(NoSecret, match="a key has"):
            read([*given[:3], (volume_guid(DATA), wrong)])


@pytest.mark.parametrize(("address", "size"), [(0, 3072), (0x810, 0), (0x810, 1 << 20), (0x900, 3072), (1 << 40, 3072)])
def test_places_without_a_table(tmp_path: Path, address: int, size: int) -> None:
    """Not named, not there, beyond the end."""
    table = bytes(secret_table([(DISK_KEY_GUID, KEY)]))
    with pytest.raises(NoSecret):
        disk_key(address, size, coco=tmp_path / "none", memory=memory(tmp_path, table))


def test_no_memory_at_all(tmp_path: Path) -> None:
    """A kernel without /dev/mem."""
    with pytest.raises(NoSecret, match="error 2"):
        disk_key(0x810, 3072, coco=tmp_path / "none", memory=tmp_path / "none")


@pytest.mark.parametrize("key", [b"", bytes(65)])
def test_keys_of_impossible_lengths(tmp_path: Path, key: bytes) -> None:
    """An empty one, and one longer than any."""
    table = bytes(secret_table([(DISK_KEY_GUID, key)]))
    with pytest.raises(NoSecret, match="a key has"):
        disk_key(0x810, 3072, coco=tmp_path / "none", memory=memory(tmp_path, table))


def entry(name: str, data: bytes, size: int | None = None) -> bytes:
    length = HEAD_BYTES + len(data) if size is None else size
    return uuid.UUID(name).bytes_le + length.to_bytes(4, "little") + data


def table_of(body: bytes, length: int | None = None) -> bytes:
    return TABLE.bytes_le + (HEAD_BYTES + len(body) if length is None else length).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    "table",
    [
        b"",
        bytes(4096),
        table_of(b"", 0),
        table_of(b"", 19),
        table_of(entry(OTHER, b"x"), 4000),
        table_of(b"", 1 << 31),
        table_of(entry(OTHER, b"x", 0)),
        table_of(entry(OTHER, b"x", 19)),
        table_of(entry(OTHER, b"x", 22)),
        table_of(entry(OTHER, b"x", (1 << 32) - 1)),
        table_of(entry(OTHER, b"x")[:-8]),
        table_of(entry(OTHER, b"x") + bytes(7)),
        table_of(entry(OTHER, b"x") * 2),
    ],
    ids=["none", "zeros", "length 0", "length 19", "too long", "huge", "entry 0", "entry 19", "entry beyond",
         "entry huge", "torn", "rest", "twice"],
)  # fmt: skip
def test_tables_that_contradict_themselves(table: bytes) -> None:
    """Refused whole: nothing is taken out of a damaged table."""
    with pytest.raises(NoSecret):
        entries(table)


def test_random_damage_never_does_more_than_refuse() -> None:
    """Whatever the host makes of the page."""
    chance = random.Random(7)
    good = bytes(secret_table([(OTHER, b"y" * 40), (DISK_KEY_GUID, KEY)]))
    for _ in range(3000):
        table = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            table[chance.randrange(len(table))] = chance.randrange(256)
        try:
            found = entries(table[: chance.randint(0, len(table))])
        except NoSecret:
            continue
        assert sum(len(data) + HEAD_BYTES for data in found.values()) <= len(table)
