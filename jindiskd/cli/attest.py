"""`jindiskctl attest`: judging evidence from files, without the service or a network; and explaining refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from jindiskd.base.platform import Tee
from jindiskd.bus.lib import Variant
from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import AUDIT, AUDIT_PATH, Client, RemoteError, connected
from jindiskd.cli.domain import DOMAINS
from jindiskd.cli.image import IMAGES
from jindiskd.cli.jobs import result, start_and_follow
from jindiskd.cli.output import clean, fields
from jindiskd.cli.parameters import Hex
from jindiskd.errors import EXIT_NOT_FOUND, EXIT_REFUSED, JindiskError

if TYPE_CHECKING:
    from jindiskd.attest.verdict import OfflineVerdict

P = ParamSpec("P")
R = TypeVar("R")
FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%d %H:%M:%S"]

SHOWN = 100
"""Characters of a value shown to people; --json has all."""
FILE = click.Path(exists=True, path_type=Path)


class ManyFiles(click.Command):
    """A command whose option `--certificates` takes as many files as stand after it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option in front of each."""
        words: list[str] = []
        many = False
        for word in args:
            if word.startswith("-"):
                many = word == "--certificates"
            elif many and words[-1] != "--certificates":
                words.append("--certificates")
            words.append(word)
        return super().parse_args(ctx, words)


class EvidenceNotAccepted(JindiskError, code="EvidenceNotAccepted", exit_code=EXIT_REFUSED):
    """Evidence from a file was judged, and is not to be believed or not what was asked for."""

    def __init__(self, findings: int) -> None:
        super().__init__(f"the evidence is refused for {findings} reason{'' if findings == 1 else 's'}")


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


def evidence_options(command: Callable[P, R]) -> Callable[P, R]:
    """The options by which evidence in files is given."""
    for option in reversed(
        (
            click.option("--evidence", type=FILE, help="The report, the quote, or what libvirt says of the launch."),
            click.option(
                "--certificates",
                type=FILE,
                multiple=True,
                help="Certificates and revocation lists; as many files or folders as wanted.",
            ),
            click.option("--collateral", type=FILE, help="TDX: Intel's collateral, a JSON file."),
            click.option("--event-log", type=FILE, help="TDX: the guest's event log; must lead to the registers."),
            click.option("--session-key", type=FILE, help="SEV: the integrity key (TIK) of the launch's session."),
            click.option("--simulated-root", type=FILE, help="Judge by this simulated root; proves nothing."),
            click.option("--at", type=click.DateTime(FORMATS), help="The time to judge by, UTC; now if not given."),
        )
    ):
        command = option(command)
    return command


def at_time(given: dict[str, Any]) -> datetime:
    """The time to judge by, with a zone."""
    at: datetime | None = given["at"]
    if at is None:
        return datetime.now(UTC)
    return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)


@click.group()
@common
def attest() -> None:
    """Judge evidence, and explain why a guest was refused."""


@attest.command(cls=ManyFiles)
@click.argument("evidence_", metavar="[EVIDENCE]", type=FILE, required=False)
@click.option(
    "--tee",
    type=click.Choice([item.value for item in Tee]),
    default=Tee.SNP.value,
    show_default=True,
    help="The kind of evidence.",
)
@evidence_options
@click.option("--policy", "policy_", type=FILE, help="A policy (TOML) that the evidence is to meet.")
@click.option("--allow-vlek", multiple=True, metavar="PROVIDER", help="SNP: a provider whose key may have signed.")
@click.option(
    "--measurement", multiple=True, metavar="HEX", help="A launch digest (SNP, SEV) or MRTD (TDX) to accept."
)
@click.option("--host-data", type=Hex(32), multiple=True, help="SNP: host data to accept; zeros if not given.")
@click.option("--rtmr", type=Register(), multiple=True, help="TDX: a value to accept, as 1=HEX, or 3=any.")
@common
@pass_app
def verify(app: App, /, **given: Any) -> None:
    """
    Judge evidence in files: a SEV-SNP report, a TDX quote, or the launch of a SEV guest; status 7 if it is refused.

    Nothing is asked of the service or a network. Without a policy or a measurement it is only asked whether the
    evidence is genuine. The challenge behind a file is not known: a good verdict does not say that it is fresh.
    """
    tee = Tee(given["tee"])
    evidence: Path | None = given["evidence"] or given["evidence_"]
    if evidence is None or (given["evidence"] and given["evidence_"]):
        raise click.UsageError("give one file with --evidence")
    show_verdict(app, judge_files(tee, evidence, given, _policy(tee, given)))


def judge_files(tee: Tee, evidence: Path, given: dict[str, Any], policy: Any) -> OfflineVerdict:
    """Judge by the options of `evidence_options`; `policy` is what is expected, or None."""
    # Needs libraries that no other command does.
    from jindiskd.attest.offline import verify_files

    # A policy says itself which providers and hidden chips are allowed.
    by_policy = given.get("policy_") is not None
    return verify_files(
        tee,
        evidence,
        given["certificates"],
        given["collateral"],
        at_time(given),
        policy,
        simulated_root=given["simulated_root"],
        event_log=given["event_log"],
        session_key=given["session_key"],
        allow_vlek_csp=None if by_policy else frozenset(given.get("allow_vlek", ())),
        allow_masked_chip_id=by_policy,
    )


def show_verdict(app: App, verdict: OfflineVerdict) -> None:
    """Print a judgement.

    Raises:
        EvidenceNotAccepted: it is a refusal.
    """
    from jindiskd.policy.advice import remedy

    findings = [
        {"id": finding.id, "text": finding.text, "remedy": remedy(finding.id)} for finding in verdict.findings
    ]

    def text() -> str:
        shown = {name: _short(value) for name, value in verdict.fields.items()}
        suffix = " (simulated: proves nothing)" if verdict.simulated else ""
        return "\n".join([fields(shown), f"verdict: {verdict.verdict.value}{suffix}", *finding_lines(findings)])

    document = {
        "verdict": verdict.verdict.value,
        "simulated": verdict.simulated,
        "fields": verdict.fields,
        "findings": findings,
    }
    app.show(document, text)
    if findings:
        raise EvidenceNotAccepted(len(findings))


def finding_lines(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Findings for people, each with what to do."""
    lines = []
    for finding in findings:
        lines.append(f"finding: {clean(finding['text'])} [{finding['id']}]")
        if finding["remedy"]:
            lines.append(f"  {finding['remedy']}")
    return lines


