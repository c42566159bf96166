"""The device-mapper structures, against the C compiler's view of linux/dm-ioctl.h and a recorded kernel."""

import errno
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from jindiskd.guest import dm

PROGRAM = r"""
#include <sys/ioctl.h>
#include <linux/dm-ioctl.h>
#include <stddef.h>
#include <stdio.h>
int main(void) {
    printf("%zu %zu %zu %zu %zu %zu %zu %zu %lu %lu %lu %lu %u",
        sizeof(struct dm_ioctl), offsetof(struct dm_ioctl, data_size), offsetof(struct dm_ioctl, target_count),
        offsetof(struct dm_ioctl, flags), offsetof(struct dm_ioctl, dev), offsetof(struct dm_ioctl, name),
        offsetof(struct dm_ioctl, uuid), sizeof(struct dm_target_spec),
        (unsigned long) DM_DEV_CREATE, (unsigned long) DM_DEV_REMOVE, (unsigned long) DM_DEV_SUSPEND,
        (unsigned long) DM_TABLE_LOAD, DM_SECURE_DATA_FLAG);
}
"""


def test_against_the_kernel_header(tmp_path) -> None:
    """Sizes, offsets, request numbers and flags are those that C sees."""
    if not shutil.which("cc") or not Path("/usr/include/linux/dm-ioctl.h").exists():
        pytest.skip("a C compiler with the kernel's headers is missing; install gcc and linux-libc-dev")
    source = tmp_path / "sizes.c"
    source.write_text(PROGRAM)
    subprocess.run(["cc", "-o", tmp_path / "sizes", source], check=True)
    seen = [int(word) for word in subprocess.check_output([tmp_path / "sizes"]).split()]
    packed = dm.pack_header("N", uuid="U", targets=0x01020304, flags=0x05060708, total_bytes=0x11121314)
    offsets = [
        packed.index(struct.pack("<I", 0x11121314)),
        packed.index(struct.pack("<I", 0x01020304)),
        packed.index(struct.pack("<I", 0x05060708)),
        dm.HEADER.size - 7 - 129 - 128 - 8,
        packed.index(b"N"),
        packed.index(b"U"),
    ]
    numbers = [dm.DM_DEV_CREATE, dm.DM_DEV_REMOVE, dm.DM_DEV_SUSPEND, dm.DM_TABLE_LOAD, dm.DM_SECURE_DATA_FLAG]
    assert [dm.HEADER.size, *offsets, dm.TARGET.size, *numbers] == seen


def test_crypt_table() -> None:
    """The table is as `dmsetup table --showkeys` prints it for a volume that cryptsetup opened."""
    key = bytearray(range(64))
    text = dm.crypt_parameters("aes-xts-plain64", key, "254:3", offset_sectors=2048, sector_bytes=4096)
    assert text.decode() == f"aes-xts-plain64 {bytes(range(64)).hex()} 0 254:3 2048 1 sector_size:4096"


def test_table_buffer() -> None:
    """One target behind the header, its parameters ended by NUL, marked secret, big enough not to be copied."""
    buffer = dm.pack_table("root", 1000, "crypt", bytearray(b"parameters"))
    assert len(buffer) == dm.BUFFER_BYTES > 1024
    assert struct.unpack_from("<III", buffer, 12) == (len(buffer), 312, 1)
    assert struct.unpack_from("<I", buffer, 28)[0] & dm.DM_SECURE_DATA_FLAG
    assert buffer[312:352] == struct.pack("<QQiI", 0, 1000, 0, 0) + b"crypt".ljust(16, b"\0")
    assert buffer[352:363] == b"parameters\0"
    assert len(dm.pack_table("root", 1, "crypt", bytearray(5001))) >= 312 + 40 + 5002


@pytest.mark.parametrize(("name", "uuid"), [("n" * 128, ""), ("n", "u" * 129)])
def test_long_names(name, uuid) -> None:
    """What would lose its NUL is refused."""
    with pytest.raises(ValueError):
        dm.pack_header(name, uuid=uuid, total_bytes=4096)


class Kernel:
    """Stands in for the kernel's side to make an ioctl fail, which cannot be provoked with a sound table."""

    def __init__(self, failing: int) -> None:
        self.failing = failing
        self.requests: list[int] = []

    def __call__(self, _descriptor: int, request: int, _buffer: bytearray) -> int:
        self.requests.append(request)
        if request == self.failing:
            raise OSError(errno.EINVAL, "refused")
        return 0


@pytest.mark.parametrize("failing", [dm.DM_TABLE_LOAD, dm.DM_DEV_SUSPEND])
def test_nothing_is_left_after_a_refusal(tmp_path, failing) -> None:
    """A mapping whose table the kernel refuses is removed, and the key is wiped."""
    control = tmp_path / "control"
    control.touch()
    kernel, parameters = Kernel(failing), bytearray(b"secret")
    with pytest.raises(OSError, match="refused"):
        dm.activate("root", "U", sectors=8, kind="crypt", parameters=parameters, control=control, ioctl=kernel)
    assert kernel.requests[-1] == dm.DM_DEV_REMOVE
    assert parameters == bytes(6)
