"""The verbs, done with the rights of root: attach, map, take away, tell. All parsing of disks is the worker's."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jindiskd.base.files import replace_file
from jindiskd.base.secret import Secret
from jindiskd.errors import Busy, InvalidArgument, JindiskError, NotFound, NotSupported, TimedOut
from jindiskd.guest import dm
from jindiskd.helper import lower, mapped, worker
from jindiskd.helper.lower import Places
from jindiskd.helper.mapped import Mapped
from jindiskd.helper.protocol import Answer, Close, HelperFailed, Kind, Open, Serving, broken
from jindiskd.helper.states import SOCKET
from jindiskd.helper.worker import Said, User
from jindiskd.jindisk import nbd_kernel
from jindiskd.jindisk.geometry import BLOCK
from jindiskd.jindisksetup import server_process
from jindiskd.jindisksetup.attached import VolumeNotClosed
from jindiskd.luks2 import layout

CLOSE_S = 120.0
OPEN_S = 600.0
"""For a worker to open a volume: recovery reads as much as the last session wrote."""
LOOK_S = 0.5
SECTOR_BYTES = dm.SECTOR_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where things are."""

    service_uid: int = 0
    """Who may ask, beside root."""
    user: User | None = None
    """Who workers become; None where the helper itself has no rights to drop, in tests."""
    states: Path = SOCKET
    run: Path = Path("/run/jindisk-helper")
    """Faults of volumes, a file each, by node: written when a volume fails or is not closed well."""
    places: Places = field(default_factory=Places)


Reply = Callable[[Answer], None]
"""Sends the answer, once."""


def open_(request: Open, key: Secret, reply: Reply, settings: Settings) -> None:
    """Map a volume. For one that a worker serves this returns when it is closed.

    Raises:
        JindiskError: nothing is mapped.
    """
    for there in mapped.mapped(settings.places.sys):
        if there.below == request.below:
            raise Busy(f"device {request.below}", f"its volume is open as /dev/{there.node} already")
    if request.kind is Kind.LUKS2:
        _open_luks2(request, key, reply, settings)
    elif request.kind is Kind.JINDISK1 and not request.read_only and _has_target():
        _open_target(request, key, reply, settings)
    else:
        _open_nbd(request, key, reply, settings)


def _has_target() -> bool:
    try:
        return "jindisk" in dm.targets()
    except OSError:
        return False


def _open_nbd(request: Open, key: Secret, reply: Reply, settings: Settings) -> None:
    device = lower.open_below(request.below, settings.places, writable=not request.read_only, exclusive=True)
    name = f"device {request.below}"

    def body(parent: socket.socket) -> None:
        worker.serve(request, device, key, name, settings.states, parent)

    # No signal ends this process between attaching and being ready to let go.
    server_process.hold_signals()
    process, ours = worker.start(body, settings.user)
    os.close(device)
    key.close()
    index = -1
    try:
        ours.settimeout(OPEN_S)
        said, fds = _heard(ours)
        if len(fds) != 1:
            raise HelperFailed(broken("the worker sent no connection"))
        try:
            index = _attach(fds[0], said, mapped.nbd_mark(request))
        finally:
            os.close(fds[0])
        if not any(item.node == f"nbd{index}" for item in mapped.mapped(settings.places.sys)):
            raise NotSupported("a network block device", "the kernel shows no mark of ours on it: Linux 5.14 is needed")
        (settings.run / f"nbd{index}").unlink(missing_ok=True)
        ours.send(worker.GO)
        reply(Answer(node=f"nbd{index}"))
        _stay(process, ours, index, settings)
    except BaseException:
        # The worker sees the end of its socket, or of the kernel's, and closes the volume.
        if index >= 0:
            with contextlib.suppress(OSError):
                nbd_kernel.detach(index)
        ours.close()
        _end(process)
        raise


def _heard(ours: socket.socket) -> tuple[Said, list[int]]:
    try:
        said, fds = worker.hear(ours)
    except TimeoutError as exc:
        raise TimedOut("opening the volume", OPEN_S) from exc
    if said.failed is not None:
        for fd in fds:
            os.close(fd)
        raise HelperFailed(said.failed)
    return said, fds


