"""Guests at the broker: real TLS, real verification of simulated reports, each refusal with its reason."""

import base64
import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from brokerbench import DIGEST, IMAGE, KEY, OTHER, REQUEST, Bench, bench

from jindiskd.broker.service import BrokerLimits
from jindiskd.kbs.client import BrokerNotTrusted, BrokerRefused, BrokerUnreachable
from jindiskd.keys.store import KeyState
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot


async def test_a_good_guest_gets_its_key_and_the_audit_says_so_before(root: SimulatedRoot, tmp_path: Path) -> None:
    """The key arrives unaltered, newline, NUL and all; the audit says that the platform was simulated."""
    async with bench(root, tmp_path) as b:
        assert await b.fetch() == KEY
        assert [event.kind for event in b.events] == ["challenged", "attested", "released"]
        row = b.store.audit_rows()[-1]
        said = (row["kind"], row["image_id"], row["simulated"], row["measurement"])
        assert said == ("released", IMAGE, True, DIGEST.hex())
        assert b.store.verify_audit()[0] == len(b.store.audit_rows())


async def test_another_launch_digest_is_refused(root: SimulatedRoot, tmp_path: Path) -> None:
    """One changed byte of kernel, initrd or command line is another digest."""
    async with bench(root, tmp_path) as b:
        b.firmware = SimulatedSnpFirmware(root, bytes([1]) + DIGEST[1:])
        with pytest.raises(BrokerRefused) as refused:
            await b.fetch()
        assert refused.value.kind == "PolicyDeny"
        assert any("measurement" in finding for finding in b.last_findings())


async def test_another_images_key_is_refused(root: SimulatedRoot, tmp_path: Path) -> None:
    """A guest that measures well still gets no key but its own domain's image's."""
    async with bench(root, tmp_path) as b:
        with pytest.raises(BrokerRefused):
            await b.fetch(OTHER)
        assert "peer.image" in b.last_findings()


async def test_a_revoked_image_gets_nothing_until_it_is_reinstated(root: SimulatedRoot, tmp_path: Path) -> None:
    """Revocation counts at once."""
    async with bench(root, tmp_path) as b:
        b.store.revoke(IMAGE)
        assert b.store.image(IMAGE).state is KeyState.REVOKED
        with pytest.raises(BrokerRefused):
            await b.fetch()
        assert "key.state" in b.last_findings()
        b.store.reinstate(IMAGE)
        assert await b.fetch() == KEY


async def test_simulation_must_be_configured(root: SimulatedRoot, tmp_path: Path) -> None:
    """A broker that does not allow simulated platforms refuses them, even with their root among its own."""
    async with bench(root, tmp_path, allow_simulated=False) as b:
        with pytest.raises(BrokerRefused):
            await b.fetch()


async def test_a_root_that_is_not_configured_is_refused(root: SimulatedRoot, tmp_path: Path) -> None:
    """Anybody can make a root with the same names."""
    async with bench(root, tmp_path) as b:
        b.firmware = SimulatedSnpFirmware(SimulatedRoot.generate(now=datetime.now(UTC)), DIGEST)
        with pytest.raises(BrokerRefused) as refused:
            await b.fetch()
        assert refused.value.kind == "AttestationError"


async def test_a_replayed_report_is_refused(root: SimulatedRoot, tmp_path: Path) -> None:
    """A report made for an earlier nonce and key binds neither of the present session."""
    async with bench(root, tmp_path) as b:
        kept: list[Mapping[str, Any]] = []

        def keep(report_data: bytes) -> Mapping[str, Any]:
            kept.append(b.evidence(report_data))
            return kept[-1]

        assert await b.fetch(evidence=keep) == KEY
        with pytest.raises(BrokerRefused):
            await b.fetch(evidence=lambda _fresh: kept[0])
        assert any("report_data" in finding for finding in b.last_findings())


