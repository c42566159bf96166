"""What the broker remembers of each JinDisk volume, so that an old copy of a disk is refused (format document, 13).

Each message is one transaction, durable before it is answered. Anchors and session identifiers are stored wrapped:
whoever reads the database can neither speak for a session nor tell what a volume holds.
Calls block; call them in a thread.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from jindiskd.attest.model import Finding
from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.errors import EXIT_BUSY, EXIT_REFUSED, AlreadyExists, JindiskError, NotFound
from jindiskd.kbs.freshness import SESSION_BYTES, VolumeGrant, VolumeState, check_volume
from jindiskd.keys import wrap
from jindiskd.keys.audit import Requester
from jindiskd.keys.database import ANCHOR_PURPOSE, PENDING_PURPOSE, images_table, volumes_table
from jindiskd.keys.store import ApprovalWaiting, ImageRecord, KeyState, ReleaseRefused, Store, record_of

LEASE_MARGIN_S = 10.0
"""Added to a lease before a newer session may take over: clocks of guest and broker run differently."""


class SessionRefused(JindiskError, code="SessionRefused", exit_code=EXIT_REFUSED):
    """A session may not do that to its volume; it is fenced."""

    def __init__(self, volume: str, finding: str, reason: str) -> None:
        """`finding` is a dotted id, `reason` the rest of the sentence."""
        super().__init__(f"volume {volume}: {reason}; the session is fenced")
        self.finding = finding


class LeaseHeld(JindiskError, code="LeaseHeld", exit_code=EXIT_BUSY):
    """The lease of the session before has not run out."""

    def __init__(self, volume: str, seconds: float) -> None:
        """`seconds` until it has."""
        super().__init__(f"volume {volume}: the session before may write for {seconds:.0f} s more: adopt after that")


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeRecord:
    """What is remembered of a volume, for people."""

    volume: str
    image_id: str
    anchor: Anchor | None
    pending: bool
    """Whether a session was released and not yet adopted."""
    accept_any: bool
    """Whether the owner accepts, once, whatever authentic state is found."""
    resource: str
    """Of its key; empty for that of the image's root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltVolume:
    """A volume as its builder closed it."""

    volume: str
    anchor: Anchor
    resource: str | None = None
    """Of its key; None for that of the image's root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stale:
    """That a guest found an old copy of its disk."""

    image_id: str
    simulated: bool
    finding: Finding


class Volumes:
    """The volumes of a store."""

    def __init__(self, store: Store, draw: Callable[[int], bytes] = secrets.token_bytes) -> None:
        """`draw` gives random bytes for session identifiers."""
        self._store, self._database, self._draw = store, store.database, draw

    def add(
        self,
        volume: str,
        image_id: str,
        anchor: Anchor | None,
        *,
        resource: str | None = None,
        by: Requester | None = None,
    ) -> None:
        """Begin to remember a volume, whose key is one of an image; `anchor` as its builder closed it.

        `resource` names the key if it is another than that of the image's root; `by` is who does it.

        Without an anchor it cannot be released until `accept_rollback`.

        Raises:
            AlreadyExists: it is remembered already.
            NotFound: no such image, or no such key of it.
        """
        check_volume(volume)
        try:
            with self._database.write() as connection:
                self.insert(connection, volume, image_id, anchor, resource)
                self._store.audit.append(connection, "volume added", image_id, by, {"volume": volume})
        except sa.exc.IntegrityError as exc:
            raise AlreadyExists("volume", volume) from exc

    def activate(self, image_id: str, launch_digests: Sequence[bytes], built: Sequence[BuiltVolume]) -> None:
        """Activate the keys of an image with its volumes, which are remembered from now on; one transaction for all.

        Repeating it changes nothing. Raises as `add` and `Store.activate`.
        """
        for one in built:
            check_volume(one.volume)
        try:
            self._store.activate(
                image_id, launch_digests, lambda connection: self._activated(connection, image_id, built)
            )
        except sa.exc.IntegrityError as exc:
            raise AlreadyExists("volume", " or ".join(one.volume for one in built)) from exc

    def _activated(self, connection: sa.Connection, image_id: str, built: Sequence[BuiltVolume]) -> None:
        for one in built:
            self.insert(connection, one.volume, image_id, one.anchor, one.resource)
            self._store.audit.append(connection, "volume added", image_id, detail={"volume": one.volume})

    def insert(
        self, connection: sa.Connection, volume: str, image_id: str, anchor: Anchor | None, resource: str | None
    ) -> None:
        """The part of `add` that is within the caller's write transaction."""
        query = sa.select(images_table).where(images_table.c.image_id == image_id)
        image = connection.execute(query).mappings().first()
        if image is None:
            raise NotFound("key of image", image_id)
        stored = self._store.stored_key(connection, image, resource)
        row = {
            "volume": volume,
            "image_id": image_id,
            "anchor": self._wrap(anchor.pack(), ANCHOR_PURPOSE, volume) if anchor else None,
            "pending": None,
            "accept_any": False,
            "pending_any": False,
            "lease_until": 0.0,
            "resource": "" if stored.resource == image["resource"] else stored.resource,
        }
        connection.execute(volumes_table.insert().values(row))

    def list(self) -> list[VolumeRecord]:
        """All volumes."""
        query = sa.select(volumes_table).order_by(volumes_table.c.volume)
        with self._database.read() as connection:
            rows = connection.execute(query).mappings().all()
        return [self._record(dict(row)) for row in rows]

    def get(self, volume: str) -> VolumeRecord:
        """One volume: its anchor is what reading it without a session needs.

        Raises:
            NotFound: it is not remembered.
        """
        with self._database.read() as connection:
            return self._record(self._row(connection, volume))

    def of_image(self, image_id: str) -> Sequence[VolumeRecord]:
        """The volumes that the key of an image opens."""
        return [record for record in self.list() if record.image_id == image_id]

    def accept_rollback(self, volume: str, reason: str, by: Requester | None = None) -> None:
        """Accept whatever authentic state the next session finds, once: after a restored backup, or a lost database.

        Raises:
            NotFound: it is not remembered.
        """
        with self._database.write() as connection:
            row = self._row(connection, volume)
            self._update(connection, volume, accept_any=True)
            detail = {"volume": volume, "reason": reason, **self._position(row)}
            self._store.audit.append(connection, "rollback accepted", row["image_id"], by, detail)

    def release(
        self,
        volume: str,
        image_id: str,
        requester: Requester,
        *,
        revision: int | None = None,
        resource: str | None = None,
    ) -> VolumeGrant:
        """Draw a session and give out key, anchor and session; audit row and pending session are durable before.

        Changes nothing for a session that runs: only `adopt` ends that.

        Raises:
            NotFound, ReleaseRefused, RecordChanged, ApprovalWaiting, KeyUnreadable: no key leaves.
        """
        session = self._draw(SESSION_BYTES)
        with self._database.write() as connection:
            record, stored = self._store.for_release(connection, image_id, requester, revision, resource)
            row = self._row(connection, volume)
            if row["image_id"] != image_id or (row["resource"] or record.resource) != stored.resource:
                raise ReleaseRefused(image_id, "volume.image", "does not belong to this volume")
            anchor = self._anchor(row)
            if anchor is None and not row["accept_any"]:
                raise ReleaseRefused(image_id, "volume.no_anchor", "belongs to a volume whose state is not known")
            approvals = self._store.approvals
            waiting = approvals.needed(connection, image_id, requester) if record.rules.approval else None
            if waiting is None:
                key = self._store.open_key(stored)
                pending = self._wrap(session, PENDING_PURPOSE, volume)
                self._update(connection, volume, pending=pending, pending_any=row["accept_any"])
                detail = {"volume": volume, "any state": bool(row["accept_any"])}
                self._store.released(connection, record, requester, detail, stored.resource)
        if waiting is not None:
            raise ApprovalWaiting(waiting)
        return VolumeGrant(
            key=key,
            anchor=None if row["accept_any"] else anchor,
            session=session,
            lease_s=record.rules.lease_s,
        )

    def adopt(self, state: VolumeState, requester: Requester, image_id: str | None = None) -> None:
        """A released session found `state` and begins to write. Repeating it with the same values is no error.

        Args:
            state: what the session says.
            requester: who says it.
            image_id: the only image whose volumes this peer may speak of; None for any.

        Raises:
            SessionRefused: the session is not the pending one, or the state is not acceptable.
            LeaseHeld: the session before may still be writing; ask again.
        """
        with self._database.write() as connection:
            row, anchor = self._known(connection, state, image_id)
            record = self._image(connection, row["image_id"])
            if record.state is not KeyState.ACTIVE:
                raise SessionRefused(state.volume, "key.state", "the key of its image is not active")
            if anchor is not None and anchor == _anchor_of(state, open_=True):
                return self._renew(connection, row, state)
            if not self._is_pending(row, state):
                raise SessionRefused(state.volume, "session.not_pending", "the session is not the one released last")
            at, wait = self._database.now().timestamp(), 0.0
            if anchor is not None and anchor.open:
                wait = row["lease_until"] - at
            if wait > 0:
                raise LeaseHeld(state.volume, wait)
            forward = anchor is not None and (
                (state.sequence, state.root) == (anchor.sequence, anchor.root)
                or (anchor.open and state.sequence > anchor.sequence)
            )
            if not forward and not row["pending_any"]:
                reason = f"state {state.sequence} does not follow from the last one reported"
                raise SessionRefused(state.volume, "session.stale", reason)
            # Accepting any state was for this once, also where the state found needed no such kindness.
            once = {"accept_any": False} if row["pending_any"] else {}
            self._update(connection, state.volume, pending=None, pending_any=False, **once)
            self._renew(connection, row, state)
            detail = {"volume": state.volume, "sequence": state.sequence, "before": self._position(row)}
            if row["pending_any"]:
                detail["any state"] = True
            self._store.audit.append(connection, "adopted", row["image_id"], _seen(requester, record), detail)
        return None

    def report(self, state: VolumeState, image_id: str | None = None) -> None:
        """A durable state of the running session; raises `SessionRefused`. No audit row: there are many."""
        with self._database.write() as connection:
            row, anchor = self._known(connection, state, image_id)
            self._check_running(anchor, state)
            self._renew(connection, row, state)

    def close(self, state: VolumeState, requester: Requester, image_id: str | None = None) -> None:
        """The last state of the running session. Repeating it is no error; raises `SessionRefused`."""
        closed = _anchor_of(state, open_=False)
        with self._database.write() as connection:
            row, anchor = self._known(connection, state, image_id)
            if anchor == closed:
                return
            self._check_running(anchor, state)
            self._update(
                connection,
                state.volume,
                anchor=self._wrap(closed.pack(), ANCHOR_PURPOSE, state.volume),
                lease_until=0.0,
            )
            detail = {"volume": state.volume, "sequence": state.sequence}
            record = self._image(connection, row["image_id"])
            self._store.audit.append(connection, "closed", row["image_id"], _seen(requester, record), detail)

    def stale(self, state: VolumeState, requester: Requester, image_id: str | None = None) -> Stale:
        """A released session found a disk in no acceptable state: write that down, and forget the session.

        Args:
            state: the newest on the disk.
            requester: who says it.
            image_id: the only image whose volumes this peer may speak of; None for any.

        Raises:
            SessionRefused: the session is not the pending one.
        """
        with self._database.write() as connection:
            row, anchor = self._known(connection, state, image_id)
            if not self._is_pending(row, state):
                raise SessionRefused(state.volume, "session.not_pending", "the session is not the one released last")
            record = self._image(connection, row["image_id"])
            last = anchor.sequence if anchor else "unknown"
            further = row["resource"].rpartition("/")[2]  # empty for the root
            disk = f"the disk of its volume {further!r}" if further else "its disk"
            option = f" --volume {further}" if further else ""
            text = (
                f"{disk} is not in the latest state: it holds state {state.sequence}, the last one known is {last},"
                " so an old or foreign copy was attached; attach the right disk, or accept this one once by"
                f" `jindiskctl key accept-rollback {record.name}{option}`"
            )
            self._update(connection, state.volume, pending=None, pending_any=False)
            finding = Finding("volume.stale", text)
            detail = {
                "volume": state.volume,
                "sequence": state.sequence,
                "before": self._position(row),
                "findings": [{"id": finding.id, "text": finding.text}],
            }
            self._store.audit.append(connection, "refused", record.image_id, _seen(requester, record), detail)
        return Stale(image_id=record.image_id, simulated=record.platform.simulated, finding=finding)

    def record_fenced(self, volume: str, verb: str, requester: Requester, why: SessionRefused) -> None:
        """Write down that a message was refused."""
        with self._database.write() as connection:
            query = sa.select(volumes_table.c.image_id).where(volumes_table.c.volume == volume)
            image_id = connection.scalar(query) or ""
            findings = [{"id": why.finding, "text": str(why)}]
            detail = {"volume": volume, "message": verb, "findings": findings}
            self._store.audit.append(connection, "fenced", image_id, requester, detail)

    # Parts

    def _row(self, connection: sa.Connection, volume: str) -> dict[str, Any]:
        row = connection.execute(sa.select(volumes_table).where(volumes_table.c.volume == volume)).mappings().first()
        if row is None:
            raise NotFound("volume", volume)
        return dict(row)

    def _known(
        self, connection: sa.Connection, state: VolumeState, image_id: str | None
    ) -> tuple[dict[str, Any], Anchor | None]:
        """The row of a session's volume. A revoked key does not matter here: a session that runs may end in order."""
        try:
            row = self._row(connection, state.volume)
        except NotFound as exc:
            raise SessionRefused(state.volume, "volume.unknown", "the volume is not known") from exc
        if image_id is not None and row["image_id"] != image_id:
            raise SessionRefused(state.volume, "peer.image", "the volume is another image's than the guest's own")
        return row, self._anchor(row)

    @staticmethod
    def _image(connection: sa.Connection, image_id: str) -> ImageRecord:
        query = sa.select(images_table).where(images_table.c.image_id == image_id)
        return record_of(connection.execute(query).mappings().one())

    def _check_running(self, anchor: Anchor | None, state: VolumeState) -> None:
        if anchor is None or not hmac.compare_digest(anchor.session, state.session) or not anchor.open:
            raise SessionRefused(state.volume, "session.not_running", "the session is not the one that runs")
        if state.sequence < anchor.sequence or (state.sequence == anchor.sequence and state.root != anchor.root):
            raise SessionRefused(state.volume, "session.backwards", f"state {state.sequence} does not follow")

    def _is_pending(self, row: dict[str, Any], state: VolumeState) -> bool:
        if row["pending"] is None:
            return False
        with wrap.unwrap(
            self._database.kek, bytes(row["pending"]), purpose=PENDING_PURPOSE, owner=state.volume
        ) as pending:
            return hmac.compare_digest(pending.reveal(), state.session)

    def _renew(self, connection: sa.Connection, row: dict[str, Any], state: VolumeState) -> None:
        """Remember a state of the session that runs, and begin its lease anew."""
        lease_s = self._image(connection, row["image_id"]).rules.lease_s
        until = self._database.now().timestamp() + lease_s + LEASE_MARGIN_S if lease_s else 0.0
        anchor = self._wrap(_anchor_of(state, open_=True).pack(), ANCHOR_PURPOSE, state.volume)
        self._update(connection, state.volume, anchor=anchor, lease_until=until)

    def _update(self, connection: sa.Connection, volume: str, **values: object) -> None:
        connection.execute(volumes_table.update().where(volumes_table.c.volume == volume).values(values))

    def _wrap(self, value: bytes, purpose: str, volume: str) -> bytes:
        with Secret(value) as secret:
            return wrap.wrap(self._database.kek, secret, purpose=purpose, owner=volume)

    def _anchor(self, row: dict[str, Any]) -> Anchor | None:
        if row["anchor"] is None:
            return None
        with wrap.unwrap(
            self._database.kek, bytes(row["anchor"]), purpose=ANCHOR_PURPOSE, owner=row["volume"]
        ) as packed:
            return Anchor.unpack(bytes(packed.reveal()))

    def _position(self, row: dict[str, Any]) -> dict[str, object]:
        """Where a volume stands, for audit rows: without its session."""
        anchor = self._anchor(row)
        return {"sequence": anchor.sequence, "open": anchor.open} if anchor else {"sequence": None, "open": False}

    def _record(self, row: dict[str, Any]) -> VolumeRecord:
        return VolumeRecord(
            volume=row["volume"],
            image_id=row["image_id"],
            anchor=self._anchor(row),
            pending=row["pending"] is not None,
            accept_any=row["accept_any"],
            resource=row["resource"],
        )


def _seen(requester: Requester, record: ImageRecord) -> Requester:
    """Who speaks for a session: it was attested when its key was released, as what its image is for."""
    return replace(requester, simulated=record.platform.simulated)


def _anchor_of(state: VolumeState, *, open_: bool) -> Anchor:
    return Anchor(open=open_, session=state.session, sequence=state.sequence, root=state.root)
