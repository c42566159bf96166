"""Many guests at once, each a task: real TLS, real reports, each request to one broker or another, as it comes."""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from jindiskd.kbs import jwe, jwk
from jindiskd.kbs.binding import report_data
from jindiskd.kbs.evidence import snp_to_json
from jindiskd.sim.firmware import SimulatedSnpFirmware

REQUEST = {"version": "0.4.0", "tee": "snp", "extra-params": ""}
REQUEST_S = 240.0


class Away(Exception):
    """No answer, or one that says to try again."""


class Denied(Exception):
    """A final answer."""


@dataclass(slots=True)
class Guest:
    """What became of one guest."""

    number: int
    key: bytes = b""
    denied: str = ""
    attempts: int = 0
    crossed: int = 0
    """Sessions in which more than one broker answered."""
    doubled: int = 0
    """Attestations that were sent twice at once."""
    accepted: list[int] = field(default_factory=list)
    """For each of these, how many were accepted."""
    seconds: float = 0.0


class Crowd:
    """Guests of one image.

    Args:
        ports: of the brokers; one that is away is found out by asking.
        pin: what all of them have.
        firmware: makes the reports.
        resource: what is asked for.
        at_once: connections open at the same time.
    """

    def __init__(
        self,
        ports: Sequence[int],
        pin: bytes,
        firmware: SimulatedSnpFirmware,
        resource: str,
        *,
        at_once: int = 400,
        seed: int = 1,
    ) -> None:
        self.ports, self.pin, self.firmware, self.resource = list(ports), pin, firmware, resource
        self.table = firmware.certificate_table()
        self.random = random.Random(seed)
        self.doors = asyncio.Semaphore(at_once)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.check_hostname, self.context.verify_mode = False, ssl.CERT_NONE
        self.served = 0
        self._awaited: dict[int, asyncio.Event] = {}

    async def reached(self, count: int) -> None:
        """Wait until so many guests are served."""
        event = self._awaited.setdefault(count, asyncio.Event())
        if self.served < count:
            await event.wait()

    async def ask(
        self, port: int, method: str, path: str, body: bytes = b"", cookie: str = ""
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own: status, headers, body."""
        try:
            async with self.doors, asyncio.timeout(REQUEST_S):
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, ssl=self.context, ssl_handshake_timeout=REQUEST_S
                )
                try:
                    self._check(writer)
                    lines = [f"{method} /kbs/v0/{path} HTTP/1.1", "Host: x", "Connection: close"]
                    lines += [f"Content-Length: {len(body)}", *([f"Cookie: {cookie}"] if cookie else [])]
                    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
                    answer = await reader.read(1 << 20)
                    while more := await reader.read(1 << 20):
                        answer += more
                finally:
                    writer.transport.abort()
        except (OSError, TimeoutError, EOFError) as exc:
            raise Away(type(exc).__name__) from exc
        head, _, rest = answer.partition(b"\r\n\r\n")
        first, *fields = head.decode("latin-1").split("\r\n")
        if not first.startswith("HTTP/1.1 "):
            raise Away("no answer")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in fields)}
        if len(rest) != int(headers.get("content-length", "0")):
            raise Away("half an answer")
        return int(first.split()[1]), headers, rest

    def _check(self, writer: asyncio.StreamWriter) -> None:
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        key = x509.load_der_x509_certificate(der).public_key()
        spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        assert hashlib.sha256(spki).digest() == self.pin, "another broker"

    async def ok(self, *words: Any, **more: Any) -> tuple[dict[str, str], bytes]:
        """As `ask`, for a guest that knows the protocol's errors."""
        status, headers, body = await self.ask(*words, **more)
        if status == 200:
            return headers, body
        kind = str(json.loads(body)["type"]).rsplit("/", 1)[-1]
        if kind == "PolicyDeny":
            raise Denied(kind)
        raise Away(kind)

    async def attempt(self, guest: Guest, digest: bytes, report_id: bytes) -> bytes:
        """Attest and fetch once, each step at a broker of its own choice."""
        picked = [self.random.choice(self.ports) for _ in range(3)]
        headers, body = await self.ok(picked[0], "POST", "auth", json.dumps(REQUEST).encode())
        cookie, nonce = headers["set-cookie"].split(";")[0], json.loads(body)["nonce"]
        key = ec.generate_private_key(ec.SECP256R1())
        public = jwk.tee_jwk(key.public_key())
        template = replace(
            self.firmware.template,
            measurement=digest,
            report_id=report_id,
            report_data=report_data(nonce, public),
        )
        evidence = snp_to_json(self.firmware.sign(template), self.table)
        told = {
            "init-data": None,
            "runtime-data": {"nonce": nonce, "tee-pubkey": public},
            "tee-evidence": {"primary_evidence": evidence, "additional_evidence": ""},
        }
        sent = json.dumps(told).encode()
        if guest.number % 10 == 0:
            # The same to two brokers at once: one of them at most may accept it.
            guest.doubled += 1
            both = [self.ask(self.random.choice(self.ports), "POST", "attest", sent, cookie=cookie) for _ in range(2)]
            answers = await asyncio.gather(*both, return_exceptions=True)
            accepted = [a for a in answers if not isinstance(a, BaseException) and a[0] == 200]
            guest.accepted.append(len(accepted))
            if not accepted:
                raise Away("neither accepted")
        else:
            await self.ok(picked[1], "POST", "attest", sent, cookie=cookie)
        _, sealed = await self.ok(picked[2], "GET", f"resource/{self.resource}", cookie=cookie)
        guest.crossed += len(set(picked)) > 1
        with jwe.open_(sealed, key) as secret:
            return bytes(secret.reveal())

    async def guest(self, number: int, digest: bytes, within_s: float) -> Guest:
        """One guest until it is served, denied, or its time is over."""
        found, report_id = Guest(number), os.urandom(32)
        begun = time.monotonic()
        wait = 0.25
        while time.monotonic() - begun < within_s:
            found.attempts += 1
            try:
                found.key = await self.attempt(found, digest, report_id)
                self.served += 1
                if self.served in self._awaited:
                    self._awaited[self.served].set()
                break
            except Denied as exc:
                found.denied = str(exc)
                break
            except Away:
                await asyncio.sleep(wait * self.random.uniform(0.5, 1.0))
                wait = min(2 * wait, 5.0)
        found.seconds = time.monotonic() - begun
        return found


@contextlib.asynccontextmanager
async def gathered(crowd: Crowd, digests: Sequence[bytes], within_s: float) -> Any:
    """All guests at once; a list that is filled at the end."""
    tasks = [asyncio.create_task(crowd.guest(n, digest, within_s)) for n, digest in enumerate(digests)]
    found: list[Guest] = []
    try:
        yield found
        found.extend(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
