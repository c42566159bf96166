"""`jindiskctl broker`: the owner's key broker, by its local socket or over the network. Needs no jindiskd here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import click
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from jindiskd.base import document
from jindiskd.base.files import replace_file
from jindiskd.cli.app import App, common, pass_app
from jindiskd.cli.attest import finding_lines
from jindiskd.cli.broker_keys import key, recovery, token, volume
from jindiskd.cli.broker_target import EXISTING, FILE, Target, reached, show_image, when, write
from jindiskd.cli.client import RemoteError
from jindiskd.cli.output import fields, platform, table
from jindiskd.errors import EXIT_REFUSED, AlreadyExists, InvalidArgument, NotFound
from jindiskd.keys import handover

KNOWN = frozenset({AlreadyExists.code, handover.AlreadyTakenOver.code})
"""Of a list of handovers, those that were taken over before are passed over."""


@click.group()
@common
def broker() -> None:
    """Administer the key broker of a guest owner."""


@broker.command()
@reached
def status(target: Target) -> None:
    """Show how the broker is, and what its owner should know."""
    told = target.call("GET", "status")

    def text() -> str:
        simulated = told["images_simulated"]
        pairs = {
            "version": told["version"],
            "key digest": told["spki_sha256"],
            "database": told["database"],
            "listens": "; ".join(f"{name}: {', '.join(where)}" for name, where in told["listen"].items()),
            "simulated reports": "accepted: they prove nothing" if told["allow_simulated"] else "refused",
            "images": f"{told['images']}" + (f", {simulated} of them simulated" if simulated else ""),
            "waiting approvals": str(told["approvals_waiting"]),
            "recovery key": "set" if told["recovery_key"] else "not set",
        }
        return fields(pairs) + "".join(f"\nwarning: {line}" for line in told["warnings"])

    target.app.show(told, text)


@broker.command()
@click.option("--output", type=FILE, default="-", help="The file to write; standard output if not given.")
@reached
def card(target: Target, output: Path) -> None:
    """Print the broker's card: what hosts that build and launch for its owner are configured with."""
    told = target.call("GET", "card")
    write(output, json.dumps(told, indent=2, sort_keys=True) + "\n")


@broker.command(name="make-card")
@click.option("--certificate", type=EXISTING, required=True, help="The broker's TLS certificate, PEM.")
@click.option("--transfer-key", type=EXISTING, required=True, help="Public key, PEM, that image keys are sealed to.")
@common
@pass_app
def make_card(app: App, certificate: Path, transfer_key: Path) -> None:
    """Make a card for a broker of another kind, such as a Trustee KBS, whose owner opens handovers himself."""
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (ValueError, x509.InvalidVersion) as exc:
        raise InvalidArgument("--certificate", str(certificate), "it is a certificate in PEM") from exc
    spki = found.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    made = handover.BrokerCard(
        spki_sha256=hashlib.sha256(spki).digest(),
        transfer_key=handover.recipient_of_pem(transfer_key.read_bytes()),
    )
    plain = document.to_plain(made)
    app.show(plain, lambda: json.dumps(plain, indent=2, sort_keys=True))


@broker.command()
@reached
def metrics(target: Target) -> None:
    """Print the counters as Prometheus gets them."""
    told = target.call("GET", "metrics")
    target.app.show({"metrics": told}, lambda: told.rstrip())


# Images


@broker.group()
@common
def image() -> None:
    """The images whose keys the broker releases."""


@image.command(name="list")
@reached
def image_list(target: Target) -> None:
    """List the images, and the state of their keys."""
    told = target.call("GET", "images")
    rows = [
        (
            item["name"],
            platform({"Platform": item["platform"], "Simulated": item["simulated"]}),
            item["state"],
            " ".join(digest[:16] for digest in item["launch_digests"]),
            item["image_id"],
        )
        for item in told["images"]
    ]
    head = ("IMAGE", "PLATFORM", "KEY", "RELEASED TO", "ID")
    target.app.show(told, lambda: table(head, rows, legend=target.app.legend))


@image.command(name="show")
@click.argument("name")
@reached
def image_show(target: Target, name: str) -> None:
    """Show one image, its rules, further keys and volumes."""
    show_image(target, target.call("GET", "images", name))


