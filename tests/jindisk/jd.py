"""Helpers of the JinDisk tests: a device in memory, an auditor of nonces, a keeper of anchors."""

import copy
import hashlib
import itertools
import random
from dataclasses import dataclass, replace
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from jindiskd.base.anchor import Anchor, State
from jindiskd.base.secret import Secret
from jindiskd.jindisk import crypto
from jindiskd.jindisk.create import create_volume
from jindiskd.jindisk.errors import VolumeFenced
from jindiskd.jindisk.geometry import BLOCK, Geometry, default_geometry
from jindiskd.jindisk.native import Blocks, Native, native
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.volume import Volume, open_volume

KEY = bytes(range(32))
_processes = itertools.count()
UUID1 = UUID(bytes=bytes(range(0x40, 0x50)))


def small_geometry() -> Geometry:
    """4096 blocks, segments of 64, the smallest journal: every mechanism runs within seconds."""
    base = default_geometry(4096)
    return Geometry(
        blocks=4096, segment_bits=6, segments=base.segments, journal_blocks=16, meta_slots=base.meta_slots
    )


ZERO = bytes(BLOCK)


class MemoryDevice:
    """A device in memory that holds what is not zero; copies are cheap."""

    name = "memory"

    def __init__(self, size_bytes: int, blocks: dict[int, bytes] | None = None) -> None:
        self.size_bytes = size_bytes
        self.blocks = dict(blocks or {})
        """Content by raw block."""

    def pread(self, offset: int, length: int) -> bytes:
        assert not offset % BLOCK
        assert not length % BLOCK
        first = offset // BLOCK
        return b"".join(self.blocks.get(raw, ZERO) for raw in range(first, first + length // BLOCK))

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        assert not offset % BLOCK
        assert not len(data) % BLOCK
        assert offset + len(data) <= self.size_bytes
        for at in range(0, len(data), BLOCK):
            self.blocks[(offset + at) // BLOCK] = bytes(data[at : at + BLOCK])

    def flush(self) -> None:
        """Nothing is lost here."""

    def discard(self, offset: int, length: int) -> None:
        """Nothing to do."""

    def copy(self) -> "MemoryDevice":
        return MemoryDevice(self.size_bytes, self.blocks)


class Broker:
    """The broker's side of section 13.2 for one volume, written from the document."""

    def __init__(self) -> None:
        self.anchor: Anchor | None = None
        self.pending: bytes | None = None
        self._sessions = 0

    def release(self) -> tuple[Anchor | None, bytes]:
        self._sessions += 1
        self.pending = hashlib.sha256(b"session %d" % self._sessions).digest()
        return self.anchor, self.pending

    def first(self, state: State) -> None:
        self.anchor = Anchor(open=True, session=state.session, sequence=state.sequence, root=state.root)

    def adopt(self, state: State, session: bytes) -> None:
        a = self.anchor
        if a and (a.open, a.session, a.sequence, a.root) == (True, session, state.sequence, state.root):
            return
        same = a is not None and (a.sequence, a.root) == (state.sequence, state.root)
        fits = a is None or same or (a.open and state.sequence > a.sequence)
        if session != self.pending or not fits:
            raise VolumeFenced("adopt refused")
        self.anchor = Anchor(open=True, session=session, sequence=state.sequence, root=state.root)
        self.pending = None

    def _follow(self, state: State, still_open: bool) -> None:
        a = self.anchor
        assert a is not None
        same = (state.sequence, state.root) == (a.sequence, a.root)
        if not still_open and not a.open and same and state.session == a.session:
            return
        if state.session != a.session or not a.open or state.sequence < a.sequence:
            raise VolumeFenced("report refused")
        if state.sequence == a.sequence and not same:
            raise VolumeFenced("report refused")
        self.anchor = Anchor(open=still_open, session=state.session, sequence=state.sequence, root=state.root)

    def report(self, state: State) -> None:
        self._follow(state, still_open=True)

    def close(self, state: State) -> None:
        self._follow(state, still_open=False)


class Audit:
    """Section 22, nonce audit and K1, for all sealings while it is installed."""

    def __init__(self) -> None:
        self.sealed: set[tuple[bytes, bytes]] = set()
        self.repeated: list[bytes] = []
        self.drawn: set[bytes] = set()
        self.foreign = 0
        self.count = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        audit = self

        class Watched:
            def __init__(self, key: bytes) -> None:
                self._aead, self._key = AESGCM(key), bytes(key)

            def encrypt(self, nonce: bytes, data: bytes, aad: bytes) -> bytes:
                self._note(nonce)
                return self._aead.encrypt(nonce, data, aad)

            def encrypt_into(self, nonce: bytes, data: bytes, aad: bytes, into: memoryview) -> int:
                self._note(nonce)
                return self._aead.encrypt_into(nonce, data, aad, into)

            def _note(self, nonce: bytes) -> None:
                audit.note(self._key, bytes(nonce))  # a view of memory that is used again

            def decrypt(self, nonce: bytes, data: bytes, aad: bytes) -> bytes:
                return self._aead.decrypt(nonce, data, aad)

            def decrypt_into(self, nonce: bytes, data: bytes, aad: bytes, into: memoryview) -> int:
                return self._aead.decrypt_into(nonce, data, aad, into)

        draw, derive = crypto.Generator.draw, crypto.hkdf

        def drawing(generator: crypto.Generator) -> bytes:
            found = draw(generator)
            audit.drawn.add(found)
            return found

        def deriving(*, ikm: bytes | bytearray, salt: bytes, info: bytes) -> bytes:
            found = derive(ikm=ikm, salt=salt, info=info)
            if info == crypto.LABEL_SUPERBLOCK and salt[16:] in audit.drawn:
                audit.drawn.add(found)
            return found

        native()  # it tries itself once, by keys of its own
        seal = Native.seal

        def sealing(loop: Native, blocks: Blocks, plain: memoryview, sealed: memoryview, tags: memoryview) -> int:
            count = seal(loop, blocks, plain, sealed, tags)
            assert len(blocks.keys) == blocks.key_bytes
            assert blocks.nonce is not None
            for number in range(blocks.nonce, blocks.nonce + count):
                audit.note(blocks.keys, crypto.block_nonce(number))
            return count

        monkeypatch.setattr(Native, "seal", sealing)
        monkeypatch.setattr(crypto, "AESGCM", Watched)
        monkeypatch.setattr(crypto.Generator, "draw", drawing)
        monkeypatch.setattr(crypto, "hkdf", deriving)

    def note(self, key: bytes, nonce: bytes) -> None:
        """A sealing."""
        name = (hashlib.sha256(key).digest()[:16], nonce)
        if name in self.sealed:
            self.repeated.append(nonce)
        self.sealed.add(name)
        self.count += 1
        if key not in self.drawn:
            self.foreign += 1

    def new_process(self) -> None:
        """Another process begins: keys drawn before may not seal any more."""
        self.drawn = set()

    def verify(self) -> None:
        assert self.count
        assert not self.repeated, "a nonce came twice under one key"
        assert not self.foreign, "a key that this process had not drawn sealed"


@dataclass(slots=True, kw_only=True)
class World:
    """A volume, its broker, and what it should hold."""

    device: MemoryDevice
    broker: Broker
    key: Secret
    seed: int = 0
    audit: Audit | None = None
    uuid: UUID = UUID1

    def entropy(self, length: int) -> bytes:
        """The system's random bytes: different ones for every process, forks of one history included."""
        return random.Random(f"{self.seed} {next(_processes)}").randbytes(length)

    def fork(self, device: MemoryDevice | None = None, broker: Broker | None = None) -> "World":
        """The same volume on a copy of the disk, with a copy of what the broker remembers."""
        device = self.device.copy() if device is None else device
        broker = copy.copy(broker or self.broker)
        return replace(self, device=device, broker=broker)

    def _new_process(self) -> None:
        if self.audit is not None:
            self.audit.new_process()

    def create(self, geometry: Geometry | None = None) -> Session:
        self._new_process()
        _, session_id = self.broker.release()
        session = create_volume(
            self.device, geometry=geometry or small_geometry(), key=self.key, uuid=self.uuid, session_id=session_id,
            entropy=self.entropy, keeper=self.broker, clock=lambda: 0,
        )  # fmt: skip
        self.broker.first(session.durable)
        return session

    def open(self, anchor: Anchor | None = None) -> Volume:
        return open_volume(self.device, key=self.key, uuid=self.uuid, anchor=anchor or self.broker.anchor)

    def begin(self, **options: object) -> Session:
        self._new_process()
        anchor, session_id = self.broker.release()
        volume = open_volume(self.device, key=self.key, uuid=self.uuid, anchor=anchor)
        session = Session(
            volume, session_id=session_id, keeper=self.broker, entropy=self.entropy, clock=lambda: 0, **options
        )
        session.begin()
        return session


def world(geometry: Geometry | None = None, seed: int = 0, audit: Audit | None = None) -> World:
    geometry = geometry or small_geometry()
    return World(device=MemoryDevice(geometry.end * BLOCK), broker=Broker(), key=Secret(KEY), seed=seed, audit=audit)


def content(number: int) -> bytes:
    """A block's content that tells which it is."""
    return hashlib.sha256(b"%d" % number).digest() * 128
