"""Making a LUKS2 header in memory: one AES-XTS segment, one PBKDF2 key slot, one digest.

`cryptsetup luksFormat` wants the kernel's crypto interface or device mapper; an image is built on machines and as users
that have neither. The result is what cryptsetup makes of the same choices, and every choice is fixed, so that the guest
can demand it.

The key slot costs next to nothing to try (1000 rounds of PBKDF2): cost protects passphrases that people choose. Ours
is 32 bytes from the key store; guessing 256 bits is out of reach at any cost, while a costly slot would only make each
boot slower. Argon2 would also bring a memory parameter that a hostile header could raise without bound.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument
from jindiskd.luks2 import antiforensic, layout, xts

Rng = Callable[[int], bytes]
"""`rng(n)` gives n random bytes."""
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def metadata(*, slot_salt: bytes, digest_salt: bytes, digest: bytes, data_bytes: int) -> dict[str, Any]:
    """The JSON area of a header of ours as plain values. All else than the arguments is the same in each header.

    Source: "LUKS2 On-Disk Format Specification", section 3; 64-bit sizes are decimal strings there.
    """
    return {
        "keyslots": {
            "0": {
                "type": "luks2",
                "key_size": layout.KEY_BYTES,
                "af": {"type": "luks1", "stripes": layout.STRIPES, "hash": layout.HASH},
                "area": {
                    "type": "raw",
                    "offset": str(layout.KEYSLOTS_OFFSET_BYTES),
                    "size": str(layout.SLOT_AREA_BYTES),
                    "encryption": layout.CIPHER,
                    "key_size": layout.KEY_BYTES,
                },
                "kdf": {
                    "type": "pbkdf2",
                    "hash": layout.HASH,
                    "iterations": layout.ITERATIONS,
                    "salt": base64.b64encode(slot_salt).decode(),
                },
            }
        },
        "tokens": {},
        "segments": {
            "0": {
                "type": "crypt",
                "offset": str(layout.DATA_OFFSET_BYTES),
                "size": str(data_bytes),
                "iv_tweak": "0",
                "encryption": layout.CIPHER,
                "sector_size": layout.SECTOR_BYTES,
            }
        },
        "digests": {
            "0": {
                "type": "pbkdf2",
                "keyslots": ["0"],
                "segments": ["0"],
                "hash": layout.HASH,
                "iterations": layout.ITERATIONS,
                "salt": base64.b64encode(digest_salt).decode(),
                "digest": base64.b64encode(digest).decode(),
            }
        },
        "config": {"json_size": str(layout.JSON_BYTES), "keyslots_size": str(layout.KEYSLOTS_BYTES)},
    }


def encode(values: dict[str, Any]) -> bytes:
    """The JSON area as stored: one form only, padded with zeros to `layout.JSON_BYTES`."""
    return json.dumps(values, separators=(",", ":"), sort_keys=True).encode().ljust(layout.JSON_BYTES, b"\0")


def slot_key(passphrase: Secret, salt: bytes) -> bytes:
    """The key that the key slot's area is encrypted with, 64 bytes."""
    return hashlib.pbkdf2_hmac(layout.HASH, passphrase.reveal(), salt, layout.ITERATIONS, layout.KEY_BYTES)


def key_digest(volume_key: bytes | bytearray, salt: bytes) -> bytes:
    """What a header stores to recognise its volume key, 32 bytes."""
    return hashlib.pbkdf2_hmac(layout.HASH, volume_key, salt, layout.ITERATIONS, layout.DIGEST_BYTES)


def make_header(*, volume_key: Secret, passphrase: Secret, uuid: str, data_bytes: int, rng: Rng) -> bytes:
    """A complete header of `layout.DATA_OFFSET_BYTES` bytes; the data follows it directly.

    Args:
        volume_key: 64 random bytes.
        passphrase: what opens the key slot: 32 random bytes from the key store, never something a person chose.
        uuid: of the volume, lower case.
        data_bytes: length of the data, a multiple of 4096.
        rng: `rng(n)` gives n random bytes; with the same answers the header has the same bytes.

    Raises:
        InvalidArgument: a length is wrong or the UUID is not one.
    """
    if len(volume_key) != layout.KEY_BYTES:
        raise InvalidArgument("volume key length", len(volume_key), f"it has {layout.KEY_BYTES} bytes")
    if len(passphrase) < 32:
        raise InvalidArgument("key length", len(passphrase), "32 random bytes are needed, the key slot has no cost")
    if not UUID.fullmatch(uuid):
        raise InvalidArgument("volume UUID", uuid, "it is 8-4-4-4-12 hexadecimal digits in lower case")
    if data_bytes <= 0 or data_bytes % layout.SECTOR_BYTES:
        raise InvalidArgument("data length", data_bytes, f"it is a positive multiple of {layout.SECTOR_BYTES}")
    slot_salt, digest_salt = rng(layout.SALT_BYTES), rng(layout.SALT_BYTES)
    area = encode(
        metadata(
            slot_salt=slot_salt,
            digest_salt=digest_salt,
            digest=key_digest(volume_key.reveal(), digest_salt),
            data_bytes=data_bytes,
        )
    )
    copies = b"".join(
        layout.BinaryHeader(primary=primary, uuid=uuid, salt=rng(64)).pack(area) for primary in (True, False)
    )
    material = antiforensic.split(volume_key.reveal(), layout.STRIPES, rng)
    slot = xts.encrypt(
        slot_key(passphrase, slot_salt),
        material.ljust(layout.SLOT_AREA_BYTES, b"\0"),
        sector_bytes=layout.AREA_SECTOR_BYTES,
        first_tweak=0,
        step=1,
    )
    return (copies + slot).ljust(layout.DATA_OFFSET_BYTES, b"\0")
