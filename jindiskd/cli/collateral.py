"""`jindiskctl collateral`: certificates, revocation lists and Intel's collateral, fetched or from bundles of files.

Works on the directory itself, without the service, so that it serves a broker anywhere and a machine without a network.
The service sees what changes at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import click

from jindiskd.cli.app import App, common, pass_app
from jindiskd.cli.output import clean, table
from jindiskd.config import DEFAULT_FILE, load
from jindiskd.errors import EXIT_UNAVAILABLE, InvalidArgument, JindiskError

if TYPE_CHECKING:
    from jindiskd.attest.collateral import CollateralCache
    from jindiskd.attest.collecting import Collector

PRODUCTS = ("Milan", "Genoa", "Turin")
DIRECTORY = click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="The directory; that of jindiskd's configuration if not given.",
)


class FetchIncomplete(JindiskError, code="FetchIncomplete", exit_code=EXIT_UNAVAILABLE):
    """Not everything that was asked for could be fetched; what could is kept."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))


def _cache(directory: Path | None) -> CollateralCache:
    from jindiskd.attest.collateral import CollateralCache

    return CollateralCache(directory or load(DEFAULT_FILE).config.collateral_dir)


@click.group()
@common
def collateral() -> None:
    """Look after what evidence is judged with: certificates, revocation lists, Intel's collateral."""


