"""The decision about an attested session: may it have this key, and if so the key, sealed to the guest's own.

Blocks. The audit row of a release is durable before the key leaves. Refusals are written down by `broker.service`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from jindiskd.attest.model import Finding
from jindiskd.base.secret import Secret
from jindiskd.broker.peer import Peer
from jindiskd.broker.sessions import Session
from jindiskd.errors import NotFound
from jindiskd.kbs import jwe
from jindiskd.keys.store import ImageRecord, RecordChanged, ReleaseRefused, Requester, Store
from jindiskd.keys.volumes import Volumes
from jindiskd.policy.release import decide

ATTEMPTS = 3
"""How often a decision is made anew because the record changed under it."""
Give = Callable[[ImageRecord, Requester, str], Secret]
"""Releases what is at a resource, in one transaction with its audit row."""


class Deciding:
    """Decides by records, rules and limits.

    Args:
        store: keys and audit.
        volumes: what is remembered of JinDisk volumes.
        allow_simulated: whether simulated platforms may get keys of images built for them.
        now: wall clock, for dates in rules.
    """

    def __init__(
        self, store: Store, volumes: Volumes, *, allow_simulated: bool, now: Callable[[], datetime]
    ) -> None:
        self._store, self._volumes, self._allow_simulated, self._now = store, volumes, allow_simulated, now

    def key(self, record: ImageRecord, who: Requester, resource: str) -> Secret:
        """Give a key."""
        return self._store.release_to(record.image_id, who, revision=record.revision, resource=resource)

    def grant(self, volume: str, record: ImageRecord, who: Requester, resource: str) -> Secret:
        """Give key, anchor and session of a JinDisk volume."""
        granted = self._volumes.release(
            volume, record.image_id, who, revision=record.revision, resource=resource
        )
        try:
            return Secret(granted.pack())
        finally:
            granted.close()

    def decide(
        self, session: Session, peer: Peer, resource: str, give: Give
    ) -> tuple[str, str, Sequence[Finding]]:
        """Image, sealed key, and findings against it: with findings no key.

        Raises:
            ApprovalWaiting, RecordChanged: not now; ask again.
        """
        assert session.verified is not None
        image_id = ""
        for attempt in range(ATTEMPTS):
            try:
                record = self._store.by_resource(resource)
                image_id = record.image_id
                findings = decide(
                    record, session.verified, allow_simulated=self._allow_simulated, now=self._now()
                )
                if peer.image_id is not None and peer.image_id != image_id:
                    text = "the guest asked for the key of another image than its own"
                    findings.insert(0, Finding("peer.image", text))
                if findings:
                    return image_id, "", findings
                with give(record, requester(session, peer), resource) as key:
                    return image_id, jwe.seal(key.reveal(), session.tee_pubkey), ()
            except RecordChanged:
                if attempt + 1 == ATTEMPTS:
                    raise
            except NotFound as exc:
                return image_id, "", [Finding("resource.unknown", str(exc))]
            except ReleaseRefused as exc:
                return image_id, "", [Finding(exc.finding, str(exc))]
        raise AssertionError("every attempt returns or raises")


def requester(session: Session, peer: Peer) -> Requester:
    """Who asks, for audit rows and limits: what an attested session proved."""
    assert session.verified is not None
    verified = session.verified
    return Requester(
        peer=peer.description,
        measurement=verified.measurement,
        simulated=verified.simulated,
        guest=verified.guest,
        chip=verified.chip,
        token=session.session_id,
    )
