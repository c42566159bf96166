"""Verified evidence as it is kept between two steps, or after a refusal: its bytes, and what verification found.

What is kept comes from our own database, never from a guest: restoring believes it. The bytes are read again, so that
nothing but the verifier's own findings has a second form.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.offline import snp_fields, tdx_fields
from jindiskd.attest.snp import VerifiedSnp
from jindiskd.attest.snp_report import Product, Signer, encode_report, parse_report
from jindiskd.attest.tdx import VerifiedTdx
from jindiskd.attest.tdx_quote import parse_quote
from jindiskd.base.platform import Tee

Verified = VerifiedSnp | VerifiedTdx


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Evidence and the findings of its verification, ready for a database."""

    tee: Tee
    blob: bytes
    """SNP: the report, 1184 bytes. TDX: the quote."""
    facts: Mapping[str, Any]
    """Plain JSON values by name; empty where the evidence was not found genuine."""


def keep(verified: Verified) -> Kept:
    """What `restore` makes the same object of."""
    facts: dict[str, Any] = {}
    for item in fields(verified):
        value = getattr(verified, item.name)
        if item.name in {"report", "quote"}:
            continue
        if isinstance(value, enum.Enum):
            value = value.value
        elif isinstance(value, bytes):
            value = value.hex()
        elif isinstance(value, frozenset):
            value = sorted(value)
        elif isinstance(value, datetime):
            value = value.isoformat()
        facts[item.name] = value
    if isinstance(verified, VerifiedSnp):
        return Kept(tee=Tee.SNP, blob=encode_report(verified.report), facts=facts)
    return Kept(tee=Tee.TDX, blob=verified.quote.quote, facts=facts)


def restore(kept: Kept) -> Verified:
    """The object that was kept.

    Raises:
        MalformedEvidence: it is evidence that was never found genuine, or was kept by another release.
    """
    facts = dict(kept.facts)
    try:
        if kept.tee is Tee.SNP:
            product, signer = Product(facts.pop("product")), Signer(facts.pop("signer"))
            report = parse_report(kept.blob, product=product)
            return VerifiedSnp(report=report, product=product, signer=signer, **facts)
        facts["fmspc"], facts["ppid"] = bytes.fromhex(facts["fmspc"]), bytes.fromhex(facts["ppid"])
        facts["advisory_ids"] = frozenset(facts["advisory_ids"])
        facts["tcb_date"] = datetime.fromisoformat(facts["tcb_date"])
        return VerifiedTdx(quote=parse_quote(kept.blob), **facts)
    except (KeyError, TypeError, ValueError) as exc:
        raise MalformedEvidence("evidence that was kept", f"it lacks what verification found ({exc})") from exc


def shown(kept: Kept) -> dict[str, Any]:
    """Its fields for people, ready for JSON, as far as they can be read."""
    product = kept.facts.get("product")
    if kept.tee is Tee.SNP:
        found = snp_fields(parse_report(kept.blob, product=Product(product) if product else None))
    else:
        found = tdx_fields(parse_quote(kept.blob))
    return {**found, **kept.facts}
