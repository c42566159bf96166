"""Images that come to a store whose owners work at the same time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import ec

from jindiskd.base import document
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.kbs import jwk
from jindiskd.keys import handover
from jindiskd.keys.audit import Requester
from jindiskd.keys.handover import Handover, Opened
from jindiskd.keys.registry import Registry
from jindiskd.keys.store import Store
from jindiskd.policy.rules import ReleaseRules

OLD, NEW = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
BY = Requester(peer="a person")


def opened(image_id: str, name: str = "web") -> Opened:
    resource = f"default/{image_id}/root"
    told = Handover(
        image_id=image_id,
        name=name,
        platform=Platform.SNP,
        resource=resource,
        launch_digests=(bytes(48),),
        created="2026-01-01T00:00:00+00:00",
    )
    return Opened(handover=told, keys={resource: Secret(b"k" * 32)}, anchors={})


def test_rules_that_change_while_an_image_is_replaced_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who makes them stricter, and comes first, is not undone by whoever imports the next build."""
    store = Store.open(f"sqlite:///{tmp_path}/keys.db", Secret.random(32))
    registry = Registry(store)
    registry.register(opened(OLD), BY)
    strict = replace(ReleaseRules(), approval=True)
    write, others = store.database.write, [lambda: store.set_rules(OLD, strict)]

    @contextlib.contextmanager
    def behind_others() -> Iterator[sa.Connection]:
        while others:
            others.pop()()
        with write() as connection:
            yield connection

    monkeypatch.setattr(store.database, "write", behind_others)
    record = registry.register(opened(NEW), BY, replaces=OLD)
    assert record.rules == store.image(OLD).rules == strict
    store.close()


def test_an_image_that_was_replaced_can_still_be_handed_on(tmp_path: Path) -> None:
    """Under its new name, however long the old one was: one that could not be read ended a recovery copy of all."""
    store = Store.open(f"sqlite:///{tmp_path}/keys.db", Secret.random(32))
    registry, name = Registry(store), "w" * 63
    registry.register(opened(OLD, name), BY)
    registry.register(opened(NEW, name), BY, replaces=OLD)
    recipient = jwk.tee_jwk(ec.generate_private_key(ec.SECP256R1()).public_key())
    for image_id in (OLD, NEW):
        told = registry.export(image_id, recipient, BY)
        assert handover.read(document.dump(told)).image_id == image_id
    store.close()
