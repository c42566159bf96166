"""Images that come to a store whose owners work at the same time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.keys.audit import Requester
from jindiskd.keys.handover import Handover, Opened
from jindiskd.keys.registry import Registry
from jindiskd.keys.store import Store
from jindiskd.policy.rules import ReleaseRules

OLD, NEW = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
BY = Requester(peer="a person")


def opened(image_id: str) -> Opened:
    resource = f"default/{image_id}/root"
    told = Handover(
        image_id=image_id,
        name="web",
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
