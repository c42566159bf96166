"""Whom SEV-SNP evidence must go back to: root certificates pinned by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.snp_certs import Certificate, parse_certificate
from jindiskd.attest.snp_report import Product

PRODUCTS = {product.value: product for product in Product}
SIMULATED_MARK = "Simulated-"
"""Stands before the product in the subject names of simulated authorities, for people who look at them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpRoots:
    """Root certificates (ARK) by product. The certificates themselves come with the evidence or from files: the
    digest is the trust, names and sources are none."""

    name: str
    ark_sha256: Mapping[str, str]
    """From `Product` to the SHA-256 of the DER certificate, in lower-case hexadecimal."""
    simulated: bool

    @classmethod
    def simulated_from(cls, ark_der: bytes) -> SnpRoots:
        """Trust a simulated root, and nothing else. Its product is the one its subject names.

        Raises:
            MalformedEvidence: not a certificate of the right form, or AMD's own.
        """
        ark = parse_certificate(ark_der)
        product = authority_product(ark.subject_cn, "ARK-", simulated=True)
        if product is None or ark.sha256 in AMD_ROOTS.ark_sha256.values():
            raise MalformedEvidence("simulated root", f"its subject is {ark.subject_cn!r}")
        digest = hashlib.sha256(ark_der).hexdigest()
        return cls(name=f"simulated {digest[:16]}", ark_sha256={product: digest}, simulated=True)

    def product_of(self, ark: Certificate) -> Product | None:
        """The product that a certificate is the pinned root of; None if it is none."""
        digest = ark.sha256
        for product, pinned in self.ark_sha256.items():
            if pinned == digest:
                return PRODUCTS[product]
        return None


AMD_ROOTS = SnpRoots(
    name="AMD",
    ark_sha256={
        "Milan": "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",
        "Genoa": "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",
        "Turin": "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a",
    },
    simulated=False,
)
"""AMD's roots, the same in four independent public projects."""


def authority_product(common_name: str, prefix: str, *, simulated: bool) -> Product | None:
    """The product that an authority's common name tells after `prefix`; the simulated mark only where allowed."""
    if not common_name.startswith(prefix):
        return None
    name = common_name.removeprefix(prefix)
    if simulated:
        name = name.removeprefix(SIMULATED_MARK)
    return PRODUCTS.get(name)
