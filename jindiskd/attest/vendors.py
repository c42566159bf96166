"""AMD's and Intel's services for certificates and collateral: asked seldom, bounded, and believed in nothing.

What they say is checked like a file from anywhere; the connection's TLS only keeps others from reading which machines
are asked about. Each URL is asked once at a time, whoever wants it (single flight). A service that fails or says "too
many requests" is left alone for a while that doubles with each failure, and meanwhile the failure is the answer.

Blocking; call it in a thread, from several at once. Sources: AMD 57230 (key distribution service) and
55766 (SEV API: GET_ID); Intel PCS v4.
"""

from __future__ import annotations

import http.client
import json
import re
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jindiskd.attest.collateral import KINDS, chip_name
from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.sev_certs import GENERATIONS
from jindiskd.attest.snp_report import Product, Tcb
from jindiskd.errors import EXIT_UNAVAILABLE, InvalidArgument, JindiskError

KDS = "https://kdsintf.amd.com"
SEV_AUTHORITIES = "https://download.amd.com/developer/eula/sev"
"""AMD's folder of ASK and ARK for SEV and SEV-ES, a file for each generation: the key service has the CEKs alone."""
PCS = "https://api.trustedservices.intel.com"
INTEL_ROOT_CRL = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
MAX_BYTES = 1 << 20
MAX_HEADER = 64 << 10
TIMEOUT_S = 20.0
WAIT_S, MAX_WAIT_S = 10.0, 3600.0
FMSPC = re.compile(r"[0-9a-fA-F]{12}")


class VendorUnavailable(JindiskError, code="VendorUnavailable", exit_code=EXIT_UNAVAILABLE):
    """A vendor's service did not give what was asked for."""

    def __init__(self, url: str, problem: str) -> None:
        """`url` without its query; `problem` is the end of the sentence."""
        super().__init__(f"{url} {problem}: try again later, or import a bundle (jindiskctl collateral import)")
        self.url, self.problem = url, problem


@dataclass(slots=True)
class _Flight:
    """A request under way, or what its last failure was."""

    done: threading.Event = field(default_factory=threading.Event)
    answer: tuple[bytes, Mapping[str, str]] | None = None
    error: VendorUnavailable | None = None


@dataclass(frozen=True, slots=True)
class _Rest:
    """A service that is left alone."""

    until: float
    wait_s: float
    error: VendorUnavailable


