"""An owner's ID block on an image: taken where it is a statement about this image, and carried into its launches.

The keys that sign never come here: whoever has them signs what the image measures as (`attest.id_block`).
"""

from __future__ import annotations

from dataclasses import replace

from jindiskd.attest import guest_policy, id_block
from jindiskd.attest.id_block import IdBlock, SignedIdBlock
from jindiskd.attest.model import MalformedEvidence
from jindiskd.base.platform import Tee
from jindiskd.errors import InvalidArgument, NotSupported
from jindiskd.image.manifest import Manifest


def policy_of(manifest: Manifest) -> int:
    """The guest policy that an image's launches have."""
    chosen = manifest.shape.guest_policy
    return guest_policy.default(manifest.platform.tee) if chosen is None else chosen


def signature_of(manifest: Manifest) -> tuple[IdBlock, SignedIdBlock] | None:
    """The ID block of an image, and what it was signed with; None where it has none.

    Raises:
        MalformedEvidence: it is none that the firmware would take.
    """
    if not manifest.id_block and not manifest.id_auth:
        return None
    return IdBlock.decode(manifest.id_block), id_block.check(manifest.id_block, manifest.id_auth)


def problem(manifest: Manifest) -> str:
    """Why the firmware would refuse a launch with the ID block of this manifest; empty where it would not."""
    try:
        found = signature_of(manifest)
    except MalformedEvidence as exc:
        return str(exc)
    if found is None:
        return ""
    block, policy = found[0], policy_of(manifest)
    if manifest.platform.tee is not Tee.SNP:
        return f"platform {manifest.platform} has no ID blocks"
    if block.launch_digest != manifest.launch_digest:
        return f"it is for the launch digest {block.launch_digest.hex()}, the image has {manifest.launch_digest.hex()}"
    if block.policy != policy:
        return f"it is for the guest policy {block.policy:#x}, the image has {policy:#x}"
    return ""


def signed(manifest: Manifest, block: bytes, auth: bytes) -> Manifest:
    """The manifest with an ID block, or without one where both are empty.

    Raises:
        NotSupported: the image is not for SEV-SNP. InvalidArgument: the block is not one of this image.
    """
    if manifest.platform.tee is not Tee.SNP:
        raise NotSupported(f"an ID block for platform {manifest.platform}", "SEV-SNP alone has them")
    made = replace(manifest, id_block=block, id_auth=auth)
    if wrong := problem(made):
        remedy = f"{wrong}: sign what 'jindiskctl image measure {manifest.name}' prints now"
        raise InvalidArgument("ID block", block.hex()[:32], remedy)
    return made