def _attach(kernels: int, said: Said, mark: str) -> int:
    try:
        return nbd_kernel.attach([kernels], said.size_bytes, BLOCK, said.flags, backend=mark)
    except OSError as exc:
        if exc.errno == errno.ENOENT:
            raise NotSupported("a network block device", "load the kernel's nbd module: modprobe nbd") from exc
        raise


def _stay(process: int, ours: socket.socket, index: int, settings: Settings) -> None:
    """Wait until the worker has closed the volume, as it does when the kernel lets go; a signal does that too."""
    node, detached = f"nbd{index}", False
    ours.settimeout(0.0)
    while True:
        if signal.sigtimedwait(server_process.ENDING, LOOK_S) is not None and not detached:
            detached = True
            with contextlib.suppress(OSError):
                _sync(node, settings)
            with contextlib.suppress(OSError):
                nbd_kernel.detach(index)
        ended, status = os.waitpid(process, os.WNOHANG)
        _note_faults(ours, settings.run / node)
        if ended:
            break
    if os.waitstatus_to_exitcode(status) < 0:  # killed: the kernel has a device that nobody serves
        replace_file(settings.run / node, b"its server was killed", 0o644)
        with contextlib.suppress(OSError):
            nbd_kernel.detach(index)


def _note_faults(ours: socket.socket, path: Path) -> None:
    """Keep what a worker has complained about, for whoever closes the volume."""
    while True:
        try:
            said, fds = worker.hear(ours)
        except (OSError, JindiskError):  # nothing is said, or no more
            return
        for fd in fds:
            os.close(fd)
        if said.failed is not None:
            replace_file(path, said.failed.text.encode(), 0o644)


def _end(process: int) -> None:
    """Have a worker end: gently, for it may have a volume open."""
    deadline = time.monotonic() + CLOSE_S
    while time.monotonic() < deadline:
        if os.waitpid(process, os.WNOHANG)[0]:
            return
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def _open_luks2(request: Open, key: Secret, reply: Reply, settings: Settings) -> None:
    device = lower.open_below(request.below, settings.places, writable=False, exclusive=False)
    try:
        with _asked(lambda parent: worker.unlock(request, device, key, parent), settings) as ours:
            said, fds = _heard(ours)
            for fd in fds:
                os.close(fd)
            with Secret(bytearray(ours.recv(layout.KEY_BYTES + 1))) as volume_key:
                if len(volume_key) != layout.KEY_BYTES:
                    raise HelperFailed(broken("the worker sent no key"))
                reply(Answer(node=_map_luks2(request, said, volume_key)))
    finally:
        os.close(device)


