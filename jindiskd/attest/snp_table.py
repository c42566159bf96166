"""Certificate tables: what a host gives with a report (GHCB specification 4.1.8.1). Nothing in one is believed."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.snp_certs import to_der

MAX_TABLE_BYTES = 1 << 16
MAX_ENTRIES = 64

TABLE_GUIDS: Mapping[str, str] = {
    "c0b406a4-a803-4952-9743-3fb6014cd0ae": "ARK",
    "4ab7b379-bbac-4fe4-a02f-05aef327c782": "ASK",
    "63da758d-e664-4564-adc5-f4b93be8accd": "VCEK",
    "a8074bc2-a25a-483e-aae6-39c045a0b8a1": "VLEK",
    "92f81bc3-5811-4d3d-97ff-d19f88dc67ea": "CRL",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TableEntry:
    """One entry of a certificate table that came with a report."""

    guid: str
    kind: str | None
    """ARK, ASK (also an ASVK), VCEK, VLEK or CRL; None for an identifier we do not know."""
    data: bytes


def parse_certificate_table(blob: bytes) -> list[TableEntry]:
    """Split a certificate table: what the host gives with a report (`auxblob`). May be empty.

    Entries of 24 bytes (GUID in RFC 4122 byte order, offset u32, length u32, from the start of the table) end with a
    zero entry. The host wrote it: every bound is checked.

    Raises:
        MalformedEvidence: longer than 64 KiB, no end, or an entry outside the table.
    """
    what = "certificate table"
    if len(blob) > MAX_TABLE_BYTES:
        raise MalformedEvidence(what, f"it is longer than {MAX_TABLE_BYTES} bytes")
    found: list[TableEntry] = []
    if not blob.strip(b"\0"):
        return found
    for at in range(0, 24 * MAX_ENTRIES, 24):
        entry = blob[at : at + 24]
        if len(entry) < 24:
            raise MalformedEvidence(what, "its entries have no end")
        if not any(entry):
            break
        guid = str(uuid.UUID(bytes=entry[:16]))
        offset, length = int.from_bytes(entry[16:20], "little"), int.from_bytes(entry[20:24], "little")
        if offset + length > len(blob):
            raise MalformedEvidence(what, f"the entry {guid} points outside of it")
        found.append(TableEntry(guid=guid, kind=TABLE_GUIDS.get(guid), data=blob[offset : offset + length]))
    else:
        raise MalformedEvidence(what, f"it has more than {MAX_ENTRIES - 1} entries")
    if sum(len(entry.data) for entry in found) > MAX_TABLE_BYTES:
        raise MalformedEvidence(what, "its entries overlap")
    return found


def table_certificates(blob: bytes) -> tuple[list[bytes], list[bytes]]:
    """Certificates and revocation lists of a certificate table, as DER; unknown entries are left out."""
    certificates: list[bytes] = []
    lists: list[bytes] = []
    for entry in parse_certificate_table(blob):
        if entry.kind is not None and entry.data:
            (lists if entry.kind == "CRL" else certificates).extend(to_der(entry.data))
    return certificates, lists


def encode_certificate_table(entries: Sequence[tuple[str, bytes]]) -> bytes:
    """A certificate table with `entries` of (kind, DER), kinds as in `TableEntry`."""
    guids = {kind: guid for guid, kind in TABLE_GUIDS.items()}
    offset = 24 * (len(entries) + 1)
    head, body = b"", b""
    for kind, data in entries:
        head += uuid.UUID(guids[kind]).bytes + (offset + len(body)).to_bytes(4, "little")
        head += len(data).to_bytes(4, "little")
        body += data
    return head + bytes(24) + body
