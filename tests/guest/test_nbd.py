"""The network block device: structures against the kernel's headers, requests against a dictionary in memory."""

import errno
import os
import random
import shutil
import socket
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from jindiskd.guest import nbd, shutdown, storage
from jindiskd.jindisk import nbd_kernel

PROGRAM = r"""
#include <linux/genetlink.h>
#include <linux/netlink.h>
#include <linux/nbd.h>
#include <linux/nbd-netlink.h>
#include <stdio.h>
int main(void) {
    printf("%zu %zu %zu %zu %zu %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d",
        sizeof(struct nlmsghdr), sizeof(struct genlmsghdr), sizeof(struct nlattr),
        sizeof(struct nbd_request), sizeof(struct nbd_reply),
        NETLINK_GENERIC, NLMSG_ERROR, NLM_F_REQUEST, NLM_F_ACK, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_ID,
        CTRL_ATTR_FAMILY_NAME, NBD_CMD_CONNECT * 10 + NBD_CMD_DISCONNECT,
        NBD_ATTR_INDEX, NBD_ATTR_SIZE_BYTES, NBD_ATTR_BLOCK_SIZE_BYTES,
        NBD_ATTR_SERVER_FLAGS, NBD_ATTR_SOCKETS, NBD_SOCK_ITEM, NBD_SOCK_FD,
        NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM,
        NBD_CMD_FLUSH * 10 + NBD_CMD_TRIM, NLA_F_NESTED);
    printf(" %u %u", NBD_REQUEST_MAGIC, NBD_REPLY_MAGIC);
}
"""


def test_against_the_kernel_headers(tmp_path) -> None:
    """Sizes and numbers are those that C sees."""
    if not shutil.which("cc") or not Path("/usr/include/linux/nbd-netlink.h").exists():
        pytest.skip("a C compiler with the kernel's headers is missing; install gcc and linux-libc-dev")
    source = tmp_path / "numbers.c"
    source.write_text(PROGRAM)
    subprocess.run(["cc", "-w", "-o", tmp_path / "numbers", source], check=True)
    k = nbd_kernel
    assert [int(word) for word in subprocess.check_output([tmp_path / "numbers"]).split()] == [
        k._MESSAGE.size, k._GENERIC.size, k._ATTRIBUTE.size, nbd.REQUEST.size, nbd.REPLY.size,
        k.NETLINK_GENERIC, k.NLMSG_ERROR, k.NLM_F_REQUEST, k.NLM_F_ACK, k.GENL_ID_CTRL,
        k.CTRL_CMD_GETFAMILY, k.CTRL_ATTR_FAMILY_ID, k.CTRL_ATTR_FAMILY_NAME,
        k.NBD_CMD_CONNECT * 10 + k.NBD_CMD_DISCONNECT,
        k.NBD_ATTR_INDEX, k.NBD_ATTR_SIZE_BYTES, k.NBD_ATTR_BLOCK_SIZE_BYTES, k.NBD_ATTR_SERVER_FLAGS,
        k.NBD_ATTR_SOCKETS, k.NBD_SOCK_ITEM, k.NBD_SOCK_FD, nbd.FLAGS, nbd.FLUSH * 10 + nbd.TRIM,
        k.NLA_F_NESTED, nbd.REQUEST_MAGIC, nbd.REPLY_MAGIC,
    ]  # fmt: skip


class Memory:
    """A volume in memory that remembers what was flushed."""

    def __init__(self, size: int = 1 << 16) -> None:
        self.size_bytes = size
        self.data = bytearray(size)
        self.flushed = bytes(size)
        self.closed = 0
        self.failing = False

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        if self.failing:
            raise OSError(errno.ENOSPC, "full")
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.flushed = bytes(self.data)

    def discard(self, offset: int, length: int) -> None:
        self.data[offset : offset + length] = bytes(min(length, len(self.data) - offset))

    def close(self) -> None:
        if self.failing:
            raise OSError(errno.EIO, "cannot")
        self.flush()
        self.closed += 1