def _map_luks2(request: Open, said: Said, volume_key: Secret) -> str:
    if said.size_bytes % SECTOR_BYTES or said.data_offset_bytes % SECTOR_BYTES or not said.size_bytes:
        raise HelperFailed(broken("the worker sent sizes that are none"))
    parameters = dm.crypt_parameters(
        layout.CIPHER,
        volume_key.reveal(),
        str(request.below),
        offset_sectors=said.data_offset_bytes // SECTOR_BYTES,
        sector_bytes=layout.SECTOR_BYTES,
    )
    return _map(request, "crypt", said.size_bytes // SECTOR_BYTES, parameters)


def _open_target(request: Open, key: Secret, reply: Reply, settings: Settings) -> None:
    """JinDisk 1 by the kernel's own target. It takes a path, and the kernel opens it."""
    device = lower.open_below(request.below, settings.places, writable=True, exclusive=False)
    try:

        def body(parent: socket.socket) -> None:
            worker.measure(request, device, key, parent)

        with _asked(body, settings) as ours:
            said, fds = _heard(ours)
            for fd in fds:
                os.close(fd)
        parameters = dm.jindisk_parameters(key.reveal(), f"/dev/block/{request.below}")
        reply(Answer(node=_map(request, "jindisk", said.size_bytes // SECTOR_BYTES, parameters)))
    finally:
        os.close(device)


def _map(request: Open, kind: str, sectors: int, parameters: bytearray) -> str:
    name = mapped.dm_name(request)
    try:
        active = dm.activate(
            name, mapped.dm_mark(request), sectors=sectors, kind=kind, parameters=parameters,
            read_only=request.read_only,
        )  # fmt: skip
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise Busy(name, "the volume is open from another device, or this device is in use") from exc
        if exc.errno in {errno.ENOENT, errno.ENXIO, errno.ENODEV}:
            raise NotSupported("a mapping", "load the kernel's device mapper: modprobe dm_mod") from exc
        raise
    return active.node.name


@contextlib.contextmanager
def _asked(body: Callable[[socket.socket], None], settings: Settings) -> Iterator[socket.socket]:
    """A worker that looks at a volume and ends."""
    process, ours = worker.start(body, settings.user)
    try:
        ours.settimeout(OPEN_S)
        yield ours
    finally:
        ours.close()
        _end(process)


def close(request: Close, settings: Settings) -> None:
    """Take a mapping of ours away, and wait until its volume is closed.

    Raises:
        NotFound: there is none of this node and mark.
        Busy: it is in use; nothing was changed.
        VolumeNotClosed: it is gone, but its volume's closing failed.
        TimedOut: closing takes too long; it goes on.
    """
    there = _find(request, settings)
    fault = _fault(there.node, settings)
    try:
        _sync(there.node, settings)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise Busy(f"/dev/{there.node}", "it is mounted, or another device lies on it") from exc
        fault = fault or f"what was written last is lost ({exc.strerror})"
    if there.node.startswith("nbd"):
        _close_nbd(there)
        fault = _fault(there.node, settings) or fault
        (settings.run / there.node).unlink(missing_ok=True)
    else:
        _remove_mapping(there, settings)
    if fault:
        raise VolumeNotClosed(f"/dev/{there.node}", fault)


def _find(request: Close, settings: Settings) -> Mapped:
    for there in mapped.mapped(settings.places.sys):
        if (there.node, there.mark) == (request.node, request.mark):
            return there
    raise NotFound("open volume", request.node)


def _close_nbd(there: Mapped) -> None:
    try:
        watched = os.pidfd_open(there.process)
    except OSError:  # it was killed
        watched = -1
    try:
        nbd_kernel.detach(int(there.node.removeprefix("nbd")))
        if watched >= 0 and not select.select([watched], [], [], CLOSE_S)[0]:
            raise TimedOut(f"closing {there.node}", CLOSE_S)
    finally:
        if watched >= 0:
            os.close(watched)


def _remove_mapping(there: Mapped, settings: Settings) -> None:
    name = (settings.places.sys / "block" / there.node / "dm/name").read_text(encoding="ascii").strip()
    try:
        dm.remove(name, there.mark)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise Busy(f"/dev/{there.node}", "it is mounted, or another device lies on it") from exc
        if exc.errno in {errno.ENXIO, errno.ENODEV}:
            raise NotFound("open volume", there.node) from exc
        raise


def _sync(node: str, settings: Settings) -> None:
    """Make what was written to a node durable, if nobody uses it. Raises `OSError`, EBUSY where somebody does."""
    fd = os.open(settings.places.dev / node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fault(node: str, settings: Settings) -> str:
    try:
        return (settings.run / node).read_text(encoding="utf-8", errors="replace")[:500]
    except OSError:
        return ""


def list_(settings: Settings) -> Answer:
    """All that is mapped, and whether it is served."""
    return Answer(
        serving=tuple(
            Serving(
                node=there.node,
                mark=there.mark,
                alive=not there.node.startswith("nbd") or _lives(there.process),
                fault=_fault(there.node, settings),
            )
            for there in mapped.mapped(settings.places.sys)[:256]
        )
    )


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True


def as_error(exc: Exception) -> JindiskError:
    """Any error as one that can be told."""
    if isinstance(exc, JindiskError):
        return exc
    if isinstance(exc, OSError):
        return HelperFailed(broken(f"the kernel refuses: {exc.strerror or 'no reason'}"))
    if isinstance(exc, ValueError):
        return InvalidArgument("the request", "", "it cannot be done")
    return HelperFailed(broken(f"a fault of the helper: {type(exc).__name__}"))
