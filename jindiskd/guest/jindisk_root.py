"""An encrypted volume on JinDisk 2, the root or another: released, adopted and served by a storage process.

The agent looks at the identification block, which proves nothing, so that a wrong disk never causes a release; what
counts is that the released key and anchor accept the volume. Format document, sections 5, 12 and 13.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from uuid import UUID

from jindiskd.base.anchor import State
from jindiskd.guest import broker, storage
from jindiskd.guest.broker import GuestBroker, seconds_from_now
from jindiskd.guest.codes import Code, GuestFailure
from jindiskd.guest.config import JindiskExpectation
from jindiskd.jindisk import identification
from jindiskd.jindisk.anchor import UNANCHORED, Reporting
from jindiskd.jindisk.device import FileDevice, OpenFile
from jindiskd.jindisk.errors import VolumeError, VolumeFenced, VolumeStale
from jindiskd.jindisk.geometry import BLOCK
from jindiskd.jindisk.served import ServedSession
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.volume import open_volume
from jindiskd.kbs.client import Fenced
from jindiskd.kbs.freshness import VolumeGrant

VERSION = 2
REPORT_INTERVAL_S = 60.0
MESSAGE_S = 20.0
"""How long a message to the broker is tried for, once the system runs."""
THREAD_STACK_BYTES = 512 << 10
"""All of a stack is locked in memory, and the default is 8 MiB."""
CACHE_PAGES = 2048
"""Map pages of 4 KiB held for each tree: 8 MiB, which maps 32 GiB or so of a dense volume."""


def check_identification(device: Path, expectation: JindiskExpectation) -> None:
    """Look whether this seems to be the volume expected.

    Raises:
        VolumeError, OSError: it cannot be.
        GuestFailure: another volume.
    """
    with OpenFile(device, writable=False) as opened:
        found = identification.decode(opened.pread(0, BLOCK), os.fspath(device))
    if expectation.version != VERSION or found.uuid != UUID(expectation.uuid):
        raise GuestFailure(Code.VOLUME)


class BrokerKeeper:
    """The broker as the one who remembers the anchor, for one session of one volume."""

    def __init__(self, guest_broker: GuestBroker, volume: str, session: bytes) -> None:
        """`volume` is its UUID, `session` the 32 bytes released with the key."""
        self._broker, self._volume, self._session = guest_broker, volume, session

    def adopt(self, state: State, session: bytes) -> None:
        """See `jindisk.anchor.Keeper`."""
        with _refusals():
            self._broker.client(seconds_from_now(MESSAGE_S)).adopt(self._volume, session, state.sequence, state.root)

    def report(self, state: State) -> None:
        """See `jindisk.anchor.Keeper`."""
        with _refusals():
            client = self._broker.client(seconds_from_now(MESSAGE_S))
            client.report(self._volume, self._session, state.sequence, state.root)

    def stale(self, state: State) -> None:
        """The disk's newest state is this one, which the anchor does not accept: the owner should know."""
        with _refusals():
            client = self._broker.client(seconds_from_now(MESSAGE_S))
            client.stale(self._volume, self._session, state.sequence, state.root)

    def close(self, state: State) -> None:
        """See `jindisk.anchor.Keeper`."""
        with _refusals():
            client = self._broker.client(seconds_from_now(MESSAGE_S))
            client.close(self._volume, self._session, state.sequence, state.root)


class _refusals(contextlib.AbstractContextManager[None]):  # noqa: N801 - reads as the function it replaces
    """The client's `Fenced` as the engine's `VolumeFenced`."""

    def __exit__(self, _kind: object, exc: BaseException | None, _traceback: object) -> None:
        if isinstance(exc, Fenced):
            raise VolumeFenced("a newer session has begun, or the state is not accepted") from None


def open_session(device: Path, expectation: JindiskExpectation, grant: VolumeGrant, keeper: BrokerKeeper) -> Session:
    """Open the volume and begin the released session on it. Runs in the storage process.

    Raises:
        VolumeError, OSError: it cannot be opened, or is not in an acceptable state.
        JindiskError: the broker did not take the adoption.
    """
    anchor = UNANCHORED if grant.anchor is None else grant.anchor
    opened: FileDevice = OpenFile(device, writable=True).__enter__()  # for the life of the process
    try:
        volume = open_volume(
            opened, key=grant.key, uuid=UUID(expectation.uuid), anchor=anchor, name="it", cache_pages=CACHE_PAGES
        )
    except VolumeStale as exc:
        if exc.newest is not None:
            with contextlib.suppress(Exception):  # the boot ends here, whoever hears of it
                keeper.stale(exc.newest)
        raise
    session = Session(
        volume,
        session_id=grant.session,
        keeper=keeper,
        reporting=Reporting.INTERVAL,
        interval_s=REPORT_INTERVAL_S,
        lease_s=float(grant.lease_s),
    )
    session.begin()
    return session


def code_of(exc: Exception) -> Code:
    """The code for what went wrong in the storage process."""
    match exc:
        case VolumeStale():
            return Code.STALE
        case VolumeFenced():
            return Code.FENCED
        case VolumeError():
            return Code.VOLUME
        case OSError():
            return Code.STORAGE
        case _:
            return broker.code_of(exc)


def serve(
    device: Path,
    expectation: JindiskExpectation,
    grant: VolumeGrant,
    guest_broker: GuestBroker,
    *,
    timeout_s: float,
    forget: storage.Forget,
    number: int = 0,
) -> Path:
    """Start a storage process for the volume and return the node of the block device it serves.

    Args:
        device: the volume.
        expectation: from the measured configuration.
        grant: from the broker; its key is the storage process's alone from now on.
        guest_broker: whom the process tells the volume's states.
        timeout_s: for opening, recovery included.
        forget: runs in the new process first: what it must not keep of ours.
        number: of the volume; the root's is 0.

    Raises:
        GuestFailure: with the code for what went wrong.
    """

    def open_volume_there() -> ServedSession:
        forget()
        keeper = BrokerKeeper(guest_broker, expectation.uuid, grant.session)
        return ServedSession(open_session(device, expectation, grant, keeper), stack_bytes=THREAD_STACK_BYTES)

    with grant.key:
        try:
            storage.start(
                open_volume_there, lambda exc: code_of(exc).value.encode(), timeout_s=timeout_s, number=number
            )
        except storage.StorageFailed as exc:
            said = exc.said.decode("ascii", errors="replace")
            raise GuestFailure(Code(said) if said in set(Code) else Code.STORAGE) from None
    return storage.node(number)
