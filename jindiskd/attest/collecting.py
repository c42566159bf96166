"""Judging with the cache: verifiers that add what a guest did not send, and ask the vendors where that is allowed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

from jindiskd.attest.collateral import KINDS, CollateralCache, products_of, read_entry
from jindiskd.attest.model import EvidenceRefused, MalformedEvidence
from jindiskd.attest.sev_certs import GENERATIONS, halves, signed_by
from jindiskd.attest.snp import AMD_ROOTS, SnpVerifier, VerifiedSnp
from jindiskd.attest.snp_certs import parse_certificate, to_der
from jindiskd.attest.snp_report import Product, SnpReport, parse_report
from jindiskd.attest.tdx import TdxVerifier
from jindiskd.attest.tdx_quote import TdxQuote
from jindiskd.attest.vendors import Vendors, VendorUnavailable
from jindiskd.attest.verifier import Evidence, TdxJudge, Verifier
from jindiskd.base.platform import Tee
from jindiskd.errors import JindiskError, NotSupported

ASKS_PER_HOUR, HOUR_S = 120, 3600.0
SIGNING = frozenset({"SEV-VCEK", "SEV-VLEK"})


class Collector:
    """Gets collateral from the cache, or where there is `vendors` and it is not in the cache, or over, from them.

    What the vendors give goes into the cache first, after a look at what it is. Safe to call from several threads.

    Args:
        cache: what is at hand.
        vendors: whom to ask; None to ask nobody.
        clock: monotonic, seconds, for how often they are asked.
        now: wall clock, for what is over.
    """

    def __init__(
        self,
        cache: CollateralCache,
        vendors: Vendors | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.cache, self.vendors = cache, vendors
        self._clock, self._now, self._lock = clock, now, threading.Lock()
        self._asked: list[float] = []

    def vceks(self, report: SnpReport) -> list[bytes]:
        """Certificates that may be of the chip and the versions in a report that is not believed."""
        found: list[bytes] = []
        if report.chip_id_masked:
            return found
        for product in products_of(report):
            name = self.cache.vcek_name(product, report.chip_id, report.reported_tcb)
            blob = self.cache.vcek(product, report.chip_id, report.reported_tcb)
            if blob is None and self.vendors is not None and _plausible(report, product):
                ask = functools.partial(self.vendors.vcek, product, report.chip_id, report.reported_tcb)
                blob = self._ask(name, ask)
            if blob is not None:
                found.append(blob)
        return found

    def tdx(self, quote: TdxQuote) -> bytes | None:
        """Collateral for a quote that is not believed. Intel's lasts a month: what is over is asked for anew."""
        platform = platform_of(quote.quote)
        if platform is None:
            return None
        fmspc, ca = platform
        name, blob = self.cache.tdx_name(fmspc, ca), self.cache.tdx(fmspc, ca)
        if self.vendors is not None and (blob is None or self._is_over(name, blob)):
            blob = self._ask(name, functools.partial(self.vendors.tdx, fmspc, ca)) or blob
        return blob

    def _is_over(self, name: str, blob: bytes) -> bool:
        """Whether something of the cache is of no use any more; what is damaged is not."""
        try:
            expires = read_entry(name, blob).expires
        except MalformedEvidence:
            return True
        return expires is not None and expires < self._now()

    def cek(self, cpu_id: bytes) -> bytes | None:
        """The signed CEK of a processor, by what a host that is not believed says of it."""
        blob = self.cache.cek(cpu_id)
        if blob is None and self.vendors is not None and any(cpu_id):
            blob = self._ask(self.cache.cek_name(cpu_id), functools.partial(self.vendors.cek, cpu_id))
        return blob

    def sev_authorities(self, cek: bytes) -> tuple[bytes, bytes] | None:
        """ASK and ARK of the generation whose ASK signed a CEK (2084 bytes), which does not name it.

        Raises:
            MalformedEvidence: the CEK is none.
        """
        for ask, ark in self.cache.sev_authorities():
            if signed_by(ask, cek):
                return ask, ark
        for name, fetch in self._missing_authorities():
            blob = self._ask(name, fetch)
            if blob is not None:
                ask, ark = halves(blob)
                if signed_by(ask, cek):
                    return ask, ark
        return None

    def _missing_authorities(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Name and function that fetches it, of each generation's that is not in the cache; none without vendors."""
        if self.vendors is not None:
            there = set(self.cache.names())
            for generation in GENERATIONS:
                name = self.cache.sev_authorities_name(generation)
                if name not in there:
                    yield name, functools.partial(self.vendors.sev_authorities, generation)

    def _ask(self, name: str, fetch: Callable[[], bytes]) -> bytes | None:
        """Fetch into the cache; None where that fails: evidence is then refused for what is missing.

        Guests decide what is asked for before anything of theirs is believed, so how often is limited.
        """
        with self._lock:
            now = self._clock()
            self._asked = [at for at in self._asked if at > now - HOUR_S]
            if len(self._asked) >= ASKS_PER_HOUR:
                return None
            self._asked.append(now)
        try:
            blob = fetch()
            self.cache.put(name, blob)
        except JindiskError:
            return None
        return blob

    def fetch_authorities(self, products: Sequence[Product]) -> list[JindiskError]:
        """Fetch chains and revocation lists of AMD's; returns what went wrong."""
        assert self.vendors is not None
        problems: list[JindiskError] = []
        for product in products:
            for kind in KINDS:
                for name, fetch in (
                    (f"snp/{product}/{kind}-chain.pem", self.vendors.snp_authorities),
                    (f"snp/{product}/{kind}.crl", self.vendors.snp_revocation_list),
                ):
                    try:
                        self.cache.put(name, fetch(product, kind))
                    except (VendorUnavailable, MalformedEvidence) as exc:
                        problems.append(exc)
        return problems

    def fetch_sev(self, cpu_id: bytes) -> list[JindiskError]:
        """Fetch the CEK of a processor, and the authorities of its generation; returns what went wrong."""
        assert self.vendors is not None
        try:
            cek = self.vendors.cek(cpu_id)
            self.cache.put(self.cache.cek_name(cpu_id), cek)
        except (VendorUnavailable, MalformedEvidence) as exc:
            return [exc]
        if any(signed_by(ask, cek) for ask, _ in self.cache.sev_authorities()):
            return []
        problems: list[JindiskError] = []
        for name, fetch in self._missing_authorities():
            try:
                blob = fetch()
                self.cache.put(name, blob)
                if signed_by(halves(blob)[0], cek):
                    return []
            except (VendorUnavailable, MalformedEvidence) as exc:
                problems.append(exc)
        return problems or [MalformedEvidence("CEK of the processor", "no generation's authorities signed it")]


def _plausible(report: SnpReport, product: Product) -> bool:
    """Whether a report is worth asking AMD about: everybody can send one, and the service counts questions."""
    return product.value in AMD_ROOTS.ark_sha256 and report.signature_algorithm == 1 and any(report.chip_id)


def platform_of(quote: bytes) -> tuple[str, str] | None:
    """FMSPC and CA of the certificate in a quote, not believed; None where it has none."""
    try:
        library = importlib.import_module("dcap_qvl")
    except ImportError as exc:
        raise NotSupported("Intel TDX evidence", "install the Python package dcap-qvl (jindiskd[tdx])") from exc
    try:
        parsed = library.Quote.parse(quote)
        return str(parsed.fmspc()).lower(), str(parsed.ca())
    except ValueError:
        return None


class CachingSnpVerifier:
    """A `Verifier` of SEV-SNP reports by AMD's roots, with the authorities, lists and certificates of a cache.

    Reads authorities and lists again when they change, so that what is fetched or imported counts at once.
    """

    tee = Tee.SNP

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._lock = threading.Lock()
        self._stamp: object = None
        self._verifier: SnpVerifier | None = None

    def _current(self) -> SnpVerifier:
        cache = self._collector.cache
        with self._lock:
            stamp = cache.stamp()
            if self._verifier is None or stamp != self._stamp:
                self._verifier = SnpVerifier(
                    roots=AMD_ROOTS,
                    intermediates=cache.authorities(),
                    crls=cache.revocation_lists(),
                    # Providers' keys and hidden chips are for each image's policy to allow.
                    allow_vlek_csp=None,
                    allow_masked_chip_id=True,
                )
                self._stamp = stamp
            return self._verifier

    def judge(self, evidence: Evidence, *, report_data: bytes | None, now: datetime) -> VerifiedSnp:
        """See `Verifier`. A certificate of the cache is taken where none came, or where the one that came is wrong."""
        verifier, sent = self._current(), evidence.certificates
        try:
            return verifier.verify(evidence.blob, sent, report_data=report_data, now=now)
        except EvidenceRefused as exc:
            refused = exc
        ids = {finding.id for finding in refused.findings}
        if not ids & {"snp.certificate.missing", "snp.tcb.certificate", "snp.chip_id", "snp.product", "snp.signature"}:
            raise refused
        others = [blob for blob in sent if not _is_signing(blob)]
        for certificate in self._collector.vceks(parse_report(evidence.blob)):
            with contextlib.suppress(EvidenceRefused):
                return verifier.verify(evidence.blob, [certificate, *others], report_data=report_data, now=now)
        raise refused


def _is_signing(blob: bytes) -> bool:
    try:
        return any(parse_certificate(part).subject_cn in SIGNING for part in to_der(blob))
    except MalformedEvidence:
        return True


def genuine_verifiers(collector: Collector) -> list[Verifier]:
    """Those for AMD's and Intel's roots; without the library for TDX, the first alone."""
    found: list[Verifier] = [CachingSnpVerifier(collector)]
    with contextlib.suppress(NotSupported):
        found.append(TdxJudge(TdxVerifier(), collector.tdx))
    return found
