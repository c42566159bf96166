"""`jindiskctl image measure`: what an image, or files, will measure as; and an owner's signature on that."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from jindiskd.base.files import replace_file
from jindiskd.bus.lib import Variant
from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import connected
from jindiskd.cli.completion import images
from jindiskd.cli.image import IMAGE, IMAGES
from jindiskd.cli.jobs import result, start_and_follow
from jindiskd.cli.output import clean, fields
from jindiskd.cli.parameters import Number
from jindiskd.cli.sign import check_options, make, signature_options

SNP_DEFAULT = 0x30000
"""As `attest.guest_policy`, whose imports are heavy."""
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
SHOWN = {
    "firmware": "firmware",
    "firmware_sha256": "  sha-256",
    "firmware_build": "  build",
    "kernel_sha256": "kernel sha-256",
    "initrd_sha256": "initrd sha-256",
    "cmdline": "command line",
    "vcpus": "processors",
    "cpu_model": "processor model",
    "cpu_signature": "  signature",
}


@click.command()
@click.argument("name", required=False, shell_complete=images)
@click.option("--firmware", type=FILE, help="Of files: the firmware.")
@click.option("--kernel", type=FILE, help="Of files: the kernel.")
@click.option("--initrd", type=FILE, help="Of files: the initrd.")
@click.option("--cmdline", default="", help="Of files: the kernel command line.")
@click.option("--vcpus", type=click.IntRange(1), default=1, show_default=True, help="Of files: processors.")
@click.option("--cpu-model", default="EPYC-Milan", show_default=True, help="Of files: QEMU's processor model.")
@click.option("--guest-features", type=Number(), default=1, show_default=True, help="Of files: SEV_FEATURES.")
@click.option("--init-data", type=FILE, help="Init-data that the launch is to bind: prints HOST_DATA and MRCONFIGID.")
@signature_options
@click.option("--guest-policy", type=Number(), help="ID block: the guest's policy; that of the image, or 0x30000.")
@click.option(
    "--output", type=click.Path(file_okay=False, exists=True, path_type=Path), help="Folder for id-block and id-auth."
)
@common
@pass_app
def measure(app: App, /, name: str | None, **given: Any) -> None:
    """
    Compute what the image NAME will measure as on each platform, with all that enters it; or files, by themselves.

    An image's digest is compared with the one that its key is released to. What cannot be computed before a launch is
    said to be so.
    """
    files = (given["firmware"], given["kernel"], given["initrd"])
    if (name is None) == all(file is None for file in files):
        raise click.UsageError("name an image, or give --firmware, --kernel and --initrd")
    if name is None and None in files:
        raise click.UsageError("files are --firmware, --kernel and --initrd, all three")
    check_options(given)
    if given["output"] and not given["id_key"]:
        raise click.UsageError("--output is for what --id-key signs")
    found = run(_of_image(app, name)) if name is not None else _of_files(given)
    if given["init_data"] is not None:
        from jindiskd.attest.expected import bound_init_data

        found["init_data"] = bound_init_data(given["init_data"].read_text(encoding="utf-8"))
    if given["id_key"] is not None:
        found["id_block"] = _signed(found, given)
    app.show(found, lambda: _text(found))


async def _of_image(app: App, name: str) -> dict[str, Any]:
    async with connected() as client:
        path, _ = await IMAGES.find(client, name)

        async def start() -> str:
            job: str = await client.call(path, IMAGE, "Measure", {"all": Variant("b", True)})
            return job

        job = await start_and_follow(client, app, start, wait=True)
        assert job is not None
        return {"image": name, **json.loads(await result(client, job))}


def _of_files(given: Mapping[str, Any]) -> dict[str, Any]:
    # Needs libraries that hardly any other command does.
    from jindiskd.attest.expected import expected
    from jindiskd.attest.measure import LaunchInputs

    return expected(
        LaunchInputs(
            firmware=given["firmware"],
            kernel=given["kernel"],
            initrd=given["initrd"],
            cmdline=given["cmdline"],
            vcpus=given["vcpus"],
            cpu_model=given["cpu_model"],
            guest_features=given["guest_features"],
        )
    )


def _signed(found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    digest = found["measurements"]["snp"].get("digest")
    if digest is None:
        raise click.UsageError(f"there is no SEV-SNP digest to sign: {found['measurements']['snp']['problem']}")
    policy = given["guest_policy"]
    if policy is None:
        policy = found["guest_policy"]["value"] if "guest_policy" in found else SNP_DEFAULT
    signed = make(bytes.fromhex(digest), policy, given)
    if given["output"] is not None:
        replace_file(given["output"] / "id-block", signed.block)
        replace_file(given["output"] / "id-auth", signed.auth)
    return {
        "id_block": base64.b64encode(signed.block).decode(),
        "id_auth": base64.b64encode(signed.auth).decode(),
        "id_key_digest": signed.id_key_digest.hex(),
        "author_key_digest": signed.author_key_digest.hex(),
    }


def _text(found: Mapping[str, Any]) -> str:
    inputs = found["inputs"]
    pairs = {label: clean(str(inputs[name])) for name, label in SHOWN.items() if inputs[name] is not None}
    enforces = {True: "checked by the firmware", False: "NOT checked by the firmware", None: "not known to be checked"}
    pairs["kernel hashes"] = enforces[inputs["enforces_kernel_hashes"]]
    pairs["guest features"] = f"0x{inputs['guest_features']:x}"
    notes = []
    for platform, told in found["measurements"].items():
        pairs[platform] = told.get("digest") or f"none: {told['problem']}"
        if told.get("note"):
            notes.append(f"{platform}: {told['note']}")
    for name in ("host_data", "mr_config_id"):
        if "init_data" in found:
            pairs[name.upper().replace("_", " ")] = found["init_data"][name]
    if "guest_policy" in found:
        policy = found["guest_policy"]
        pairs["guest policy"] = f"0x{policy['value']:x}" + (f" ({policy['words']})" if policy["words"] else "")
    if "signed" in found:
        pairs["signed by ID key"] = found["signed"]["id_key_digest"]
        if any(bytes.fromhex(found["signed"]["author_key_digest"])):
            pairs["  by author key"] = found["signed"]["author_key_digest"]
        pairs["  version"] = str(found["signed"]["guest_svn"])
    if "id_block" in found:
        pairs["ID key digest"] = found["id_block"]["id_key_digest"]
        if any(bytes.fromhex(found["id_block"]["author_key_digest"])):
            pairs["author key digest"] = found["id_block"]["author_key_digest"]
        pairs["id block"] = found["id_block"]["id_block"]
    return "\n".join([fields(pairs), *(f"note: {note}" for note in notes)])
