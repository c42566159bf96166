"""What a host sends of an SEV launch: read strictly, and answered whatever it is."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sev_place import IMAGE, POLICY, Place, cookie_of, report

from jindiskd.broker.sev import HostPlatform
from jindiskd.broker.sev_messages import (
    BeginRequest,
    dump_approve,
    parse_approve,
    parse_begin,
)
from jindiskd.broker.sev_remote import LaunchForgotten
from jindiskd.kbs.client import BrokerRefused
from jindiskd.kbs.messages import MalformedMessage
from jindiskd.sim.sev_platform import CPU_ID, SevPlatformKeys


def good(keys: SevPlatformKeys) -> dict[str, dict[str, Any]]:
    host = HostPlatform(pdh=keys.pdh, chain=keys.chain, cpu_id=CPU_ID)
    return {
        "sev-begin": json.loads(BeginRequest(image_id=IMAGE, policy=POLICY, host=host).dump()),
        "sev-approve": json.loads(dump_approve(report(bytes(48)))),
    }


def test_both_messages_read_as_they_were_written(keys: SevPlatformKeys) -> None:
    """And nothing but exactly that is read: members, types, lengths, ranges."""
    told = good(keys)
    assert parse_begin(json.dumps(told["sev-begin"]).encode()).host.pdh == keys.pdh
    assert parse_approve(json.dumps(told["sev-approve"]).encode()) == report(bytes(48))
    for verb, parse in (("sev-begin", parse_begin), ("sev-approve", parse_approve)):
        for name in told[verb]:
            for value in (None, "", [], {}, -1, 1 << 40, True, "\0", "=", "A!" * 9, 1.5):
                with pytest.raises(MalformedMessage):
                    parse(json.dumps({**told[verb], name: value}).encode())
            with pytest.raises(MalformedMessage):
                parse(json.dumps({n: v for n, v in told[verb].items() if n != name}).encode())
        with pytest.raises(MalformedMessage):
            parse(json.dumps({**told[verb], "more": 1}).encode())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_long_and_altered_messages(keys: SevPlatformKeys, data: st.DataObject) -> None:
    """Whatever a host sends is read or refused, and nothing else."""
    verb, parse = data.draw(st.sampled_from([("sev-begin", parse_begin), ("sev-approve", parse_approve)]))
    body = bytearray(json.dumps(good(keys)[verb]).encode())
    place = data.draw(st.integers(0, len(body)))
    body[place:place] = data.draw(st.binary(max_size=64))
    del body[data.draw(st.integers(0, len(body))) :]
    with contextlib.suppress(MalformedMessage):
        parse(bytes(body))


async def test_bad_messages_cost_an_answer(place: Place, keys: SevPlatformKeys) -> None:
    """Over the wire: too long, cut, none at all. A launch whose measurement could not be read is not judged again."""
    async with place.listening() as owner:
        for body in (b"", b"{}", b"{" * 1000, b" " * (17 << 10), json.dumps(good(keys)["sev-begin"]).encode()[:-9]):
            with pytest.raises(BrokerRefused) as caught:
                await place.raw("sev-begin", body)
            assert caught.value.kind == "SerdeError"
        turn, _launch, told = await place.measured(owner)
        with pytest.raises(BrokerRefused) as caught:
            await place.raw("sev-approve", b"{}", cookie_of(turn))
        assert caught.value.kind == "SerdeError"
        with pytest.raises(LaunchForgotten):
            await turn.approve(told)
    assert place.kinds() == []
