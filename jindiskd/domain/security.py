"""Launch security as values: what a domain asks of SEV, SEV-SNP or TDX, and its `<launchSecurity>` element.

Source: libvirt formatdomain, "Launch Security"; libvirt notes sections 2.1 to 2.3. Byte strings are written in base64.
"""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ET
from dataclasses import dataclass, replace

from jindiskd.attest import guest_policy
from jindiskd.attest.sev import SevPolicy
from jindiskd.base.platform import Platform, Tee
from jindiskd.errors import InvalidArgument, NotSupported
from jindiskd.image.manifest import Manifest
from jindiskd.image.signing import policy_of, signature_of

SEV_POLICY = guest_policy.SEV_DEFAULT
SEV_POLICY_ES = int(SevPolicy.ES)
SNP_POLICY = guest_policy.SNP_DEFAULT
TDX_POLICY = 0x10000000
"""SEPT_VE_DISABLE alone: without it the host could make a guest believe that a page of its own was accepted."""
QUOTE_SOCKET = "/var/run/tdx-qgs/qgs.socket"
"""libvirt's default path of the quote generation service; without the element a guest gets no quote."""
DH_CERT_BYTES, SESSION_BYTES = 2084, 128
ID_BLOCK_BYTES, ID_AUTH_BYTES, HOST_DATA_BYTES, WORKAROUNDS_BYTES = 96, 4096, 32, 16
TDX_REGISTER_BYTES = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Sev:
    """SEV, and with policy bit 2 SEV-ES. `dh_cert` and `session` are for one launch: reuse lets the host replay it."""

    policy: int = SEV_POLICY
    kernel_hashes: bool = True
    dh_cert: bytes = b""
    """2084 bytes, or empty together with `session`."""
    session: bytes = b""
    """128 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snp:
    """SEV-SNP. Empty byte strings are left out."""

    policy: int = SNP_POLICY
    kernel_hashes: bool = True
    id_block: bytes = b""
    """96 bytes, with `id_auth`: a signed statement of the launch digest, which the firmware checks."""
    id_auth: bytes = b""
    """4096 bytes."""
    author_key: bool = False
    """Whether `id_auth` holds an author key too."""
    vlek: bool = False
    """Reports are signed by a key of the fleet's owner (VLEK) instead of the processor's (VCEK)."""
    host_data: bytes = b""
    """32 bytes that reports show as the host's."""
    workarounds: bytes = b""
    """16 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tdx:
    """TDX. The registers have 48 bytes or none."""

    policy: int = TDX_POLICY
    mr_config_id: bytes = b""
    mr_owner: bytes = b""
    mr_owner_config: bytes = b""
    quote_socket: str = QUOTE_SOCKET


Security = Sev | Snp | Tdx


def default_security(platform: Platform, *, quote_socket: str = QUOTE_SOCKET) -> Security | None:
    """What a domain of this platform gets unless more is said; None for a platform that is simulated in the guest."""
    if platform is Platform.SIMULATED_SNP:
        return None
    if platform.tee is Tee.SNP:
        return Snp()
    if platform.tee is Tee.TDX:
        return Tdx(quote_socket=quote_socket)
    return Sev(policy=guest_policy.default(platform.tee))


def security_of(manifest: Manifest) -> Security | None:
    """What a domain of this image gets: its platform's, with the guest policy and ID block that the image has."""
    found = default_security(manifest.platform)
    policy = policy_of(manifest)
    if isinstance(found, Sev):
        return replace(found, policy=policy)
    if not isinstance(found, Snp):
        return found
    signature = signature_of(manifest)
    author = signature is not None and any(signature[1].author_key_digest)
    return replace(found, policy=policy, id_block=manifest.id_block, id_auth=manifest.id_auth, author_key=author)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """What a definition says of policy and ID block; of a simulated platform, our metadata does."""

    policy: int | None = None
    id_block: bytes = b""
    id_auth: bytes = b""

    @classmethod
    def of_image(cls, manifest: Manifest) -> Stated:
        """What an image demands; no policy where it was built without one."""
        return cls(policy=manifest.shape.guest_policy, id_block=manifest.id_block, id_auth=manifest.id_auth)

    @classmethod
    def read(cls, element: ET.Element | None) -> Stated:
        """From `<launchSecurity>`, or our element; raises `ValueError` for what is no number or no base64."""
        if element is None:
            return cls()
        found = {child.tag.rpartition("}")[2]: "".join((child.text or "").split()) for child in element}
        return cls(
            policy=int(found["policy"], 0) if "policy" in found else None,
            id_block=base64.b64decode(found.get("idBlock", ""), validate=True),
            id_auth=base64.b64decode(found.get("idAuth", ""), validate=True),
        )

    def differs(self, wanted: Stated) -> str:
        """What is not as an image wants it, as the beginning of a sentence; empty where all is."""
        if wanted.policy is not None and self.policy != wanted.policy:
            return f"its guest policy, {'none' if self.policy is None else hex(self.policy)},"
        if wanted.id_block and (self.id_block, self.id_auth) != (wanted.id_block, wanted.id_auth):
            return "its ID block"
        return ""

    def elements(self, namespace: str) -> list[ET.Element]:
        """As `read` takes them, in a namespace."""
        made = []
        texts = {
            "policy": "" if self.policy is None else hex(self.policy),
            "idBlock": base64.b64encode(self.id_block).decode(),
            "idAuth": base64.b64encode(self.id_auth).decode(),
        }
        for tag, text in texts.items():
            if text:
                element = ET.Element(f"{{{namespace}}}{tag}")
                element.text = text
                made.append(element)
        return made


