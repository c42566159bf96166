"""Keys at rest: wrapped by a key-encryption key, bound to what they are for.

A wrapped key is the marker `JDW1`, a nonce of 12 bytes, then AES-256-GCM ciphertext and tag; the additional data are
the marker, the purpose and the name of the owner, so that one row's key does not open in another row's place.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from jindiskd.base.files import replace_file
from jindiskd.base.secret import Secret
from jindiskd.errors import EXIT_INTEGRITY, JindiskError

MARKER = b"JDW1"
KEK_BYTES = 32
CREDENTIAL = "jindisk.kek"


class KeyUnreadable(JindiskError, code="KeyUnreadable", exit_code=EXIT_INTEGRITY):
    """A stored key does not open."""

    def __init__(self, owner: str) -> None:
        """`owner` is the image id."""
        super().__init__(
            f"the stored key of {owner} does not open with this key-encryption key: restore the one it was stored with"
        )


class KekUnusable(JindiskError, code="KekUnusable", exit_code=EXIT_INTEGRITY):
    """The key-encryption key is not what it should be."""

    def __init__(self, where: str) -> None:
        """`where` it came from."""
        super().__init__(f"the key-encryption key in {where} is not {KEK_BYTES} bytes long: restore it from its backup")


class KekMissing(JindiskError, code="KekMissing", exit_code=EXIT_INTEGRITY):
    """There are keys, but not the key that opens them."""

    def __init__(self, where: str) -> None:
        """`where` it was looked for."""
        super().__init__(f"the key-encryption key is not in {where}, but keys are stored: restore it from its backup")


def load_kek(file: Path, credentials: Path | None, *, create: bool = True) -> Secret:
    """The key-encryption key: the systemd credential `jindisk.kek` if there is one, else `file`, made if absent.

    Args:
        file: 32 raw bytes, mode 0600; drawn on first use.
        credentials: the unit's credentials directory.
        create: whether it may be drawn now; not where keys are stored already, which it would not open.

    Raises:
        KekUnusable: it is there and has another length.
        KekMissing: it is not there and may not be drawn.
    """
    for path in ([credentials / CREDENTIAL] if credentials else []) + [file]:
        try:
            data = bytearray(path.read_bytes())
        except FileNotFoundError:
            continue
        if len(data) != KEK_BYTES:
            raise KekUnusable(str(path))
        return Secret(data)
    if not create:
        raise KekMissing(str(file))
    kek = Secret.random(KEK_BYTES)
    replace_file(file, kek.reveal(), 0o600)
    return kek


def _additional(purpose: str, owner: str) -> bytes:
    parts = [MARKER, purpose.encode(), owner.encode()]
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def wrap(kek: Secret, key: Secret, *, purpose: str, owner: str) -> bytes:
    """A key for storage."""
    nonce = os.urandom(12)
    sealed = AESGCM(bytes(kek.reveal())).encrypt(nonce, bytes(key.reveal()), _additional(purpose, owner))
    return MARKER + nonce + sealed


def unwrap(kek: Secret, wrapped: bytes, *, purpose: str, owner: str) -> Secret:
    """A stored key.

    Raises:
        KeyUnreadable: another key-encryption key, another owner or purpose, or damage.
    """
    if wrapped[:4] != MARKER:
        raise KeyUnreadable(owner)
    try:
        opened = AESGCM(bytes(kek.reveal())).decrypt(wrapped[4:16], wrapped[16:], _additional(purpose, owner))
    except InvalidTag as exc:
        raise KeyUnreadable(owner) from exc
    return Secret(bytearray(opened))
