"""What a VCEK or VLEK certificate vouches for: AMD's own extensions (AMD 57230 chapter 3). Nothing is believed here."""

from __future__ import annotations

from dataclasses import dataclass

from jindiskd.attest import der
from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.snp_certs import Certificate
from jindiskd.attest.snp_report import Product, Tcb

OID_AMD = "1.3.6.1.4.1.3704.1"
OID_STRUCTURE_VERSION = f"{OID_AMD}.1"
OID_PRODUCT = f"{OID_AMD}.2"
OID_BOOTLOADER = f"{OID_AMD}.3.1"
OID_TEE = f"{OID_AMD}.3.2"
OID_SNP = f"{OID_AMD}.3.3"
OID_RESERVED_SPL = tuple(f"{OID_AMD}.3.{number}" for number in (4, 5, 6, 7))
OID_MICROCODE = f"{OID_AMD}.3.8"
OID_FMC = f"{OID_AMD}.3.9"
OID_HARDWARE_ID = f"{OID_AMD}.4"
OID_CSP_ID = f"{OID_AMD}.5"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endorsement:
    """What a VCEK or VLEK certificate vouches for, from its extensions."""

    product: Product
    tcb: Tcb
    hardware_id: bytes | None
    """VCEK: 64 bytes, or 8 from Turin on. None for a VLEK."""
    csp_id: str | None
    """VLEK: the provider, such as `CN=cc-us-east-2.amazonaws.com`. None for a VCEK."""


def _spl(certificate: Certificate, name: str) -> int:
    _critical, value = certificate.extensions[name]
    return der.octet(value, f"security version {name} of a certificate")


def parse_endorsement(certificate: Certificate) -> Endorsement:
    """Read AMD's extensions of a VCEK or VLEK certificate.

    Raises:
        MalformedEvidence: one is missing, of another form, or critical; an unknown product; reserved versions set.
    """
    what = "endorsement certificate"
    kind = certificate.subject_cn
    if kind not in {"SEV-VCEK", "SEV-VLEK"}:
        raise MalformedEvidence(what, f"its subject {kind!r} is neither SEV-VCEK nor SEV-VLEK")
    critical = [name for name, (important, _value) in certificate.extensions.items() if important]
    if critical:
        raise MalformedEvidence(what, f"the critical extension {critical[0]} is not known")
    try:
        _flag, raw_name = certificate.extensions[OID_PRODUCT]
        name = der.text(der.whole(raw_name, der.IA5_STRING, what))
        product = Product(name.partition("-")[0])
        version = _spl(certificate, OID_STRUCTURE_VERSION)
        tcb = Tcb(
            fmc=_spl(certificate, OID_FMC) if product.has_fmc else None,
            bootloader=_spl(certificate, OID_BOOTLOADER),
            tee=_spl(certificate, OID_TEE),
            snp=_spl(certificate, OID_SNP),
            microcode=_spl(certificate, OID_MICROCODE),
        )
        hardware_id = csp_id = None
        if kind == "SEV-VCEK":
            _flag, hardware_id = certificate.extensions[OID_HARDWARE_ID]
        else:
            _flag, raw_csp = certificate.extensions[OID_CSP_ID]
            csp_id = der.text(der.whole(raw_csp, der.IA5_STRING, what))
    except KeyError as exc:
        raise MalformedEvidence(what, f"the extension {exc.args[0]} is missing") from exc
    except ValueError as exc:
        raise MalformedEvidence(what, f"the product {name!r} is not known") from exc
    if version > 1:
        raise MalformedEvidence(what, f"its structure version {version} is not known")
    if any(_spl(certificate, reserved) for reserved in OID_RESERVED_SPL if reserved in certificate.extensions):
        raise MalformedEvidence(what, "a reserved security version is not zero")
    if not product.has_fmc and OID_FMC in certificate.extensions:
        raise MalformedEvidence(what, f"it has an FMC security version, which {product} does not have")
    if (OID_CSP_ID if csp_id is None else OID_HARDWARE_ID) in certificate.extensions:
        raise MalformedEvidence(what, "it names both a chip and a provider")
    if hardware_id is not None:
        size = 8 if product.has_fmc else 64
        if len(hardware_id) == size + 2 and hardware_id[:2] == bytes([der.OCTET_STRING, size]):
            hardware_id = hardware_id[2:]
        if len(hardware_id) != size:
            raise MalformedEvidence(what, f"its hardware identity has {len(hardware_id)} bytes instead of {size}")
    return Endorsement(product=product, tcb=tcb, hardware_id=hardware_id, csp_id=csp_id)
