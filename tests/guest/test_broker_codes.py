"""What the host is told for each thing that can go wrong with broker and volume."""

import errno
from uuid import UUID

import pytest

from jindiskd.base.anchor import State
from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument
from jindiskd.guest import broker, jindisk_root
from jindiskd.guest.codes import Code, GuestFailure
from jindiskd.guest.config import JindiskExpectation
from jindiskd.jindisk import served
from jindiskd.jindisk.create import create_volume
from jindiskd.jindisk.device import OpenFile
from jindiskd.jindisk.errors import (
    VolumeCrowded,
    VolumeDeviceFailed,
    VolumeFenced,
    VolumeMalformed,
    VolumeStale,
    VolumeUnauthentic,
)
from jindiskd.jindisk.geometry import BLOCK, default_geometry
from jindiskd.kbs import client

UUID_TEXT = "5a9d1a7e-62a1-4a4c-8f4e-0c2f27bd6d1e"


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (client.BrokerNotTrusted(), Code.BROKER_NOT_TRUSTED),
        (client.BrokerUnreachable("x"), Code.BROKER_UNREACHABLE),
        (client.BrokerMisbehaved("x"), Code.BROKER_MISBEHAVED),
        (client.BrokerRefused("PolicyDeny"), Code.POLICY_DENIED),
        (client.BrokerRefused("AttestationError"), Code.EVIDENCE_REFUSED),
        (client.BrokerRefused("AttestationError", "auth", ("0.2.0", "0.4.0")), Code.BROKER_MISBEHAVED),
        (client.BrokerRefused("PluginInternalError"), Code.BROKER_TROUBLE),
        (client.Fenced(), Code.FENCED),
        (ConnectionResetError(), Code.BROKER_UNREACHABLE),
        (InvalidArgument("a", "b", "c"), Code.BROKER_MISBEHAVED),
        (GuestFailure(Code.REPORT), Code.REPORT),
        (ZeroDivisionError(), Code.INTERNAL),
    ],
)
def test_codes_of_the_broker(exc, code) -> None:
    """Each error of the client has its code; what is inside a failure already keeps its own."""
    with pytest.raises(GuestFailure) as caught, broker.broker_failures():
        raise exc
    assert caught.value.code is code
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (VolumeStale(3, "2"), Code.STALE),
        (VolumeFenced("x"), Code.FENCED),
        (VolumeUnauthentic("x"), Code.VOLUME),
        (VolumeMalformed("x", "y"), Code.VOLUME),
        (OSError(errno.ENOENT, "nbd"), Code.STORAGE),
        (client.BrokerUnreachable("x"), Code.BROKER_UNREACHABLE),
        (client.BrokerRefused("PolicyDeny"), Code.POLICY_DENIED),
    ],
)
def test_codes_of_the_volume(exc, code) -> None:
    """In the storage process the engine's errors come first."""
    assert jindisk_root.code_of(exc) is code


class Failing:
    """A session whose every method raises what it is given; the engine's own tests provoke the real things."""

    size_bytes = BLOCK

    def __init__(self, exc: Exception) -> None:
        self.exc = exc
        self.closed = False

    def _raise(self, *_arguments: object) -> None:
        raise self.exc

    read = write = flush = discard = tick = idle = _raise

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("exc", "number"),
    [
        (VolumeUnauthentic("x"), errno.EIO),
        (VolumeFenced("x"), errno.EROFS),
        (VolumeCrowded(0), errno.ENOSPC),
        (VolumeDeviceFailed("x", OSError(errno.ENOSPC, "full")), errno.ENOSPC),
        (OSError(errno.EIO, "disk"), errno.EIO),
        (AssertionError("secret"), errno.EIO),
    ],
)
def test_the_kernel_is_told_a_number(exc, number) -> None:
    """Whatever the engine raises, the storage process lives and the kernel gets an error number."""
    session = Failing(exc)
    device = served.ServedSession(session)  # type: ignore[arg-type]  # stands in for a session
    try:
        for call in (
            lambda: device.read(0, 1),
            lambda: device.write(0, b"x"),
            device.flush,
            lambda: device.discard(0, 1),
        ):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == number
            assert "secret" not in str(caught.value)
    finally:
        device.close()
    assert session.closed


class Client:
    """A client that answers as told."""

    def __init__(self, exc: Exception | None) -> None:
        self.exc = exc
        self.calls: list[tuple[object, ...]] = []

    def client(self, _deadline: float) -> "Client":
        return self

    def adopt(self, *arguments: object) -> None:
        self.calls.append(arguments)
        if self.exc:
            raise self.exc

    report = close = adopt


def test_keeper() -> None:
    """A fenced session is the engine's refusal; anything else is no answer."""
    state = State(session=b"o" * 32, sequence=7, root=b"r" * 32)
    for exc, expected in ((client.Fenced(), VolumeFenced), (client.BrokerUnreachable("x"), client.BrokerUnreachable)):
        keeper = jindisk_root.BrokerKeeper(Client(exc), UUID_TEXT, b"s" * 32)  # type: ignore[arg-type]
        for call in (lambda k=keeper: k.adopt(state, b"s" * 32), lambda k=keeper: k.report(state)):
            with pytest.raises(expected):
                call()
    told = Client(None)
    keeper = jindisk_root.BrokerKeeper(told, UUID_TEXT, b"s" * 32)  # type: ignore[arg-type]
    keeper.adopt(state, b"n" * 32)
    keeper.report(state)
    keeper.close(state)
    sessions = [b"n" * 32, b"s" * 32, b"s" * 32]
    assert told.calls == [(UUID_TEXT, session, 7, b"r" * 32) for session in sessions]


def test_identification(tmp_path) -> None:
    """The volume expected passes; another UUID, another version, an empty disk and a short one do not."""
    disk = tmp_path / "disk"
    geometry = default_geometry(4096)
    with disk.open("wb") as file:
        file.truncate(geometry.end * BLOCK)
    with Secret.random(32) as key, OpenFile(disk, writable=True) as device:
        create_volume(device, geometry=geometry, key=key, uuid=UUID(UUID_TEXT), session_id=bytes(32)).close()
    jindisk_root.check_identification(disk, JindiskExpectation(version=2, uuid=UUID_TEXT))
    for version, uuid in ((3, UUID_TEXT), (2, UUID_TEXT.replace("5", "6"))):
        with pytest.raises(GuestFailure):
            jindisk_root.check_identification(disk, JindiskExpectation(version=version, uuid=uuid))
    for size in (0, 100, 1 << 20):
        disk.write_bytes(bytes(size))
        with pytest.raises(Exception, match=r"device ends|no JinDisk"):
            jindisk_root.check_identification(disk, JindiskExpectation(version=2, uuid=UUID_TEXT))
