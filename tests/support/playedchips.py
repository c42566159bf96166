"""What tests of collateral ask the played services of `vendorbench` for: processors of recorded reports."""

from pathlib import Path

from vendorbench import Played

from jindiskd.attest.snp_report import Product, parse_report
from jindiskd.attest.vendors import Vendors

PROCESSOR = bytes(range(64))


def vendors(services: Played, **options) -> Vendors:
    given = {"kds": services.url, "pcs": services.url, "root_crl": f"{services.url}/root.crl"}
    return Vendors(**{**given, "context": services.context(), "timeout_s": 20, **options})


def report_of(attestation: Path, case: str) -> bytes:
    return (attestation / "snp" / case / "report.bin").read_bytes()


def serve_chip(services: Played, attestation: Path, case: str) -> str:
    """Let the played service know the chip of a recorded report; returns the path by which it is asked."""
    product = Product(case.partition("-")[0].capitalize())
    report = parse_report(report_of(attestation, case), product=product)
    chip = report.chip_id[:8] if product.has_fmc else report.chip_id
    tcb = report.reported_tcb
    first = f"fmcSPL={tcb.fmc:02d}&" if product.has_fmc else ""
    query = f"{first}blSPL={tcb.bootloader:02d}&teeSPL={tcb.tee:02d}&snpSPL={tcb.snp:02d}&ucodeSPL={tcb.microcode:02d}"
    path = f"/vcek/v1/{product}/{chip.hex()}?{query}"
    services.add(path, (attestation / "snp" / case / "vek.der").read_bytes())
    return path


def sev_certificates(attestation: Path, generation: str) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (attestation / "sev/certs" / generation).glob("*.cert")}
