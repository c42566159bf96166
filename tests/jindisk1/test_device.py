"""Reading and writing many parts at once, where the system does a part of it only."""

import os
from pathlib import Path

import pytest

from jindiskd.jindisk.device import FileDevice


@pytest.mark.parametrize("most", [1, 7, 10, 1000])
def test_transfers_that_come_short_are_completed(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    real_write, real_read = os.pwritev, os.preadv

    def short_write(fd: int, parts: list[bytes], offset: int) -> int:
        return real_write(fd, [b"".join(parts)[:most]], offset)

    def short_read(fd: int, parts: list[memoryview], offset: int) -> int:
        return real_read(fd, [parts[0][:most]], offset)

    monkeypatch.setattr(os, "pwritev", short_write)
    monkeypatch.setattr(os, "preadv", short_read)
    try:
        device = FileDevice(fd, name="f", offset_bytes=3)
        device.pwritev(5, [b"0123456789", memoryview(b"abcdef"), b"XYZ"])
        assert os.pread(fd, 100, 0) == bytes(8) + b"0123456789abcdefXYZ"
        room = bytearray(12)
        device.preadv(6, [memoryview(room)[:10], memoryview(room)[10:]])
        assert room == b"123456789abc"
        with pytest.raises(OSError, match="ends before"):
            device.preadv(20, [memoryview(room)])
    finally:
        os.close(fd)
