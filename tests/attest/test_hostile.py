"""Hostile input: every reader of foreign bytes answers with a value or one of our errors, quickly, whatever comes."""

import contextlib
import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jindiskd.attest import der
from jindiskd.attest.ccel import Event, parse_event_log, replay
from jindiskd.attest.firmware import inspect_firmware
from jindiskd.attest.model import EvidenceRefused, MalformedEvidence
from jindiskd.attest.offline import snp_report_of
from jindiskd.attest.sev_certs import (
    parse_authority,
    parse_cek,
    parse_pair,
    parse_sev_certificate,
    split_chain,
    verify_platform,
)
from jindiskd.attest.snp import AMD_ROOTS, SnpRoots, SnpVerifier
from jindiskd.attest.snp_certs import parse_certificate, parse_crl, signed_by, to_der
from jindiskd.attest.snp_chain import CACHED
from jindiskd.attest.snp_endorsement import parse_endorsement
from jindiskd.attest.snp_report import encode_report, parse_report
from jindiskd.attest.snp_table import encode_certificate_table, parse_certificate_table, table_certificates
from jindiskd.attest.tdx import TdxVerifier, parse_collateral
from jindiskd.attest.tdx_quote import parse_quote
from jindiskd.errors import JindiskError
from jindiskd.kbs.evidence import snp_from_json, snp_to_json
from jindiskd.kbs.messages import MalformedMessage