def with_host_data(security: Security | None, data: bytes, platform: Platform) -> Security | None:
    """The same with bytes that the host chooses and the guest's evidence shows: HOSTDATA of SNP, MRCONFIGID of TDX.

    Args:
        security: of the platform.
        data: 32 bytes for SNP, 48 for TDX; empty for none.
        platform: for messages.

    Raises:
        InvalidArgument: another length. NotSupported: the platform has no such thing.
    """
    if not data:
        return security
    if isinstance(security, Snp):
        if len(data) != HOST_DATA_BYTES:
            raise InvalidArgument("length of the host data", len(data), f"SEV-SNP has {HOST_DATA_BYTES} bytes")
        return replace(security, host_data=data)
    if isinstance(security, Tdx):
        if len(data) != TDX_REGISTER_BYTES:
            raise InvalidArgument("length of the host data", len(data), f"TDX has {TDX_REGISTER_BYTES} bytes")
        return replace(security, mr_config_id=data)
    raise NotSupported(f"host data for platform {platform}", "SEV-SNP and TDX alone have it")


def host_data_of(root: ET.Element) -> bytes:
    """What `with_host_data` put into a definition; empty where there is none, or none that can be read."""
    for tag in ("hostData", "mrConfigId"):
        text = root.findtext(f"launchSecurity/{tag}")
        if text is not None:
            try:
                return base64.b64decode("".join(text.split()), validate=True)
            except ValueError:
                return b""
    return b""


def element(security: Security) -> ET.Element:
    """The `<launchSecurity>` element.

    `cbitpos` and `reducedPhysBits` are left out: libvirt takes them from the host, and QEMU refuses any other.
    """
    if isinstance(security, Sev):
        found = ET.Element("launchSecurity", type="sev", kernelHashes=_yes(security.kernel_hashes))
        _text(found, "policy", f"0x{security.policy:04x}")
        _bytes(found, "dhCert", security.dh_cert)
        _bytes(found, "session", security.session)
    elif isinstance(security, Snp):
        found = ET.Element("launchSecurity", type="sev-snp", kernelHashes=_yes(security.kernel_hashes))
        if security.id_block:
            found.set("authorKey", _yes(security.author_key))
        if security.vlek:
            found.set("vcek", "no")
        _text(found, "policy", f"0x{security.policy:x}")
        _bytes(found, "guestVisibleWorkarounds", security.workarounds)
        _bytes(found, "idBlock", security.id_block)
        _bytes(found, "idAuth", security.id_auth)
        _bytes(found, "hostData", security.host_data)
    else:
        found = ET.Element("launchSecurity", type="tdx")
        _text(found, "policy", f"0x{security.policy:x}")
        _bytes(found, "mrConfigId", security.mr_config_id)
        _bytes(found, "mrOwner", security.mr_owner)
        _bytes(found, "mrOwnerConfig", security.mr_owner_config)
        if security.quote_socket:
            ET.SubElement(found, "quoteGenerationService", path=security.quote_socket)
    return found


def with_session(text: str, dh_certificate: bytes, session: bytes) -> str:
    """A domain's XML with the owner's session of one launch in its `<launchSecurity>`, in the place of an older one."""
    root = ET.fromstring(text)  # noqa: S314 (our own, or libvirt's after `xml.parse`)
    found = root.find("launchSecurity")
    assert found is not None  # a SEV domain
    for old in [child for child in found if child.tag in {"dhCert", "session"}]:
        found.remove(old)
    _bytes(found, "dhCert", dh_certificate)
    _bytes(found, "session", session)
    return ET.tostring(root, encoding="unicode")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _text(parent: ET.Element, tag: str, text: str) -> None:
    ET.SubElement(parent, tag).text = text


def _bytes(parent: ET.Element, tag: str, data: bytes) -> None:
    if data:
        _text(parent, tag, base64.b64encode(data).decode())
