"""Policies, approvals, audit log and refusals behind the bus: a policy, the log in pages, refusals explained.

Everything here blocks on the database, on files or on arithmetic, in threads of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jindiskd.attest.explain import Alternatives, Explanation, explain_digest
from jindiskd.attest.firmware import inspect_firmware
from jindiskd.attest.kept import restore, shown
from jindiskd.attest.measure import snp_launch_digest
from jindiskd.attest.model import Finding, MalformedEvidence
from jindiskd.attest.snp import VerifiedSnp
from jindiskd.base.platform import Tee
from jindiskd.broker.refused import decided_again, told
from jindiskd.bus.objects import microseconds
from jindiskd.bus.ports import ApprovalView, AuditOrder
from jindiskd.config import Config
from jindiskd.errors import Busy, Cancelled, JindiskError
from jindiskd.image.measurement import cmdline_of, inputs_of
from jindiskd.image.service import ImageService
from jindiskd.image.store import StoredImage
from jindiskd.jobs.job import Job
from jindiskd.keys.audit import AuditQuery, Requester
from jindiskd.keys.refusals import StoredRefusal
from jindiskd.keys.store import Store
from jindiskd.policy import form

MAX_FIRMWARE = 32
PATTERNS = ("*.fd", "*/*.fd", "*/*/*.fd")


class DecisionsBackend:
    """Policies, approvals, audit log and refusals of one key store."""

    def __init__(self, images: ImageService, store: Store, config: Config) -> None:
        self._images, self._store, self._config = images, store, config
        self._verifying = asyncio.Lock()

    # Policies

    async def policy(self, image_id: str, *, set_only: bool) -> str:
        """The policy of an image as TOML."""
        record = await asyncio.to_thread(self._store.image, image_id)
        return form.write(record.rules, explain=not set_only)

    async def set_policy(self, image_id: str, text: str, by: str) -> bool:
        """Replace it; False where it is that already.

        Raises:
            BadPolicy: with every fault; nothing was changed.
        """
        rules = form.read(text)

        def change() -> bool:
            if self._store.image(image_id).rules == rules:
                return False
            self._store.set_rules(image_id, rules, Requester(peer=by))
            return True

        return await asyncio.to_thread(change)

    async def check_policy(
        self, image_id: str, *, text: str | None, row: int | None
    ) -> tuple[int, Sequence[Mapping[str, object]]]:
        """What a policy would have said of a guest that was refused: number of the audit row, and findings.

        Args:
            image_id: whose key the guest would get.
            text: the policy; the one in force if None.
            row: of the refusal in the audit log; the image's last if None.

        Raises:
            BadPolicy: `text` is none.
            NotFound: no such refusal, or its evidence is no longer kept.
        """
        rules = form.read(text) if text is not None else None

        def check() -> tuple[int, list[Finding]]:
            record = self._store.image(image_id)
            refusal = self._store.refusals.find(number=row, image_id=None if row is not None else image_id)
            allowed = self._config.broker.allow_simulated
            return refusal.number, decided_again(
                refusal, record, rules or record.rules, allow_simulated=allowed, now=datetime.now(UTC)
            )

        number, findings = await asyncio.to_thread(check)
        return number, [told(finding) for finding in findings]

    # Approvals

    async def approvals(self) -> Sequence[ApprovalView]:
        """The guests that wait for a person, and those whose approval still counts."""

        def look() -> list[ApprovalView]:
            waiting = self._store.approvals.list()
            names = {record.image_id: record.name for record in self._store.images()} if waiting else {}
            return [
                ApprovalView(
                    number=item.number,
                    image_id=item.image_id,
                    image=names.get(item.image_id, ""),
                    peer=item.peer,
                    guest=item.guest,
                    measurement=item.measurement,
                    simulated=item.simulated,
                    granted=item.granted,
                    expires=datetime.fromtimestamp(item.expires, UTC),
                )
                for item in waiting
            ]

        return await asyncio.to_thread(look)

    async def decide(self, number: int, *, approve: bool, by: str) -> None:
        """Let one have its keys, or take it off the list; raises `NotFound` where it waits no longer."""
        change = self._store.approvals.grant if approve else self._store.approvals.deny
        await asyncio.to_thread(change, number, Requester(peer=by))

    # The audit log

    async def rows(self, order: AuditOrder) -> tuple[Sequence[Mapping[str, object]], bool]:
        """Rows of the log as the bus has them, oldest first, and whether there are more."""
        query = AuditQuery(
            limit=order.limit,
            after=order.after,
            before=order.before,
            image_id=order.image_id,
            guest=order.guest,
            kind=order.verdict,
            since=order.since,
            until=order.until,
        )
        rows, more = await asyncio.to_thread(self._store.audit.page, query)
        return [_row(row) for row in rows], more

    async def last(self) -> int:
        """Number of the newest row, or 0."""
        return await asyncio.to_thread(self._store.audit.last)

    async def verify(self, job: Job) -> str:
        """Check the log's chain; number of rows and digest of the last, as JSON.

        Raises:
            AuditBroken: it does not fit. Busy: it is being checked already; a check keeps a thread from guests.
        """
        if self._verifying.locked():
            raise Busy("the audit log", "it is being checked already; wait for that job to end")
        async with self._verifying:
            return await self._verify(job)

    async def _verify(self, job: Job) -> str:
        loop, total = asyncio.get_running_loop(), await self.last()
        stopped = threading.Event()

        def progress(rows: int) -> None:
            if stopped.is_set():
                raise Cancelled("the check of the audit log")
            loop.call_soon_threadsafe(job.progress, "checking", rows / max(total, rows))

        job.progress("checking", 0.0)
        try:
            rows, head = await asyncio.to_thread(self._store.audit.verify, progress)
        finally:
            stopped.set()  # a thread cannot be cancelled; it ends by itself at its next report
        job.log(f"{rows} rows fit, the last is {head or 'none'}")
        return json.dumps({"rows": rows, "head": head})

    # Refusals

    async def explain(self, *, image_id: str | None, domain: str | None, row: int | None, job: Job) -> str:
        """Why a guest was refused, as a JSON document: findings with what to do, and what explains its digest.

        Args:
            image_id: of this image; None for any.
            domain: UUID of the domain that was refused; None for any.
            row: number of the audit row; the last refusal if None.
            job: told of the steps.

        Raises:
            NotFound: no such refusal.
        """
        job.progress("looking up the refusal")
        peer = f"domain {domain}" if domain else None
        refusal = await asyncio.to_thread(self._store.refusals.find, number=row, image_id=image_id, peer=peer)
        stored = {image.manifest.image_id: image for image in await self._images.list()}
        image = stored.get(refusal.image_id)
        job.progress("trying what could explain the digest")
        digest = await asyncio.to_thread(self._explain_digest, refusal, image, list(stored.values()))
        document = {
            "row": refusal.number,
            "at": refusal.time,
            "image": image.manifest.name if image else "",
            "image_id": refusal.image_id,
            "peer": refusal.peer,
            "simulated": refusal.simulated,
            "findings": [told(Finding(*finding)) for finding in refusal.findings],
            "evidence": await asyncio.to_thread(_shown, refusal),
            "explanation": digest,
        }
        return json.dumps(document, ensure_ascii=False)

    def _explain_digest(
        self, refusal: StoredRefusal, image: StoredImage | None, others: Sequence[StoredImage]
    ) -> dict[str, Any]:
        """What explains the launch digest that was reported; `text` for people."""
        if refusal.evidence is None:
            return _answer("no evidence is kept of this refusal, so nothing can be compared")
        if refusal.evidence.tee is not Tee.SNP:
            return _answer("a quote's registers are hashes of events: the findings name those that differ")
        try:
            verified = restore(refusal.evidence)
        except MalformedEvidence:
            return _answer("the evidence is not genuine, so what it says of the guest explains nothing")
        assert isinstance(verified, VerifiedSnp)
        reported = verified.report.measurement
        if image is None:
            return _answer("the image is not in this store, so there is nothing to compare with")
        manifest = image.manifest
        if reported == manifest.launch_digest:
            return _answer("the digest is the image's own: what was measured is not why it was refused", found=True)
        for other in others:
            if other.manifest.launch_digest == reported:
                text = f"the digest is that of the image {other.manifest.name!r}: the guest was started with its files"
                return _answer(text, found=True, changes=[{"what": "image", "text": text}])
        return self._tried(reported, image, others)

    def _tried(self, reported: bytes, image: StoredImage, others: Sequence[StoredImage]) -> dict[str, Any]:
        """Compute the digest again with what could differ."""
        recorded = inputs_of(image)
        try:
            current = snp_launch_digest(recorded)
            found = explain_digest(reported, recorded, self._alternatives(image, others))
        except JindiskError as exc:
            return _answer(f"the image's own digest cannot be computed here, so nothing can be compared: {exc}")
        changes = [{"what": change.what, "text": change.text} for change in found.changes]
        text = str(found)
        if current != image.manifest.launch_digest:
            parts = replaced(image)
            stale = (
                f"the image's files measure otherwise than when it was built: {_listed(parts)} changed since; put back "
                "what was built, or build the image again"
            )
            changes[:0] = [{"what": part, "text": stale} for part in parts]
            text = stale if found.found and not found.changes else f"{stale}; then {text}"
        return _answer(text, found=found.found, changes=changes, tried=found.tried, remedy=_remedy(found))

    def _alternatives(self, image: StoredImage, others: Sequence[StoredImage]) -> Alternatives:
        others = [other for other in others if other.manifest.image_id != image.manifest.image_id]
        return Alternatives(
            firmware=self._firmware(),
            kernels=[other.path / other.manifest.kernel.file for other in others],
            initrds=[other.path / other.manifest.initrd.file for other in others],
            cmdlines=[cmdline_of(other) for other in others],
        )

    def _firmware(self) -> list[Path]:
        """Firmware on this host that can carry SEV-SNP guests."""
        configured = self._config.images.firmware
        found = [configured] if configured is not None else []
        for place in self._config.images.firmware_dirs:
            for pattern in PATTERNS:
                for path in sorted(place.glob(pattern)):
                    if len(found) == MAX_FIRMWARE:
                        return found
                    try:
                        if path.resolve() == path and inspect_firmware(path).has_snp_metadata:
                            found.append(path)
                    except (JindiskError, OSError):
                        continue
        return found


def _row(row: Mapping[str, Any]) -> Mapping[str, object]:
    detail = dict(row["detail"])
    findings = detail.pop("findings", [])
    return {
        "number": row["number"],
        "at": microseconds(datetime.fromisoformat(row["time"])),
        "kind": row["kind"],
        "image-id": row["image_id"],
        "peer": row["peer"],
        "guest": detail.pop("guest", ""),
        "simulated": bool(row["simulated"]),
        "measurement": row["measurement"],
        "findings": [f"{found['id']}: {found['text']}" for found in findings],
        "detail": json.dumps(detail, ensure_ascii=False, sort_keys=True),
    }


def replaced(image: StoredImage) -> list[str]:
    """What of an image's measured files is not what was built: `kernel`, `initrd`, `cmdline`, `firmware`."""
    manifest = image.manifest
    files = (
        ("kernel", image.path / manifest.kernel.file, manifest.kernel.sha256),
        ("initrd", image.path / manifest.initrd.file, manifest.initrd.sha256),
        ("cmdline", image.path / manifest.cmdline.file, manifest.cmdline.sha256),
        ("firmware", Path(manifest.shape.firmware), manifest.shape.firmware_sha256),
    )
    found = []
    for what, path, expected in files:
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").digest() != expected:
                found.append(what)
    return found


