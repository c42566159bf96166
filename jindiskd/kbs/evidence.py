"""SEV-SNP and TDX evidence between their binary forms and the protocol's JSON (protocol sections 11.1 and 11.2).

Layouts: AMD 56860, ATTESTATION_REPORT; AMD 56421 section 4.1.8.1 for the certificate table. Nothing is believed here:
the conversion keeps every signed byte, and the verifier judges the bytes.
"""

from __future__ import annotations

import base64
import binascii
import struct
import uuid
from collections.abc import Mapping
from typing import Any

from jindiskd.kbs.messages import MalformedMessage

REPORT_BYTES = 1184
MAX_TABLE_BYTES = 64 << 10
MAX_CERTIFICATES = 16
MAX_QUOTE_BYTES = 64 << 10
MAX_LOG_BYTES = 1 << 20
WHAT = "the SNP evidence"
TDX = "the TDX evidence"
TURIN_FAMILY = 0x1A

# The GUIDs of the table stand in RFC 4122 byte order.
CERT_TYPES = {
    uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae").bytes: "ARK",
    uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782").bytes: "ASK",
    uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd").bytes: "VCEK",
    uuid.UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1").bytes: "VLEK",
    uuid.UUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea").bytes: "CRL",
}

# name, offset, length, kind: "int" little-endian, "bytes", "tcb", "version" (build, minor, major)
FIELDS: tuple[tuple[str, int, int, str], ...] = (
    ("version", 0x000, 4, "int"),
    ("guest_svn", 0x004, 4, "int"),
    ("policy", 0x008, 8, "int"),
    ("family_id", 0x010, 16, "bytes"),
    ("image_id", 0x020, 16, "bytes"),
    ("vmpl", 0x030, 4, "int"),
    ("sig_algo", 0x034, 4, "int"),
    ("current_tcb", 0x038, 8, "tcb"),
    ("plat_info", 0x040, 8, "int"),
    ("key_info", 0x048, 4, "int"),
    ("report_data", 0x050, 64, "bytes"),
    ("measurement", 0x090, 48, "bytes"),
    ("host_data", 0x0C0, 32, "bytes"),
    ("id_key_digest", 0x0E0, 48, "bytes"),
    ("author_key_digest", 0x110, 48, "bytes"),
    ("report_id", 0x140, 32, "bytes"),
    ("report_id_ma", 0x160, 32, "bytes"),
    ("reported_tcb", 0x180, 8, "tcb"),
    ("chip_id", 0x1A0, 64, "bytes"),
    ("committed_tcb", 0x1E0, 8, "tcb"),
    ("current", 0x1E8, 3, "version"),
    ("committed", 0x1EC, 3, "version"),
    ("launch_tcb", 0x1F0, 8, "tcb"),
)
# Present from report version 3 and 5 on; null before.
CPUID = (("cpuid_fam_id", 0x188), ("cpuid_mod_id", 0x189), ("cpuid_step", 0x18A))
MITIGATION = (("launch_mit_vector", 0x1F8), ("current_mit_vector", 0x200))


def _is_turin(report: bytes) -> bool:
    """Which TCB layout: by CPUID family (version 3 on), else by a chip id of eight bytes (version 2)."""
    if int.from_bytes(report[0:4], "little") >= 3:
        return report[0x188] >= TURIN_FAMILY
    return report[0x1A0:0x1A8] != bytes(8) and report[0x1A8:0x1E0] == bytes(56)


def _tcb_positions(turin: bool) -> dict[str, int]:
    if turin:
        return {"fmc": 0, "bootloader": 1, "tee": 2, "snp": 3, "microcode": 7}
    return {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7}


def snp_to_json(report: bytes, table: bytes = b"") -> dict[str, Any]:
    """A report of 1184 bytes and its certificate table (may be empty) as the protocol's evidence object.

    Raises:
        MalformedMessage: another length, or a table whose entries point outside it.
    """
    if len(report) != REPORT_BYTES:
        raise MalformedMessage(WHAT, f"a report has {REPORT_BYTES} bytes")
    version = int.from_bytes(report[0:4], "little")
    positions = _tcb_positions(_is_turin(report))
    out: dict[str, Any] = {}
    for name, offset, length, kind in FIELDS:
        part = report[offset : offset + length]
        if kind == "int":
            out[name] = int.from_bytes(part, "little")
        elif kind == "bytes":
            out[name] = list(part)
        elif kind == "tcb":
            out[name] = {"fmc": None, **{member: part[at] for member, at in positions.items()}}
        else:
            out[name] = {"build": part[0], "minor": part[1], "major": part[2]}
    for name, offset in CPUID:
        out[name] = report[offset] if version >= 3 else None
    for name, offset in MITIGATION:
        out[name] = int.from_bytes(report[offset : offset + 8], "little") if version >= 5 else None
    out["signature"] = {"r": list(report[0x2A0:0x2E8]), "s": list(report[0x2E8:0x330])}
    chain = [
        {"cert_type": CERT_TYPES.get(guid, {"OTHER": str(uuid.UUID(bytes=guid))}), "data": list(data)}
        for guid, data in read_table(table)
    ]
    return {"attestation_report": out, "cert_chain": chain or None}