@image.command(name="import")
@click.argument("file", type=click.File("rb"))
@click.option("--replaces", metavar="IMAGE", help="The image it was built again from: revoked, its policy taken over.")
@click.option("--yes", is_flag=True, help="Do not ask before a change of an image is taken over.")
@reached
def image_import(target: Target, file: Any, replaces: str | None, yes: bool) -> None:
    """Take over an image and its keys from the handover in FILE (`jindiskctl key export`); - is standard input.

    From then on the keys are released to guests with the launch digests in it: import what you know the origin of.
    FILE may hold changes of an image that is known, whose data volumes came or went on a host that relays: they are
    taken over in their order, those that were before are passed over, and the old launch digests count no more.
    """
    data = file.read(handover.LIMIT_BYTES + 1)
    query = {"replaces": replaces} if replaces else None
    parts, told, known = handover.parts(data), None, None
    for one in parts:
        if one.amends is not None:
            if replaces:
                raise InvalidArgument("--replaces", replaces, "the handover is of a change, which replaces no image")
            comes = f"add the key {one.amends.added}" if one.amends.added else f"forget the key {one.amends.removed}"
            digests = ", ".join(digest.hex() for digest in one.launch_digests)
            question = f"Release the keys of image {one.name} to launch digest {digests} alone, and {comes} for good?"
            target.app.confirm(question, f"changing what the keys of {one.name} are released to", yes=yes)
        try:
            told = target.call("POST", "images", body=document.dump(one), query=query)
        except RemoteError as exc:
            if exc.code not in KNOWN or len(parts) == 1:
                raise
            known = exc
    if told is None:
        assert known is not None, "there was one at least"
        raise known
    show_image(target, told)


@image.command(name="remove")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@reached
def image_remove(target: Target, name: str, yes: bool) -> None:
    """Forget an image and its keys for good: what is on its disks can never be read again."""
    target.app.confirm(f"Forget the keys of {name} for good?", f"forgetting the keys of {name}", yes=yes)
    target.call("DELETE", "images", name)
    target.app.show({}, lambda: f"The keys of {name} are gone.")


@image.command(name="policy")
@click.argument("name")
@click.option("--set", "file", type=click.File("rb"), help="Put the policy in this TOML file in force; - is stdin.")
@click.option(
    "--try", "tried", type=click.File("rb"), help="Try the policy in this file; the one in force with --row alone."
)
@click.option("--row", type=click.IntRange(1), help="Number of the refusal to try it on; the last of the image.")
@reached
def image_policy(target: Target, name: str, file: Any, tried: Any, row: int | None) -> None:
    """Show the policy of an image as TOML, replace it, or try one on a guest that was refused (status 7 if still)."""
    if tried is not None or row is not None:
        body: dict[str, Any] = {"row": row} if row is not None else {}
        if tried is not None:
            body["policy"] = tried.read().decode()
        found = target.call("POST", "images", name, "policy", "try", body=body)
        verdict = "would still be refused" if found["findings"] else "would get its key"
        text = "\n".join([f"The guest of audit row {found['row']} {verdict}.", *finding_lines(found["findings"])])
        target.app.show(found, lambda: text)
        if found["findings"]:
            raise click.exceptions.Exit(EXIT_REFUSED)
        return
    if file is not None:
        show_image(target, target.call("PUT", "images", name, "policy", body=file.read()))
        return
    told = target.call("GET", "images", name, "policy")
    target.app.show(told, lambda: told["policy"].rstrip())


@image.command(name="limits")
@click.argument("name")
@click.option("--per-hour", type=click.IntRange(0, 1_000_000), help="Releases of a key within an hour; 0 for no limit.")
@click.option("--per-guest", type=click.IntRange(0, 1_000_000), help="Releases to one launch of a guest; 0 for none.")
@click.option("--approval/--no-approval", default=None, help="Whether each guest waits for a person's approval.")
@reached
def image_limits(target: Target, name: str, per_hour: int | None, per_guest: int | None, approval: bool | None) -> None:
    """Show or change how often the keys of an image are released."""
    told = target.call("GET", "images", name)
    rules = dict(told["rules"])
    for setting, value in (("releases_per_hour", per_hour), ("releases_per_guest", per_guest)):
        if value is not None:
            rules[setting] = value or None
    if approval is not None:
        rules["approval"] = approval
    if rules != told["rules"]:
        told = target.call("PUT", "images", name, "rules", body=rules)
    show_image(target, told)


