"""How long does judging evidence take, beside the signatures that it cannot do without, and beside other verifiers?

    python bench/attest/verify.py [--vectors FOLDER] [--seconds N] [--json]

The floor of an SEV-SNP decision is one ECDSA P-384 verification (the report); for the first report of a chip one
RSA-4096 verification more (VCEK), and with nothing remembered three (VCEK, ASK, ARK). The floor of a TDX decision is
the library's own `verify`.

Peers (`pip install -e .[bench]`): dcap-qvl is also the floor of TDX; omne-attest checks the report's and three
certificates' signatures each time and some fields; sev-attest-tool is given a sample of its own. A peer that is not
installed is named, not left out.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_der_public_key

from jindiskd.attest.appraise import SnpExpectations, appraise_snp
from jindiskd.attest.snp import AMD_ROOTS, SnpVerifier
from jindiskd.attest.snp_certs import PSS, parse_certificate, to_der
from jindiskd.attest.snp_report import SIGNED_BYTES, Tcb, parse_report
from jindiskd.base.platform import Platform
from jindiskd.keys.store import ImageRecord, KeyState
from jindiskd.policy.release import decide as policy_decide
from jindiskd.policy.rules import MinimumTcb, ReleaseRules

ROOT = Path(__file__).resolve().parent.parent.parent
FLOORS = {
    "decision, chain remembered": "one P-384 signature",
    "decision by an image's policy": "one P-384 signature",
    "decision, new chip": "one P-384 and one RSA-4096 signature",
    "decision, nothing remembered": "one P-384 and three RSA-4096 signatures",
    "peer omne-attest, nothing remembered": "one P-384 and three RSA-4096 signatures",
    "decision": "dcap-qvl verify",
}
"""What each row is compared with."""
NOW = datetime(2026, 7, 15, tzinfo=UTC)
ROUNDS = 25


def rate(work: Callable[[], object], seconds: float) -> float:
    """Microseconds of processor time a call, the best of many short rounds: other work on the machine counts little."""
    work()
    best = float("inf")
    for _ in range(ROUNDS):
        count, begun = 0, time.process_time()
        while time.process_time() - begun < seconds / ROUNDS:
            for _ in range(10):
                work()
            count += 10
        best = min(best, (time.process_time() - begun) / count)
    return best * 1e6


def snp(folder: Path, seconds: float) -> dict[str, float]:
    blob = (folder / "snp/milan-v3-vcek/report.bin").read_bytes()
    chain = [to_der((folder / f"amd-roots/milan/{name}.pem").read_bytes())[0] for name in ("ark", "ask")]
    sent = [(folder / "snp/milan-v3-vcek/vek.der").read_bytes(), *chain]
    report, parsed = parse_report(blob), [parse_certificate(item) for item in sent]
    key = load_der_public_key(parsed[0].spki)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    keys = {certificate.subject_cn: load_der_public_key(certificate.spki) for certificate in parsed[1:]}
    pair = encode_dss_signature(report.signature_r, report.signature_s)
    wanted = SnpExpectations(
        measurements=frozenset({report.measurement}),
        host_data=frozenset({report.host_data}),
        minimum_tcb={"Milan": Tcb(bootloader=4, tee=0, snp=20, microcode=200)},
    )
    warm = SnpVerifier(roots=AMD_ROOTS)

    def one_signature() -> None:
        key.verify(pair, blob[:SIGNED_BYTES], ec.ECDSA(hashes.SHA384()))

    def all_signatures() -> None:
        one_signature()
        for certificate in parsed:
            issuer = keys[certificate.issuer_cn]
            issuer.verify(certificate.signature, certificate.tbs, PSS, hashes.SHA384())

    def chip_signatures() -> None:
        one_signature()
        keys[parsed[0].issuer_cn].verify(parsed[0].signature, parsed[0].tbs, PSS, hashes.SHA384())

    def decide_new_chip() -> None:
        warm._chains._chains.clear()  # what it knows of chips; of AMD's authorities it forgets nothing
        decide(warm)

    def decide(verifier: SnpVerifier) -> None:
        verified = verifier.verify(blob, sent, report_data=report.report_data, now=NOW)
        assert not appraise_snp(verified, wanted)

    record = ImageRecord(
        image_id="i",
        name="bench",
        platform=Platform.SNP,
        resource="default/i/root",
        state=KeyState.ACTIVE,
        launch_digests=(report.measurement,),
        created="",
        rules=ReleaseRules(
            host_data=(report.host_data,),
            minimum_tcb={"Milan": MinimumTcb(bootloader=4, snp=20, microcode=200)},
            revocation_required=False,
        ),
    )

    def by_policy() -> None:
        verified = warm.verify(blob, sent, report_data=report.report_data, now=NOW)
        assert not policy_decide(record, verified, allow_simulated=False, now=NOW)

    return {
        "one P-384 signature": rate(one_signature, seconds),
        "decision, chain remembered": rate(lambda: decide(warm), seconds),
        "decision by an image's policy": rate(by_policy, seconds),
        "one P-384 and one RSA-4096 signature": rate(chip_signatures, seconds),
        "decision, new chip": rate(decide_new_chip, seconds),
        "one P-384 and three RSA-4096 signatures": rate(all_signatures, seconds),
        "decision, nothing remembered": rate(lambda: decide(SnpVerifier(roots=AMD_ROOTS)), seconds),
        **snp_peers(blob, sent, seconds),
    }


@contextlib.contextmanager
def peer_named(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError:
        print(f"not installed, so not measured: {name}", file=sys.stderr)


def snp_peers(blob: bytes, sent: list[bytes], seconds: float) -> dict[str, float]:
    """Other verifiers in Python, as far as they are installed. `sent`: VCEK, ARK, ASK."""
    found = {}
    with peer_named("omne-attest"):
        from omne_attest import snp as omne

        vcek, ark, ask = sent
        pin = hashlib.sha256(ark).digest()

        def peer() -> None:
            omne.Report.parse(blob).verify_signature(vcek)
            omne.verify_chain(vcek, ask, ark, pin)
            omne.Report.parse(blob).verify_vcek_binding(vcek)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # serial number 0 of AMD's certificates
            found["peer omne-attest, nothing remembered"] = rate(peer, seconds)
    with peer_named("sev-attest-tool"):
        import sev_attest_tool as tool

        sample = tool.SAMPLE_ATTESTATION, tool.SAMPLE_VCEK
        found["peer sev-attest-tool, its own sample"] = rate(lambda: tool.verify_attestation_report(*sample), seconds)
    return found


def tdx(folder: Path, seconds: float) -> dict[str, float]:
    try:
        import dcap_qvl
    except ImportError:
        return {}
    from jindiskd.attest.tdx import TdxVerifier

    quote = (folder / "tdx/v4-uptodate/quote.bin").read_bytes()
    collateral = (folder / "tdx/v4-uptodate/collateral.json").read_bytes()
    now = datetime.fromtimestamp(1751624655, UTC)
    given = dcap_qvl.QuoteCollateralV3.from_json(collateral.decode())
    verifier = TdxVerifier()
    return {
        "dcap-qvl verify": rate(lambda: dcap_qvl.verify(quote, given, 1751624655), seconds),
        "decision": rate(lambda: verifier.verify(quote, collateral=collateral, report_data=None, now=now), seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(os.environ.get("JINDISK_VECTORS", ROOT.parent / "shared" / "vectors"))
    parser.add_argument("--vectors", type=Path, default=default)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = options.vectors / "attestation"
    if not folder.is_dir():
        print(f"not measured: the recorded evidence is not at {folder}; set JINDISK_VECTORS", file=sys.stderr)
        return
    found = {"SEV-SNP": snp(folder, options.seconds), "TDX": tdx(folder, options.seconds)}
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for tee, rows in found.items():
        for name, microseconds in rows.items():
            floor = FLOORS.get(name)
            ratio = f"  {microseconds / rows[floor]:.2f} times {floor!r}" if floor in rows else ""
            print(f"{tee:8} {name:42} {microseconds:9.1f} µs {1e6 / microseconds:9.0f} /s{ratio}")


if __name__ == "__main__":
    main()