class Kernel:
    """Sends requests as the kernel does."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream

    def send(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> tuple[int, bytes]:
        handle = random.getrandbits(64)
        self.stream.sendall(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, kind, handle, offset, length) + data)
        magic, number, same = nbd.REPLY.unpack(nbd.receive(self.stream, 16))
        assert (magic, same) == (nbd.REPLY_MAGIC, handle)
        return number, nbd.receive(self.stream, length) if kind == nbd.READ and not number else b""


@pytest.fixture
def served(tmp_path):
    """A storage loop in a thread: (kernel, volume, control path, thread)."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(60)
    volume = Memory()
    path = tmp_path / "control/socket"
    control = storage.listen(path)
    thread = threading.Thread(target=storage.serve, args=(ours, control, volume), daemon=True)
    thread.start()
    yield Kernel(theirs), volume, path, thread
    theirs.close()
    thread.join(5)
    assert not thread.is_alive()
    ours.close()
    control.close()


def test_random_requests(served) -> None:
    """Against a model: what is read is what was written last; flush and FUA make it durable."""
    kernel, volume, _, _ = served
    model = bytearray(volume.size_bytes)
    generator = random.Random(7)
    for _ in range(500):
        offset = generator.randrange(0, volume.size_bytes, 512)
        length = min(generator.choice([512, 4096, 20000]), volume.size_bytes - offset)
        kind = generator.choice([nbd.READ, nbd.WRITE, nbd.WRITE, nbd.TRIM, nbd.FLUSH])
        if kind == nbd.READ:
            assert kernel.send(kind, offset, length) == (0, bytes(model[offset : offset + length]))
        elif kind == nbd.WRITE:
            data, flags = generator.randbytes(length), generator.choice([0, nbd.FUA])
            assert kernel.send(kind, offset, length, data, flags) == (0, b"")
            model[offset : offset + length] = data
            assert not flags or volume.flushed == model
        elif kind == nbd.TRIM:
            flags = generator.choice([0, nbd.FUA])
            assert kernel.send(kind, offset, length, flags=flags) == (0, b"")
            model[offset : offset + length] = bytes(length)
            assert not flags or volume.flushed == model
        else:
            assert kernel.send(kind) == (0, b"")
            assert volume.flushed == model


def test_errors_reach_the_kernel(served) -> None:
    """A failing volume, a request beyond the end and an unknown request are errors of that request alone."""
    kernel, volume, _, _ = served
    assert kernel.send(nbd.READ, volume.size_bytes - 512, 1024)[0] == errno.EINVAL
    assert kernel.send(nbd.READ, 1 << 63, 512)[0] == errno.EINVAL
    assert kernel.send(nbd.WRITE, volume.size_bytes, 4, b"data")[0] == errno.EINVAL
    assert kernel.send(9)[0] == errno.EINVAL
    volume.failing = True
    assert kernel.send(nbd.WRITE, 0, 4, b"data")[0] == errno.ENOSPC
    volume.failing = False
    assert kernel.send(nbd.READ, 0, 4) == (0, bytes(4))


def test_a_trim_may_be_long(served) -> None:
    """The kernel trims up to 4 GiB with one request: that is no junk, as a read of this length would be."""
    kernel, volume, _, _ = served
    volume.size_bytes = 1 << 32
    assert kernel.send(nbd.TRIM, 0, 0xFFFFF000) == (0, b"")
    volume.size_bytes = 1 << 16
    assert kernel.send(nbd.READ, 0, 4) == (0, bytes(4))


@pytest.mark.parametrize("junk", [b"x" * 28, nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.READ, 0, 0, (32 << 20) + 1)])
def test_junk_ends_it(served, junk) -> None:
    """What is no request ends the service, and the volume is closed properly."""
    kernel, volume, _, thread = served
    kernel.stream.sendall(junk)
    thread.join(5)
    assert volume.closed == 1


