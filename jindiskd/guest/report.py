"""Attestation reports from inside the guest: one source a way of asking, chosen by the measured configuration.

What devices the host shows never decides: a host that takes the real device away gets an error, not a simulation.
Sources: attestation facts, section 2; Documentation/ABI/testing/configfs-tsm-report; linux/sev-guest.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import importlib
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from jindiskd.base.platform import Platform, Tee
from jindiskd.errors import EXIT_REFUSED, JindiskError
from jindiskd.guest.config import FIRMWARE_PORT

DATA_BYTES = 64
REPORT_LIMIT = 4000  # the response buffer of SNP_GET_REPORT
QUOTE_LIMIT = 1 << 16
TABLE_LIMIT = 1 << 16
EVENT_LOG, LOG_LIMIT = Path("/sys/firmware/acpi/tables/data/CCEL"), 1 << 19
ATTEMPTS = 5
RTMR3 = Path("/sys/devices/virtual/misc/tdx_guest/measurements/rtmr3:sha384")
KEYS_GIVEN = hashlib.sha384(b"jindisk: keys given").digest()
"""What RTMR3 is extended with, by a write of 48 bytes (Linux, ABI/testing/sysfs-devices-virtual-misc-tdx_guest)."""


class NoReport(JindiskError, code="NoReport", exit_code=EXIT_REFUSED):
    """The platform gave no report."""

    def __init__(self, source: str, problem: str) -> None:
        """`source` is what was asked."""
        super().__init__(f"{source} gave no attestation report: {problem}; check the domain's launch security")


@dataclass(frozen=True, slots=True, kw_only=True)
class RawReport:
    """What the platform answered; the broker's to verify, the guest's only to pass on."""

    report: bytes
    table: bytes
    """The certificate table (GHCB 4.1.8.1) that came with it, empty when none did."""


class ReportSource(Protocol):
    """A way of asking the platform."""

    def get(self, data: bytes) -> RawReport:
        """A fresh report that binds `data`, 64 bytes. Raises `NoReport`."""


def source_for(platform: Platform, plugin: str = "") -> ReportSource:
    """The way of asking that belongs to `platform`, or the measured configuration's own, `module:attribute`.

    Raises:
        NoReport: the platform has no reports of its own; the plug-in cannot be used.
    """
    if plugin:
        module, _, name = plugin.partition(":")
        try:
            made: ReportSource = getattr(importlib.import_module(module), name)(platform)
        except Exception as exc:
            raise NoReport(f"the report source {plugin}", f"it cannot be used ({type(exc).__name__})") from exc
        return made
    if platform is Platform.SIMULATED_SNP:
        return SimulatedFirmware(connect_to_firmware)
    if platform is Platform.SNP:
        # Which of the two the kernel offers is the measured kernel's property; both reach the same hardware.
        return TsmReports() if TsmReports.ROOT.is_dir() else SevGuest()
    if platform is Platform.TDX:
        return TsmReports()
    raise NoReport(f"platform {platform.value}", "it is attested before its launch, not from inside")


class TsmReports:
    """configfs-tsm, Linux 6.7 and later; the same interface for SNP and TDX."""

    ROOT = Path("/sys/kernel/config/tsm/report")

    def __init__(self, root: Path = ROOT, random: Callable[[int], bytes] = os.urandom) -> None:
        """`random` names the request's directory, so that no two callers share one."""
        self._root, self._random = root, random

    def get(self, data: bytes) -> RawReport:
        """See `ReportSource`. Retries while the generation count shows somebody else's write."""
        entry = self._root / f"jindisk-{self._random(8).hex()}"
        try:
            entry.mkdir()
        except OSError as exc:
            raise NoReport("configfs-tsm", f"error {exc.errno} at mkdir") from exc
        try:
            for _ in range(ATTEMPTS):
                found = self._attempt(entry, data)
                if found is not None:
                    return found
        except OSError as exc:
            raise NoReport("configfs-tsm", f"error {exc.errno}") from exc
        finally:
            entry.rmdir()
        raise NoReport("configfs-tsm", "its answers kept changing or failing")

    def _attempt(self, entry: Path, data: bytes) -> RawReport | None:
        before = int(entry.joinpath("generation").read_bytes())
        _write_whole(entry / "inblob", data)
        try:
            report = _read_bounded(entry / "outblob", QUOTE_LIMIT)
            table = _read_bounded(entry / "auxblob", TABLE_LIMIT)
        except OSError as exc:
            # The host may interrupt or delay a quote; anything else is final.
            if exc.errno in {errno.EINTR, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY}:
                return None
            if exc.errno != errno.ENOENT:
                raise
            table = b""  # a provider without certificates has no such attribute
        if int(entry.joinpath("generation").read_bytes()) != before + 1:
            return None
        if not report:
            raise NoReport("configfs-tsm", "the report is empty")
        return RawReport(report=report, table=table)


def event_log(path: Path = EVENT_LOG) -> bytes:
    """The firmware's event log of a TDX guest (CCEL); empty where the kernel shows none. The broker replays it."""
    try:
        return _read_bounded(path, LOG_LIMIT)
    except OSError:
        return b""


def end_attesting(platform: Platform, register: Path = RTMR3) -> None:
    """Have a TDX guest's quotes show from now on that it has its keys: a policy that demands zeros in RTMR3, as is the
    default, gives it none again, whoever is root in it.

    Linux shows the register since 6.16; before, and on other platforms, nothing is done.

    Raises:
        OSError: it is there, and was not extended.
    """
    if platform.tee is Tee.TDX and register.exists():
        _write_whole(register, KEYS_GIVEN)


