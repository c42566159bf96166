"""`jindiskctl image sign`: an owner's ID block on an image for SEV-SNP. The keys that sign stay in this process."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import Client, connected
from jindiskd.cli.completion import images
from jindiskd.cli.image import IMAGE, IMAGES
from jindiskd.cli.parameters import Hex, Number
from jindiskd.errors import NotSupported

if TYPE_CHECKING:
    from jindiskd.attest.id_block import SignedIdBlock

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
BLOCK_LIMIT = 1 << 16
OPTIONS = (
    click.option("--id-key", type=FILE, help="Sign the SEV-SNP digest as an ID block with this P-384 key (PEM)."),
    click.option("--author-key", type=FILE, help="Sign the ID key with this P-384 key (PEM)."),
    click.option("--guest-svn", type=Number(), default=0, help="ID block: the image's security version."),
    click.option("--family-id", type=Hex(16), default=bytes(16).hex(), help="ID block: 16 bytes of your choice."),
    click.option("--image-id", type=Hex(16), default=bytes(16).hex(), help="ID block: 16 bytes of your choice."),
)


def signature_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say by whom and as what an image is signed."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def check_options(given: Mapping[str, Any]) -> None:
    """Refuse options that mean nothing without another."""
    if given["author_key"] and not given["id_key"]:
        raise click.UsageError("--author-key signs an --id-key")


def make(digest: bytes, policy: int, given: Mapping[str, Any]) -> SignedIdBlock:
    """The block of a launch digest and a guest policy, signed as the options say."""
    from jindiskd.attest.id_block import IdBlock, load_key, sign  # needs what hardly any other command does

    block = IdBlock(
        launch_digest=digest,
        family_id=given["family_id"],
        image_id=given["image_id"],
        guest_svn=given["guest_svn"],
        policy=policy,
    )
    author = load_key(given["author_key"]) if given["author_key"] else None
    return sign(block, load_key(given["id_key"]), author)


async def put(client: Client, path: str, block: bytes, auth: bytes) -> dict[str, Any]:
    """Give the image at a path this block; its properties afterwards."""
    words = (base64.b64encode(block).decode(), base64.b64encode(auth).decode())
    await client.call(path, IMAGE, "SetIdBlock", *words, {})
    return await client.properties(path, IMAGE)


async def sign_image(client: Client, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Sign what the image measures as; its properties afterwards."""
    path, found = await IMAGES.find(client, name)
    if found["Platform"] not in {"snp", "simulated-snp"}:
        raise NotSupported(f"an ID block for platform {found['Platform']}", "SEV-SNP alone has them")
    signed = make(bytes.fromhex(found["LaunchDigest"]), found["GuestPolicy"], given)
    return await put(client, path, signed.block, signed.auth)


@click.command(name="sign")
@click.argument("name", shell_complete=images)
@signature_options
@click.option("--id-block", type=click.File("rb"), help="Instead of keys: the block that somebody signed elsewhere.")
@click.option("--id-auth", type=click.File("rb"), help="What authenticates it; as image measure --output wrote both.")
@click.option("--remove", "removed", is_flag=True, help="Take the signature away.")
@common
@pass_app
def sign_(app: App, /, name: str, id_block: Any, id_auth: Any, removed: bool, **given: Any) -> None:
    """Sign the image NAME, for SEV-SNP: the firmware then starts nothing else, and its reports name the key.

    A policy can then name the key and a least security version instead of each digest ([snp] id_key_digests,
    author_key_digests, minimum_guest_svn). The keys do not leave this program. An image that is updated or cloned
    measures otherwise, and has to be signed again.
    """
    check_options(given)
    files = (id_block is not None) + (id_auth is not None)
    if files == 1 or sum((bool(given["id_key"]), files == 2, removed)) != 1:
        raise click.UsageError("give --id-key, or --id-block with --id-auth, or --remove")
    block, auth = (id_block.read(BLOCK_LIMIT), id_auth.read(BLOCK_LIMIT)) if files else (b"", b"")
    run(_sign(app, name, block, auth, given))


async def _sign(app: App, name: str, block: bytes, auth: bytes, given: dict[str, Any]) -> None:
    async with connected() as client:
        if given["id_key"]:
            found = await sign_image(client, name, given)
        else:
            path, _ = await IMAGES.find(client, name)
            found = await put(client, path, block, auth)
    app.show({"image": found}, lambda: signature_text(found))


def signature_text(found: Mapping[str, Any]) -> str:
    """Who signed an image, in a sentence."""
    if not found["IdKeyDigest"]:
        return f"Image {found['Name']} is not signed."
    author = f", vouched for by {found['AuthorKeyDigest']}" if any(bytes.fromhex(found["AuthorKeyDigest"])) else ""
    return f"Image {found['Name']} is signed by ID key {found['IdKeyDigest']}{author}; version {found['GuestSvn']}."
