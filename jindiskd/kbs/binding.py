"""What the report's 64 bytes of report data bind: the broker's nonce and the guest's key (protocol section 6)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from jindiskd.kbs.jcs import canonical
from jindiskd.kbs.messages import VERSION, VERSION_0_2

REPORT_DATA_BYTES = 64


def report_data(nonce: str, tee_pubkey: Mapping[str, str], additional: str = "", version: str = VERSION) -> bytes:
    """SHA-384 of the canonical primary document, then 16 zero bytes: 64 bytes.

    Args:
        nonce: the challenge as text, never decoded.
        tee_pubkey: the key's members as sent.
        additional: the text of the additional evidence as sent, empty without.
        version: of the protocol; in 0.2.0 the document has no member for additional evidence.
    """
    document: dict[str, object] = {"nonce": nonce, "tee-pubkey": dict(tee_pubkey)}
    if version != VERSION_0_2:
        document["additional-evidence"] = additional
    return hashlib.sha384(canonical(document)).digest().ljust(REPORT_DATA_BYTES, b"\0")
