"""Every parser that bytes of a guest, or of a host on behalf of one, reach: what it may raise, and seeds that it takes.

A target is a function of bytes that returns or raises what it is allowed to. Anything else is a fault.
"""

import json
import re
import struct
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import volumes
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from jindiskd.attest.ccel import EV_NO_ACTION, TPM_ALG_SHA384, parse_event_log, replay
from jindiskd.attest.collateral import read_entry
from jindiskd.attest.id_block import AUTH_BYTES, IdBlock, check, sign
from jindiskd.attest.kept import Kept, restore
from jindiskd.attest.model import EvidenceRefused, MalformedEvidence
from jindiskd.attest.offline import snp_report_of
from jindiskd.attest.offline_sev import parse_launch
from jindiskd.attest.sev import LaunchReport, SealedSecret, SevKeys
from jindiskd.attest.sev_certs import parse_authority, parse_cek, parse_pair, parse_sev_certificate, split_chain
from jindiskd.attest.snp import AMD_ROOTS, SnpVerifier
from jindiskd.attest.snp_certs import parse_certificate, parse_crl, to_der
from jindiskd.attest.snp_endorsement import parse_endorsement
from jindiskd.attest.snp_report import Product, encode_report, parse_report, reserved_faults
from jindiskd.attest.snp_table import table_certificates
from jindiskd.attest.tdx import parse_collateral
from jindiskd.attest.tdx_quote import parse_quote
from jindiskd.attest.tdx_registers import authenticode
from jindiskd.base.platform import Tee
from jindiskd.base.secret import Secret
from jindiskd.broker.judge import judge
from jindiskd.broker.sev import HostPlatform
from jindiskd.broker.sev_messages import (
    BeginRequest,
    dump_approve,
    dump_sealed,
    parse_approve,
    parse_begin,
    parse_sealed,
)
from jindiskd.broker.token import TokenMaker, TokenRefused, draw_signing_key
from jindiskd.device.probe import probe
from jindiskd.errors import InvalidArgument, JindiskError
from jindiskd.helper import mapped
from jindiskd.helper import protocol as helper
from jindiskd.jindisk.anchor_file import AnchorFileDamaged
from jindiskd.jindisk.errors import VolumeInconsistent, VolumeMalformed, VolumeUnrecognised, VolumeUnsupported
from jindiskd.jindisk.identification import Identification
from jindiskd.jindisk.nbd_handshake import Gone
from jindiskd.jindisk.v1.nodes import BadNode
from jindiskd.kbs import encoding, initdata, jwk
from jindiskd.kbs.evidence import snp_from_json, snp_to_json, tdx_from_json, tdx_to_json
from jindiskd.kbs.freshness import VolumeState, dump_release, parse_release, parse_state
from jindiskd.kbs.messages import (
    VERSION_0_2,
    MalformedMessage,
    check_resource,
    parse_attestation,
    parse_request,
    read_object,
)

NOW = datetime.fromisoformat("2026-07-15T00:00:00Z")
NONCE = "bm9uY2U="
FMSPC = re.compile(rb'fmspc[^0-9a-fA-F]{1,8}([0-9a-fA-F]{12})')
VERIFIER = SnpVerifier(roots=AMD_ROOTS, allow_vlek_csp=None)
TOKENS = TokenMaker(draw_signing_key())
UUID = "7c1d1f0a-5a0e-4bd5-9a3e-3b0c6a7f0a11"
OPEN = helper.Open(
    kind=helper.Kind.JINDISK2, below=helper.Below(major=8, minor=2, sequence=7), owner=0, read_only=False, uuid=UUID,
    anchor=bytes(73), session=bytes(32),
)  # fmt: skip
DEVICE = Identification(segment_bits=10, uuid=uuid.UUID(UUID), blocks=4096, end=8192, label="a").encode()[:600]


@dataclass(frozen=True)
class Target:
    """One parser."""

    run: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...]
    seeds: tuple[str, ...] = ()
    """Glob patterns of recorded files, below the folder of attestation vectors."""
    made: tuple[bytes, ...] = ()
    joined: Callable[[Path], list[bytes]] = lambda _folder: []
    """Seeds made of several recorded files."""


