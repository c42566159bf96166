"""Administration with anything in it: an answer, or an error of ours with its status; never a fault, never a key."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from brokerprocess import DIGEST, IMAGE, KEY, RESOURCE, handed
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jindiskd.base import document
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.broker.admin import Admin
from jindiskd.broker.admin_request import Asked, Caller
from jindiskd.broker.metrics import Metrics
from jindiskd.bus.collection import named
from jindiskd.errors import JindiskError, NotFound
from jindiskd.kbs import jwk
from jindiskd.keys import handover
from jindiskd.keys.audit import Requester
from jindiskd.keys.handover import BrokerCard
from jindiskd.keys.roles import Role
from jindiskd.keys.store import Store
from jindiskd.keys.tokens import Tokens

ME = Caller(who=Requester(peer="user me (0)", measurement=DIGEST), role=Role.MANAGE, local=True)


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    store = Store.open(f"sqlite:///{tmp_path_factory.mktemp('admin')}/keys.db", Secret.random(32))
    private = ec.generate_private_key(ec.SECP256R1())
    card = BrokerCard(spki_sha256=bytes(32), transfer_key=jwk.tee_jwk(private.public_key()))
    made = Admin(store, card, private, Metrics(), lambda: {"allow_simulated": True, "warnings": [], "listen": {}})
    opened = handover.open_(handed(card.transfer_key), private)
    made._registry.register(opened, ME.who)
    yield made
    store.close()


TEXT = st.text(max_size=40) | st.sampled_from([IMAGE, RESOURCE, "web", "", "..", "\0", "x" * 5000, "1", "0", "grant"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
MEMBERS = ("recipient", "policy", "row", "reason", "role", "life_s", "key", "anchor")
BODIES = (
    st.binary(max_size=100)
    | VALUES.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from(MEMBERS), VALUES, max_size=3).map(lambda value: json.dumps(value).encode())
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_asked_is_answered_or_refused(admin: Admin, data: st.DataObject) -> None:
    """Every call with any path, query and body; what is answered has no key in it."""
    route = data.draw(st.sampled_from([r for r in admin._routes if r.method != "DELETE"]))
    parts = tuple(data.draw(TEXT) for _ in range(route.path.groups))
    if "approvals/" in route.path.pattern:
        parts = (str(data.draw(st.integers(0, 10**17))), data.draw(st.sampled_from(["grant", "deny"])))
    query = data.draw(st.dictionaries(st.sampled_from(["limit", "image", "row", "replaces"]), TEXT, max_size=2))
    body = data.draw(BODIES)
    try:
        answer = route.call(Asked(caller=ME, parts=parts, query=query, body=body))
    except JindiskError:
        return
    text = answer if isinstance(answer, str) else json.dumps(answer)
    assert KEY.hex() not in text


def test_every_role_is_asked_for(admin: Admin) -> None:
    """Nothing that changes something is for readers; what lets a key or a right out is for the machine itself."""
    for route in admin._routes:
        if route.method != "GET" and not route.path.pattern.endswith("policy/try"):
            assert route.role is not Role.READ, route.path.pattern
    local = {route.path.pattern for route in admin._routes if route.local}
    assert local == {"/v1/images/([^/]+)/export", "/v1/recovery", "/v1/tokens/([^/]+)"}


def test_tokens_end(admin: Admin, tmp_path: Path) -> None:
    """With their time, and when they are taken away; a database does not have them."""
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    store = Store.open(f"sqlite:///{tmp_path}/keys.db", Secret.random(32), lambda: now[0])
    tokens = Tokens(store.database, store.audit)
    one, two = (tokens.add(name, Role.READ, 60, ME.who) for name in ("one", "two"))
    found = tokens.find(one)
    assert found is not None
    assert found.name == "one"
    assert tokens.find(one[:-1]) is None
    tokens.remove("two", ME.who)
    assert tokens.find(two) is None
    now[0] += timedelta(seconds=61)
    assert tokens.find(one) is None
    store.close()
    data = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert one.encode() not in data


def test_plain_forms_round(admin: Admin) -> None:
    """What `images/X/rules` shows can be put back."""
    show, put = (
        next(r for r in admin._routes if (r.method, r.path.pattern) == (method, pattern))
        for method, pattern in (("GET", "/v1/images/([^/]+)"), ("PUT", "/v1/images/([^/]+)/rules"))
    )
    told: Any = show.call(Asked(caller=ME, parts=("web",), query={}, body=b""))
    body = document.dump(told["rules"])
    again: Any = put.call(Asked(caller=ME, parts=("web",), query={}, body=body))
    assert again["rules"] == told["rules"]


def test_an_identity_goes_before_a_name_that_looks_like_it(admin: Admin) -> None:
    """An image that was named like another's identity is not taken for that, and what is done not done to it."""
    (web,) = admin._store.images()
    first = "0" * 8 + web.image_id[8:]  # sorts before
    admin._store.add_image(first, web.image_id, Platform.SNP, "default/other/root", Secret(b"k" * 32))
    admin._store.add_image("zz", "0", Platform.SNP, "default/third/root", Secret(b"k" * 32))
    assert admin._find(web.image_id).name == "web"
    assert admin._find("web").image_id == web.image_id
    assert admin._find(first).image_id == first
    views = {record.image_id: record for record in reversed(admin._store.images())}
    assert named("image", web.image_id, views, lambda view: view.name).name == "web"
    assert named("image", "0", views, lambda view: view.name).image_id == "zz"
    with pytest.raises(NotFound):
        named("image", "none", views, lambda view: view.name)