NOW = datetime(2026, 7, 15, tzinfo=UTC)
QUICK = settings(
    max_examples=150,
    deadline=timedelta(milliseconds=500),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read_certificate(blob: bytes) -> None:
    certificate = parse_certificate(blob)
    signed_by(certificate, certificate)
    with contextlib.suppress(MalformedEvidence):
        _ = certificate.is_authority
    parse_endorsement(certificate)


def read_der(blob: bytes) -> None:
    element, _end = der.read(blob)
    for reader in (der.oid, der.integer, der.boolean, der.bit_string, der.text, der.time, der.children):
        with contextlib.suppress(MalformedEvidence):
            reader(element)


def read_log(blob: bytes) -> None:
    replay(parse_event_log(blob))


def read_authorities(blob: bytes) -> None:
    parse_pair(blob, "Rome")


READERS = [
    read_der,
    read_certificate,
    parse_crl,
    to_der,
    parse_certificate_table,
    table_certificates,
    parse_report,
    snp_report_of,
    parse_quote,
    read_log,
    parse_collateral,
    parse_sev_certificate,
    parse_authority,
    parse_cek,
    read_authorities,
    split_chain,
]
SIZES = st.sampled_from([0, 1, 24, 1184, 4000, 2084, 832, 1600, 1664, 3200])


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@QUICK
@given(data=st.data())
def test_any_bytes(reader, data):
    """Arbitrary bytes, also of the sizes that readers expect and with their first bytes, raise nothing else."""
    starts = [b"", b"\x30\x82", b"\x30\x80", b"{", b"-----BEGIN CERTIFICATE-----\n", b"\1\0\0\0"]
    start = data.draw(st.sampled_from(starts))
    body = data.draw(st.binary(max_size=300))
    size = data.draw(SIZES)
    with contextlib.suppress(MalformedEvidence):
        reader((start + body).ljust(size, b"\0"))


SEEDS = {
    "snp/milan-v3-vcek/vek.der": read_certificate,
    "snp/milan-v2-vlek-vmpl1/vek.der": read_certificate,
    "snp/turin-v5-vcek/vek.der": read_certificate,
    "snp-test-pki/milan/crl-ask-revoked.der": parse_crl,
    "snp/genoa-v3-vcek-auxblob/auxblob.bin": table_certificates,
    "snp/turin-v5-vcek/report.bin": parse_report,
    "snp/msg-report-rsp.bin": snp_report_of,
    "tdx/v5-td15-uptodate/quote.bin": parse_quote,
    "ccel/gcp-cos-113/ccel.bin": read_log,
    "sev/certs/rome/pek.cert": parse_sev_certificate,
    "sev/certs/rome/ask.cert": parse_authority,
    "sev/certs/rome/cek.cert": parse_cek,
}
MUTATION = st.tuples(
    st.integers(0, 1 << 16), st.sampled_from(["set", "cut", "insert", "repeat"]), st.binary(min_size=1, max_size=9)
)
MUTATIONS = st.lists(MUTATION, min_size=1, max_size=6)


def mutate(blob: bytes, mutations: list[tuple[int, str, bytes]]) -> bytes:
    out = bytearray(blob)
    for place, kind, data in mutations:
        at = place % (len(out) + 1)
        if kind == "set":
            out[at : at + len(data)] = data
        elif kind == "cut":
            del out[at : at + len(data) * 5]
        elif kind == "insert":
            out[at:at] = data
        else:
            out[at:at] = out[at : at + 64]
    return bytes(out)


@pytest.mark.parametrize("name", SEEDS)
@QUICK
@given(mutations=MUTATIONS)
def test_damaged_evidence(attestation, name, mutations):
    """Real files with parts overwritten, cut out, inserted and repeated raise nothing else."""
    with contextlib.suppress(MalformedEvidence):
        SEEDS[name](mutate((attestation / name).read_bytes(), mutations))


@QUICK
@given(which=st.integers(0, 2), mutations=MUTATIONS)
def test_verifier_with_damaged_evidence(attestation, which, mutations):
    """A verifier given a damaged report, certificate or authority refuses it, and only ever refuses it."""
    folder = attestation / "snp-test-pki/milan"
    parts = [(folder / name).read_bytes() for name in ("good.bin", "vcek.der", "ask.pem")]
    damaged = mutate(parts[which], mutations)
    ark = (folder / "ark.pem").read_bytes()
    verifier = SnpVerifier(roots=SnpRoots.simulated_from(to_der(ark)[0]), intermediates=[ark])
    chosen = [damaged if number == which else part for number, part in enumerate(parts)]
    try:
        verifier.verify(chosen[0], chosen[1:], report_data=None, now=NOW)
    except (EvidenceRefused, MalformedEvidence):
        return
    # Only what is not part of the evidence may have changed: padding, or PEM's text around the same certificate.
    assert [to_der(part) for part in chosen[1:]] == [to_der(part) for part in parts[1:]]
    assert chosen[0] == parts[0]


@QUICK
@given(mutations=MUTATIONS, which=st.booleans())
def test_tdx_verifier_with_damaged_evidence(attestation, mutations, which):
    """Damaged quotes and collateral never make the library behind the verifier raise anything else."""
    pytest.importorskip("dcap_qvl")
    folder = attestation / "tdx-test-pki"
    quote = (folder / "v4-uptodate.bin").read_bytes()
    collateral = (folder / "collateral/3cf29ac520.json").read_bytes()
    verifier = TdxVerifier(root_ca_der=(folder / "root_ca.der").read_bytes())
    if which:
        quote = mutate(quote, mutations)
    else:
        collateral = mutate(collateral, mutations)
    with contextlib.suppress(EvidenceRefused, MalformedEvidence):
        verifier.verify(quote, collateral=collateral, report_data=None, now=NOW)


@QUICK
@given(member=st.integers(0, 7), value=st.text(max_size=60))
def test_tdx_collateral_members(attestation, member, value):
    """Any text in any member of the collateral is refused.

    Only `pck_crl_issuer_chain` is not looked at: the list is checked with the authority in the quote's own chain.
    """
    pytest.importorskip("dcap_qvl")
    folder = attestation / "tdx-test-pki"
    collateral = json.loads((folder / "collateral/3cf29ac520.json").read_bytes())
    collateral[sorted(collateral.keys() - {"pck_crl_issuer_chain"})[member]] = value
    verifier = TdxVerifier(root_ca_der=(folder / "root_ca.der").read_bytes())
    with pytest.raises((EvidenceRefused, MalformedEvidence)):
        verifier.verify(
            (folder / "v4-uptodate.bin").read_bytes(),
            collateral=json.dumps(collateral).encode(),
            report_data=None,
            now=NOW,
        )


@QUICK
@given(mutations=MUTATIONS, which=st.sampled_from(["pdh", "pek", "ark", "ask"]))
def test_sev_chain_with_damaged_certificates(attestation, mutations, which):
    """Damaged platform certificates are refused, and only refused."""
    given_ = {path.stem: path.read_bytes() for path in (attestation / "sev/certs/rome").glob("*.cert")}
    damaged = {**given_, which: mutate(given_[which], mutations)}
    chain = damaged["pek"] + damaged["oca"] + damaged["cek"]
    with contextlib.suppress(EvidenceRefused, MalformedEvidence):
        verify_platform(damaged["pdh"], chain, ask=damaged["ask"], ark=damaged["ark"])


@QUICK
@given(mutations=MUTATIONS)
def test_damaged_firmware(attestation, tmp_path, mutations):
    """A damaged firmware image is refused by an error of ours, or read."""
    path = tmp_path / "fd"
    path.write_bytes(mutate((attestation / "measure/ovmf_AmdSev_suffix.bin").read_bytes(), mutations))
    with contextlib.suppress(JindiskError):
        inspect_firmware(path)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    LEAVES | st.lists(st.integers(-1, 256), max_size=70),
    lambda inner: st.dictionaries(st.sampled_from(["attestation_report", "cert_chain", "r", "policy", "fmc"]), inner),
    max_leaves=6,
)


@QUICK
@given(value=JSON)
def test_any_json(value):
    """Any JSON value is refused as evidence."""
    with pytest.raises(MalformedMessage):
        snp_from_json(value)


