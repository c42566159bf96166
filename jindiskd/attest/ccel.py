"""The event log of a TDX guest (CCEL): reading it, and replaying it against a quote's registers.

The host can write anything into the log. Once the replay equals the quote, its *digests* are genuine; event *data* is
so only where it hashes to its digest.

Source: TCG PC Client Platform Firmware Profile (TCG_PCR_EVENT2), UEFI CC measurement protocol.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from jindiskd.attest.model import Finding, MalformedEvidence

MAX_LOG_BYTES = 1 << 20
MAX_EVENTS = 10000
MAX_ALGORITHMS = 16
EV_NO_ACTION = 3
TPM_ALG_SHA384 = 0x000C
END = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One record: what was extended into a register."""

    register: int
    """0 is MRTD, 1 to 4 are RTMR0 to RTMR3."""
    kind: int
    """TCG event type."""
    digest: bytes
    """48 bytes, SHA-384."""
    data: bytes

    @property
    def data_is_digested(self) -> bool:
        """True where `data` itself hashes to the digest, and is thus as genuine as the digest is."""
        return hashlib.sha384(self.data).digest() == self.digest


class _Reader:
    def __init__(self, blob: bytes) -> None:
        self.blob, self.at = blob, 0

    def take(self, size: int) -> bytes:
        if size > len(self.blob) - self.at:
            raise MalformedEvidence("event log", f"the record at byte {self.at} does not fit in it")
        self.at += size
        return self.blob[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")


def parse_event_log(blob: bytes) -> list[Event]:
    """Read a whole event log; ends at a register of 0xFFFFFFFF or at zero fill.

    Raises:
        MalformedEvidence: longer than 1 MiB, more than 10000 events, without SHA-384, or records that do not fit.
    """
    if len(blob) > MAX_LOG_BYTES:
        raise MalformedEvidence("event log", f"it is longer than {MAX_LOG_BYTES} bytes")
    reader = _Reader(blob)
    reader.take(4)
    kind = reader.number(4)
    reader.take(20)
    sizes = _read_header(reader.take(reader.number(4)), kind)
    events: list[Event] = []
    while reader.at < len(blob):
        if not any(blob[reader.at : reader.at + 16]) and not blob[reader.at :].strip(b"\0"):
            break
        register = reader.number(4)
        if register == END:
            break
        kind = reader.number(4)
        digest = None
        count = reader.number(4)
        if count > MAX_ALGORITHMS:
            raise MalformedEvidence("event log", f"a record has {count} digests")
        for _ in range(count):
            algorithm = reader.number(2)
            if algorithm not in sizes:
                raise MalformedEvidence("event log", f"a record has the unknown algorithm 0x{algorithm:x}")
            value = reader.take(sizes[algorithm])
            if algorithm == TPM_ALG_SHA384:
                digest = value
        data = reader.take(reader.number(4))
        if digest is None:
            raise MalformedEvidence("event log", "a record has no SHA-384 digest")
        events.append(Event(register=register, kind=kind, digest=digest, data=data))
        if len(events) > MAX_EVENTS:
            raise MalformedEvidence("event log", f"it has more than {MAX_EVENTS} records")
    return events


def _read_header(data: bytes, kind: int) -> dict[int, int]:
    """Digest sizes by algorithm, from the first record's data (TCG_EfiSpecIdEvent)."""
    if kind != EV_NO_ACTION or data[:16] != b"Spec ID Event03\0":
        raise MalformedEvidence("event log", "it does not begin with the record that names its format")
    reader = _Reader(data)
    reader.take(24)
    count = reader.number(4)
    if not 1 <= count <= MAX_ALGORITHMS:
        raise MalformedEvidence("event log", f"it names {count} digest algorithms")
    sizes = {}
    for _ in range(count):
        algorithm = reader.number(2)
        sizes[algorithm] = reader.number(2)
    if sizes.get(TPM_ALG_SHA384) != 48:
        raise MalformedEvidence("event log", "it has no SHA-384 digests")
    return sizes


def replay(events: Sequence[Event]) -> tuple[bytes, bytes, bytes, bytes]:
    """RTMR0 to RTMR3 as they stand after `events`: each SHA-384 over the old value and the digest, from zeros."""
    registers = [bytes(48)] * 4
    for event in events:
        if event.kind != EV_NO_ACTION and 1 <= event.register <= 4:
            registers[event.register - 1] = hashlib.sha384(registers[event.register - 1] + event.digest).digest()
    return registers[0], registers[1], registers[2], registers[3]


def check_replay(events: Sequence[Event], rtmrs: Sequence[bytes]) -> list[Finding]:
    """A finding `tdx.event_log` for each of a verified quote's four registers that the log does not explain."""
    return [
        Finding("tdx.event_log", f"the event log does not lead to RTMR{number}")
        for number, (found, reported) in enumerate(zip(replay(events), rtmrs, strict=True))
        if found != reported
    ]