class Vendors:
    """The services.

    Args:
        kds, pcs, root_crl, sev: where they are, https alone.
        context: for TLS; the system's authorities if not given.
        timeout_s: for connecting and for each read.
        clock: monotonic, seconds.
    """

    def __init__(
        self,
        *,
        kds: str = KDS,
        pcs: str = PCS,
        root_crl: str = INTEL_ROOT_CRL,
        sev: str = SEV_AUTHORITIES,
        context: ssl.SSLContext | None = None,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect to nothing yet; raises `InvalidArgument` for an address that is not https."""
        for url in (kds, pcs, root_crl, sev):
            parts = urllib.parse.urlsplit(url)
            if parts.scheme != "https" or not parts.hostname or parts.username or parts.query:
                raise InvalidArgument("address of a vendor's service", url, "write https://host[:port][/path]")
        self._kds, self._pcs, self._root_crl = kds.rstrip("/"), pcs.rstrip("/"), root_crl
        self._sev = sev.rstrip("/")
        self._context = context or ssl.create_default_context()
        self._timeout_s, self._clock = timeout_s, clock
        self._lock = threading.Lock()
        self._flights: dict[str, _Flight] = {}
        self._resting: dict[str, _Rest] = {}
        self.waiting = 0
        """How many callers wait for what another has asked."""

    # AMD

    def snp_authorities(self, product: Product, kind: str) -> bytes:
        """Intermediate and root of a product for `vcek` or `vlek`, PEM. Raises `VendorUnavailable`."""
        assert kind in KINDS
        return self._get(f"{self._kds}/{kind}/v1/{product}/cert_chain")[0]

    def snp_revocation_list(self, product: Product, kind: str) -> bytes:
        """Revocation list of a product, DER. Raises `VendorUnavailable`."""
        assert kind in KINDS
        return self._get(f"{self._kds}/{kind}/v1/{product}/crl")[0]

    def vcek(self, product: Product, chip_id: bytes, tcb: Tcb) -> bytes:
        """The certificate of a chip for its firmware versions, DER. Raises `VendorUnavailable`."""
        values = {
            **({"fmcSPL": tcb.fmc} if tcb.fmc is not None else {}),
            "blSPL": tcb.bootloader,
            "teeSPL": tcb.tee,
            "snpSPL": tcb.snp,
            "ucodeSPL": tcb.microcode,
        }
        query = "&".join(f"{name}={value:02d}" for name, value in values.items())
        return self._get(f"{self._kds}/vcek/v1/{product}/{chip_name(product, chip_id)}?{query}")[0]

    def sev_authorities(self, generation: str) -> bytes:
        """ASK and ARK of a generation (`attest.sev_certs.GENERATIONS`). Raises `VendorUnavailable`."""
        assert generation in GENERATIONS
        return self._get(f"{self._sev}/ask_ark_{generation.lower()}.cert")[0]

    def cek(self, cpu_id: bytes) -> bytes:
        """The signed CEK of a processor, by what SEV's GET_ID says of it. Raises `VendorUnavailable`."""
        return self._get(f"{self._kds}/cek/id/{cpu_id.hex()}")[0]

    # Intel

    def tdx(self, fmspc: str, ca: str) -> bytes:
        """Collateral of a family of platforms, as `attest.tdx.parse_collateral` reads it.

        Raises:
            VendorUnavailable: one of the services does not answer, or answers something else.
            InvalidArgument: no such platform can be.
        """
        if not FMSPC.fullmatch(fmspc) or ca not in {"platform", "processor"}:
            raise InvalidArgument("platform", f"{fmspc} {ca}", "an FMSPC has 12 hexadecimal digits; its CA is known")
        base = f"{self._pcs}/tdx/certification/v4"
        tcb, tcb_headers = self._get(f"{base}/tcb?fmspc={fmspc.upper()}")
        identity, identity_headers = self._get(f"{base}/qe/identity")
        crl, crl_headers = self._get(f"{self._pcs}/sgx/certification/v4/pckcrl?ca={ca}&encoding=der")
        root, _ = self._get(self._root_crl)
        tcb_info, tcb_signature = _signed_part(tcb, "tcbInfo")
        qe_identity, qe_signature = _signed_part(identity, "enclaveIdentity")
        members = {
            "pck_crl_issuer_chain": _chain(crl_headers, "sgx-pck-crl-issuer-chain"),
            "root_ca_crl": root.hex(),
            "pck_crl": crl.hex(),
            "tcb_info_issuer_chain": _chain(tcb_headers, "tcb-info-issuer-chain"),
            "tcb_info": tcb_info,
            "tcb_info_signature": tcb_signature,
            "qe_identity_issuer_chain": _chain(identity_headers, "sgx-enclave-identity-issuer-chain"),
            "qe_identity": qe_identity,
            "qe_identity_signature": qe_signature,
        }
        return json.dumps(members, sort_keys=True).encode()

    # HTTP

    def _get(self, url: str) -> tuple[bytes, Mapping[str, str]]:
        """Body and headers (names in lower case). Whoever asks while it is under way gets the same answer."""
        place = urllib.parse.urlsplit(url).netloc
        with self._lock:
            rest = self._resting.get(place)
            if rest is not None and self._clock() < rest.until:
                raise rest.error
            flight = self._flights.get(url)
            mine = flight is None
            if flight is None:
                flight = self._flights[url] = _Flight()
            else:
                self.waiting += 1
        if not mine:
            flight.done.wait()
            with self._lock:
                self.waiting -= 1
            if flight.error is not None:
                raise flight.error
            assert flight.answer is not None
            return flight.answer
        try:
            flight.answer = self._fetch(url)
        except VendorUnavailable as exc:
            flight.error = exc
            raise
        except BaseException:
            flight.error = VendorUnavailable(url.partition("?")[0], "was not asked to the end")
            raise
        finally:
            with self._lock:
                del self._flights[url]
                if flight.error is None:
                    self._resting.pop(place, None)
            flight.done.set()
        return flight.answer

    def _fetch(self, url: str) -> tuple[bytes, Mapping[str, str]]:
        parts = urllib.parse.urlsplit(url)
        shown = url.partition("?")[0]
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=self._timeout_s, context=self._context
        )
        deadline = self._clock() + 3 * self._timeout_s
        try:
            connection.request("GET", target, headers={"Accept": "*/*", "Connection": "close"})
            with connection.getresponse() as response:
                body = bytearray()
                while part := response.read1(65536):
                    body += part
                    if len(body) > MAX_BYTES:
                        raise VendorUnavailable(shown, f"answers with more than {MAX_BYTES} bytes")
                    if self._clock() > deadline:
                        raise TimeoutError
                if response.length:
                    raise http.client.IncompleteRead(b"", response.length)
                headers = {name.lower(): value for name, value in response.getheaders()}
        except (OSError, http.client.HTTPException) as exc:
            # Of the exception only its kind: its text may quote what the service said.
            raise self._failed(parts.netloc, shown, f"cannot be asked ({type(exc).__name__})", None) from exc
        finally:
            connection.close()
        if response.status == http.client.NOT_FOUND:
            raise VendorUnavailable(shown, "does not know that")
        if response.status != http.client.OK:
            problem = f"answers with status {response.status}"
            if response.status == http.client.TOO_MANY_REQUESTS:
                problem = "has been asked too often"
            raise self._failed(parts.netloc, shown, problem, headers.get("retry-after"))
        if not body:
            raise VendorUnavailable(shown, "answers with nothing")
        return bytes(body), headers

    def _failed(self, place: str, shown: str, problem: str, retry_after: str | None) -> VendorUnavailable:
        """Leave a service alone: as long as it says, at least twice as long as the last time."""
        error = VendorUnavailable(shown, problem)
        with self._lock:
            last = self._resting.get(place)
            wait = min(MAX_WAIT_S, 2 * last.wait_s if last is not None else WAIT_S)
            if retry_after is not None and retry_after.isdigit() and len(retry_after) < 6:
                wait = min(MAX_WAIT_S, max(wait, float(retry_after)))
            self._resting[place] = _Rest(self._clock() + wait, wait, error)
        return error


def _signed_part(body: bytes, name: str) -> tuple[str, str]:
    """The exact text of the signed member, which is what was signed, and its signature in hexadecimal."""
    what = f"Intel's {name}"
    try:
        text = body.decode()
        outer: Any = json.loads(text)
        signature = outer["signature"]
        begin = text.index("{", text.index(f'"{name}"'))
        _value, end = json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise MalformedEvidence(what, "it is not a signed JSON document") from exc
    if not isinstance(signature, str) or re.fullmatch(r"[0-9a-fA-F]{128}", signature) is None:
        raise MalformedEvidence(what, "its signature is not 64 bytes in hexadecimal")
    return text[begin:end], signature


def _chain(headers: Mapping[str, str], name: str) -> str:
    """A certificate chain from a header, in PEM."""
    # An older name of the header for TCB info is still sent by caches of that service.
    value = headers.get(name) or headers.get(f"sgx-{name}")
    if value is None or len(value) > MAX_HEADER:
        raise MalformedEvidence("Intel's answer", f"the header {name} is missing")
    return urllib.parse.unquote(value)