def _efi_image() -> bytes:
    """The least that has a digest: headers with a section of eight bytes, and certificates of eight."""
    image = bytearray(512 + 16)
    image[:2], image[0x3C:0x40] = b"MZ", (64).to_bytes(4, "little")
    image[64:68], image[70:72], image[84:86] = b"PE\0\0", b"\1\0", (240).to_bytes(2, "little")
    for at, size, value in (
        (88, 2, 0x20B), (88 + 60, 4, 512), (88 + 108, 4, 16), (88 + 144, 4, 520), (88 + 148, 4, 8),
        (88 + 240 + 16, 4, 8), (88 + 240 + 20, 4, 512),
    ):  # fmt: skip
        image[at : at + size] = value.to_bytes(size, "little")
    return bytes(image)


def _report(data: bytes) -> None:
    for product in (None, Product.MILAN, Product.TURIN):
        report = parse_report(data, product=product)
        reserved_faults(data, report)
        again = parse_report(encode_report(report), product=product)
        assert again == report, "a report does not survive being written"


def _certificate(data: bytes) -> None:
    for blob in to_der(data):
        parsed = parse_certificate(blob)
        _ = parsed.is_authority
        parse_endorsement(parsed)


def _authorities(data: bytes) -> None:
    parse_pair(data, "Naples")


def _collateral_file(data: bytes) -> None:
    """A file of the cache under the name of whatever platforms it says it is of."""
    named = FMSPC.search(data)
    read_entry(f"tdx/{named[1].decode().lower() if named else '00806f050000'}-platform.json", data)


def _with_chains(folder: Path) -> list[bytes]:
    """Reports with the certificates that they need, as PEM."""

    def pem(der: bytes) -> bytes:
        return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # serial number 0
        for report in sorted((folder / "snp").glob("milan-*-vcek/report.bin")):
            chain = [(folder / f"amd-roots/milan/{name}.pem").read_bytes() for name in ("ask", "ark")]
            found.append(report.read_bytes() + pem(report.with_name("vek.der").read_bytes()) + b"".join(chain))
    return found


def _verify(data: bytes) -> None:
    """A report and what came with it, cut in two anywhere."""
    VERIFIER.verify(data[:1184], [data[1184:]] if len(data) > 1184 else [], report_data=None, now=NOW)


def _quote(data: bytes) -> None:
    quote = parse_quote(data)
    assert data.startswith(quote.quote)


def _log(data: bytes) -> None:
    assert all(len(register) == 48 for register in replay(parse_event_log(data)))


def _json(data: bytes, read: Callable[[Any], Any]) -> None:
    read(read_object(data, "fuzz"))


def _snp_json(data: bytes) -> None:
    report, certificates = snp_from_json(read_object(data, "fuzz"))
    assert len(report) == 1184
    assert sum(map(len, certificates)) <= 64 << 10


def _tdx_json(data: bytes) -> None:
    quote, log = tdx_from_json(read_object(data, "fuzz"))
    assert tdx_from_json(tdx_to_json(quote, log)) == (quote, log)


def _judge(data: bytes) -> None:
    for tee in (Tee.SNP, Tee.TDX):
        judge(data, NONCE, [VERIFIER], NOW, tee)


