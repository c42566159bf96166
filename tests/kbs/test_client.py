"""The guest's client against brokers that refuse, err, lie and stall: what is tried again, what is final.

The broker here is a script of answers behind real TLS; the honest broker is tested with its own package.
"""

import base64
import contextlib
import hashlib
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from jindiskd.base.secret import Secret
from jindiskd.kbs import client as kbs_client
from jindiskd.kbs import jwe
from jindiskd.kbs.client import (
    Ask,
    BrokerMisbehaved,
    BrokerNotTrusted,
    BrokerRefused,
    BrokerUnreachable,
    Fenced,
    KbsClient,
)

KEY = b"\x00 a key \n"
NONCE = base64.b64encode(b"n" * 32).decode()
ERRORS = "https://github.com/confidential-containers/kbs/errors/"
RESOURCE, VOLUME = "default/image/root", "33333333-3333-4333-8333-333333333333"
COOKIE = "kbs-session-id=" + "a" * 32
Answer = tuple[int, bytes] | bytes | None


def refusal(kind: str, detail: str = "") -> tuple[int, bytes]:
    return 401, json.dumps({"type": ERRORS + kind, "detail": detail}).encode()


def make_identity(path: Path) -> bytes:
    """A key and certificate in a file; returns the pin."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "broker")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    certificate = builder.sign(private, hashes.SHA256())
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(pem + certificate.public_bytes(Encoding.PEM))
    spki = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


class Scripted:
    """A broker on a unix socket: `answers` may replace what it says to a step by an answer, or by a list of them."""

    def __init__(self, folder: Path) -> None:
        self.pin = make_identity(folder / "broker.pem")
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(folder / "broker.pem")
        self.path = folder / "socket"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(16)
        self.asked: list[str] = []
        self.headers: list[bytes] = []
        self.answers: dict[str, list[Answer | Callable[[dict[str, Any]], Answer]]] = {}
        self.recipient: dict[str, str] = {}
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()

    def _serve(self) -> None:
        while True:
            try:
                raw, _ = self.listener.accept()
            except OSError:
                return
            raw.settimeout(10)
            silent = contextlib.suppress(OSError, ValueError)
            with raw, silent, self._tls(raw) as stream, stream.makefile("rwb") as file:
                while line := file.readline():
                    self._one(line, file)

    def _tls(self, raw: socket.socket) -> ssl.SSLSocket:
        return self.context.wrap_socket(raw, server_side=True)

    def _one(self, line: bytes, file: Any) -> None:
        _, path, _ = line.decode().split()
        head = b""
        while (field := file.readline()) not in {b"\r\n", b""}:
            head += field
        self.headers.append(head)
        length = int(head.lower().split(b"content-length:")[1].split()[0])
        body = json.loads(file.read(length) or b"{}")
        step = path.removeprefix("/kbs/v0/").split("/")[0]
        self.asked.append(step)
        script = self.answers.get(step, [])
        answer = (script.pop(0) if len(script) > 1 else script[0]) if script else self._honest(step, body)
        if callable(answer):
            answer = answer(body)
        if answer is None:
            raise ValueError("the script says: hang up")
        if isinstance(answer, bytes):
            file.write(answer)
        else:
            extra = f"Set-Cookie: {COOKIE}; Expires=x\r\n" if step == "auth" else ""
            file.write(f"HTTP/1.1 {answer[0]} X\r\nContent-Length: {len(answer[1])}\r\n{extra}\r\n".encode())
            file.write(answer[1])
        file.flush()

    def _honest(self, step: str, body: dict[str, Any]) -> Answer:
        if step == "auth":
            return 200, json.dumps({"nonce": NONCE, "extra-params": ""}).encode()
        if step == "attest":
            self.recipient = body["runtime-data"]["tee-pubkey"]
            return 200, b'{"token":"x"}'
        if step == "resource":
            return 200, jwe.seal(KEY, self.recipient).encode()
        return 200, b'{"result":"ok"}'

    def connect(self) -> socket.socket:
        stream = socket.socket(socket.AF_UNIX)
        stream.settimeout(5)
        stream.connect(str(self.path))
        return stream

    def client(self, within_s: float = 10, pin: bytes | None = None) -> KbsClient:
        return KbsClient(self.connect, spki_sha256=pin or self.pin, deadline=time.monotonic() + within_s)

    def fetch(self, within_s: float = 10, pin: bytes | None = None) -> bytes:
        with self.client(within_s, pin).fetch("snp", RESOURCE, evidence) as key:
            return bytes(key.reveal())


def evidence(data: bytes) -> Mapping[str, Any]:
    assert len(data) == 64
    return {"report": data.hex()}


@pytest.fixture
def broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.setattr(kbs_client, "FIRST_WAIT_S", 0.01)
    scripted = Scripted(tmp_path)
    yield scripted
    scripted.close()


def test_an_honest_broker(broker: Scripted) -> None:
    """One connection, three requests, the cookie echoed, nothing else."""
    assert broker.fetch() == KEY
    assert broker.asked == ["auth", "attest", "resource"]
    assert COOKIE.encode() in broker.headers[1]
    assert COOKIE.encode() in broker.headers[2]


@pytest.mark.parametrize("kind", ["PolicyDeny", "PluginNotFound", "InvalidRequestPath", "AdminAuthAccess"])
def test_final_refusals_are_not_tried_again(broker: Scripted, kind: str) -> None:
    """One denial is one attestation: the reference client makes three of it."""
    broker.answers["resource"] = [refusal(kind)]
    with pytest.raises(BrokerRefused) as refused:
        broker.fetch()
    assert refused.value.kind == kind
    assert broker.asked == ["auth", "attest", "resource"]


def test_refused_evidence_is_tried_once_more(broker: Scripted) -> None:
    """From /auth, with a fresh nonce and key; then it is final."""
    broker.answers["attest"] = [refusal("AttestationError")]
    with pytest.raises(BrokerRefused):
        broker.fetch()
    assert broker.asked == ["auth", "attest"] * 2


def test_a_refused_token_is_tried_once_more(broker: Scripted) -> None:
    """And can come out well the second time."""
    broker.answers["resource"] = [refusal("TokenVerifierError"), lambda _: broker._honest("resource", {})]
    assert broker.fetch() == KEY
    assert broker.asked == ["auth", "attest", "resource"] * 2


@pytest.mark.parametrize("kind", ["PluginInternalError", "TokenNotFound", "PolicyEngineError", "HTTPFailed"])
def test_trouble_at_the_broker_is_waited_out(broker: Scripted, kind: str) -> None:
    """As long as there is time."""
    broker.answers["resource"] = [*[refusal(kind)] * 4, lambda _: broker._honest("resource", {})]
    assert broker.fetch() == KEY


def test_a_version_mismatch_names_both_versions(broker: Scripted) -> None:
    """And is not tried again."""
    detail = "KBS Client Protocol Version Mismatch: expect =0.3.0 while the request is 0.4.0"
    broker.answers["auth"] = [refusal("AttestationError", detail)]
    with pytest.raises(BrokerRefused, match=r"version 0\.3\.0, this guest 0\.4\.0") as refused:
        broker.fetch()
    assert refused.value.versions == ("0.3.0", "0.4.0")
    assert broker.asked == ["auth"]


def test_the_other_version_is_tried_once(broker: Scripted) -> None:
    """A broker that wants whatever is not said does not keep a guest busy."""

    def contrary(told: dict[str, Any]) -> Answer:
        other = "0.2.0" if told["version"] == "0.4.0" else "0.4.0"
        detail = f"KBS Client Protocol Version Mismatch: expect ={other} while the request is {told['version']}"
        return refusal("AttestationError", detail)

    broker.answers["auth"] = [contrary]
    with pytest.raises(BrokerRefused, match=r"version 0\.4\.0, this guest 0\.2\.0"):
        broker.fetch()
    assert broker.asked == ["auth", "auth"]


def test_a_certificate_that_is_none_has_no_pin(tmp_path: Path) -> None:
    """Whatever a host in the broker's place shows: of a version that does not exist, cut, nothing."""
    pin = make_identity(tmp_path / "broker.pem")
    made = x509.load_pem_x509_certificate((tmp_path / "broker.pem").read_bytes()).public_bytes(Encoding.DER)
    assert kbs_client.pin_of(made) == pin
    version = b"\xa0\x03\x02\x01\x02"
    assert made.count(version) == 1
    for altered in (made.replace(version, version[:-1] + b"\x08"), made[:-1], made[:40], b"", b"\x30\x00"):
        assert kbs_client.pin_of(altered) is None