async def test_a_broker_with_another_key_is_sent_nothing(root: SimulatedRoot, tmp_path: Path) -> None:
    """The guest checks the pin before it speaks."""
    async with bench(root, tmp_path) as b:
        with pytest.raises(BrokerNotTrusted):
            await b.fetch(pin=bytes(32))
        assert b.events == []


async def test_an_absent_broker_is_given_up_in_time(root: SimulatedRoot, tmp_path: Path) -> None:
    """The deadline bounds everything."""
    made = Bench(root, tmp_path)
    begun = time.monotonic()
    with pytest.raises(BrokerUnreachable):
        await made.fetch(within_s=1.0)
    assert time.monotonic() - begun < 30
    made.store.close()


HOSTILE = [
    b"\x00" * 1000,
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n[]",
    b"POST /kbs/v0/attest HTTP/1.1\r\nHost: x\r\nCookie: kbs-session-id=" + b"0" * 32
    + b"\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n\r\n" + b"x" * (3 << 20),
    b"GET /kbs/v0/resource/default/" + OTHER.encode() + b"/root HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /kbs/v0/resource/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /kbs/v0/resource/a/b/c HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
]


@pytest.mark.parametrize("request_bytes", HOSTILE, ids=range(len(HOSTILE)))
async def test_hostile_requests_get_nothing_and_hurt_nobody(
    root: SimulatedRoot, tmp_path: Path, request_bytes: bytes
) -> None:
    """Whatever is sent, no 200 comes back, and the next guest is served."""
    async with bench(root, tmp_path) as b:
        answer = await b.raw(request_bytes)
        assert b" 200 " not in answer.split(b"\r\n", 1)[0]
        assert b"Traceback" not in answer
        assert await b.fetch() == KEY


async def test_sessions_are_limited_and_end(root: SimulatedRoot, tmp_path: Path) -> None:
    """A guest that opens sessions without end is stopped, and served again when they have expired."""
    clock = [0.0]
    limits = BrokerLimits(sessions_per_peer=3, session_lifetime_s=60)
    async with bench(root, tmp_path, limits=limits, monotonic=lambda: clock[0]) as b:
        request = b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(REQUEST) + REQUEST
        answers = [await b.raw(request) for _ in range(4)]
        assert [b" 200 " in answer for answer in answers] == [True, True, True, False]
        clock[0] = 61.0
        assert await b.fetch() == KEY


async def test_another_protocol_version_is_told_both_versions(root: SimulatedRoot, tmp_path: Path) -> None:
    """The text is how clients probe a broker's version."""
    async with bench(root, tmp_path) as b:
        body = b'{"version":"0.3.0","tee":"snp","extra-params":""}'
        answer = await b.raw(b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert b"401" in answer.split(b"\r\n", 1)[0]
        assert b"expect =0.4.0 while the request is 0.3.0" in answer


async def test_the_key_is_nowhere_in_clear(
    root: SimulatedRoot, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not in the database with its journal, not in what was logged, printed or answered; nor is the KEK."""
    caplog.set_level(logging.DEBUG)
    async with bench(root, tmp_path) as b:
        assert await b.fetch() == KEY
        with pytest.raises(BrokerRefused):
            await b.fetch(OTHER)
        cookie, token, _ = await b.attested()
        answers = [token.encode()]
        answers += [
            (await b.ask("GET", f"/kbs/v0/resource/default/{image}/root", cookie=cookie))[2]
            for image in (IMAGE, OTHER, "nobody")
        ]
        said = (caplog.text + "".join(capfd.readouterr())).encode() + b"".join(answers)
        said += b.broker.metrics.render().encode()
        for file in tmp_path.iterdir():
            if file.is_file():
                said += file.read_bytes()
        assert b"1111" in said, "nothing was collected"
        for secret in (KEY, bytes(b.kek.reveal())):
            forms = [secret, secret[:24], secret.hex().encode(), base64.b64encode(secret)[:40]]
            forms += [base64.urlsafe_b64encode(secret)[:40], repr(secret).encode()]
            assert not any(form in said for form in forms)
