"""`jindiskctl attest`: judging evidence from files, without the service and without a network."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from jindiskd.base.platform import Tee
from jindiskd.cli.app import App, common, pass_app
from jindiskd.cli.output import fields
from jindiskd.errors import EXIT_REFUSED, JindiskError

SHOWN = 100
"""Characters of a value shown to people; --json has all."""
FILE = click.Path(exists=True, path_type=Path)


class EvidenceNotAccepted(JindiskError, code="EvidenceNotAccepted", exit_code=EXIT_REFUSED):
    """Evidence from a file was judged, and is not to be believed or not what was asked for."""

    def __init__(self, findings: int) -> None:
        super().__init__(f"the evidence is refused for {findings} reason{'' if findings == 1 else 's'}")


class Hex(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.2
    """Bytes in hexadecimal, of a fixed length."""

    name = "hex"

    def __init__(self, length: int) -> None:
        self.length = length

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """The bytes."""
        try:
            data = value if isinstance(value, bytes) else bytes.fromhex(value)
        except ValueError:
            data = b""
        if len(data) != self.length:
            self.fail(f"{value!r} is not {self.length} bytes in hexadecimal", param, ctx)
        return data


class Register(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.2
    """`N=HEX` or `N=any`: a value that RTMR N may have."""

    name = "register"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, bytes | None]:
        """Number and value; None for any."""
        if isinstance(value, tuple):
            return value
        number, _, text = value.partition("=")
        if number not in {"0", "1", "2", "3"}:
            self.fail(f"{value!r} is not like 1=HEX or 3=any, with a register from 0 to 3", param, ctx)
        return int(number), None if text == "any" else Hex(48).convert(text, param, ctx)


@click.group()
@common
def attest() -> None:
    """Judge evidence."""


@attest.command()
@click.argument("evidence", type=FILE)
@click.option("--tee", type=click.Choice([Tee.SNP.value, Tee.TDX.value]), default=Tee.SNP.value, show_default=True)
@click.option(
    "--certificates", type=FILE, multiple=True, help="SNP: certificates and revocation lists; a file or folder."
)
@click.option("--collateral", type=FILE, help="TDX: Intel's collateral, a JSON file.")
@click.option("--event-log", type=FILE, help="TDX: the guest's event log, which must lead to the quote's registers.")
@click.option("--simulated-root", type=FILE, help="Judge by this simulated root; proves nothing.")
@click.option("--allow-vlek", multiple=True, metavar="PROVIDER", help="SNP: a provider whose key may have signed.")
@click.option("--measurement", type=Hex(48), multiple=True, help="A launch digest (SNP) or MRTD (TDX) to accept.")
@click.option("--host-data", type=Hex(32), multiple=True, help="SNP: host data to accept; zeros if not given.")
@click.option("--rtmr", type=Register(), multiple=True, help="TDX: a value to accept, as 1=HEX, or 3=any.")
@click.option("--at", type=click.DateTime(), help="The time to judge by, UTC; now if not given.")
@common
@pass_app
def verify(app: App, /, **given: Any) -> None:
    """
    Judge the attestation report or quote in the file EVIDENCE.

    Without a measurement it is only asked whether the evidence is genuine. The challenge behind a file is not known:
    a good verdict does not say that the evidence is fresh.
    """
    # Needs libraries that no other command does.
    from jindiskd.attest.offline import OfflineVerdict, Verdict, verify_files

    tee = Tee(given["tee"])
    at = given["at"].replace(tzinfo=UTC) if given["at"] else datetime.now(UTC)
    verdict: OfflineVerdict = verify_files(
        tee,
        given["evidence"],
        given["certificates"],
        given["collateral"],
        at,
        _policy(tee, given),
        simulated_root=given["simulated_root"],
        event_log=given["event_log"],
        allow_vlek_csp=frozenset(given["allow_vlek"]),
    )
    findings = [{"id": finding.id, "text": finding.text} for finding in verdict.findings]

    def text() -> str:
        shown = {name: _short(value) for name, value in verdict.fields.items()}
        suffix = " (simulated: proves nothing)" if verdict.simulated else ""
        lines = [fields(shown), f"verdict: {verdict.verdict.value}{suffix}"]
        return "\n".join(lines + [f"finding: {finding['text']} [{finding['id']}]" for finding in findings])

    document = {
        "verdict": verdict.verdict.value,
        "simulated": verdict.simulated,
        "fields": verdict.fields,
        "findings": findings,
    }
    app.show(document, text)
    if verdict.verdict is Verdict.REFUSED:
        raise EvidenceNotAccepted(len(findings))


def _policy(tee: Tee, given: dict[str, Any]) -> Any:
    """What the evidence should say; None if nothing was named."""
    from jindiskd.attest.appraise import SnpExpectations
    from jindiskd.attest.tdx import TdxExpectations

    measurements: Sequence[bytes] = given["measurement"]
    simulated = given["simulated_root"] is not None
    if tee is Tee.SNP:
        if given["rtmr"]:
            raise click.UsageError("--rtmr belongs to --tee tdx")
        if not measurements:
            if given["host_data"]:
                raise click.UsageError("--host-data is judged together with a --measurement")
            return None
        return SnpExpectations(
            measurements=frozenset(measurements),
            host_data=frozenset(given["host_data"] or [bytes(32)]),
            allow_simulated=simulated,
        )
    if given["host_data"]:
        raise click.UsageError("--host-data belongs to --tee snp")
    if not measurements and not given["rtmr"]:
        return None
    rtmrs: list[frozenset[bytes] | None] = [frozenset() for _ in range(4)]
    for number, value in given["rtmr"]:
        known = rtmrs[number]
        rtmrs[number] = None if value is None or known is None else known | {value}
    return TdxExpectations(mr_td=frozenset(measurements), rtmrs=tuple(rtmrs), allow_simulated=simulated)


def _short(value: Any) -> str:
    text = " ".join(str(item) for item in value) if isinstance(value, list) else str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
