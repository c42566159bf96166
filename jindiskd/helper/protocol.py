"""What the service may ask of the helper, and what it is answered. Each message is one packet of a unix socket.

    request     VERB, a space, a JSON document; `open` also one descriptor: a memory file that holds the key
    answer      a JSON document

Devices are named by number and by the sequence number that the kernel gave the disk, so that one that took another's
place is never meant; mapped nodes by the kernel's name and the mark that the helper put on them. No paths cross.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from uuid import UUID

from jindiskd.base import document
from jindiskd.base.anchor import ANCHOR_BYTES, Anchor
from jindiskd.errors import InvalidArgument, JindiskError

MESSAGE_BYTES = 8192
ANSWER_BYTES = 65_536
KEY_BYTES = 64
"""More than any key has."""
SESSION_BYTES = DIGEST_BYTES = 32
MOST_MINOR = (1 << 20) - 1
MOST_MAJOR = 4095
MOST_SEQUENCE = (1 << 63) - 1
MOST_UID = (1 << 32) - 2
MOST_LEASE_S = 86_400
_NODE = re.compile(r"nbd(0|[1-9][0-9]{0,4})|dm-(0|[1-9][0-9]{0,6})")
MARK_CHARACTERS = 128


class Kind(enum.StrEnum):
    """What a device carries."""

    JINDISK2 = "jindisk2"
    JINDISK1 = "jindisk1"
    LUKS2 = "luks2"


class MalformedRequest(JindiskError, code="MalformedRequest"):
    """A request that the service does not make."""

    def __init__(self, why: str) -> None:
        """`why` it is none."""
        super().__init__(f"the helper was asked something that is no request: {why}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Below:
    """A block device of the host."""

    major: int
    minor: int
    sequence: int
    """Of its disk, as the kernel counts them: never the same twice while the machine runs."""

    def __str__(self) -> str:
        return f"{self.major}:{self.minor}"

    def check(self) -> None:
        """Raise `MalformedRequest` unless it may be one."""
        if not (0 < self.major <= MOST_MAJOR and 0 <= self.minor <= MOST_MINOR and 0 <= self.sequence <= MOST_SEQUENCE):
            raise MalformedRequest("the device's numbers are out of range")


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Map a volume. The key comes as a descriptor."""

    kind: Kind
    below: Below
    owner: int
    """User id of who asked the service."""
    read_only: bool
    uuid: str = ""
    """Of the volume; none for JinDisk 1."""
    anchor: bytes = b""
    """JinDisk 2: the state that must be there, 73 bytes; empty for whatever is."""
    session: bytes = b""
    """JinDisk 2: 32 bytes, whose states the service is told; empty where nobody remembers them."""
    lease_s: int = 0
    header_sha256: bytes = b""
    """LUKS2: of the header area as it was built; empty for any of the right form."""

    def check(self) -> None:
        """Raise `MalformedRequest` for what does not go together."""
        self.below.check()
        if not 0 <= self.owner <= MOST_UID or not 0 <= self.lease_s <= MOST_LEASE_S:
            raise MalformedRequest("owner or lease is out of range")
        if (self.kind is Kind.JINDISK1) == bool(self.uuid) or (self.uuid and not _is_uuid(self.uuid)):
            raise MalformedRequest("the volume's UUID is missing, or none")
        if self.kind is not Kind.JINDISK2 and (self.anchor or self.session or self.lease_s):
            raise MalformedRequest("only JinDisk 2 has states and sessions")
        if self.kind is not Kind.LUKS2 and self.header_sha256:
            raise MalformedRequest("only LUKS2 has a header to be compared")
        if len(self.anchor) not in {0, ANCHOR_BYTES} or len(self.session) not in {0, SESSION_BYTES}:
            raise MalformedRequest("anchor or session is of another length")
        if len(self.header_sha256) not in {0, DIGEST_BYTES}:
            raise MalformedRequest("the header's digest is of another length")
        if self.anchor:
            try:
                Anchor.unpack(self.anchor)
            except InvalidArgument as exc:
                raise MalformedRequest("the anchor is none") from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Take a mapping away that the helper made."""

    node: str
    """As the kernel calls it: `nbd3`, `dm-1`."""
    mark: str
    """What the helper put on it."""

    def check(self) -> None:
        """Raise `MalformedRequest` unless it may be one."""
        if not _NODE.fullmatch(self.node):
            raise MalformedRequest("the node is none that can be mapped")
        if not 0 < len(self.mark) <= MARK_CHARACTERS or not self.mark.isascii() or not self.mark.isprintable():
            raise MalformedRequest("the mark is none")


@dataclass(frozen=True, slots=True, kw_only=True)
class List:
    """Tell what is mapped."""

    def check(self) -> None:
        """Nothing can be wrong."""


Request = Open | Close | List
VERBS: dict[bytes, type[Open | Close | List]] = {b"open": Open, b"close": Close, b"list": List}


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What is mapped, and how it is."""

    node: str
    mark: str
    alive: bool
    """Whether what serves it is there; a mapping of the kernel's own always is."""
    fault: str = ""
    """Why it cannot be written any more, or was not closed well; empty while all is well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a request."""

    error: str = ""
    """Code of the error; empty if it was done."""
    exit_code: int = 0
    text: str = ""
    """The error's sentence."""
    node: str = ""
    """Open: the mapped node, `nbd3` or `dm-1`."""
    serving: tuple[Serving, ...] = field(default=())
    """List."""


class HelperFailed(JindiskError):
    """What went wrong in the helper or its worker; has the code and exit status of the error there."""

    def __init__(self, answer: Answer) -> None:
        """`answer` says it."""
        super().__init__(answer.text)
        self.__dict__.update(code=answer.error, exit_code=answer.exit_code)  # of this one, not of the class


def broken(text: str) -> Answer:
    """The answer for what is no error of ours."""
    return Answer(error=JindiskError.code, exit_code=JindiskError.exit_code, text=text[:2000])


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


def dump(request: Request) -> bytes:
    """A request as it is sent."""
    verb = next(name for name, kind in VERBS.items() if isinstance(request, kind))
    return verb + b" " + document.dump(request)


def parse(packet: bytes) -> Request:
    """Read a request strictly.

    Raises:
        MalformedRequest: it is none.
    """
    verb, _, rest = packet.partition(b" ")
    kind = VERBS.get(verb)
    if kind is None:
        raise MalformedRequest("there is no such verb")
    try:
        request = document.load(kind, rest, document="the request", limit_bytes=MESSAGE_BYTES)
    except document.MalformedDocument as exc:
        raise MalformedRequest("its document is malformed") from exc
    request.check()
    return request


def failed(exc: JindiskError) -> Answer:
    """The answer for an error."""
    return Answer(error=exc.code, exit_code=exc.exit_code, text=str(exc)[:2000])
