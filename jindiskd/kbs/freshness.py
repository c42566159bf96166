"""Freshness of JinDisk volumes: what the broker remembers of each, and the messages about it.

Format document, section 13. An *anchor* is the last state the broker was told; a *session* is one run of an engine that
writes. A session identifier is a secret of broker and guest: whoever knows it speaks for that session.

Integers in bytes are little-endian. In JSON the session and the root are lower-case hexadecimal, the volume is the text
form of its UUID.
"""

from __future__ import annotations

import json
import re
import struct
import uuid
from dataclasses import dataclass, field

from jindiskd.base.anchor import ANCHOR_BYTES, Anchor
from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument
from jindiskd.kbs.messages import MalformedMessage, check_resource, read_object

SESSION_BYTES = ROOT_BYTES = 32
VERBS = ("release", "adopt", "report", "close", "stale")
_GRANT = struct.Struct("<4sIB73s32s")
_MAGIC = b"JDR1"
_HEX = re.compile(r"[0-9a-f]{64}")
MAX_SEQUENCE = (1 << 64) - 1
MAX_KEY_BYTES = 1 << 10


@dataclass(slots=True, kw_only=True)
class VolumeGrant:
    """The answer to a release: what a guest needs to open its volume for writing."""

    key: Secret
    anchor: Anchor | None
    """None where the owner has accepted, once, whatever authentic state is found."""
    session: bytes = field(repr=False)
    """32 bytes: of the new session, to be adopted."""
    lease_s: int
    """The process fences itself when its last answered message is older; 0 for no lease."""

    def pack(self) -> bytearray:
        """As sent: `JDR1`, u32 lease, u8 anchored, anchor or zeros (73), session (32), then the key."""
        anchor = self.anchor.pack() if self.anchor else bytes(ANCHOR_BYTES)
        head = _GRANT.pack(_MAGIC, self.lease_s, self.anchor is not None, anchor, self.session)
        return bytearray(head) + self.key.reveal()

    @classmethod
    def unpack(cls, sealed: Secret) -> VolumeGrant:
        """Read what `pack` wrote, and wipe it.

        Raises:
            MalformedMessage: it is not that.
        """
        with sealed:
            data = sealed.reveal()
            if not _GRANT.size < len(data) <= _GRANT.size + MAX_KEY_BYTES:
                raise MalformedMessage("the volume's release", "of another length")
            magic, lease, anchored, anchor, session = _GRANT.unpack_from(data)
            if magic != _MAGIC or anchored > 1:
                raise MalformedMessage("the volume's release", "of another form")
            try:
                known = Anchor.unpack(anchor) if anchored else None
            except InvalidArgument as exc:
                raise MalformedMessage("the volume's release", "without a sound anchor") from exc
            # Sliced as bytearray, which the secret takes over and wipes.
            key = Secret(data[_GRANT.size :])
        return cls(key=key, anchor=known, session=session, lease_s=lease)

    def close(self) -> None:
        """Wipe the key."""
        self.key.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeState:
    """`adopt`, `report`, `close`, `stale`: a session tells a state of its volume."""

    volume: str
    session: bytes = field(repr=False)
    sequence: int
    root: bytes

    def dump(self) -> bytes:
        """The body of the message."""
        return json.dumps(
            {
                "volume": self.volume,
                "session": self.session.hex(),
                "sequence": self.sequence,
                "root": self.root.hex(),
            }
        ).encode()


def check_volume(volume: str) -> str:
    """The text form of a volume's UUID, unchanged.

    Raises:
        InvalidArgument: it is another text.
    """
    try:
        if str(uuid.UUID(volume)) == volume:
            return volume
    except ValueError:
        pass
    raise InvalidArgument("the volume", volume, "it is a UUID in its usual form, in lower case")


def dump_release(resource: str, volume: str) -> bytes:
    """The body of a `release`."""
    return json.dumps({"resource": check_resource(resource), "volume": check_volume(volume)}).encode()


def parse_release(body: bytes) -> tuple[str, str]:
    """Resource path and volume of a `release`.

    Raises:
        MalformedMessage: it is not one.
    """
    what = "the release"
    value = read_object(body, what)
    resource, volume = value.get("resource"), value.get("volume")
    if set(value) != {"resource", "volume"} or not isinstance(resource, str) or not isinstance(volume, str):
        raise MalformedMessage(what, "it has other members than resource and volume")
    try:
        return check_resource(resource), check_volume(volume)
    except InvalidArgument as exc:
        raise MalformedMessage(what, "its resource or volume is not one") from exc


def parse_state(body: bytes) -> VolumeState:
    """Read an `adopt`, `report`, `close` or `stale`.

    Raises:
        MalformedMessage: it is none.
    """
    what = "the volume's state"
    value = read_object(body, what)
    volume, session, sequence, root = (value.get(name) for name in ("volume", "session", "sequence", "root"))
    if len(value) != 4 or not isinstance(volume, str) or type(sequence) is not int:
        raise MalformedMessage(what, "it has other members than volume, session, sequence and root")
    if not 0 <= sequence <= MAX_SEQUENCE:
        raise MalformedMessage(what, "the sequence number is out of range")
    if not isinstance(session, str) or not isinstance(root, str):
        raise MalformedMessage(what, "session or root is not a string")
    if not _HEX.fullmatch(session) or not _HEX.fullmatch(root):
        raise MalformedMessage(what, "session or root is not 32 bytes in hexadecimal")
    try:
        check_volume(volume)
    except InvalidArgument as exc:
        raise MalformedMessage(what, "the volume is not a UUID") from exc
    return VolumeState(volume=volume, session=bytes.fromhex(session), sequence=sequence, root=bytes.fromhex(root))