def test_a_broker_with_another_key_is_told_nothing(broker: Scripted) -> None:
    """Not even /auth; and it is not asked again."""
    with pytest.raises(BrokerNotTrusted):
        broker.fetch(pin=os.urandom(32))
    assert broker.asked == []


def test_a_connection_that_breaks_is_made_again(broker: Scripted) -> None:
    """At each step."""
    for step in ("auth", "attest", "resource"):
        broker.answers[step] = [None, lambda body, step=step: broker._honest(step, body)]
    assert broker.fetch() == KEY


MALFORMED: dict[str, tuple[str, Answer]] = {
    "redirection": ("auth", b"HTTP/1.1 302 Found\r\nLocation: https://elsewhere/\r\nContent-Length: 0\r\n\r\n"),
    "permanent redirection": ("resource", b"HTTP/1.1 308 X\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n"),
    "not HTTP": ("auth", b"hello\r\n\r\n"),
    "old HTTP": ("auth", b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}"),
    "no length": ("auth", b"HTTP/1.1 200 OK\r\n\r\n{}"),
    "chunked": ("auth", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}"),
    "large": ("resource", b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n"),
    "long header": ("auth", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20000),
    "no nonce": ("auth", (200, b'{"extra-params":""}')),
    "short nonce": ("auth", (200, b'{"nonce":"x","extra-params":""}')),
    "a nonce twice": ("auth", (200, b'{"nonce":"%s","nonce":"%s"}' % (NONCE.encode(), NONCE.encode()))),
    "a digest not offered": (
        "auth",
        (200, json.dumps({"nonce": NONCE, "extra-params": {"selected-hash-algorithm": "sm3"}}).encode()),
    ),
    "a plain key": ("resource", (200, KEY)),
    "a compact JWE": ("resource", (200, b'"a.b.c.d.e"')),
    "a key in JSON": ("resource", (200, json.dumps({"key": "AAAA"}).encode())),
    "garbage": ("resource", (200, b"\xff" * 100)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_answers_against_the_protocol_are_not_believed(broker: Scripted, name: str) -> None:
    """A pinned broker may still be broken; nothing but a JWE is ever taken for a key."""
    step, answer = MALFORMED[name]
    broker.answers[step] = [answer]
    with pytest.raises(BrokerMisbehaved):
        broker.fetch(within_s=0.4)


def changed(answer: bytes, header: Mapping[str, Any] | None = None, **members: Any) -> bytes:
    value = json.loads(answer)
    if header is not None:
        padded = value["protected"] + "=" * (-len(value["protected"]) % 4)
        text = json.dumps({**json.loads(base64.urlsafe_b64decode(padded)), **header})
        value["protected"] = base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
    return json.dumps({**value, **members}).encode()


@pytest.mark.parametrize(
    "change",
    [
        {"header": {"alg": "dir"}},
        {"header": {"alg": "RSA1_5"}},
        {"header": {"enc": "A128GCM"}},
        {"header": {"apu": "QQ"}},
        {"header": {"apv": "QQ"}},
        {"header": {"zip": "DEF"}},
        {"header": {"crit": ["x"], "x": 1}},
        {"iv": "AAAA"},
        {"tag": "AAAA"},
        {"aad": "QQ"},
        {"header_": {}},
    ],
    ids=str,
)
def test_other_forms_of_jwe_are_refused(broker: Scripted, change: dict[str, Any]) -> None:
    """Other algorithms, party information, compression, critical headers, other sizes, additional members."""
    broker.answers["resource"] = [lambda _: (200, changed(jwe.seal(KEY, broker.recipient).encode(), **change))]
    with pytest.raises(BrokerMisbehaved):
        broker.fetch(within_s=0.4)


def test_a_jwe_for_another_key_or_curve_does_not_open(broker: Scripted) -> None:
    """What was sealed for an earlier boot is of no use in this one."""
    from jindiskd.kbs import jwk

    for curve in (ec.SECP256R1(), ec.SECP521R1()):
        other = jwk.tee_jwk(ec.generate_private_key(curve).public_key())
        broker.answers["resource"] = [(200, jwe.seal(KEY, other).encode())]
        with pytest.raises(BrokerMisbehaved):
            broker.fetch(within_s=0.3)


def test_each_attempt_has_a_key_pair_of_its_own(broker: Scripted) -> None:
    """Fresh per attestation, so nothing sealed for a broken attempt opens later."""
    keys = []

    def attest(body: dict[str, Any]) -> Answer:
        keys.append(json.dumps(body["runtime-data"]["tee-pubkey"]))
        return refusal("AttestationError")

    broker.answers["attest"] = [attest]
    with pytest.raises(BrokerRefused):
        broker.fetch()
    assert len(set(keys)) == 2


def test_a_broker_that_drips_is_given_up_in_time(broker: Scripted) -> None:
    """A host that lets a byte through now and then does not make the guest wait for ever."""

    def drip(_: dict[str, Any]) -> Answer:
        time.sleep(1.5)
        return None

    broker.answers["auth"] = [drip]
    begun = time.monotonic()
    with pytest.raises(BrokerUnreachable):
        broker.fetch(within_s=0.8)
    assert time.monotonic() - begun < 30


def test_the_volume_messages(broker: Scripted) -> None:
    """Fenced is final and an error of its own; a broken connection is nothing, since messages may be repeated."""
    client = broker.client()
    broker.answers["jindisk"] = [None, lambda body: broker._honest("jindisk", body)]
    client.report(VOLUME, b"s" * 32, 1 << 63, b"r" * 32)
    assert broker.asked == ["jindisk", "jindisk"]
    broker.answers["jindisk"] = [refusal("Fenced")]
    for message in (client.adopt, client.report, client.close):
        broker.asked.clear()
        with pytest.raises(Fenced):
            message(VOLUME, b"s" * 32, 2, b"r" * 32)
        assert broker.asked == ["jindisk"]


def test_a_release_that_is_none_is_not_believed(broker: Scripted) -> None:
    """A plain key, sealed rightly, is not a volume's release."""
    for plain in (b"", b"x" * 32, b"JDR1" + bytes(110), b"JDR2" + bytes(200), bytes(4000)):
        broker.answers["jindisk"] = [lambda _, plain=plain: (200, jwe.seal(plain, broker.recipient).encode())]
        with pytest.raises(BrokerMisbehaved):
            broker.client(1).release("snp", RESOURCE, VOLUME, evidence)


def test_proxy_variables_are_not_looked_at(broker: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor anything else in the environment."""
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert broker.fetch() == KEY


ASKS = [Ask.resource(f"default/image/{name}") for name in ("root", "data", "logs")]


def test_several_keys_take_one_attestation(broker: Scripted) -> None:
    """In the order asked for."""
    broker.answers["resource"] = [
        lambda _body, key=key: (200, jwe.seal(key, broker.recipient).encode()) for key in (b"1", b"2", b"3")
    ]
    got = broker.client().obtain("snp", ASKS, evidence)
    assert [bytes(secret.reveal()) for secret in got] == [b"1", b"2", b"3"]
    assert broker.asked == ["auth", "attest", "resource", "resource", "resource"]


def test_what_came_before_a_fault_is_not_asked_for_again(broker: Scripted) -> None:
    """The next attempt attests anew, with another key, and asks for what is missing."""
    broker.answers["resource"] = [
        lambda _body: (200, jwe.seal(b"1", broker.recipient).encode()),
        None,
        lambda _body: (200, jwe.seal(b"2", broker.recipient).encode()),
        lambda _body: (200, jwe.seal(b"3", broker.recipient).encode()),
    ]
    got = broker.client(60).obtain("snp", ASKS, evidence)
    assert [bytes(secret.reveal()) for secret in got] == [b"1", b"2", b"3"]
    assert broker.asked == ["auth", "attest", "resource", "resource", "auth", "attest", "resource", "resource"]


def test_no_key_is_left_where_one_is_refused(broker: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest with a part of its keys has none."""
    opened = []

    def open_(sealed: bytes, key: ec.EllipticCurvePrivateKey) -> Secret:
        opened.append(jwe.open_(sealed, key))
        return opened[-1]

    monkeypatch.setattr(kbs_client, "jwe", SimpleNamespace(open_=open_))
    broker.answers["resource"] = [
        lambda _body: (200, jwe.seal(b"1", broker.recipient).encode()), refusal("PolicyDeny"),
    ]  # fmt: skip
    with pytest.raises(BrokerRefused):
        broker.client().obtain("snp", ASKS, evidence)
    assert [len(secret) for secret in opened] == [0]
