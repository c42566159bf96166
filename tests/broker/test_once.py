"""A nonce counts once, and a message that can be read in two ways is not read at all."""

import asyncio
from pathlib import Path

from brokerbench import REQUEST, bench

from jindiskd.sim.pki import SimulatedRoot


async def test_a_session_is_attested_once(root: SimulatedRoot, tmp_path: Path) -> None:
    """The very body that was accepted is refused when it is sent again in its session."""
    async with bench(root, tmp_path) as b:
        cookie, nonce = await b.session()
        body = b.attestation(nonce)
        assert (await b.ask("POST", "/kbs/v0/attest", body, cookie=cookie))[0] == 200
        assert (await b.ask("POST", "/kbs/v0/attest", body, cookie=cookie))[0] == 401


async def test_of_attestations_at_the_same_time_one_is_judged(root: SimulatedRoot, tmp_path: Path) -> None:
    """However many connections race for one nonce."""
    async with bench(root, tmp_path) as b:
        cookie, nonce = await b.session()
        body = b.attestation(nonce)
        asked = [b.ask("POST", "/kbs/v0/attest", body, cookie=cookie) for _ in range(6)]
        assert sorted(status for status, _, _ in await asyncio.gather(*asked)) == [200] + 5 * [401]


async def test_a_body_of_one_session_is_refused_in_another(root: SimulatedRoot, tmp_path: Path) -> None:
    """A replayed /attest: the nonce in it is not this session's."""
    async with bench(root, tmp_path) as b:
        cookie, nonce = await b.session()
        body = b.attestation(nonce)
        assert (await b.ask("POST", "/kbs/v0/attest", body, cookie=cookie))[0] == 200
        other, _ = await b.session()
        assert (await b.ask("POST", "/kbs/v0/attest", body, cookie=other))[0] == 401
        assert b.last_findings() == ["session.nonce"]


async def test_a_member_that_stands_twice_is_refused(root: SimulatedRoot, tmp_path: Path) -> None:
    """Also where both say the same; and the nonce is spent by the attempt."""
    async with bench(root, tmp_path) as b:
        doubled = REQUEST.replace(b'"tee":"snp"', b'"tee":"snp","tee":"snp"')
        assert (await b.ask("POST", "/kbs/v0/auth", doubled))[0] == 401
        cookie, nonce = await b.session()
        body = b.attestation(nonce)
        twice = body.replace(b'"init-data": null', b'"init-data": null, "init-data": null')
        assert twice != body
        assert (await b.ask("POST", "/kbs/v0/attest", twice, cookie=cookie))[0] == 401
        assert (await b.ask("POST", "/kbs/v0/attest", body, cookie=cookie))[0] == 401