def _digests(given: dict[str, Any], length: int) -> tuple[bytes, ...]:
    kind = Hex(length)
    return tuple(kind.convert(text, None, None) for text in given["measurement"])


def _policy(tee: Tee, given: dict[str, Any]) -> Any:
    """What the evidence should say; None if nothing was named."""
    from jindiskd.attest.appraise import SnpExpectations
    from jindiskd.attest.offline_sev import SevExpectations
    from jindiskd.attest.tdx import TdxExpectations

    for option, kinds in (("host_data", {Tee.SNP}), ("rtmr", {Tee.TDX}), ("allow_vlek", {Tee.SNP})):
        if given[option] and tee not in kinds:
            raise click.UsageError(f"--{option.replace('_', '-')} belongs to --tee {min(kinds)}")
    measurements = _digests(given, 32 if tee in {Tee.SEV, Tee.SEV_ES} else 48)
    simulated = given["simulated_root"] is not None
    if given["policy_"] is not None:
        if given["host_data"] or given["rtmr"] or given["allow_vlek"]:
            raise click.UsageError("with --policy, write it there: host_data, rtmr0 to rtmr3, providers")
        return expectations(tee, _read_policy(given["policy_"]), measurements, simulated=simulated)
    if tee in {Tee.SEV, Tee.SEV_ES}:
        return SevExpectations(launch_digests=frozenset(measurements), encrypted_state=tee is Tee.SEV_ES)
    if tee is Tee.SNP:
        if not measurements:
            if given["host_data"]:
                raise click.UsageError("--host-data is judged together with a --measurement")
            return None
        return SnpExpectations(
            measurements=frozenset(measurements),
            host_data=frozenset(given["host_data"] or [bytes(32)]),
            allow_simulated=simulated,
        )
    if not measurements and not given["rtmr"]:
        return None
    rtmrs: list[frozenset[bytes] | None] = [frozenset() for _ in range(4)]
    for number, value in given["rtmr"]:
        known = rtmrs[number]
        rtmrs[number] = None if value is None or known is None else known | {value}
    return TdxExpectations(mr_td=frozenset(measurements), rtmrs=tuple(rtmrs), allow_simulated=simulated)


