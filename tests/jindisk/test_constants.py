"""The constants of the format document, section 23: computed by a prototype that shares no code with this package."""

import hashlib
import struct

from jd import KEY, UUID1, MemoryDevice

from jindiskd.base.secret import Secret
from jindiskd.jindisk import journal, tree
from jindiskd.jindisk.create import create_volume
from jindiskd.jindisk.crypto import ZERO_NONCE, Generator, SealingKey, block_nonce, superblock_opening_key
from jindiskd.jindisk.geometry import BLOCK, Geometry, Kind, default_geometry
from jindiskd.jindisk.identification import Identification
from jindiskd.jindisk.segments import data_aad

SESSION = b"\xa5" * 32
DATA = bytes(7 * i % 256 for i in range(BLOCK))


def test_the_generator_draws_the_documents_keys() -> None:
    """Seed, first and second key."""
    generator = Generator(Secret(KEY), SESSION, bytes)
    assert generator._seed.hex() == "37d800ac50e4417990ddcce2c8cdd65633b8a0b2f2aed901b08cafda7102d907"
    assert generator.draw().hex() == "ce5253a4fdc9779d197569207bce90574f57e7eacee26c59c6691bd3ee7f6763"
    assert generator.draw().hex() == "d71733cb5e305fc919a4a9f482e11eef53e9aafb9d10ad35959738e07f397371"


def test_format_and_first_write_give_the_documents_bytes() -> None:
    """Superblock tag, both state roots, the data's tag, and the checksum in clear."""
    geometry = default_geometry(4096)
    device = MemoryDevice(geometry.end * BLOCK)
    session = create_volume(
        device, geometry=geometry, key=Secret(KEY), uuid=UUID1, session_id=SESSION, label="test",
        entropy=bytes, clock=lambda: 0, ordered_placement=True,
    )  # fmt: skip
    slot = device.pread(2 * BLOCK, BLOCK)
    assert slot[-16:].hex() == "9297e2d7f05ae0b7661105765a59b5fd"
    assert session.durable.root.hex() == "0842696b9a70759370d71c57c8e7aee81dcdf298bc8d17835b21f6df0fb58b9d"
    plain = superblock_opening_key(Secret(KEY), UUID1, slot[:32]).open(
        ZERO_NONCE, slot[32:], struct.pack("<4sI16s", b"JD2S", 1, UUID1.bytes)
    )
    expected = (
        "4a443273757065720100000000000000404142434445464748494a4b4c4d4e4f"
        "00000000000000000000000000000000000000000000000001000000000000000100000000000000"
        "0010000000000000c0130000000000004c0000000000000006000000200000000800000000000000"
        "28000000000000008c00000000000000c00000000000000000000000000000000000000000000000"
        "00000000000000000000000000000000" + "a5" * 32 + "00" * 32
        + "ce5253a4fdc9779d197569207bce90574f57e7eacee26c59c6691bd3ee7f6763"
    )  # fmt: skip
    assert plain[:264].hex() == expected
    assert not any(plain[264:])
    assert struct.unpack_from("<I", device.pread(0, BLOCK), 508)[0] == 0x12FFF78F
    session.write(0, DATA)
    session.flush()
    assert session.volume.entry(0)[8:].hex() == "e4a1efdcf7ea3bedf58eb4485580ddb3"
    assert session.durable.root.hex() == "ebd6819f3d707e30e8a318f51dce4e454a39b96cb98e8cb676890290e9449981"
    assert session.durable.sequence == 2


def test_single_objects_are_sealed_as_documented() -> None:
    """Data block, page, journal block under one given key."""
    material = bytes(range(0x20, 0x40))
    key = SealingKey.take_over(material)
    data = key.seal(block_nonce(200), DATA, data_aad(5))
    assert data[BLOCK:].hex() == "19ea474dd673eea485aff709f06de649"
    digest = hashlib.sha256(data[:BLOCK]).hexdigest()
    assert digest == "1a52c3fe2e7c35ed09db8ca78ef82a95a6a8dcdd090b20251d91de04bc4e57c4"
    page = (struct.pack("<Q", 200) + data[BLOCK:]).ljust(BLOCK, b"\0")
    sealed = key.seal(ZERO_NONCE, page, tree.page_aad(Kind.F, 0, 3, 80))
    assert sealed[BLOCK:].hex() == "481e4491047b043b2e90ed34e7c0e7d7"
    assert (
        hashlib.sha256(sealed[:BLOCK]).hexdigest() == "839d2b81e101e12c2a84df8d6b30eb6657b596ece0a353b6a1d406925f9c5781"
    )
    log = journal.EntryLog()
    log.segment(1, material)
    log.map_all([(5, (200).to_bytes(8, "little") + data[BLOCK:])])
    writer = journal.JournalWriter(SealingKey.take_over(material), 2, b"\x22" * 32)
    block = writer.seal(log.blocks(), 3, ordered=False)
    assert block[-16:].hex() == "ef98592b7512f6efe8217a99b3d8a858"
    assert writer.root.hex() == "0225ca447dd61f629c995278e5759e8e701c1b5533f5177d967fb35f98433f67"


def test_geometry_follows_the_documents_table() -> None:
    """Section 4, worked values: S, P, meta_slots, J, data_start, end."""
    table = {
        4096: (6, 76, 38, 140, 32, 192, 5056),
        65536: (6, 1084, 546, 1156, 128, 1344, 70720),
        262144: (8, 1084, 2131, 4326, 512, 4864, 282368),
        2097152: (8, 8610, 16980, 34024, 4096, 38144, 2242304),
        16777216: (10, 17212, 135173, 200773, 4096, 205824, 17830912),
        1 << 28: (10, 275260, 2162421, 2228021, 4096, 2232320, 284098560),
        1 << 32: (10, 4404028, 34598337, 34663937, 4096, 34668544, 4544393216),
    }

    def row(g: Geometry) -> tuple[int, ...]:
        return g.segment_bits, g.segments, g.pages, g.meta_slots, g.journal_blocks, g.data_start, g.end

    assert {blocks: row(default_geometry(blocks)) for blocks in table} == table
    assert all(default_geometry(blocks).fault() is None for blocks in table)


def test_identification_has_the_documents_checksum() -> None:
    """CRC-32 of the identification block with label `test`."""
    block = Identification(segment_bits=6, uuid=UUID1, blocks=4096, end=5056, label="test").encode()
    assert struct.unpack_from("<I", block, 508)[0] == 0x12FFF78F