def _write_whole(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        # configfs takes a binary attribute when the descriptor is closed, so errors may appear only there.
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _read_bounded(path: Path, limit: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = bytearray()
        while part := os.read(descriptor, 4096):
            found += part
            if len(found) > limit:
                raise OSError(errno.EFBIG, "an attestation blob is too long")
        return bytes(found)
    finally:
        os.close(descriptor)


class SevGuest:
    """The SEV guest device, Linux 5.19 and later."""

    DEVICE = Path("/dev/sev-guest")
    SNP_GET_REPORT = 0xC0205300
    SNP_GET_EXT_REPORT = 0xC0205302
    REQUEST = struct.Struct("<B7xQQQ")  # struct snp_guest_request_ioctl
    REPORT_REQUEST = struct.Struct("<64sI28x")  # struct snp_report_req, for VMPL 0
    EXTENSION = struct.Struct("<QI4x")  # the rest of struct snp_ext_report_req
    ANSWER = struct.Struct("<II24x")  # struct msg_report_resp: status, size
    ANSWER_BYTES = 4000
    PAGE = 4096
    VMM_INVALID_LENGTH = 1
    VMM_BUSY = 2

    def __init__(self, device: Path = DEVICE, ioctl: Callable[[int, int, bytearray], object] | None = None) -> None:
        """`ioctl` is the call that does it, `fcntl.ioctl` if not given."""
        self._device = device
        self._ioctl = ioctl or (lambda descriptor, request, buffer: fcntl.ioctl(descriptor, request, buffer, True))

    def get(self, data: bytes) -> RawReport:
        """See `ReportSource`. The certificate table is asked for with the length that the host says it has."""
        try:
            descriptor = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise NoReport(os.fspath(self._device), f"error {exc.errno} at open") from exc
        try:
            length = 0
            for _ in range(ATTEMPTS):
                found, length = self._attempt(descriptor, data, length)
                if found is not None:
                    return found
        finally:
            os.close(descriptor)
        raise NoReport(os.fspath(self._device), "the host kept changing the length of its certificates, or was busy")

    def _attempt(self, descriptor: int, data: bytes, length: int) -> tuple[RawReport | None, int]:
        """A report, or None and the length of the certificate table for the next attempt."""
        certificates = ctypes.create_string_buffer(max(length, 1))
        request = ctypes.create_string_buffer(
            self.REPORT_REQUEST.pack(data, 0)
            + self.EXTENSION.pack(ctypes.addressof(certificates) if length else 0, length),
            self.REPORT_REQUEST.size + self.EXTENSION.size,
        )
        answer = ctypes.create_string_buffer(self.ANSWER_BYTES)
        call = bytearray(self.REQUEST.pack(1, ctypes.addressof(request), ctypes.addressof(answer), 0))
        try:
            self._ioctl(descriptor, self.SNP_GET_EXT_REPORT, call)
        except OSError as exc:
            vmm_error = self.REQUEST.unpack(call)[3] >> 32
            needed = self.EXTENSION.unpack_from(request.raw, self.REPORT_REQUEST.size)[1]
            if vmm_error == self.VMM_INVALID_LENGTH and needed != length:
                if needed % self.PAGE or not 0 < needed <= TABLE_LIMIT:
                    raise NoReport(os.fspath(self._device), f"the host says {needed} bytes of certificates") from exc
                return None, needed
            if vmm_error == self.VMM_BUSY:
                return None, length
            raise NoReport(os.fspath(self._device), f"error {exc.errno}") from exc
        status, size = self.ANSWER.unpack_from(answer.raw)
        if status or not 0 < size <= self.ANSWER_BYTES - self.ANSWER.size:
            raise NoReport(os.fspath(self._device), f"status {status}, {size} bytes")
        report = answer.raw[self.ANSWER.size : self.ANSWER.size + size]
        return RawReport(report=report, table=certificates.raw[:length]), length


def connect_to_firmware() -> socket.socket:
    """A new vsock stream to the simulated firmware."""
    stream = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    stream.settimeout(SimulatedFirmware.TIMEOUT_S)
    try:
        stream.connect((socket.VMADDR_CID_HOST, FIRMWARE_PORT))
    except OSError:
        stream.close()
        raise
    return stream


class SimulatedFirmware:
    """The simulated firmware on a vsock port. Its reports prove nothing and say so."""

    MAGIC = b"JSIM"
    VERSION = 1
    REQUEST = struct.Struct("<4sI64s")
    WORD = struct.Struct("<I")
    TIMEOUT_S = 10.0

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        """`connect` gives a new stream to it."""
        self._connect = connect

    def get(self, data: bytes) -> RawReport:
        """See `ReportSource`."""
        try:
            with self._connect() as stream:
                stream.sendall(self.REQUEST.pack(self.MAGIC, self.VERSION, data))
                status = self._word(stream)
                if status:
                    raise NoReport("the simulated firmware", f"status {status}")
                report = self._blob(stream, REPORT_LIMIT)
                table = self._blob(stream, TABLE_LIMIT)
        except (OSError, EOFError) as exc:
            raise NoReport("the simulated firmware", "no connection, or it broke off") from exc
        return RawReport(report=report, table=table)

    def _word(self, stream: socket.socket) -> int:
        return int(self.WORD.unpack(_receive(stream, self.WORD.size))[0])

    def _blob(self, stream: socket.socket, limit: int) -> bytes:
        length = self._word(stream)
        if length > limit:
            raise NoReport("the simulated firmware", f"a part of {length} bytes")
        return _receive(stream, length)


def _receive(stream: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = stream.recv(length - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