def _text(function: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: function(data.decode("utf-8", "replace"))


def _restore(data: bytes) -> None:
    facts = {"product": "Milan", "signer": "vcek", "csp_id": None, "simulated": False, "roots": "AMD"}
    facts |= {"certificate_sha256": "", "crl_issued": None, "report_data_checked": True}
    restore(Kept(tee=Tee.SNP, blob=data, facts=facts))


def _restore_quote(data: bytes) -> None:
    facts = {"status": "UpToDate", "advisory_ids": [], "tcb_date": "2026-01-01T00:00:00+00:00", "tcb_evaluation": 1}
    facts |= {"fmspc": "00", "ppid": "00", "simulated": False, "report_data_checked": True}
    facts |= dict.fromkeys(("dynamic_platform", "cached_keys", "smt_enabled"))
    restore(Kept(tee=Tee.TDX, blob=data, facts=facts))


def _sev(data: bytes) -> None:
    for read in (parse_sev_certificate, parse_authority, split_chain, parse_cek, _authorities):
        try:
            read(data)
        except MalformedEvidence:
            continue


def _event_log() -> bytes:
    """The least that is a log: the record that names its format, and one event of each register."""
    named = b"Spec ID Event03\0" + bytes(8) + struct.pack("<IHH", 1, TPM_ALG_SHA384, 48) + b"\0"
    log = struct.pack("<II20sI", 1, EV_NO_ACTION, b"", len(named)) + named
    for register in range(1, 5):
        log += struct.pack("<IIIH48sI", register, 5, 1, TPM_ALG_SHA384, b"digest", 4) + b"data"
    return log + b"\xff" * 4


def _id_blocks() -> tuple[bytes, ...]:
    """Authentication and block of a launch, with an author's key and without."""
    first, second = (ec.derive_private_key(number, ec.SECP384R1()) for number in (7, 11))
    block = IdBlock(launch_digest=bytes(48))
    return tuple(made.auth + made.block for made in (sign(block, first), sign(block, first, second)))


def _evidence() -> bytes:
    report = bytes([2]) + bytes(1183)
    told = {
        "runtime-data": {"nonce": NONCE, "tee-pubkey": {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}},
        "tee-evidence": {"primary_evidence": snp_to_json(report), "additional_evidence": ""},
        "init-data": {"format": "toml", "body": 'version = "0.1.0"\nalgorithm = "sha256"\n[data]\n"a" = "b"\n'},
    }
    return json.dumps(told).encode()


EVIDENCE = (MalformedEvidence,)
MESSAGE = (MalformedMessage,)
JWK = json.dumps(jwk.tee_jwk(ec.derive_private_key(7, ec.SECP256R1()).public_key())).encode()
LAUNCH = LaunchReport(measurement=bytes(48), api_major=1, api_minor=55, build=21, policy=11)
SEALED = SealedSecret(header=bytes(52), payload=bytes(64))
RELEASE = dump_release("default/a/root", UUID)
STATE = VolumeState(volume=UUID, session=bytes(32), sequence=7, root=bytes(32)).dump()
SESSION = b"JDS1" + bytes(36) + b"Milan"
BEGIN = BeginRequest(
    image_id=UUID, policy=11, host=HostPlatform(pdh=bytes(2084), chain=bytes(3 * 2084), cpu_id=bytes(64))
).dump()
TARGETS: Mapping[str, Target] = {
    "report": Target(_report, EVIDENCE, ("snp/*/report.bin", "snp-test-pki/*/*.bin")),
    "response": Target(snp_report_of, EVIDENCE, ("snp/msg-report-rsp.bin",), (b"{}",)),
    "certificate": Target(_certificate, EVIDENCE, ("snp/*/vek.der", "amd-roots/*/a*.pem")),
    "revocation": Target(
        lambda data: [parse_crl(blob) for blob in to_der(data, "list")], EVIDENCE, ("snp-test-pki/*/crl*.der",)
    ),
    "table": Target(table_certificates, EVIDENCE, ("snp/*/auxblob.bin",)),
    "verify": Target(_verify, (MalformedEvidence, EvidenceRefused), ("snp/*/report.bin",), (), _with_chains),
    "quote": Target(_quote, EVIDENCE, ("tdx/*/quote.bin", "tdx-test-pki/*.bin")),
    "event-log": Target(_log, EVIDENCE, ("ccel/*/ccel.bin",), (_event_log(),)),
    "collateral": Target(parse_collateral, EVIDENCE, ("tdx-test-pki/collateral/*.json",)),
    "collateral-file": Target(_collateral_file, EVIDENCE, ("tdx-test-pki/collateral/*.json",)),
    "id-auth": Target(lambda data: check(data[AUTH_BYTES:], data[:AUTH_BYTES]), EVIDENCE, (), _id_blocks()),
    "sev-certificate": Target(_sev, (), ("sev/certs/*/*.cert",)),
    "sev-launch": Target(
        parse_launch,
        EVIDENCE,
        (),
        (
            b'{"sev-measurement":"AAAA","sev-api-major":1,"sev-api-minor":55,"sev-build-id":21,"sev-policy":"0xb"}',
            b"sev-measurement: AAAA\nsev-api-major : 1\nsev-api-minor: 55\nsev-build-id: 21\nsev-policy: 11\n",
        ),
    ),
    "sev-begin": Target(parse_begin, MESSAGE, (), (BEGIN,)),
    "sev-approve": Target(parse_approve, MESSAGE, (), (dump_approve(LAUNCH),)),
    "sev-session": Target(lambda data: SevKeys.unpack(Secret(data)).close(), EVIDENCE, (), (SESSION,)),
    "sev-sealed": Target(parse_sealed, MESSAGE, (), (json.dumps(dump_sealed(SEALED)).encode(),)),
    "kept": Target(_restore, EVIDENCE, ("snp/*/report.bin",)),
    "kept-quote": Target(_restore_quote, EVIDENCE, ("tdx/*/quote.bin",)),
    "request": Target(parse_request, MESSAGE, (), (b'{"version":"0.4.0","tee":"snp","extra-params":""}',)),
    "attestation": Target(parse_attestation, MESSAGE, (), (_evidence(),)),
    "attestation-0.2.0": Target(
        lambda data: parse_attestation(data, VERSION_0_2),
        MESSAGE,
        (),
        (b'{"tee-pubkey":{"kty":"EC"},"tee-evidence":{}}',),
    ),
    "efi-image": Target(authenticode, EVIDENCE, (), (_efi_image(),)),
    "judge": Target(_judge, (EvidenceRefused,), (), (_evidence(),)),
    "snp-evidence": Target(_snp_json, MESSAGE, (), (json.dumps(snp_to_json(bytes(1184))).encode(),)),
    "tdx-evidence": Target(_tdx_json, MESSAGE, (), (json.dumps(tdx_to_json(b"x", b"y")).encode(),)),
    "init-data": Target(
        _text(initdata.read), MESSAGE, (), (b'version = "0.1.0"\nalgorithm = "sha384"\n[data]\na = "b"\n',)
    ),
    "key": Target(lambda data: _json(data, jwk.public_key), MESSAGE, (), (JWK,)),
    "base64url": Target(_text(lambda text: encoding.decode(text, "fuzz")), MESSAGE, (), (b"AAAA-_8",)),
    "resource": Target(_text(check_resource), (InvalidArgument,), (), (b"default/a/root",)),
    "token": Target(_text(lambda text: TOKENS.session_of(text, NOW)), (TokenRefused,), (), (b"e30.e30.AAAA",)),
    "release": Target(parse_release, MESSAGE, (), (RELEASE, b'{"resource":"a/b/c","volume":""}')),
    "state": Target(parse_state, MESSAGE, (), (STATE, b'{"volume":"","session":""}')),
    "device": Target(lambda data: probe(data.ljust(4096, b"\0")), (), (), (DEVICE,)),
    "helper": Target(helper.parse, (helper.MalformedRequest,), (), (helper.dump(OPEN), helper.dump(helper.List()))),
    "mark": Target(
        _text(lambda text: [mapped.read_mark(node, text) for node in ("nbd0", "dm-0")]),
        (),
        (),
        (mapped.nbd_mark(OPEN).encode(), mapped.dm_mark(OPEN).encode()),
    ),
    "identification": Target(
        volumes.identify, (VolumeUnrecognised, VolumeUnsupported, VolumeMalformed), (), (volumes.IDENTIFICATION,)
    ),
    "superblock": Target(
        volumes.superblock,
        (VolumeUnsupported, VolumeMalformed, VolumeInconsistent),
        (),
        (volumes.SUPERBLOCK.encode()[:500],),
    ),
    "journal": Target(volumes.journal_block, (VolumeInconsistent,), (), (volumes.JOURNAL,)),
    "anchor-file": Target(volumes.kept_anchor, (AnchorFileDamaged,), (), (volumes.ANCHOR,)),
    "superblock-1": Target(volumes.header1, (VolumeMalformed,), (), (volumes.SUPERBLOCK1,)),
    "catalogue-1": Target(volumes.entry1, (VolumeMalformed,), (), (volumes.ENTRY1,)),
    "leaf-1": Target(volumes.leaf1, (BadNode,), (), (volumes.LEAF1,)),
    "inner-1": Target(volumes.inner1, (BadNode,), (), (volumes.INNER1,)),
    "nbd": Target(volumes.nbd, (Gone,), (), (volumes.CLIENT, volumes.OLD_CLIENT)),
    "nbd-requests": Target(volumes.nbd_requests, (), (), (b"\xff" + volumes.REQUESTS, b"\0" + volumes.REQUESTS)),
    "nbd-guest": Target(volumes.guest_requests, (), (), (volumes.REQUESTS,)),
}
LONG: Mapping[str, Target] = {
    **TARGETS,
    "volume": Target(volumes.Forged(), (), (), (bytes(9), b"\x41\0\0\1\0\0\0\0\0" * 2)),
}
"""With the one that takes too long to be run beside the others."""
"""`JindiskError` is never allowed as a whole: each parser has its own."""
assert all(JindiskError not in target.allowed for target in LONG.values())


def feed(target: Target, data: bytes) -> bool:
    """Run a target; True where it took the bytes. Raises what it may not raise."""
    try:
        target.run(data)
    except target.allowed:
        return False
    return True


def seeds(target: Target, attestation: Path | None) -> list[bytes]:
    """What a target is known to take, or nearly."""
    found = list(target.made)
    if attestation is not None:
        for pattern in target.seeds:
            found += [path.read_bytes() for path in sorted(attestation.glob(pattern))]
        found += target.joined(attestation)
    return found
