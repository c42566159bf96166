"""Certificates, revocation lists and Intel's collateral in files: what evidence is judged with besides itself.

Nothing in here is trusted: it is checked against the pinned roots each time evidence is judged. So a bundle may come
from anywhere, also on a disk for a machine without any network. One directory::

    snp/<product>/vcek-chain.pem  vlek-chain.pem      AMD's intermediates and root (ASK or ASVK, ARK)
    snp/<product>/vcek.crl        vlek.crl            revocation lists, DER
    snp/<product>/<chip>-<tcb>.der                    a chip's certificate (VCEK) for certain firmware versions
    sev/<generation>/ask-ark.cert                     AMD's intermediate and root for SEV and SEV-ES, as AMD gives them
    sev/cek/<id>.cert                                 the signed CEK of a processor
    tdx/<fmspc>-<ca>.json                             Intel's collateral for a family of platforms

`<id>` is what SEV's GET_ID says of a processor (libvirt's `cpu0-id`), 16 to 128 hexadecimal digits; `<chip>` is 128 of
them (16 on Turin), `<tcb>` the components by name (`bl3-tee0-snp8-ucode115`). Files are replaced whole; several readers
and writers may use the directory at once.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.sev_certs import GENERATIONS, parse_cek, parse_pair
from jindiskd.attest.snp_certs import parse_certificate, parse_crl, to_der
from jindiskd.attest.snp_endorsement import parse_endorsement
from jindiskd.attest.snp_report import Product, SnpReport, Tcb
from jindiskd.attest.tdx import MAX_COLLATERAL_BYTES, parse_collateral
from jindiskd.base.files import replace_file
from jindiskd.errors import EXIT_USAGE, JindiskError

KINDS = ("vcek", "vlek")
NAMES = "|".join(product.value for product in Product)
LAYOUT = re.compile(
    rf"snp/({NAMES})/((vcek|vlek)-chain\.pem|(vcek|vlek)\.crl|[0-9a-f]{{16,128}}-[a-z0-9-]{{8,60}}\.der)"
    rf"|sev/({'|'.join(GENERATIONS)})/ask-ark\.cert|sev/cek/([0-9a-f]{{2}}){{8,64}}\.cert"
    r"|tdx/[0-9a-f]{12}-(platform|processor)\.json"
)
MAX_ENTRY_BYTES = MAX_COLLATERAL_BYTES
MAX_ENTRIES = 20_000
MAX_BUNDLE_BYTES = 256 << 20
SOON = timedelta(days=14)


class BundleRefused(JindiskError, code="BundleRefused", exit_code=EXIT_USAGE):
    """A bundle of collateral holds something that does not belong there; nothing of it was taken."""

    def __init__(self, problem: str) -> None:
        """`problem` is the end of the sentence."""
        super().__init__(f"the bundle of collateral {problem}: make one with jindiskctl collateral export")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of the cache."""

    name: str
    what: str
    """For people."""
    expires: datetime | None
    """When it stops being of use; None where it cannot be read, and for what never does."""
    problem: str = ""
    """Why it cannot be read; empty if it can."""

    def state(self, now: datetime) -> str:
        """`ok`, `expires soon` (within 14 days), `expired` or `damaged`."""
        if self.problem:
            return "damaged"
        if self.expires is None:
            return "ok"
        return "expired" if self.expires < now else "expires soon" if self.expires < now + SOON else "ok"


def tcb_name(tcb: Tcb) -> str:
    """A TCB as part of a file's name."""
    first = f"fmc{tcb.fmc}-" if tcb.fmc is not None else ""
    return f"{first}bl{tcb.bootloader}-tee{tcb.tee}-snp{tcb.snp}-ucode{tcb.microcode}"


def chip_name(product: Product, chip_id: bytes) -> str:
    """A chip id as AMD's key server names it: 8 bytes on Turin and later, else 64."""
    return chip_id[:8].hex() if product.has_fmc else chip_id.hex()


