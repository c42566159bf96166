"""Intel TDX quotes, versions 4 and 5: bytes to fields. Believes nothing.

Source: Intel TDX DCAP Quoting Library API, appendix "Quote format"; Intel TDX module ABI, TDREPORT. Integers are
little-endian.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from jindiskd.attest.model import MalformedEvidence

MAX_QUOTE_BYTES = 1 << 16
HEADER_BYTES = 48
TEE_TDX = 0x81
KEY_ECDSA_P256 = 2
INTEL_QE_VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
QE_REPORT_CERTIFICATION = 6
BODY_TD10, BODY_TD15 = 2, 3
BODY_BYTES = {BODY_TD10: 584, BODY_TD15: 648}


class TdAttributes(enum.IntFlag):
    """TDATTRIBUTES. Bits 0 to 7 all mean a guest that must not be trusted."""

    DEBUG = 1 << 0
    LASS = 1 << 27
    SEPT_VE_DISABLE = 1 << 28
    MIGRATABLE = 1 << 29
    PKS = 1 << 30
    KL = 1 << 31
    PERFMON = 1 << 63


UNTRUSTED_BITS = 0xFF
KNOWN_BITS = UNTRUSTED_BITS | int(
    TdAttributes.LASS
    | TdAttributes.SEPT_VE_DISABLE
    | TdAttributes.MIGRATABLE
    | TdAttributes.PKS
    | TdAttributes.KL
    | TdAttributes.PERFMON
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TdxQuote:
    """A quote's header and TD report. Registers are 48 bytes, SHA-384."""

    version: int
    quote: bytes
    """The quote itself, without what the host put after it."""
    padding_bytes: int
    """How many zero bytes the host put after it."""
    signed_bytes: int
    """How many bytes from the start the quote's signature covers."""
    user_data: bytes
    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    seam_attributes: bytes
    td_attributes: int
    xfam: bytes
    mr_td: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rtmrs: tuple[bytes, bytes, bytes, bytes]
    report_data: bytes
    mr_service_td: bytes | None
    """Only in a TDREPORT 1.5 (quote version 5), else None."""


def parse_quote(blob: bytes) -> TdxQuote:
    """Split a quote into its fields; believe none of them.

    Raises:
        MalformedEvidence: longer than 64 KiB, another version than 4 and 5, another kind of TEE, key or body than TDX
            uses, lengths that do not fit, or anything but zeros after the quote.
    """
    what = "TDX quote"
    if len(blob) > MAX_QUOTE_BYTES:
        raise MalformedEvidence(what, f"it is longer than {MAX_QUOTE_BYTES} bytes")

    def number(at: int, size: int) -> int:
        if at + size > len(blob):
            raise MalformedEvidence(what, f"it ends at byte {len(blob)}, within a field")
        return int.from_bytes(blob[at : at + size], "little")

    version, key_type, tee = number(0, 2), number(2, 2), number(4, 4)
    if version not in {4, 5}:
        raise MalformedEvidence(what, f"version {version} is neither 4 nor 5")
    if tee != TEE_TDX:
        raise MalformedEvidence(what, f"it is for TEE type 0x{tee:x}, not TDX (0x81)")
    if key_type != KEY_ECDSA_P256:
        raise MalformedEvidence(what, f"attestation key type {key_type} is not ECDSA P-256 (2)")
    if blob[12:28] != INTEL_QE_VENDOR:
        raise MalformedEvidence(what, "its quoting enclave is not Intel's")
    start, kind = HEADER_BYTES, BODY_TD10
    if version == 5:
        kind, size = number(48, 2), number(50, 4)
        if BODY_BYTES.get(kind) != size:
            raise MalformedEvidence(what, f"body type {kind} of {size} bytes is not known")
        start = 54
    end = start + BODY_BYTES[kind]
    whole = end + 4 + number(end, 4)
    if whole > len(blob):
        raise MalformedEvidence(what, "its signature is longer than what there is of it")
    if blob[whole:].strip(b"\0"):
        raise MalformedEvidence(what, f"something follows it after byte {whole}")
    _check_signature_data(blob[end + 4 : whole])
    body = blob[start:end]
    return TdxQuote(
        version=version,
        quote=blob[:whole],
        padding_bytes=len(blob) - whole,
        signed_bytes=end,
        user_data=blob[28:48],
        tee_tcb_svn=body[0:16],
        mr_seam=body[16:64],
        mr_signer_seam=body[64:112],
        seam_attributes=body[112:120],
        td_attributes=int.from_bytes(body[120:128], "little"),
        xfam=body[128:136],
        mr_td=body[136:184],
        mr_config_id=body[184:232],
        mr_owner=body[232:280],
        mr_owner_config=body[280:328],
        rtmrs=(body[328:376], body[376:424], body[424:472], body[472:520]),
        report_data=body[520:584],
        mr_service_td=body[600:648] if kind == BODY_TD15 else None,
    )


def _check_signature_data(data: bytes) -> None:
    """Require that the parts of the signature data fill it exactly; nothing signs their types and lengths.

    Quote signature 64, key 64, type 6 (u16) and size u32; in that QE report 384, signature 64, authentication data
    (u16 size), type u16 and size u32 of the certification data.
    """
    outer = 64 + 64 + 6
    authentication = outer + 384 + 64
    fits = (
        len(data) >= authentication + 2
        and int.from_bytes(data[128:130], "little") == QE_REPORT_CERTIFICATION
        and int.from_bytes(data[130:134], "little") == len(data) - outer
    )
    if fits:
        inner = authentication + 2 + int.from_bytes(data[authentication : authentication + 2], "little")
        fits = len(data) >= inner + 6 and int.from_bytes(data[inner + 2 : inner + 6], "little") == len(data) - inner - 6
    if not fits:
        raise MalformedEvidence("TDX quote", "the parts of its signature do not fit each other")
