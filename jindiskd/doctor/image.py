"""An image: are its files what was built, and does it leave anything open to the host?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jindiskd.attest.firmware import inspect_firmware
from jindiskd.base.platform import Tee
from jindiskd.doctor.check import Check, note, ok, problem
from jindiskd.errors import JindiskError
from jindiskd.image.cmdline import MAX_BYTES, missing_words, unsafe_words
from jindiskd.image.store import StoredImage, verify
from jindiskd.luks2.layout import CIPHER


def examine(image: StoredImage, *, broker_spki_sha256: bytes, key_problem: str) -> Iterator[Check]:
    """Everything about one image; reads its boot files.

    Args:
        image: from the store.
        broker_spki_sha256: the key by which guests know the broker that is configured now.
        key_problem: why its key would not be released, as the end of a sentence; empty if it would be.
    """
    manifest = image.manifest
    try:
        verify(image)
        yield ok("image.files", "kernel, initrd and command line are what was built")
    except (JindiskError, OSError) as exc:
        yield problem("image.files", str(exc), "put the file back, or build the image again")
    yield from _firmware(image)
    try:
        with (image.path / manifest.cmdline.file).open(encoding="ascii", errors="replace") as stream:
            line = stream.read(MAX_BYTES + 1)
        words, lacking = unsafe_words(line), missing_words(line)
    except OSError:
        words, lacking = [], []  # told above
    if words:
        yield problem(
            "image.cmdline",
            f"the command line has {' '.join(map(repr, words))}, which opens the guest to its host",
            "build the image again without these words; such an image is for looking inside only",
        )
    elif lacking:
        yield problem(
            "image.cmdline",
            f"the command line lacks {' '.join(map(repr, lacking))}, which closes the guest to its host",
            "build the image again: it is of an earlier release",
        )
    else:
        yield ok("image.cmdline", "the command line opens nothing to the host")
    if key_problem:
        yield problem("image.key", f"its key {key_problem}", "see 'jindiskctl key list'")
    else:
        yield ok("image.key", "its key would be released to a guest that attests")
    if manifest.broker_spki_sha256 == broker_spki_sha256:
        yield ok("image.broker", "it pins the broker that is configured")
    else:
        yield problem(
            "image.broker",
            "it pins another broker than the one that is configured: its guest will speak to nobody here",
            "put that broker's key back (broker.pem), or build the image again",
        )
    if manifest.seeded:
        yield problem("image.seed", "it was built with a seed: whoever knows that knows its key", "build it without")
    if manifest.platform.simulated:
        yield note("image.platform", "its platform is simulated: what it proves is proven to nobody")
    yield from _volume("its root", manifest.volume.format, manifest.volume.cipher)
    for volume in manifest.volumes:
        yield from _volume(f"its volume {volume.name}", volume.volume.format, volume.volume.cipher)
    for change in manifest.changes:
        yield note("image.change", f"the builder changed inside: {change}")


def _firmware(image: StoredImage) -> Iterator[Check]:
    shape, platform = image.manifest.shape, image.manifest.platform
    try:
        found = inspect_firmware(Path(shape.firmware))
    except (JindiskError, OSError) as exc:
        yield problem("image.firmware", str(exc), "install it again: it is part of the launch digest")
        return
    if found.sha256 != shape.firmware_sha256:
        yield problem(
            "image.firmware",
            f"{shape.firmware} is another build than the one this image was measured with",
            "put that build back, or build the image again",
        )
    elif platform.tee is not Tee.TDX and not found.enforces_kernel_hashes:
        what = f"{shape.firmware} is not known to check kernel hashes"
        if platform.simulated:
            yield note("image.firmware", f"{what}; by emulation nothing would check them anyway")
        else:
            yield problem("image.firmware", what, "build the image with an OVMF for AMD SEV")
    else:
        yield ok("image.firmware", f"{shape.firmware} is the build this image was measured with")


def _volume(what: str, kind: str, cipher: str) -> Iterator[Check]:
    if kind == "luks2" and cipher == CIPHER:
        yield note(
            "image.volume",
            f"{what} is LUKS2 with {cipher}: an altered or older disk is not noticed",
            "build with the format jindisk, which notices both",
        )
    elif kind == "jindisk1":
        yield problem(
            "image.volume",
            f"{what} is JinDisk 1, which protects nothing against whoever holds the disk",
            "build with the format jindisk",
        )
    else:
        yield ok("image.volume", f"{what} is {kind}")