def _listed(parts: Sequence[str]) -> str:
    names = ["the command line" if part == "cmdline" else f"the {part}" for part in parts]
    return " and ".join(names) or "something that is measured"


def _answer(text: str, **more: Any) -> dict[str, Any]:
    return {"text": text, "found": False, "changes": [], "tried": 0, "remedy": "", **more}


REMEDIES = {
    "vcpus": "start the domain with the number of processors that the image was built for, or build it for this number",
    "cpu_model": "set the domain's processor model to the image's, and never host-passthrough",
    "guest_features": "the host's kernel sets other features: build the image for them, or use a host like the others",
    "firmware": "start the domain with the firmware that the image was built for, or build it for this one",
    "cmdline": "start the domain with the image's own command line, unchanged",
    "kernel": "start the domain with the image's own kernel",
    "initrd": "start the domain with the image's own initrd",
    "kernel_hashes": "set kernelHashes='yes' in the domain's launchSecurity",
}


def _remedy(found: Explanation) -> str:
    if not found.found:
        return "compare the files that the domain was started with, byte for byte, with the image's"
    return "; ".join(REMEDIES[change.what] for change in found.changes)


def _shown(refusal: StoredRefusal) -> dict[str, Any]:
    if refusal.evidence is None:
        return {}
    try:
        return {"tee": refusal.evidence.tee.value, **shown(refusal.evidence)}
    except (MalformedEvidence, ValueError) as exc:
        return {"tee": refusal.evidence.tee.value, "unreadable": str(exc)}
