"""A volume as a block device, and its use by several threads."""

import threading

import pytest
from jd1 import BLOCK, SparseDevice, key, pattern

from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.served import Served
from jindiskd.jindisk.v1.layout import Layout
from jindiskd.jindisk.v1.load import create_empty
from jindiskd.jindisk.v1.served import ServedVersion1
from jindiskd.jindisk.v1.session import open_session
from jindiskd.jindisk.v1.volume import open_volume

LAYOUT = Layout(322)


@pytest.fixture
def device() -> SparseDevice:
    found = SparseDevice(LAYOUT.total_bytes)
    create_empty(found, layout=LAYOUT, key=key(), blank=True)
    return found


def test_a_session_is_a_block_device(device: SparseDevice) -> None:
    served: Served = ServedVersion1(open_session(device, key=key()))
    assert not served.read_only
    assert served.size_bytes == 8 << 20
    served.write(5 * BLOCK, pattern(5, 1))
    assert served.extents(4 * BLOCK, 2 * BLOCK + 100) == [(BLOCK, False), (BLOCK, True), (100, False)]
    served.flush()
    assert served.extents(5 * BLOCK - 50, BLOCK + 150) == [(50, False), (BLOCK, True), (100, False)]
    served.zero(5 * BLOCK + 10, 20)
    expected = bytearray(pattern(5, 1))
    expected[10:30] = bytes(20)
    assert bytes(expected) == served.read(5 * BLOCK, BLOCK)
    served.discard(5 * BLOCK, BLOCK)
    assert bytes(expected) == served.read(5 * BLOCK, BLOCK)
    with pytest.raises(OSError, match="InvalidArgument"):
        served.read(8 << 20, 1)
    served.close()
    with pytest.raises(OSError, match="VolumeFenced"):
        served.flush()
    reader: Served = ServedVersion1(open_volume(device, key=key()))
    assert bytes(expected) == reader.read(5 * BLOCK, BLOCK)
    assert reader.extents(0, 16 * BLOCK) == [(5 * BLOCK, False), (BLOCK, True), (10 * BLOCK, False)]
    for refused in (lambda: reader.write(0, b"x"), lambda: reader.zero(0, 1), lambda: reader.discard(0, 1)):
        with pytest.raises(OSError, match="reading only"):
            refused()
    reader.flush()
    reader.close()


def test_a_size_that_is_no_multiple_of_blocks_is_refused(device: SparseDevice) -> None:
    with pytest.raises(InvalidArgument):
        ServedVersion1(open_volume(device, key=key(), size_bytes=512))


def test_threads_do_not_disturb_each_other(device: SparseDevice) -> None:
    """Each thread owns every fourth block, writes it over and over, flushes, and reads what it wrote."""
    session = open_session(device, key=key())
    faults: list[str] = []

    def work(mine: int) -> None:
        for generation in range(40):
            for lba in range(mine, 200, 4):
                session.write(lba * BLOCK, pattern(lba, generation))
            if generation % 10 == mine:
                session.flush()
            found = {lba: session.read(lba * BLOCK, BLOCK) for lba in range(mine, 200, 4)}
            if found != {lba: pattern(lba, generation) for lba in found}:
                faults.append(f"thread {mine}, generation {generation}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    session.close()
    volume = open_volume(device, key=key())
    assert all(volume.read(lba * BLOCK, BLOCK) == pattern(lba, 39) for lba in range(200))