@collateral.command()
@DIRECTORY
@click.option("--at", type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ"]), help="Judge by this time; now if not.")
@common
@pass_app
def status(app: App, directory: Path | None, at: datetime | None) -> None:
    """List what there is, and say what expires within 14 days, has expired, or is missing."""
    from jindiskd.attest.collateral import warnings_of

    cache, now = _cache(directory), at.replace(tzinfo=UTC) if at else datetime.now(UTC)
    entries = cache.entries()
    rows, found = [], []
    for entry in entries:
        state = entry.state(now)
        expires = entry.expires.strftime("%Y-%m-%d") if entry.expires else "-"
        rows.append((entry.what, expires, state, entry.name))
        when = entry.expires.isoformat() if entry.expires else None
        found.append({"name": entry.name, "what": entry.what, "expires": when, "state": state})
    warnings = warnings_of(entries, now)
    document = {"directory": str(cache.root), "entries": found, "warnings": warnings}

    def text() -> str:
        shown = table(("WHAT", "EXPIRES", "STATE", "FILE"), rows, legend=app.legend)
        return "\n".join([shown, *(f"warning: {clean(line)}" for line in warnings)])

    app.show(document, text)


@collateral.command()
@DIRECTORY
@click.option(
    "--product", "products", type=click.Choice(PRODUCTS), multiple=True, help="AMD's processor line; all if not given."
)
@click.option(
    "--evidence",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="A SEV-SNP report or TDX quote: fetch what judging it takes.",
)
@click.option("--platform", "platforms", multiple=True, metavar="FMSPC[:CA]", help="A TDX platform to fetch for.")
@click.option(
    "--sev-processor",
    "processors",
    multiple=True,
    metavar="ID",
    help="The id of a host's processor (SEV's GET_ID): fetch what judging SEV and SEV-ES launches there takes.",
)
@click.option("--sev-authorities", help="Address of AMD's folder of authorities for SEV, or of a cache of it.")
@click.option("--kds", help="Address of AMD's service, or of a cache of it.")
@click.option("--pcs", help="Address of Intel's service, or of a cache of it.")
@click.option("--root-crl", help="Address of Intel's root revocation list.")
@click.option("--ca-file", type=click.Path(exists=True, path_type=Path), help="Authorities for these addresses' TLS.")
@common
@pass_app
def fetch(app: App, /, directory: Path | None, **given: Any) -> None:
    """
    Fetch AMD's authorities and revocation lists, and what was named, from the makers' services.

    Status 69 if something could not be fetched; the rest is kept. The makers learn which machines are asked about.
    """
    from jindiskd.attest.collecting import Collector
    from jindiskd.attest.snp_report import Product
    from jindiskd.attest.vendors import INTEL_ROOT_CRL, KDS, PCS, SEV_AUTHORITIES, Vendors

    context = ssl.create_default_context(cafile=os.fspath(given["ca_file"])) if given["ca_file"] else None
    vendors = Vendors(
        kds=given["kds"] or KDS,
        sev=given["sev_authorities"] or SEV_AUTHORITIES,
        pcs=given["pcs"] or PCS,
        root_crl=given["root_crl"] or INTEL_ROOT_CRL,
        context=context,
    )
    cache: CollateralCache = _cache(directory)
    collector = Collector(cache, vendors)
    before = {entry.name: entry.expires for entry in cache.entries()}
    problems: list[JindiskError] = []
    named = given["evidence"] or given["platforms"] or given["processors"]
    processors = [_processor(text) for text in given["processors"]]
    products = [Product(name) for name in given["products"] or (() if named else PRODUCTS)]
    problems += collector.fetch_authorities(products)
    for path in given["evidence"]:
        problems += _for_evidence(collector, path)
    for platform in given["platforms"]:
        fmspc, _, ca = platform.partition(":")
        problems += _tdx(collector, fmspc, ca or "platform")
    for processor in processors:
        problems += collector.fetch_sev(processor)
    after = {entry.name: entry.expires for entry in cache.entries()}
    new = sorted(name for name, expires in after.items() if before.get(name) != expires or name not in before)
    told = [str(problem) for problem in problems]
    document = {"directory": str(cache.root), "new": new, "files": len(after), "problems": told}
    app.show(document, lambda: f"{len(new)} new, {len(after)} files in {cache.root}")
    if told:
        raise FetchIncomplete(told)


def _processor(text: str) -> bytes:
    """A processor's id: 8 to 64 bytes."""
    if re.fullmatch(r"([0-9a-fA-F]{2}){8,64}", text) is None:
        raise InvalidArgument("processor's id", text, "give the 16 to 128 hexadecimal digits that SEV's GET_ID says")
    return bytes.fromhex(text)


def _for_evidence(collector: Collector, path: Path) -> list[JindiskError]:
    """Fetch what judging the evidence in a file takes."""
    from jindiskd.attest.collateral import products_of
    from jindiskd.attest.collecting import platform_of
    from jindiskd.attest.model import MalformedEvidence
    from jindiskd.attest.offline import snp_report_of
    from jindiskd.attest.snp_report import parse_report
    from jindiskd.attest.tdx_quote import parse_quote
    from jindiskd.attest.vendors import VendorUnavailable
    from jindiskd.attest.verdict import read_evidence_file

    assert collector.vendors is not None
    blob = read_evidence_file(path, "evidence")
    try:
        report = parse_report(snp_report_of(blob)[0])
    except MalformedEvidence:
        platform = platform_of(parse_quote(blob).quote)
        if platform is None:
            raise
        return _tdx(collector, *platform)
    problems: list[JindiskError] = []
    for product in products_of(report):
        try:
            certificate = collector.vendors.vcek(product, report.chip_id, report.reported_tcb)
            collector.cache.put(collector.cache.vcek_name(product, report.chip_id, report.reported_tcb), certificate)
        except (VendorUnavailable, MalformedEvidence) as exc:
            problems.append(exc)
            continue
        return collector.fetch_authorities([product])
    return problems


def _tdx(collector: Collector, fmspc: str, ca: str) -> list[JindiskError]:
    assert collector.vendors is not None
    try:
        collector.cache.put(collector.cache.tdx_name(fmspc, ca), collector.vendors.tdx(fmspc, ca))
    except JindiskError as exc:
        if isinstance(exc, InvalidArgument):
            raise
        return [exc]
    return []


@collateral.command(name="import")
@DIRECTORY
@click.argument("bundle", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@common
@pass_app
def import_(app: App, directory: Path | None, bundle: Path) -> None:
    """Take all that is in BUNDLE (`-`: standard input), made by `collateral export`; nothing if a part is wrong."""
    cache = _cache(directory)
    with contextlib.ExitStack() as stack:
        stream = sys.stdin.buffer if str(bundle) == "-" else stack.enter_context(bundle.open("rb"))
        count = cache.import_bundle(cast("Any", stream))
    app.show({"directory": str(cache.root), "files": count}, lambda: f"{count} files taken into {cache.root}")


@collateral.command()
@DIRECTORY
@click.argument("bundle", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path))
@common
@pass_app
def export(app: App, directory: Path | None, bundle: Path) -> None:
    """Write all there is into the file BUNDLE (`-`: standard output), for a machine without a network."""
    cache = _cache(directory)
    with contextlib.ExitStack() as stack:
        to_output = str(bundle) == "-"
        stream: BinaryIO = sys.stdout.buffer if to_output else stack.enter_context(bundle.open("xb"))
        count = cache.export(cast("Any", stream))
    if not to_output:
        app.show({"bundle": str(bundle), "files": count}, lambda: f"{count} files written into {bundle}")