def test_close_on_request(served) -> None:
    """The control socket closes the volume once; requests fail from then on, a second close is fine."""
    kernel, volume, path, _ = served
    assert kernel.send(nbd.WRITE, 0, 4, b"data") == (0, b"")
    assert storage.ask_to_close(path)
    assert volume.closed == 1
    assert volume.flushed[:4] == b"data"
    assert kernel.send(nbd.READ, 0, 4)[0] == errno.EIO
    assert kernel.send(nbd.WRITE, 0, 4, b"more")[0] == errno.EIO
    assert kernel.send(nbd.TRIM, 0, 4)[0] == errno.EIO
    assert kernel.send(nbd.FLUSH)[0] == 0
    assert storage.ask_to_close(path)
    assert volume.closed == 1


def test_failed_close_is_told(served) -> None:
    """A volume that cannot be closed stays open, and the one who asked knows."""
    kernel, volume, path, _ = served
    volume.failing = True
    assert not storage.ask_to_close(path)
    volume.failing = False
    assert kernel.send(nbd.READ, 0, 4) == (0, bytes(4))


def test_odd_control_peers(served) -> None:
    """Other words, silence and hang-ups change nothing."""
    kernel, volume, path, _ = served
    for word in (b"", b"open", b"close please", bytes(1000)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
            peer.connect(os.fspath(path))
            if word:
                peer.send(word)
    assert kernel.send(nbd.READ, 0, 4) == (0, bytes(4))
    assert volume.closed == 0
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_storage_process(tmp_path) -> None:
    """Nobody there: the answer is no, at once."""
    assert not storage.ask_to_close(tmp_path / "none")


def test_failure_to_start(left_processes) -> None:
    """What the opening raises comes back as the bytes made of it, and no process is left."""

    def fail() -> Memory:
        raise ValueError("never shown")

    with pytest.raises(storage.StorageFailed) as caught:
        storage.start(fail, lambda exc: type(exc).__name__.encode(), timeout_s=20)
    # Without root's rights the process fails earlier, with another error of its own.
    assert caught.value.said in {b"ValueError", b"PermissionError", b"OSError"}
    assert left_processes() == set()


def test_survivor_mark() -> None:
    """The command line of a marked process begins with `@`, as systemd looks for it."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            storage.mark_survivor()
            os.write(writing, Path("/proc/self/cmdline").read_bytes()[:1])
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"@"


def test_mounts_below() -> None:
    """Inner mounts first, a later one on the same place before the earlier; names with spaces are decoded."""
    text = (
        "/dev/nbd0 / ext4 rw 0 0\n"
        "/dev/nbd0 /oldroot ext4 ro 0 0\n"
        "tmpfs /oldroot/run tmpfs rw 0 0\n"
        "tmpfs /oldroot/run/a\\040b tmpfs rw 0 0\n"
        "x /oldrootx tmpfs rw 0 0\n"
        "y /oldroot ext4 rw 0 0\n"
        "\n"
    )
    found = [str(path) for path in shutdown.mounts_below(text, Path("/oldroot"))]
    assert found == ["/oldroot/run/a b", "/oldroot/run", "/oldroot", "/oldroot"]


def test_attach_without_nbd() -> None:
    """A kernel without the module is an error of the kernel's."""
    if Path("/sys/module/nbd").exists():
        pytest.skip("this machine has nbd, and it is not the test's to use")
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(OSError):
        nbd_kernel.attach([theirs.fileno()], 1 << 20, 4096, nbd.FLAGS)


def test_connect_message_by_hand() -> None:
    """The message, attribute by attribute."""
    message = nbd_kernel.connect_message(0x1B, [7], 1 << 30, 4096, nbd.FLAGS, 0)
    assert struct.unpack_from("=IHHII", message) == (len(message), 0x1B, 5, 1, 0)
    assert message[16:20] == b"\1\1\0\0"
    assert message[20:28] == struct.pack("=HHI", 8, 1, 0)
    assert message[28:40] == struct.pack("=HHQ", 12, 2, 1 << 30)
    assert message[40:52] == struct.pack("=HHQ", 12, 3, 4096)
    assert message[52:64] == struct.pack("=HHQ", 12, 5, nbd.FLAGS)
    assert message[64:] == struct.pack("=HHHHHHI", 16, 7 | 1 << 15, 12, 1 | 1 << 15, 8, 1, 7)
