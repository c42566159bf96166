"""SEV-SNP evidence in the key-broker protocol's JSON form, both ways.

Byte strings are arrays of integers, 64-bit values are plain integers above 2⁵³. Reserved bytes are not in the form, so
they come out as zeros; the signature covers them, so a report that had others set will not verify.

Source: Trustee key-broker protocol 0.4.0, evidence `snp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.snp_certs import TABLE_GUIDS, TableEntry
from jindiskd.attest.snp_report import (
    VERSIONS,
    FirmwareVersion,
    SnpReport,
    Tcb,
    encode_report,
    product_of,
)

WHAT = "SEV-SNP evidence"
MAX_CERTIFICATES = 16
MAX_CERTIFICATE_BYTES = 1 << 16
TCBS = ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb")
BYTES: Mapping[str, int] = {
    "family_id": 16,
    "image_id": 16,
    "report_data": 64,
    "measurement": 48,
    "host_data": 32,
    "id_key_digest": 48,
    "author_key_digest": 48,
    "report_id": 32,
    "report_id_ma": 32,
    "chip_id": 64,
}
NUMBERS: Mapping[str, tuple[str, int]] = {
    "version": ("version", 32),
    "guest_svn": ("guest_svn", 32),
    "policy": ("policy", 64),
    "vmpl": ("vmpl", 32),
    "sig_algo": ("signature_algorithm", 32),
    "plat_info": ("platform_info", 64),
    "key_info": ("key_info", 32),
}
"""Members that are numbers: our field, and how many bits it has."""
OPTIONAL: Mapping[str, tuple[str, int]] = {
    "cpuid_fam_id": ("cpuid_family", 8),
    "cpuid_mod_id": ("cpuid_model", 8),
    "cpuid_step": ("cpuid_stepping", 8),
    "launch_mit_vector": ("launch_mit_vector", 64),
    "current_mit_vector": ("current_mit_vector", 64),
}
KINDS = frozenset(TABLE_GUIDS.values())


def evidence_to_json(report: SnpReport, entries: list[TableEntry] | None) -> dict[str, Any]:
    """Evidence of a report and the certificates that came with it; None and no certificates both give null."""
    body: dict[str, Any] = {member: getattr(report, name) for member, (name, _bits) in {**NUMBERS, **OPTIONAL}.items()}
    body |= {name: list(getattr(report, name)) for name in BYTES}
    for name in TCBS:
        tcb: Tcb = getattr(report, name)
        body[name] = {part: getattr(tcb, part) for part in ("fmc", "bootloader", "tee", "snp", "microcode")}
    for member, version in (("current", report.current_version), ("committed", report.committed_version)):
        body[member] = {"major": version.major, "minor": version.minor, "build": version.build}
    pair = {"r": report.signature_r, "s": report.signature_s}
    body["signature"] = {name: list(value.to_bytes(72, "little")) for name, value in pair.items()}
    chain = [
        {"cert_type": entry.kind or {"OTHER": entry.guid}, "data": list(entry.data)}
        for entry in entries or []
    ]
    return {"attestation_report": body, "cert_chain": chain or None}


def evidence_from_json(evidence: object) -> tuple[bytes, list[bytes]]:
    """The report's 1184 bytes and the certificates (as they came, DER or PEM) of evidence in JSON form.

    Revocation lists and entries of unknown kinds are left out.

    Raises:
        MalformedEvidence: anything that is not in the form: missing members, wrong types, sizes or ranges.
    """
    outer = _object(evidence, "evidence")
    body = _object(outer.get("attestation_report"), "attestation_report")
    fields: dict[str, Any] = {name: _bytes(body, name, size) for name, size in BYTES.items()}
    fields |= {name: _number(body, member, bits) for member, (name, bits) in NUMBERS.items()}
    for member, (name, bits) in OPTIONAL.items():
        fields[name] = _number(body, member, bits) if body.get(member) is not None else None
    version = fields["version"]
    if version not in VERSIONS:
        raise MalformedEvidence(WHAT, f"version {version} is not among 2 to 5")
    product = None
    if version >= 3:
        if fields["cpuid_family"] is None or fields["cpuid_model"] is None:
            raise MalformedEvidence(WHAT, "a report of version 3 and later names its processor")
        product = product_of(fields["cpuid_family"], fields["cpuid_model"])
    for name in TCBS:
        fields[name] = _tcb(body, name)
    for member in ("current", "committed"):
        part = _object(body.get(member), member)
        fields[f"{member}_version"] = FirmwareVersion(
            _number(part, "major", 8), _number(part, "minor", 8), _number(part, "build", 8)
        )
    signature = _object(body.get("signature"), "signature")
    fields["signature_r"] = int.from_bytes(_bytes(signature, "r", 72), "little")
    fields["signature_s"] = int.from_bytes(_bytes(signature, "s", 72), "little")
    return encode_report(SnpReport(product=product, **fields)), _certificates(outer.get("cert_chain"))


def _certificates(chain: object) -> list[bytes]:
    if chain is None:
        return []
    if not isinstance(chain, list) or len(chain) > MAX_CERTIFICATES:
        raise MalformedEvidence(WHAT, f"cert_chain is not a list of at most {MAX_CERTIFICATES} certificates")
    found = []
    for entry in chain:
        part = _object(entry, "cert_chain entry")
        kind = part.get("cert_type")
        data = _octets(part.get("data"), "cert_chain data", range(MAX_CERTIFICATE_BYTES + 1))
        if isinstance(kind, str) and kind in KINDS and kind != "CRL":
            found.append(data)
    return found


def _object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedEvidence(WHAT, f"{name} is not an object")
    return value


def _octets(value: object, name: str, sizes: range) -> bytes:
    if not isinstance(value, list) or len(value) not in sizes:
        raise MalformedEvidence(WHAT, f"{name} is not a list of bytes of the right length")
    if not all(type(item) is int and 0 <= item <= 255 for item in value):
        raise MalformedEvidence(WHAT, f"{name} is not a list of bytes")
    return bytes(value)


def _bytes(body: dict[str, Any], name: str, size: int) -> bytes:
    return _octets(body.get(name), name, range(size, size + 1))


def _number(body: dict[str, Any], name: str, bits: int) -> int:
    value = body.get(name)
    if type(value) is not int or not 0 <= value < 1 << bits:
        raise MalformedEvidence(WHAT, f"{name} is not an unsigned number of {bits} bits")
    return value


def _tcb(body: dict[str, Any], name: str) -> Tcb:
    part = _object(body.get(name), name)
    fmc = None if part.get("fmc") is None else _number(part, "fmc", 8)
    bootloader, tee, snp, microcode = (_number(part, each, 8) for each in ("bootloader", "tee", "snp", "microcode"))
    return Tcb(fmc=fmc, bootloader=bootloader, tee=tee, snp=snp, microcode=microcode)
