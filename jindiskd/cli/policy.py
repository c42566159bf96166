"""`jindiskctl policy`: what guests must prove to get an image's key, as documents that people read and write."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from jindiskd.base.platform import Platform
from jindiskd.bus.lib import Variant
from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.attest import (
    EvidenceNotAccepted,
    ManyFiles,
    evidence_options,
    expectations,
    finding_lines,
    judge_files,
    show_verdict,
)
from jindiskd.cli.client import connected
from jindiskd.cli.completion import images
from jindiskd.cli.image import IMAGES
from jindiskd.cli.objects import Kind
from jindiskd.errors import EXIT_UNCHANGED
from jindiskd.policy import form

POLICY = "org.jindisk1.Policy"
POLICIES = Kind(interface=POLICY, getter="GetPolicy")
DOCUMENT = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)


@click.group()
@common
def policy() -> None:
    """Look at, set and try what guests must prove to get a key."""


def _read(path: Path) -> str:
    """The text of a policy that was found right, `-` for standard input.

    Raises:
        BadPolicy: with every fault, each with the file's name.
    """
    if str(path) == "-":
        data, where = sys.stdin.buffer.read(form.LIMIT_BYTES + 1), "standard input"
    else:
        with path.open("rb") as stream:
            data, where = stream.read(form.LIMIT_BYTES + 1), str(path)
    form.read(data, where)
    return data.decode()


@policy.command()
@click.argument("image", shell_complete=images)
@click.option("--set-only", is_flag=True, help="Leave out what has its default, and all explanations.")
@common
@pass_app
def show(app: App, image: str, set_only: bool) -> None:
    """Print the policy of IMAGE as a TOML document, every setting with its reason; `policy set` takes it back."""
    run(_show(app, image, set_only))


async def _show(app: App, image: str, set_only: bool) -> None:
    async with connected() as client:
        path, found = await POLICIES.find(client, image)
        options = {"set-only": Variant("b", True)} if set_only else {}
        text = await client.call(path, POLICY, "Get", options)
    document = {"image": found["Name"], "policy": form.plain(form.read(text))}
    app.show(document, lambda: str(text).rstrip("\n"))


@policy.command(name="set")
@click.argument("image", shell_complete=images)
@click.argument("file", type=DOCUMENT)
@common
@pass_app
def set_(app: App, image: str, file: Path) -> int:
    """Replace the policy of IMAGE by the document in FILE (`-`: standard input). What it does not set is default."""
    return run(_set(app, image, _read(file)))


async def _set(app: App, image: str, text: str) -> int:
    async with connected() as client:
        path, found = await POLICIES.find(client, image)
        before = form.plain(form.read(await client.call(path, POLICY, "Get", {})))
        changed = await client.call(path, POLICY, "Set", text, {})
    differences = list(_differences(before, form.plain(form.read(text)))) if changed else []

    def told() -> str:
        if not changed:
            return f"The policy of image {found['Name']} is that already."
        return "\n".join([f"The policy of image {found['Name']} is changed:", *(f"  {line}" for line in differences)])

    app.show({"image": found["Name"], "changed": changed, "differences": differences}, told)
    return 0 if changed else EXIT_UNCHANGED


def _differences(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"[{section}] {name}: {before[section][name]} → {value}"
        for section, known in after.items()
        for name, value in known.items()
        if before[section][name] != value
    ]


@policy.command()
@click.argument("image", shell_complete=images)
@common
@pass_app
def edit(app: App, image: str) -> int:
    """Change the policy of IMAGE in your editor ($VISUAL, $EDITOR)."""
    return run(_edit(app, image))


async def _edit(app: App, image: str) -> int:
    async with connected() as client:
        path, _ = await POLICIES.find(client, image)
        text = before = await client.call(path, POLICY, "Get", {})
    while True:
        edited = click.edit(text, extension=".toml")
        if edited is None or edited == before:
            app.show({"image": image, "changed": False, "differences": []}, lambda: "Nothing was changed.")
            return EXIT_UNCHANGED
        try:
            form.read(edited, "the policy")
        except form.BadPolicy as exc:
            app.say(str(exc))
            if not sys.stdin.isatty() or not click.confirm("Edit it again?", default=True, err=True):
                raise
            text = edited
        else:
            return await _set(app, image, edited)


@policy.command(cls=ManyFiles)
@click.argument("file", type=DOCUMENT, required=False)
@click.option("--image", shell_complete=images, help="Try it on a guest of this image; its own policy without FILE.")
@click.option("--row", type=click.IntRange(1), help="The guest of this refusal in the audit log; the last otherwise.")
@evidence_options
@common
@pass_app
def check(app: App, /, file: Path | None, image: str | None, row: int | None, **given: Any) -> None:
    """
    Check the policy in FILE, and try it: exit status 2 if it is none, 7 if it would have refused.

    With --image it is tried on the evidence of the last guest of that image that was refused, or with --evidence on
    evidence in files. Nothing is released and nothing is changed.
    """
    text = _read(file) if file is not None else None
    if image is not None:
        run(_check(app, image, text, row, given))
    elif text is None or row is not None or given["evidence"] is not None:
        raise click.UsageError("give a FILE to check, or --image with the image to try it on")
    else:
        document = {"policy": form.plain(form.read(text))}
        app.show(document, lambda: f"{file} is a policy.")


async def _check(app: App, image: str, text: str | None, row: int | None, given: dict[str, Any]) -> None:
    async with connected() as client:
        path, found = await POLICIES.find(client, image)
        if given["evidence"] is not None:
            used = text if text is not None else await client.call(path, POLICY, "Get", {})
            _, built = await IMAGES.find(client, found["ImageId"])
        else:
            options = {"policy": Variant("s", text)} if text is not None else {}
            options |= {"row": Variant("t", row)} if row is not None else {}
            number, findings = await client.call(path, POLICY, "Check", options)
    if given["evidence"] is not None:
        tee = Platform(built["Platform"]).tee
        digests = (bytes.fromhex(built["LaunchDigest"]),) if built["LaunchDigest"] else ()
        simulated = given["simulated_root"] is not None and built["Simulated"]
        wanted = expectations(tee, form.read(used), digests, simulated=simulated)
        show_verdict(app, judge_files(tee, given["evidence"], {**given, "policy_": True}, wanted))
        return
    word = "refuse" if findings else "release the key"

    def told() -> str:
        return "\n".join([f"On the evidence of audit row {number} it would {word}.", *finding_lines(findings)])

    app.show({"image": found["Name"], "row": number, "released": not findings, "findings": findings}, told)
    if findings:
        raise EvidenceNotAccepted(len(findings))
