"""AMD's and Intel's services, played over real HTTPS on the loopback interface from recorded answers."""

import contextlib
import json
import ssl
import threading
import urllib.parse
from collections import Counter
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


def certificate(folder: Path) -> Path:
    """A self-signed certificate for 127.0.0.1, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "played services")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "tls.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(made.public_bytes(Encoding.PEM) + private)
    return path


class Played:
    """The services. `special` maps the beginning of a path to (status, headers, body) or a function that gives it."""

    def __init__(self, folder: Path) -> None:
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.special: dict[str, Any] = {}
        self.asked: Counter[str] = Counter()
        self.certificate = certificate(folder)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked[self.path] += 1
                answer = outer.answers.get(self.path, (404, {}, b"no such thing"))
                for start, special in outer.special.items():
                    if self.path.startswith(start):
                        answer = special() if callable(special) else special
                status, headers, body = answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments: Any) -> None:
                pass

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)

        class Server(ThreadingHTTPServer):
            daemon_threads = False

            def finish_request(self, request: Any, client_address: Any) -> None:
                # In the connection's own thread, so that a peer that does not shake hands holds up nobody.
                with contextlib.suppress(OSError), context.wrap_socket(request, server_side=True) as stream:
                    super().finish_request(stream, client_address)

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"https://127.0.0.1:{self.server.server_address[1]}"
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.certificate))

    def add(self, path: str, body: bytes, **headers: str) -> None:
        self.answers[path] = (200, {name.replace("_", "-"): value for name, value in headers.items()}, body)

    def play_amd(self, attestation: Path, *, lists: bool = True) -> None:
        """AMD's chains, revocation lists of the test authorities, and every recorded chip certificate."""
        for product in ("Milan", "Genoa", "Turin"):
            for kind in ("vcek", "vlek"):
                chain = attestation / "amd-roots" / product.lower() / f"{kind}_cert_chain.pem"
                self.add(f"/{kind}/v1/{product}/cert_chain", chain.read_bytes())
                if lists:
                    crl = attestation / "snp-test-pki" / product.lower() / "crl.der"
                    self.add(f"/{kind}/v1/{product}/crl", crl.read_bytes())

    def play_sev(self, attestation: Path) -> None:
        """AMD's authorities for SEV, each generation's in one file."""
        for folder in (attestation / "sev/certs").iterdir():
            pair = (folder / "ask.cert").read_bytes() + (folder / "ark.cert").read_bytes()
            self.add(f"/sev/ask_ark_{folder.name}.cert", pair)

    def play_intel(self, collateral: bytes, fmspc: str, ca: str) -> None:
        """Intel's answers, put together again from collateral."""
        members = json.loads(collateral)

        def chain(name: str) -> str:
            return urllib.parse.quote(members[name])

        tcb = f'{{"tcbInfo":{members["tcb_info"]},"signature":"{members["tcb_info_signature"]}"}}'
        identity = f'{{"enclaveIdentity":{members["qe_identity"]},"signature":"{members["qe_identity_signature"]}"}}'
        base = "/tdx/certification/v4"
        path = f"{base}/tcb?fmspc={fmspc.upper()}"
        self.answers[path] = (200, {"TCB-Info-Issuer-Chain": chain("tcb_info_issuer_chain")}, tcb.encode())
        headers = {"SGX-Enclave-Identity-Issuer-Chain": chain("qe_identity_issuer_chain")}
        self.answers[f"{base}/qe/identity"] = (200, headers, identity.encode())
        headers = {"SGX-PCK-CRL-Issuer-Chain": chain("pck_crl_issuer_chain")}
        path = f"/sgx/certification/v4/pckcrl?ca={ca}&encoding=der"
        self.answers[path] = (200, headers, bytes.fromhex(members["pck_crl"]))
        self.answers["/root.crl"] = (200, {}, bytes.fromhex(members["root_ca_crl"]))