@QUICK
@given(data=st.data())
def test_damaged_json(attestation, data):
    """Real evidence with one member replaced by anything is refused, or is evidence of the right size."""
    blob = (attestation / "snp/turin-v5-vcek/report.bin").read_bytes()
    form = json.loads(json.dumps(snp_to_json(blob)))
    holder = form["attestation_report"]
    name = data.draw(st.sampled_from(sorted(holder)))
    if isinstance(holder[name], dict) and data.draw(st.booleans()):
        holder, name = holder[name], data.draw(st.sampled_from(sorted(holder[name])))
    holder[name] = data.draw(JSON)
    with contextlib.suppress(MalformedMessage):
        assert len(snp_from_json(form)[0]) == 1184


@QUICK
@given(body=st.binary(min_size=1184, max_size=1184), version=st.integers(2, 5), turin=st.booleans())
def test_report_round_trip(body, version, turin):
    """Whatever is in a report's named fields survives reading and writing."""
    blob = bytearray(body)
    blob[0:4] = version.to_bytes(4, "little")
    blob[0x188:0x18B] = b"\x1a\x02\x01" if turin else b"\x19\x01\x01"
    report = parse_report(bytes(blob))
    assert parse_report(encode_report(report)) == report


@QUICK
@given(entries=st.lists(st.tuples(st.sampled_from(["ARK", "ASK", "VLEK", "CRL"]), st.binary(max_size=60)), max_size=9))
def test_certificate_table_round_trip(entries):
    """A table has the entries it was made with; an empty one has none."""
    table = parse_certificate_table(encode_certificate_table(entries))
    assert entries == [(entry.kind, entry.data) for entry in table]


@QUICK
@given(tag=st.sampled_from([0x02, 0x04, 0x30, 0xA3]), content=st.binary(max_size=400), rest=st.binary(max_size=3))
def test_der_round_trip(tag, content, rest):
    """An element is read as it was written, and what follows is left alone."""
    blob = der.encode(tag, content)
    element, end = der.read(blob + rest)
    assert (tag, content, blob, len(blob)) == (element.tag, element.content, element.raw, end)


def test_event_logs_end_quickly():
    """A log of the largest size with the smallest records is answered in bounded time."""
    header = bytes(4) + (3).to_bytes(4, "little") + bytes(20)
    spec = b"Spec ID Event03\0" + bytes(8) + (1).to_bytes(4, "little") + bytes.fromhex("0c003000") + b"\0"
    log = header + len(spec).to_bytes(4, "little") + spec
    record = (1).to_bytes(4, "little") + bytes(4) + (1).to_bytes(4, "little") + b"\x0c\0" + b"d" * 48 + bytes(4)
    begun = time.monotonic()
    assert [Event(register=1, kind=0, digest=b"d" * 48, data=b"")] * 3 == parse_event_log(log + record * 3)
    with pytest.raises(MalformedEvidence, match="records"):
        parse_event_log((log + record * 20000)[: 1 << 20])
    assert time.monotonic() - begun < 30


def test_many_certificates(attestation):
    """More certificates than a chain needs are refused before their signatures are looked at."""
    report = (attestation / "snp/milan-v3-vcek/report.bin").read_bytes()
    certificate = (attestation / "snp/milan-v3-vcek/vek.der").read_bytes()
    with pytest.raises(EvidenceRefused, match="more than 16"):
        SnpVerifier(roots=AMD_ROOTS).verify(report, [certificate] * 17, report_data=None, now=NOW)


def test_nothing_that_anyone_can_make_is_remembered(attestation: Path):
    """A flood of certificates, genuine but for one byte, leaves no trace in a verifier; a genuine chain does."""
    folder = attestation / "snp/milan-v3-vcek"
    report, blob = (folder / "report.bin").read_bytes(), (folder / "vek.der").read_bytes()
    authorities = [(attestation / f"amd-roots/milan/{name}.pem").read_bytes() for name in ("ark", "ask")]
    verifier = SnpVerifier(roots=AMD_ROOTS, intermediates=authorities)
    for number in range(100):
        changed = bytearray(blob)
        changed[-4:] = number.to_bytes(4, "big")
        with pytest.raises(EvidenceRefused):
            verifier.verify(report, [bytes(changed), b"\0" * 60000], report_data=None, now=NOW)
    known = verifier._chains
    assert not known._chains
    assert not any(pair[0] == parse_certificate(bytes(changed)).sha256 for pair in known._signatures)
    for _ in range(2):
        verifier.verify(report, [blob], report_data=None, now=NOW)
    assert [chain.signing.der for chain in known._chains.values()] == [blob]


def test_memory_is_bounded(attestation: Path):
    """A verifier that sees genuine certificates in ever new company forgets the oldest."""
    folder = attestation / "snp/milan-v3-vcek"
    report, blob = (folder / "report.bin").read_bytes(), (folder / "vek.der").read_bytes()
    authorities = [(attestation / f"amd-roots/milan/{name}.pem").read_bytes() for name in ("ark", "ask")]
    verifier = SnpVerifier(roots=AMD_ROOTS, intermediates=authorities)
    padding = [blob + b"\0" * number for number in range(600)]
    for padded in padding:
        verifier.verify(report, [padded], report_data=None, now=NOW)
    assert len(verifier._chains._chains) == CACHED
    assert len(verifier._chains._authorities) == 2
