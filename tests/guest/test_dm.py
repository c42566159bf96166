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
    printf("%zu %zu %zu %zu %zu %zu %zu %zu %lu %lu %lu %lu %lu %u %u %zu %zu",
        sizeof(struct dm_ioctl), offsetof(struct dm_ioctl, data_size), offsetof(struct dm_ioctl, target_count),
        offsetof(struct dm_ioctl, flags), offsetof(struct dm_ioctl, dev), offsetof(struct dm_ioctl, name),
        offsetof(struct dm_ioctl, uuid), sizeof(struct dm_target_spec),
        (unsigned long) DM_DEV_CREATE, (unsigned long) DM_DEV_REMOVE, (unsigned long) DM_DEV_SUSPEND,
        (unsigned long) DM_TABLE_LOAD, (unsigned long) DM_LIST_VERSIONS, DM_SECURE_DATA_FLAG, DM_BUFFER_FULL_FLAG,
        offsetof(struct dm_target_versions, version), offsetof(struct dm_target_versions, name));
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
    numbers = [dm.DM_DEV_CREATE, dm.DM_DEV_REMOVE, dm.DM_DEV_SUSPEND, dm.DM_TABLE_LOAD, dm.DM_LIST_VERSIONS]
    flags = [dm.DM_SECURE_DATA_FLAG, dm.DM_BUFFER_FULL_FLAG]
    assert [dm.HEADER.size, *offsets, dm.TARGET.size, *numbers, *flags, 4, dm.VERSIONS.size] == seen


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


def test_udev_is_told_that_it_was_activated_properly(tmp_path) -> None:
    """The flag that the rules of the device mapper look for is in the event of the resumed mapping, and there alone."""
    control, events = tmp_path / "control", {}
    control.touch()

    def note(_descriptor: int, request: int, buffer: bytearray) -> int:
        events[request] = struct.unpack_from("<I", buffer, 32)[0]
        return 0

    dm.activate("root", "U", sectors=8, kind="crypt", parameters=bytearray(1), control=control, ioctl=note)
    # libdevmapper.h: DM_UDEV_PRIMARY_SOURCE_FLAG 0x0040, DM_UDEV_FLAGS_SHIFT 16
    assert events == {dm.DM_DEV_CREATE: 0, dm.DM_TABLE_LOAD: 0, dm.DM_DEV_SUSPEND: 0x0040 << 16}


def test_jindisk_table() -> None:
    """As in `docs/formats/jindisk1.md`, section 13: key, IV, path, flag."""
    parameters = dm.jindisk_parameters(bytearray(range(28)), "/dev/vda3")
    assert bytes(parameters) == b"000102030405060708090a0b0c0d0e0f 101112131415161718191a1b /dev/vda3 0"
    assert dm.jindisk_parameters(bytearray(28), "/dev/vda3", make=True).endswith(b"/dev/vda3 1")
    for key, device in ((bytearray(27), "/dev/vda"), (bytearray(28), "/dev/with space"), (bytearray(28), "a\n0 1")):
        with pytest.raises(ValueError, match="28 bytes of key"):
            dm.jindisk_parameters(key, device)


def answering(buffer_flags: int, entries: bytes, data_bytes: int | None = None):
    """A kernel that lists targets."""

    def answer(_descriptor: int, request: int, buffer: bytearray) -> int:
        assert request == dm.DM_LIST_VERSIONS
        assert len(buffer) == dm.LIST_BYTES
        assert struct.unpack_from("<3III", buffer) == (4, 0, 0, dm.LIST_BYTES, 312)
        struct.pack_into("<I", buffer, 12, 312 + len(entries) if data_bytes is None else data_bytes)
        struct.pack_into("<I", buffer, 28, buffer_flags)
        buffer[312 : 312 + len(entries)] = entries
        return 0

    return answer


def test_the_list_of_targets(tmp_path) -> None:
    """Entries by their offsets, names ended by NUL; a list that is cut or loops ends."""
    control = tmp_path / "control"
    control.touch()
    two = struct.pack("<IIII8s", 24, 1, 14, 1, b"crypt") + struct.pack("<IIII8s", 0, 1, 0, 0, b"jindisk")
    assert dm.targets(control=control, ioctl=answering(0, two)) == {"crypt": (1, 14, 1), "jindisk": (1, 0, 0)}
    assert dm.targets(control=control, ioctl=answering(0, b"")) == {}
    assert dm.targets(control=control, ioctl=answering(0, two, data_bytes=330)) == {"cr": (1, 14, 1)}
    assert dm.targets(control=control, ioctl=answering(0, two, data_bytes=1 << 31)).keys() >= {"crypt", "jindisk"}
    far = struct.pack("<IIII8s", 1 << 31, 1, 0, 0, b"a")
    assert dm.targets(control=control, ioctl=answering(0, far)) == {"a": (1, 0, 0)}
    with pytest.raises(OSError, match="longer than"):
        dm.targets(control=control, ioctl=answering(dm.DM_BUFFER_FULL_FLAG, two))
    with pytest.raises(OSError, match="No such file"):
        dm.targets(control=tmp_path / "none")