# Approvals


@broker.group()
@common
def approval() -> None:
    """The guests that wait until a person approves the release."""


@approval.command(name="list")
@reached
def approval_list(target: Target) -> None:
    """List them; waiting ends by itself."""
    told = target.call("GET", "approvals")
    rows = [
        (
            str(item["number"]),
            item["image_id"],
            item["guest"][:16],
            item["peer"],
            "simulated" if item["simulated"] else "hardware",
            "granted" if item["granted"] else "waiting",
            when(item["expires"]),
        )
        for item in told["approvals"]
    ]
    head = ("NUMBER", "IMAGE", "GUEST", "PEER", "EVIDENCE", "STATE", "UNTIL")
    target.app.show(told, lambda: table(head, rows, legend=target.app.legend))


def _decide(target: Target, number: int, verb: str, sentence: str) -> None:
    told = target.call("POST", "approvals", str(number), verb)
    target.app.show(told, lambda: sentence)


@approval.command()
@click.argument("number", type=click.IntRange(1))
@reached
def grant(target: Target, number: int) -> None:
    """Let this guest have its key, for a quarter of an hour."""
    _decide(target, number, "grant", "Approved: the guest gets its key when it asks again.")


@approval.command()
@click.argument("number", type=click.IntRange(1))
@reached
def deny(target: Target, number: int) -> None:
    """Take this guest off the list."""
    _decide(target, number, "deny", "Denied.")


# Audit


@broker.group()
@common
def audit() -> None:
    """The broker's log of decisions and changes."""


@audit.command(name="list")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Number of rows.")
@click.option("--image", help="Name or id of the image to look at.")
@reached
def audit_list(target: Target, limit: int, image: str | None) -> None:
    """List decisions and changes, newest last."""
    query = {"limit": str(limit), **({"image": image} if image else {})}
    told = target.call("GET", "audit", query=query)
    rows = [
        (
            str(item["number"]),
            item["time"][:19],
            item["kind"],
            item["image_id"],
            item["peer"],
            ("simulated" if item["simulated"] else "hardware") if item["measurement"] else "",
            " ".join(finding["id"] for finding in item["detail"].get("findings", [])),
        )
        for item in told["rows"]
    ]
    head = ("NUMBER", "WHEN (UTC)", "WHAT", "IMAGE", "WHO", "EVIDENCE", "FINDINGS")
    target.app.show(told, lambda: table(head, rows, legend=target.app.legend))


@audit.command(name="explain")
@click.option("--row", type=click.IntRange(1), help="Number of the refusal; the last if not given.")
@click.option("--image", help="Name or id of an image: its last refusal.")
@click.option("--evidence", type=FILE, help="Also write what the guest sent to this file, for attest verify.")
@reached
def audit_explain(target: Target, row: int | None, image: str | None, evidence: Path | None) -> None:
    """Say why a guest was refused: every reason with what to do, and what its evidence said."""
    query = {**({"row": str(row)} if row is not None else {}), **({"image": image} if image else {})}
    told = target.call("GET", "refusals", query=query)
    said = told["evidence"]
    if evidence is not None:
        if not said:
            raise NotFound("evidence", f"of audit row {told['row']}")
        replace_file(evidence, bytes.fromhex(said["raw"]), 0o600)
    pairs = {
        "audit row": str(told["row"]),
        "when": told["time"],
        "image": told["image_id"],
        "guest": told["peer"],
        "evidence": said.get("tee", "") + (", simulated: proves nothing" if told["simulated"] else ""),
        "launch digest": said.get("measurement") or said.get("mr_td") or "",
    }
    target.app.show(told, lambda: "\n".join([fields(pairs), *finding_lines(told["findings"])]))


@audit.command(name="verify")
@reached
def audit_verify(target: Target) -> None:
    """Check that no row of the log was changed, removed or inserted."""
    told = target.call("GET", "audit", "verify")
    text = f"The audit log is whole: {told['rows']} rows, the last is {told['head'] or 'none'}."
    target.app.show(told, lambda: text)


for _group in (key, volume, recovery, token):
    broker.add_command(_group)
