"""Secrets come by descriptor, and whoever sends one may be slow, greedy or lying."""

import os
import socket
import threading
import time

import pytest

from jindiskd.bus import faults
from jindiskd.bus.faults import BusFault
from jindiskd.bus.keyfd import read_secret, take_regular_file
from jindiskd.bus.peers import Descriptor, Descriptors
from jindiskd.errors import TimedOut


def closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


@pytest.mark.parametrize("kind", ["pipe", "socket", "memfd", "file"])
async def test_a_secret_is_read_to_its_end(kind, tmp_path):
    """From whatever can be read; the descriptor is closed."""
    secret = b"k" * 32
    if kind == "pipe":
        fd, other = os.pipe()
        os.write(other, secret)
        os.close(other)
    elif kind == "socket":
        ours, theirs = socket.socketpair()
        ours.sendall(secret)
        ours.close()
        fd = theirs.detach()
    elif kind == "memfd":
        fd = os.memfd_create("secret")
        os.pwrite(fd, secret, 0)
    else:
        (tmp_path / "k").write_bytes(secret)
        fd = os.open(tmp_path / "k", os.O_RDONLY)
    with await read_secret(Descriptor(fd)) as found:
        assert bytes(found.reveal()) == secret
    assert closed(fd)


async def test_pieces_are_put_together():
    """A writer may take its time, within the limit."""
    fd, other = os.pipe()

    def write() -> None:
        for _ in range(4):
            os.write(other, b"12345678")
            time.sleep(0.02)
        os.close(other)

    thread = threading.Thread(target=write)
    thread.start()
    with await read_secret(Descriptor(fd)) as found:
        assert bytes(found.reveal()) == b"12345678" * 4
    thread.join()


@pytest.mark.parametrize("limit", [31, 32])
async def test_the_limit_is_exact(limit):
    """One byte more is refused, and never silently cut off."""
    fd, other = os.pipe()
    os.write(other, b"k" * 32)
    os.close(other)
    if limit == 32:
        (await read_secret(Descriptor(fd), limit_bytes=limit)).close()
    else:
        with pytest.raises(BusFault, match="longer than 31"):
            await read_secret(Descriptor(fd), limit_bytes=limit)
    assert closed(fd)


async def test_a_writer_that_never_ends_is_given_up():
    """Whether it says nothing or a little."""
    fd, other = os.pipe()
    os.write(other, b"half")
    with pytest.raises(TimedOut):
        await read_secret(Descriptor(fd), timeout_s=0.1)
    assert closed(fd)
    os.close(other)


@pytest.mark.parametrize("how", ["directory", "device", "write-only", "path-only"])
async def test_what_is_no_source_of_a_secret_is_refused(how, tmp_path):
    """And closed."""
    (tmp_path / "x").write_bytes(b"x")
    path, flags = {
        "directory": (tmp_path, os.O_RDONLY),
        "device": ("/dev/zero", os.O_RDONLY),
        "write-only": (tmp_path / "x", os.O_WRONLY),
        "path-only": (tmp_path / "x", os.O_PATH),
    }[how]
    fd = os.open(path, flags)
    with pytest.raises(BusFault) as caught:
        await read_secret(Descriptor(fd))
    assert caught.value.name == faults.INVALID_ARGS
    assert closed(fd)


def test_descriptors_are_taken_once_and_closed_otherwise():
    """Two arguments cannot share one, and nobody's are left."""
    first, second = os.pipe()
    both = Descriptors([first, second])
    taken = both.at(0)
    fd = taken.take()
    with pytest.raises(BusFault, match="twice"):
        both.at(0).take()
    with pytest.raises(BusFault, match="no such"):
        both.at(2)
    both.close()
    assert not closed(fd)
    assert closed(second)
    os.close(fd)


def test_a_base_is_closed_when_it_is_refused(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BusFault):
        take_regular_file(Descriptor(fd))
    assert closed(fd)
