"""Fixtures of the tests that boot, and the path to their helper modules."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import qemu
import qemu_kernel
import testroot


@pytest.fixture(scope="session")
def guest_kernel(tmp_path_factory) -> qemu_kernel.GuestKernel:
    found = qemu_kernel.find_kernel(tmp_path_factory.mktemp("kernel"))
    if found is None:
        pytest.skip(qemu_kernel.MISSING)
    return found


@pytest.fixture(scope="session")
def clear_root(tmp_path_factory) -> Path:
    """The small root file system in the clear."""
    return testroot.make_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="session")
def encrypted(tmp_path_factory, clear_root) -> testroot.EncryptedDisk:
    """The small root as a LUKS2 volume; tests that change it copy it first."""
    return testroot.encrypt_root(clear_root, tmp_path_factory.mktemp("disk") / "disk.img")


@pytest.fixture
def machine(tmp_path, guest_kernel) -> Iterator[Callable[..., qemu.Machine]]:
    """Makes virtual machines that end with the test."""
    if qemu.find_qemu() is None or qemu.find_vsock_device() is None:
        pytest.skip("qemu-system-x86_64 or vhost-device-vsock is missing; run scripts/setup")
    made: list[qemu.Machine] = []

    def make(**arguments) -> qemu.Machine:
        directory = tmp_path / f"m{len(made)}"
        directory.mkdir()
        made.append(qemu.Machine(directory=directory, kernel=guest_kernel.kernel, **arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()