class CollateralCache:
    """The directory. Made when the first thing is put into it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # SEV-SNP

    def vcek_name(self, product: Product, chip_id: bytes, tcb: Tcb) -> str:
        """Name of a chip's certificate."""
        return f"snp/{product}/{chip_name(product, chip_id)}-{tcb_name(tcb)}.der"

    def vcek(self, product: Product, chip_id: bytes, tcb: Tcb) -> bytes | None:
        """A chip's certificate, DER."""
        return self._read(self.vcek_name(product, chip_id, tcb))

    def authorities(self) -> list[bytes]:
        """All intermediates and roots that can be read, DER or PEM."""
        return self._all("*-chain.pem", "certificate")

    def revocation_lists(self) -> list[bytes]:
        """All revocation lists of AMD's that can be read, DER."""
        return self._all("*.crl", "revocation list")

    def _all(self, pattern: str, what: str) -> list[bytes]:
        found = []
        for path in sorted(self.root.glob(f"snp/*/{pattern}")):
            blob = self._read(str(path.relative_to(self.root)))
            if blob is None:
                continue
            try:
                parts = to_der(blob, what)
                for part in parts:
                    parse_crl(part) if what == "revocation list" else parse_certificate(part)
            except MalformedEvidence:
                continue  # `entries` tells of it
            found += parts
        return found

    # SEV and SEV-ES

    def sev_authorities_name(self, generation: str) -> str:
        """Name of AMD's intermediate and root for a generation of `attest.sev_certs.GENERATIONS`."""
        return f"sev/{generation}/ask-ark.cert"

    def cek_name(self, cpu_id: bytes) -> str:
        """Name of the signed CEK of a processor, by 8 to 64 bytes that SEV's GET_ID says of it."""
        return f"sev/cek/{cpu_id.hex()}.cert"

    def cek(self, cpu_id: bytes) -> bytes | None:
        """The signed CEK of a processor, 2084 bytes."""
        name = self.cek_name(cpu_id)
        return self._read(name) if LAYOUT.fullmatch(name) else None

    def sev_authorities(self) -> list[tuple[bytes, bytes]]:
        """ASK and ARK of each generation that can be read."""
        found = []
        for generation in GENERATIONS:
            blob = self._read(self.sev_authorities_name(generation))
            if blob is None:
                continue
            with contextlib.suppress(MalformedEvidence):  # `entries` tells of it
                found.append(parse_pair(blob, generation))
        return found

    # TDX

    def tdx_name(self, fmspc: str, ca: str) -> str:
        """Name of the collateral of a platform: FMSPC (12 hexadecimal digits) and CA (`platform` or `processor`)."""
        return f"tdx/{fmspc.lower()}-{ca}.json"

    def tdx(self, fmspc: str, ca: str) -> bytes | None:
        """Intel's collateral for a platform, as `attest.tdx.parse_collateral` reads it."""
        name = self.tdx_name(fmspc, ca)
        return self._read(name) if LAYOUT.fullmatch(name) else None

    # Files

    def put(self, name: str, blob: bytes) -> None:
        """Put something under its name, after a look at what it is.

        Raises:
            MalformedEvidence: it is not what its name says; what was there before still is.
        """
        read_entry(name, blob)
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        replace_file(path, blob)

    def stamp(self) -> tuple[tuple[str, int], ...]:
        """Changes when an authority or revocation list does."""
        paths = sorted([*self.root.glob("snp/*/*-chain.pem"), *self.root.glob("snp/*/*.crl")])
        return tuple((str(path), path.stat().st_mtime_ns) for path in paths)

    def _read(self, name: str) -> bytes | None:
        try:
            with (self.root / name).open("rb") as stream:
                blob = stream.read(MAX_ENTRY_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return blob if len(blob) <= MAX_ENTRY_BYTES else None

    def names(self) -> list[str]:
        """Names of all that is in it."""
        paths = (str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())
        return sorted(name for name in paths if LAYOUT.fullmatch(name))

    def entries(self) -> list[Entry]:
        """All that is in it, with when it expires."""
        found = []
        for name in self.names():
            blob = self._read(name)
            try:
                found.append(read_entry(name, blob or b""))
            except MalformedEvidence as exc:
                found.append(Entry(name=name, what="damaged", expires=None, problem=str(exc)))
        return found

    # Bundles

    def export(self, stream: io.BufferedIOBase) -> int:
        """Write all of it as a tar archive; returns the number of files."""
        names = self.names()
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for name in names:
                blob = self._read(name) or b""
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(blob), 0o644
                tar.addfile(info, io.BytesIO(blob))
        return len(names)

    def import_bundle(self, stream: io.BufferedIOBase) -> int:
        """Take all of a bundle, or nothing; returns the number of files.

        Raises:
            BundleRefused: it is none, is too large, or has something that does not belong there.
        """
        taken: dict[str, bytes] = {}
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for info in tar:
                    if not info.isreg() or LAYOUT.fullmatch(info.name) is None or info.name in taken:
                        raise BundleRefused(f"has {info.name[:100]!r}")
                    if info.size > MAX_ENTRY_BYTES or len(taken) == MAX_ENTRIES:
                        raise BundleRefused(f"is too large at {info.name!r}")
                    member = tar.extractfile(info)
                    assert member is not None
                    taken[info.name] = member.read(MAX_ENTRY_BYTES + 1)
                    read_entry(info.name, taken[info.name])
                    if sum(map(len, taken.values())) > MAX_BUNDLE_BYTES:
                        raise BundleRefused("is too large")
        except (tarfile.TarError, EOFError, ValueError, OSError) as exc:
            raise BundleRefused("is not a tar archive that is whole") from exc
        except MalformedEvidence as exc:
            raise BundleRefused(f"has something that is not what it is called: {exc}") from exc
        for name, blob in taken.items():
            self.put(name, blob)
        return len(taken)


def read_entry(name: str, blob: bytes) -> Entry:
    """What a file of the cache is.

    Raises:
        MalformedEvidence: it is not what its name says.
    """
    if LAYOUT.fullmatch(name) is None:
        raise MalformedEvidence("collateral", f"{name[:100]!r} is no name of it")
    kind, _, rest = name.partition("/")
    if kind == "tdx":
        fmspc, _, ca = rest.removesuffix(".json").partition("-")
        return Entry(name=name, what=f"TDX collateral of {fmspc} ({ca})", expires=_tdx_expiry(blob, fmspc))
    product, _, file = rest.partition("/")
    if kind == "sev":
        # SEV certificates have no dates.
        if product == "cek":
            parse_cek(blob)
            return Entry(name=name, what=f"CEK of processor {file[:16]}…", expires=None)
        parse_pair(blob, product)
        return Entry(name=name, what=f"authorities of {product} (SEV)", expires=None)
    if file.endswith(".crl"):
        revoked = parse_crl(to_der(blob, "revocation list")[0])
        if revoked.next_update is None:
            raise MalformedEvidence("revocation list", "it does not say until when it is of use")
        what = f"revocation list of {product} ({file.removesuffix('.crl').upper()})"
        return Entry(name=name, what=what, expires=revoked.next_update)
    certificates = [parse_certificate(part) for part in to_der(blob)]
    expires = min(certificate.not_after for certificate in certificates)
    if file.endswith(".pem"):
        return Entry(name=name, what=f"authorities of {product} ({file[:4].upper()})", expires=expires)
    endorsed = parse_endorsement(certificates[0])
    chip = (endorsed.hardware_id or b"").hex()
    if file != f"{chip}-{tcb_name(endorsed.tcb)}.der" or endorsed.product.value != product:
        raise MalformedEvidence("certificate", f"it is not the one that {name!r} names")
    return Entry(name=name, what=f"certificate of chip {chip[:16]}… ({endorsed.tcb})", expires=expires)


def _tdx_expiry(blob: bytes, fmspc: str) -> datetime:
    """When the first of the documents in Intel's collateral is over."""
    members = parse_collateral(blob)
    dates = []
    try:
        for name in ("tcb_info", "qe_identity"):
            document = json.loads(members[name])
            dates.append(datetime.fromisoformat(document["nextUpdate"]))
            if name == "tcb_info" and document["fmspc"].lower() != fmspc:
                raise MalformedEvidence("TDX collateral", f"it is of the platforms {document['fmspc'][:20]!r}")
        for name in ("root_ca_crl", "pck_crl"):
            update = x509.load_der_x509_crl(bytes.fromhex(members[name])).next_update_utc
            if update is not None:
                dates.append(update)
        return min(dates).astimezone(UTC)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, x509.InvalidVersion) as exc:
        raise MalformedEvidence("TDX collateral", "one of its documents cannot be read") from exc


def products_of(report: SnpReport) -> Iterator[Product]:
    """The processor lines that a report may be of: one, or for version 2 those whose chips have such identities."""
    if report.product is not None:
        yield report.product
    elif not any(report.chip_id[8:]) and any(report.chip_id):
        yield Product.TURIN
    else:
        yield from (Product.MILAN, Product.GENOA)


def warnings_of(entries: Sequence[Entry], now: datetime) -> list[str]:
    """What somebody should do about the cache, a sentence each."""
    found = []
    for entry in entries:
        state = entry.state(now)
        if state != "ok":
            found.append(f"{entry.what} {state}: {entry.problem or 'fetch or import it again'}")
    if not any(entry.name.endswith(".crl") for entry in entries):
        found.append("there is no revocation list of AMD's: by default genuine SEV-SNP guests are refused without one")
    return found