def expectations(tee: Tee, rules: Any, digests: tuple[bytes, ...], *, simulated: bool) -> Any:
    """What evidence must say by the rules of an image with these digests."""
    from jindiskd.attest.offline_sev import SevExpectations
    from jindiskd.policy.release import snp_expectations, tdx_expectations
    from jindiskd.policy.rules import version_of

    allowed = simulated and rules.allow_simulated is not False
    if tee is Tee.SNP:
        return snp_expectations(rules, digests, allow_simulated=allowed)
    if tee is Tee.TDX:
        return tdx_expectations(rules, digests, allow_simulated=allowed)
    return SevExpectations(
        launch_digests=frozenset(digests),
        minimum_api=version_of(rules.sev_minimum_api),
        allow_send=rules.sev_allow_send,
        encrypted_state=tee is Tee.SEV_ES,
    )


def _read_policy(path: Path) -> Any:
    from jindiskd.policy import form

    with path.open("rb") as stream:
        return form.read(stream.read(form.LIMIT_BYTES + 1), str(path))


def _short(value: Any) -> str:
    text = " ".join(str(item) for item in value) if isinstance(value, list) else str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


# Refusals, by the service


@attest.command()
@click.argument("name", required=False, metavar="[DOMAIN|IMAGE]")
@click.option("--row", type=click.IntRange(1), help="Number of the refusal in the audit log; the last if not given.")
@common
@pass_app
def explain(app: App, name: str | None, row: int | None) -> None:
    """
    Say why a guest was refused: every reason with what to do, and what explains its launch digest.

    Without a name the last refusal of all is explained, otherwise the last of this domain or image.
    """
    run(_explain(app, name, row))


async def _explain(app: App, name: str | None, row: int | None) -> None:
    options = {"row": Variant("t", row)} if row is not None else {}
    async with connected() as client:
        if name is not None:
            options |= await _whose(client, name)

        async def start() -> str:
            path: str = await client.call(AUDIT_PATH, AUDIT, "Explain", options)
            return path

        job = await start_and_follow(client, app, start, wait=True)
        assert job is not None
        found = json.loads(await result(client, job))
    app.show(found, lambda: _explained(found))


async def _whose(client: Client, name: str) -> dict[str, Variant]:
    """The option that names a domain, or else an image."""
    try:
        _, found = await DOMAINS.find(client, name)
        return {"domain": Variant("s", found["Uuid"])}
    except RemoteError as exc:
        if exc.exit_code != EXIT_NOT_FOUND:
            raise
    _, found = await IMAGES.find(client, name)
    return {"image": Variant("s", found["ImageId"])}


def _explained(found: Mapping[str, Any]) -> str:
    explanation, evidence = found["explanation"], found["evidence"]
    pairs = {
        "audit row": str(found["row"]),
        "when": found["at"],
        "image": found["image"] or found["image_id"] or "-",
        "guest": clean(found["peer"]),
        "evidence": evidence.get("tee", "-") + (", simulated: proves nothing" if found["simulated"] else ""),
        "launch digest": evidence.get("measurement") or evidence.get("mr_td") or "-",
    }
    lines = [fields(pairs), *finding_lines(found["findings"]), f"explanation: {clean(explanation['text'])}"]
    if explanation["remedy"]:
        lines.append(f"  {explanation['remedy']}")
    return "\n".join(lines)
