"""Administration of a broker over HTTP: by a socket of its machine, or over TLS with a token.

JSON in and out below `/v1`; keys never leave but sealed to a recipient (`keys.handover`). Errors are
`{"error": code, "message": sentence}` with the codes of the error tree. Every change is in the audit log under the name
of who made it.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from operator import attrgetter
from typing import Any

import structlog
from aiohttp import web

import jindiskd
from jindiskd.base import document
from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.broker.admin_request import Answer, Asked, Call, Caller, Route
from jindiskd.broker.http import Handler, body_of
from jindiskd.broker.metrics import CONTENT_TYPE, Metrics
from jindiskd.broker.peer import LOCAL_LIMITS, Peer
from jindiskd.broker.refused import decided_again, explained
from jindiskd.broker.refused import told as with_remedy
from jindiskd.errors import (
    EXIT_BUSY,
    EXIT_NOT_AUTHORIZED,
    EXIT_NOT_FOUND,
    EXIT_UNAVAILABLE,
    EXIT_USAGE,
    InvalidArgument,
    JindiskError,
    NotAuthorized,
    NotFound,
)
from jindiskd.kbs.jwe import PrivateKey
from jindiskd.kbs.messages import MAX_BODY_BYTES, MalformedMessage
from jindiskd.keys import handover
from jindiskd.keys.audit import Requester
from jindiskd.keys.handover import BrokerCard
from jindiskd.keys.registry import Registry
from jindiskd.keys.roles import Role
from jindiskd.keys.store import ImageRecord, Store
from jindiskd.keys.tokens import TokenRecord, Tokens
from jindiskd.keys.volumes import VolumeRecord, Volumes
from jindiskd.policy import form
from jindiskd.policy import rules as release_rules

log = structlog.get_logger(__name__)
PREFIX = "/v1"
MOST_ROWS = 10_000
WARNING_S = 10.0
TOKEN_LIFE_S = 90 * 86400
STATUSES = {EXIT_NOT_FOUND: 404, EXIT_USAGE: 400, EXIT_BUSY: 409, EXIT_NOT_AUTHORIZED: 403, EXIT_UNAVAILABLE: 503}


class Admin:
    """Answers administrators. The calls block and run in threads.

    Args:
        store: of the broker.
        card: of the broker.
        transfer_key: the private half of the card's key.
        metrics: the broker's, to be shown.
        facts: what `status` tells besides.
    """

    def __init__(
        self,
        store: Store,
        card: BrokerCard,
        transfer_key: PrivateKey,
        metrics: Metrics,
        facts: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Answer nothing yet."""
        self.limits, self.metrics = LOCAL_LIMITS, Metrics()  # its own connections are not counted with the guests'
        self._store, self._card, self._transfer_key = store, card, transfer_key
        self._shown, self._facts = metrics, facts
        self._registry, self._volumes = Registry(store), Volumes(store)
        self._tokens = Tokens(store.database, store.audit)
        self._next_warning = 0.0
        self._routes = tuple(self._table())

    def _table(self) -> list[Route]:
        image, read, approve, manage = r"images/([^/]+)", Role.READ, Role.APPROVE, Role.MANAGE
        rows: list[tuple[str, str, Role, bool, Call]] = [
            ("GET", "status", read, False, self._status),
            ("GET", "card", read, False, lambda _: document.to_plain(self._card)),
            ("GET", "metrics", read, False, lambda _: self._shown.render()),
            ("GET", "images", read, False, self._images),
            ("POST", "images", manage, False, self._register),
            ("GET", image, read, False, lambda a: self._image(self._find(a.parts[0]), full=True)),
            ("DELETE", image, manage, False, self._forget),
            ("POST", rf"{image}/rotate", manage, False, self._rotate),
            ("POST", rf"{image}/revoke", manage, False, lambda a: self._state(a, self._store.revoke)),
            ("POST", rf"{image}/reinstate", manage, False, lambda a: self._state(a, self._store.reinstate)),
            ("PUT", rf"{image}/rules", manage, False, self._set_rules),
            ("GET", rf"{image}/policy", read, False, lambda a: {"policy": form.write(self._find(a.parts[0]).rules)}),
            ("PUT", rf"{image}/policy", manage, False, self._set_policy),
            ("POST", rf"{image}/export", manage, True, self._export),
            ("PUT", rf"{image}/keys/([^/]+(?:/[^/]+/[^/]+)?)", manage, False, self._add_key),
            ("DELETE", rf"{image}/keys/([^/]+(?:/[^/]+/[^/]+)?)", manage, False, self._remove_key),
            ("PUT", rf"{image}/volumes/([^/]+)", manage, False, self._add_volume),
            ("POST", r"volumes/([^/]+)/accept-rollback", manage, False, self._accept_rollback),
            ("POST", rf"{image}/policy/try", read, False, self._try_policy),
            ("GET", "refusals", read, False, self._refusal),
            ("GET", "approvals", read, False, self._approvals),
            ("POST", r"approvals/([0-9]{1,18})/(grant|deny)", approve, False, self._decide),
            ("GET", "audit", read, False, self._audit),
            ("GET", "audit/verify", read, False, self._verify),
            ("GET", "recovery", read, False, lambda _: {"set": self._registry.recovery_key() is not None}),
            ("PUT", "recovery", manage, True, self._set_recovery),
            ("POST", "recovery/copy", manage, False, self._recovery_copy),
            ("GET", "tokens", manage, False, lambda _: {"tokens": [asdict(t) for t in self._tokens.list()]}),
            ("PUT", r"tokens/([^/]+)", manage, True, self._add_token),
            ("DELETE", r"tokens/([^/]+)", manage, False, self._remove_token),
        ]
        return [
            Route(method=method, path=re.compile(f"{PREFIX}/{path}"), role=role, local=local, call=call)
            for method, path, role, local, call in rows
        ]

    def handler(self, peer: Peer) -> Handler:
        """What answers the requests of one peer; whether it is a local one is in the peer."""

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            try:
                return await self._answer(request, peer)
            except MalformedMessage as exc:
                return _error("InvalidArgument", str(exc), 400)
            except JindiskError as exc:
                return _error(exc.code, str(exc), STATUSES.get(exc.exit_code, 422))
            except ConnectionError:
                pass
            except Exception as exc:  # whatever it is, the journal has it and the caller its name alone
                log.error("fault in administration", who=peer.description, problem=type(exc).__name__)
                log.debug("fault in administration", exc_info=exc)
            return _error("Internal", "internal error: see the broker's journal", 500)

        return handle

    async def _answer(self, request: web.BaseRequest, peer: Peer) -> web.Response:
        caller = await self._caller(request, peer)
        known = False
        for route in self._routes:
            found = route.path.fullmatch(request.path)
            known = known or found is not None
            if found is None or route.method != request.method:
                continue
            if not caller.role.allows(route.role):
                raise NotAuthorized(f"what needs the role {route.role}; {caller.who.peer} has {caller.role}")
            if route.local and not caller.local:
                raise NotAuthorized("what is possible by the socket of the broker's machine alone")
            body = b"" if request.method == "GET" else await body_of(request, MAX_BODY_BYTES)
            asked = Asked(caller=caller, parts=found.groups(), query=request.query, body=body)
            answer = await asyncio.to_thread(route.call, asked)
            if request.method != "GET":
                log.info("administration", who=caller.who.peer, what=f"{request.method} {request.path}")
            if isinstance(answer, str):
                return web.Response(body=answer.encode(), headers={"Content-Type": CONTENT_TYPE})
            return web.json_response(answer)
        if known:
            return _error("NotSupported", f"{request.method} is not possible there", 405)
        raise NotFound("path", request.path[:200])

    async def _caller(self, request: web.BaseRequest, peer: Peer) -> Caller:
        if peer.local:
            return Caller(who=Requester(peer=peer.description), role=Role.MANAGE, local=True)
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        found: TokenRecord | None = None
        if kind.lower() == "bearer" and 0 < len(token) <= 200:
            found = await asyncio.to_thread(self._tokens.find, token.strip())
        if found is None:
            now = time.monotonic()
            if now >= self._next_warning:  # whoever tries must not fill the log
                self._next_warning = now + WARNING_S
                log.warning("administration refused: no token, or none that counts", who=peer.description)
            raise NotAuthorized("administration: the token is missing, unknown or over")
        return Caller(who=Requester(peer=f"token {found.name}, {peer.description}"), role=found.role, local=False)

    # Calls

    def _find(self, name: str) -> ImageRecord:
        """An image by its identity, or else by its name: whoever built another may have named it like this one's id."""
        records = self._store.images()
        for of in (attrgetter("image_id"), attrgetter("name")):
            for record in records:
                if of(record) == name:
                    return record
        raise NotFound("image", name)

    def _image(self, record: ImageRecord, *, full: bool = False) -> dict[str, Any]:
        told: dict[str, Any] = {
            "image_id": record.image_id,
            "name": record.name,
            "platform": record.platform.value,
            "simulated": record.platform.simulated,
            "state": record.state.value,
            "resource": record.resource,
            "launch_digests": [digest.hex() for digest in record.launch_digests],
            "created": record.created,
        }
        if full:
            told["rules"] = document.to_plain(record.rules)
            told["rules_digest"] = record.rules.digest
            told["keys"] = [asdict(key) for key in self._registry.keys(record.image_id)]
            mine = [volume for volume in self._volumes.list() if volume.image_id == record.image_id]
            told["volumes"] = [_volume(volume, record) for volume in mine]
        return told

    def _status(self, _asked: Asked) -> Answer:
        images = self._store.images()
        return {
            "version": jindiskd.__version__,
            "spki_sha256": self._card.spki_sha256.hex(),
            "images": len(images),
            "images_simulated": sum(record.platform.simulated for record in images),
            "approvals_waiting": sum(not approval.granted for approval in self._store.approvals.list()),
            "recovery_key": self._registry.recovery_key() is not None,
            "database": "postgresql" if self._store.database.shared else "sqlite",
            **self._facts(),
        }

    def _images(self, _asked: Asked) -> Answer:
        return {"images": [self._image(record) for record in self._store.images()]}

    def _register(self, asked: Asked) -> Answer:
        opened = handover.open_(handover.read(asked.body), self._transfer_key)
        try:
            if opened.handover.amends is not None:
                return self._image(self._registry.amend(opened, asked.caller.who), full=True)
            name = asked.query.get("replaces")
            replaces = self._find(name).image_id if name else None
            return self._image(self._registry.register(opened, asked.caller.who, replaces=replaces), full=True)
        finally:
            opened.close()

    def _rotate(self, asked: Asked) -> Answer:
        record, told = self._find(asked.parts[0]), handover.read(asked.body)
        if told.image_id != record.image_id:
            raise InvalidArgument("the handover of image", told.image_id, f"it must be of {record.image_id}")
        opened = handover.open_(told, self._transfer_key)
        try:
            return self._image(self._registry.rotate(opened, asked.caller.who), full=True)
        finally:
            opened.close()

    def _forget(self, asked: Asked) -> Answer:
        self._store.forget(self._find(asked.parts[0]).image_id, asked.caller.who)
        return {}

    def _state(self, asked: Asked, change: Callable[[str, Requester], None]) -> Answer:
        record = self._find(asked.parts[0])
        change(record.image_id, asked.caller.who)
        return self._image(self._store.image(record.image_id))

    def _set_rules(self, asked: Asked) -> Answer:
        record = self._find(asked.parts[0])
        self._store.set_rules(record.image_id, release_rules.load(asked.body), asked.caller.who)
        return self._image(self._store.image(record.image_id), full=True)

    def _set_policy(self, asked: Asked) -> Answer:
        record = self._find(asked.parts[0])
        self._store.set_rules(record.image_id, form.read(asked.body), asked.caller.who)
        return self._image(self._store.image(record.image_id), full=True)

    def _try_policy(self, asked: Asked) -> Answer:
        record = self._find(asked.parts[0])
        given = asked.members(policy=str, row=int)
        rules = form.read(given["policy"]) if "policy" in given else record.rules
        row = given.get("row")
        refusal = self._store.refusals.find(number=row, image_id=None if row is not None else record.image_id)
        allowed, now = bool(self._facts()["allow_simulated"]), self._store.database.now()
        findings = decided_again(refusal, record, rules, allow_simulated=allowed, now=now)
        return {"row": refusal.number, "findings": [with_remedy(finding) for finding in findings]}

    def _refusal(self, asked: Asked) -> Answer:
        image = asked.query.get("image")
        row = _number(asked.query["row"]) if "row" in asked.query else None
        image_id = self._find(image).image_id if image else None
        return dict(explained(self._store.refusals.find(number=row, image_id=image_id)))

    def _export(self, asked: Asked) -> Answer:
        record = self._find(asked.parts[0])
        told = asked.members(recipient=dict)
        recipient = {str(name): str(value) for name, value in told.get("recipient", {}).items()}
        return dict(document.to_plain(self._registry.export(record.image_id, recipient, asked.caller.who)))

    def _add_key(self, asked: Asked) -> Answer:
        record = self._find(asked.parts[0])
        with Secret(asked.body) as key:
            self._registry.add_key(record.image_id, _resource(record, asked.parts[1]), key, asked.caller.who)
        return self._image(self._store.image(record.image_id), full=True)

    def _remove_key(self, asked: Asked) -> Answer:
        record = self._find(asked.parts[0])
        self._registry.remove_key(record.image_id, _resource(record, asked.parts[1]), asked.caller.who)
        return self._image(self._store.image(record.image_id), full=True)

    def _add_volume(self, asked: Asked) -> Answer:
        record = self._find(asked.parts[0])
        told = asked.members(key=str, anchor=str)
        anchor = None
        if told.get("anchor"):
            try:
                anchor = Anchor.unpack(bytes.fromhex(told["anchor"]))
            except ValueError as exc:
                raise InvalidArgument("anchor", told["anchor"][:200], "it is 73 bytes, hexadecimal") from exc
        resource = _resource(record, told["key"]) if told.get("key") else None
        self._volumes.add(asked.parts[1], record.image_id, anchor, resource=resource, by=asked.caller.who)
        return self._image(self._store.image(record.image_id), full=True)

    def _accept_rollback(self, asked: Asked) -> Answer:
        reason = asked.members(reason=str).get("reason", "")
        if not reason or len(reason) > 500:
            raise InvalidArgument("reason", reason[:100], "say in 1 to 500 characters why an older state is right")
        self._volumes.accept_rollback(asked.parts[0], reason, asked.caller.who)
        return {}

    def _approvals(self, _asked: Asked) -> Answer:
        return {"approvals": [asdict(approval) for approval in self._store.approvals.list()]}

    def _decide(self, asked: Asked) -> Answer:
        approvals = self._store.approvals
        change = approvals.grant if asked.parts[1] == "grant" else approvals.deny
        change(int(asked.parts[0]), asked.caller.who)
        return {}

    def _audit(self, asked: Asked) -> Answer:
        limit, image = _number(asked.query.get("limit", "100")), asked.query.get("image")
        if limit > MOST_ROWS:
            raise InvalidArgument("limit", limit, f"it is 1 to {MOST_ROWS}")
        image_id = self._find(image).image_id if image else None
        return {"rows": self._store.audit_rows(limit, image_id)}

    def _verify(self, _asked: Asked) -> Answer:
        count, head = self._store.verify_audit()
        return {"rows": count, "head": head}

    def _set_recovery(self, asked: Asked) -> Answer:
        self._registry.set_recovery_key(asked.body, asked.caller.who)
        return {"set": True}

    def _recovery_copy(self, asked: Asked) -> Answer:
        return {"handovers": [document.to_plain(copy) for copy in self._registry.recovery_copy(asked.caller.who)]}

    def _add_token(self, asked: Asked) -> Answer:
        told = asked.members(role=str, life_s=int)
        roles = [role.value for role in Role]
        if told.get("role", Role.READ) not in roles:
            raise InvalidArgument("role", told["role"][:50], f"it is one of {', '.join(roles)}")
        role = Role(told.get("role", Role.READ))
        return {"token": self._tokens.add(asked.parts[0], role, told.get("life_s", TOKEN_LIFE_S), asked.caller.who)}

    def _remove_token(self, asked: Asked) -> Answer:
        self._tokens.remove(asked.parts[0], asked.caller.who)
        return {}


def _number(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,17}", text):
        raise InvalidArgument("number", text[:20], "it is a whole number from 1 on")
    return int(text)


def _resource(record: ImageRecord, name: str) -> str:
    """The resource of a further key: a name beside the root's, or a whole path."""
    return name if "/" in name else f"{record.resource.rsplit('/', 1)[0]}/{name}"


def _volume(volume: VolumeRecord, record: ImageRecord) -> dict[str, Any]:
    anchor = volume.anchor
    return {
        "volume": volume.volume,
        "resource": volume.resource or record.resource,
        "sequence": anchor.sequence if anchor else None,
        "open": bool(anchor and anchor.open),
        "released": volume.pending,
        "accept_any": volume.accept_any,
    }


def _error(code: str, message: str, status: int) -> web.Response:
    body = json.dumps({"error": code, "message": message})
    return web.Response(status=status, text=body, content_type="application/json")