def read_table(table: bytes) -> list[tuple[bytes, bytes]]:
    """The entries (GUID of 16 bytes, content) of a certificate table."""
    if len(table) > MAX_TABLE_BYTES:
        raise MalformedMessage(WHAT, f"a certificate table of more than {MAX_TABLE_BYTES} bytes")
    found: list[tuple[bytes, bytes]] = []
    for at in range(0, len(table) - 23, 24):
        guid, offset, length = struct.unpack_from("<16sII", table, at)
        if guid == bytes(16):
            return found
        if offset + length > len(table) or len(found) == MAX_CERTIFICATES:
            raise MalformedMessage(WHAT, "a certificate table whose entries do not fit")
        found.append((guid, table[offset : offset + length]))
    return found


def snp_from_json(evidence: object) -> tuple[bytes, list[bytes]]:
    """The report's 1184 bytes and the certificates (DER or PEM, as the host gave them) of an evidence object.

    Reserved bytes come out as zero, as the signature demands; whether they were is thereby checked by the signature.

    Raises:
        MalformedMessage: a member missing, of another type or out of range.
    """
    if not isinstance(evidence, dict) or not isinstance(evidence.get("attestation_report"), dict):
        raise MalformedMessage(WHAT, "no attestation_report")
    source = evidence["attestation_report"]
    report = bytearray(REPORT_BYTES)
    for name, offset, length, kind in FIELDS:
        if kind == "int":
            report[offset : offset + length] = _integer(source, name, length)
        elif kind == "bytes":
            report[offset : offset + length] = _octets(source.get(name), name, length)
        elif kind == "version":
            part = _member(source, name)
            report[offset : offset + 3] = b"".join(_integer(part, m, 1) for m in ("build", "minor", "major"))
    for name, offset in CPUID:
        if source.get(name) is not None:
            report[offset : offset + 1] = _integer(source, name, 1)
    for name, offset in MITIGATION:
        if source.get(name) is not None:
            report[offset : offset + 8] = _integer(source, name, 8)
    positions = _tcb_positions(_is_turin(bytes(report)))
    for name, offset, _length, kind in FIELDS:
        if kind == "tcb":
            part = _member(source, name)
            for member, at in positions.items():
                report[offset + at : offset + at + 1] = _integer(part, member, 1)
    signature = _member(source, "signature")
    report[0x2A0:0x2E8] = _octets(signature.get("r"), "signature.r", 72)
    report[0x2E8:0x330] = _octets(signature.get("s"), "signature.s", 72)
    return bytes(report), _certificates(evidence.get("cert_chain"))


def _certificates(chain: object) -> list[bytes]:
    if chain is None:
        return []
    if not isinstance(chain, list) or len(chain) > MAX_CERTIFICATES:
        raise MalformedMessage(WHAT, "cert_chain is not a short list")
    found = []
    for entry in chain:
        if not isinstance(entry, dict) or not isinstance(entry.get("data"), list):
            raise MalformedMessage(WHAT, "an entry of cert_chain is not a certificate")
        if entry.get("cert_type") != "CRL":
            found.append(_octets(entry["data"], "cert_chain", len(entry["data"])))
    if sum(map(len, found)) > MAX_TABLE_BYTES:
        raise MalformedMessage(WHAT, f"certificates of more than {MAX_TABLE_BYTES} bytes")
    return found


def _member(source: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = source.get(name)
    if not isinstance(value, dict):
        raise MalformedMessage(WHAT, f"{name} is not an object")
    return value


def _integer(source: Mapping[str, Any], name: str, length: int) -> bytes:
    value = source.get(name)
    if type(value) is not int or not 0 <= value < 1 << 8 * length:
        raise MalformedMessage(WHAT, f"{name} is not an integer of {length} bytes")
    return value.to_bytes(length, "little")


def _octets(value: object, name: str, length: int) -> bytes:
    if not isinstance(value, list) or len(value) != length:
        raise MalformedMessage(WHAT, f"{name} is not a list of {length} bytes")
    if not all(type(item) is int and 0 <= item < 256 for item in value):
        raise MalformedMessage(WHAT, f"{name} holds something else than bytes")
    return bytes(value)


def tdx_to_json(quote: bytes, event_log: bytes = b"") -> dict[str, Any]:
    """A quote, and the guest's event log where it has one, as the protocol's evidence object."""
    log = base64.b64encode(event_log).decode() if event_log else None
    return {"cc_eventlog": log, "quote": base64.b64encode(quote).decode()}


def tdx_from_json(evidence: object) -> tuple[bytes, bytes]:
    """Quote and event log (empty where there is none) of an evidence object.

    Raises:
        MalformedMessage: a member missing, of another type, or too long.
    """
    if not isinstance(evidence, dict):
        raise MalformedMessage(TDX, "not an object")
    log = evidence.get("cc_eventlog")
    quote = _base64(evidence.get("quote"), "quote", MAX_QUOTE_BYTES)
    return quote, b"" if log is None else _base64(log, "cc_eventlog", MAX_LOG_BYTES)


def _base64(text: object, name: str, limit: int) -> bytes:
    if not isinstance(text, str) or len(text) > limit * 4 // 3 + 4:
        raise MalformedMessage(TDX, f"{name} is not a text of at most {limit} bytes in base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise MalformedMessage(TDX, f"{name} is not base64") from exc
