"""The settings of the service: TOML files to frozen dataclasses, all faults at once, each value with its origin.

`/etc/jindiskd/jindiskd.toml` is read first, then `jindiskd.toml.d/*.toml` beside it in the order of their names; a
later file overrides single settings of an earlier one. Defaults, ranges, choices and help stand in the fields below;
the manual page jindiskd.toml(5) is made from them.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from jindiskd.base import toml
from jindiskd.base.platform import Platform
from jindiskd.base.settings import near
from jindiskd.errors import EXIT_USAGE, JindiskError
from jindiskd.image.request import VolumeFormat
from jindiskd.keys.kek import KekPlace, KekSource

DEFAULT_FILE = Path("/etc/jindiskd/jindiskd.toml")
FILE_LIMIT_BYTES = 1 << 20
BUILT_IN = "default"
"""Origin of a value that no file sets."""


class VsockMode(enum.StrEnum):
    """Where guests have their vsock device from."""

    AUTO = "auto"  # the kernel if it has vhost-vsock
    KERNEL = "kernel"
    VHOST_USER = "vhost-user"  # a program for each domain


class Deployment(enum.StrEnum):
    """Where the broker is."""

    EMBEDDED = "embedded"
    RELAY = "relay"


class LogLevel(enum.StrEnum):
    """What is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """[service]: where the service keeps its things and how it talks."""

    state_dir: Path = field(
        default=Path("/var/lib/jindiskd"), metadata={"help": "keys, TLS identity and, unless set elsewhere, images"}
    )
    runtime_dir: Path = field(
        default=Path("/run/jindiskd"), metadata={"help": "sockets; emptied when the machine starts"}
    )
    log_level: LogLevel = field(default=LogLevel.INFO, metadata={"help": "what is logged"})
    job_keep_s: int = field(
        default=60, metadata={"range": (1, 3600), "help": "seconds that a job which has ended can still be looked at"}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesConfig:
    """[images]: the store, and what new images are by default."""

    dir: Path | None = field(
        default=None, metadata={"help": "the image store; `images` in the state directory if unset"}
    )
    format: VolumeFormat = field(
        default=VolumeFormat.JINDISK,
        # JinDisk 1 protects nothing, so it is asked for image by image, and never by default.
        metadata={"help": "format of the encrypted root", "choices": (VolumeFormat.JINDISK, VolumeFormat.LUKS2)},
    )
    platform: Platform = field(default=Platform.SNP, metadata={"help": "what new images are for"})
    vcpus: int = field(default=1, metadata={"range": (1, 512), "help": "processors of a guest; in its launch digest"})
    cpu_model: str = field(default="EPYC-Milan", metadata={"help": "processor model of a guest; in its launch digest"})
    firmware: Path | None = field(
        default=None,
        metadata={
            "help": "firmware of a guest; in its launch digest. Must support measured direct boot. If unset, the one "
            "that this machine's descriptors (/usr/share/qemu/firmware) name for the platform"
        },
    )
    firmware_dirs: tuple[Path, ...] = field(
        default=(Path("/usr/share"), Path("/usr/lib/jindiskd")),
        metadata={"help": "where a caller may name another firmware; nothing else on the host is looked at"},
    )
    report_source: str = field(
        default="",
        metadata={"help": "a plug-in by which guests of new images get their reports; the platform's own way if empty"},
    )
    key_program: Path | None = field(
        default=None,
        metadata={"help": "a program that new images ask for their key instead of the broker; for LUKS2 alone"},
    )
    key_program_dirs: tuple[Path, ...] = field(
        default=(Path("/usr/lib/jindiskd/key-programs"), Path("/etc/jindiskd/key-programs")),
        metadata={"help": "where a caller may name another key program; nothing else on the host is put in an image"},
    )
    build_timeout_s: int = field(
        default=7200, metadata={"range": (60, 86400), "help": "seconds after which a build is given up"}
    )
    stream_idle_s: int = field(
        default=300,
        metadata={"range": (1, 86400), "help": "seconds without a byte after which the import of an image is given up"},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """[broker]: who gets keys."""

    deployment: Deployment = field(
        default=Deployment.EMBEDDED,
        metadata={"help": "`embedded`: in this service, and the host can read the keys; `relay`: at the guests' owner"},
    )
    allow_simulated: bool = field(
        default=False, metadata={"help": "accept reports of simulated firmware, which prove nothing; for development"}
    )
    database: str = field(
        default="",
        metadata={"help": "SQLAlchemy URL of the key store; SQLite in the state directory if empty", "secret": True},
    )
    verifiers: tuple[str, ...] = field(
        default=(), metadata={"help": "plug-ins that judge evidence as well; what they accept is believed"}
    )
    session_lifetime_s: int = field(
        default=60, metadata={"range": (5, 3600), "help": "seconds after which a challenge dies"}
    )
    max_sessions: int = field(default=256, metadata={"range": (1, 65536), "help": "sessions at once, in all"})


@dataclass(frozen=True, slots=True, kw_only=True)
class KekConfig:
    """[keys]: the key that all keys in the store are wrapped by."""

    kek: KekSource = field(
        default=KekSource.AUTO,
        metadata={"help": "where the key-encryption key is; `auto`: the unit's credential, else a file"},
    )
    kek_file: Path | None = field(default=None, metadata={"help": "the file; `kek` in the state directory if unset"})
    tpm2_dir: Path | None = field(
        default=None, metadata={"help": "for `tpm2`: the directory of what is sealed; `tpm2` in the state directory"}
    )
    tpm2_pcrs: str = field(
        default="sha256:7",
        metadata={"help": "for `tpm2`: registers whose state the key is sealed to (7: Secure Boot); none if empty"},
    )
    tpm2_tcti: str = field(
        default="device:/dev/tpmrm0", metadata={"help": "for `tpm2`: how the TPM is reached, as for tpm2-tools"}
    )

    def place(self, state_dir: Path, credentials: Path | None) -> KekPlace:
        """Where the key is.

        Args:
            state_dir: of the service.
            credentials: the unit's credentials directory; None where the service manager gave none.
        """
        return KekPlace(
            source=self.kek,
            file=self.kek_file or state_dir / "kek",
            tpm2_dir=self.tpm2_dir or state_dir / "tpm2",
            tpm2_tcti=self.tpm2_tcti,
            tpm2_pcrs=self.tpm2_pcrs,
            credentials=credentials,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CollateralConfig:
    """[collateral]: certificates and revocation lists of the processors' makers."""

    dir: Path | None = field(
        default=None, metadata={"help": "where they are kept; `collateral` in the state directory if unset"}
    )
    fetch: bool = field(
        default=False,
        metadata={"help": "ask AMD's and Intel's services for what is missing when a guest attests; tells them of it"},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """[relay]: the owner's broker, where the deployment is `relay`."""

    broker: str = field(default="", metadata={"help": "host:port of the owner's broker, to which guests are passed on"})
    card: Path | None = field(
        default=None,
        metadata={"help": "the broker's card (jindiskctl broker card): what new images pin, and seal their keys to"},
    )
    max_connections: int = field(default=512, metadata={"range": (1, 65536), "help": "connections at once, in all"})
    max_connections_per_guest: int = field(
        default=8, metadata={"range": (1, 1024), "help": "connections at once of one guest"}
    )
    max_starts_per_minute: int = field(
        default=120, metadata={"range": (1, 100_000), "help": "connections that a guest may begin within a minute"}
    )
    max_bytes: int = field(
        default=64 << 20, metadata={"range": (1 << 20, 1 << 40), "help": "bytes of one connection in each direction"}
    )
    idle_s: int = field(default=75, metadata={"range": (5, 3600), "help": "seconds until an idle connection ends"})
    life_s: int = field(default=600, metadata={"range": (10, 86400), "help": "seconds until any connection ends"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainsConfig:
    """[domains]: libvirt and the guests."""

    libvirt_uri: str = field(default="qemu:///system", metadata={"help": "the libvirt connection"})
    vsock: VsockMode = field(default=VsockMode.AUTO, metadata={"help": "where guests have their vsock device from"})
    vhost_device_vsock: Path = field(
        default=Path("vhost-device-vsock"), metadata={"help": "the program for `vhost-user`; looked up in PATH"}
    )
    memory_mib: int = field(default=1024, metadata={"range": (256, 1 << 22), "help": "memory of a guest"})
    launch_timeout_s: int = field(
        default=300, metadata={"range": (10, 86400), "help": "seconds from start to a running system"}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicesConfig:
    """[devices]: volumes on block devices of this host."""

    watch: bool = field(default=True, metadata={"help": "look for volumes of ours on block devices of this host"})
    helper: Path = field(
        default=Path("/run/jindisk-helper.socket"), metadata={"help": "the socket of the helper that maps volumes"}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings."""

    service: ServiceConfig = field(default_factory=ServiceConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    broker: BrokerConfig = field(default_factory=BrokerConfig)
    keys: KekConfig = field(default_factory=KekConfig)
    collateral: CollateralConfig = field(default_factory=CollateralConfig)
    relay: RelayConfig = field(default_factory=RelayConfig)
    domains: DomainsConfig = field(default_factory=DomainsConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)

    @property
    def images_dir(self) -> Path:
        """The image store."""
        return self.images.dir or self.service.state_dir / "images"

    @property
    def collateral_dir(self) -> Path:
        """Certificates and revocation lists of the processors' makers."""
        return self.collateral.dir or self.service.state_dir / "collateral"

    @property
    def database_url(self) -> str:
        """URL of the key store."""
        return self.broker.database or f"sqlite:///{self.service.state_dir}/keys.db"

    @property
    def database_file(self) -> Path | None:
        """The SQLite file that the service makes itself; None for another database."""
        return None if self.broker.database else self.service.state_dir / "keys.db"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting in effect."""

    name: str
    """`section.setting`."""
    value: str
    """As JSON; `"(set)"` for one that may hold a password."""
    origin: str
    """The file that sets it, or `default`."""


C = TypeVar("C")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Generic[C]):
    """A configuration and where it comes from."""

    config: C
    settings: tuple[Setting, ...]

    def plain(self) -> list[dict[str, Any]]:
        """The settings for JSON: name, value, origin."""
        return [{"name": s.name, "value": json.loads(s.value), "origin": s.origin} for s in self.settings]


class BadConfiguration(JindiskError, code="BadConfiguration", exit_code=EXIT_USAGE):
    """Settings cannot be used; the text lists all that is wrong, a line each."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


def sections(schema: type = Config) -> dict[str, type]:
    """The dataclass of each section, by name."""
    return typing.get_type_hints(schema)


def files(main: Path) -> list[Path]:
    """The files that make the configuration, in the order of reading; the main file may be absent."""
    drop_ins = sorted(main.with_name(main.name + ".d").glob("*.toml"))
    return [path for path in (main, *drop_ins) if path.exists()]


def load(main: Path = DEFAULT_FILE) -> Loaded[Config]:
    """Read the service's main file, if there is one, and its drop-ins.

    Raises:
        BadConfiguration: with every fault in every file.
    """
    return load_as(Config, main)


def load_as(schema: type[C], main: Path) -> Loaded[C]:
    """Read files as the settings of another program: `schema` is a dataclass of dataclasses, a field a section."""
    faults: list[str] = []
    values: dict[tuple[str, str], tuple[Any, str]] = {}
    for path in files(main):
        for section, content in _read(path, faults).items():
            _section(sections(schema), path, section, content, values, faults)
    if faults:
        raise BadConfiguration(faults)
    built = {
        section: kind(**{name: value for (where, name), (value, _) in values.items() if where == section})
        for section, kind in sections(schema).items()
    }
    return Loaded(config=schema(**built), settings=tuple(_settings(built, values)))


def _read(path: Path, faults: list[str]) -> Mapping[str, Any]:
    try:
        data = path.read_bytes()
        if len(data) > FILE_LIMIT_BYTES:
            faults.append(f"{path}: longer than {FILE_LIMIT_BYTES} bytes")
            return {}
        return toml.loads(data.decode())
    except ValueError as exc:
        faults.append(f"{path}: not TOML: {exc}")
    except OSError as exc:
        faults.append(f"{path}: cannot be read: {exc.strerror}")
    return {}


def _section(
    known_sections: Mapping[str, type],
    path: Path,
    section: str,
    content: Any,
    values: dict[tuple[str, str], tuple[Any, str]],
    faults: list[str],
) -> None:
    kind = known_sections.get(section)
    if kind is None:
        faults.append(f"{path}: [{section}] is not a section: {near(section, known_sections)}")
        return
    if not isinstance(content, Mapping):
        faults.append(f"{path}: {section} is a section: write [{section}]")
        return
    known = {item.name: item for item in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for name, raw in content.items():
        where = f"{path}: [{section}] {name}"
        if name not in known:
            faults.append(f"{where} is not a setting: {near(name, known)}")
            continue
        value, problem = _value(hints[name], raw, known[name].metadata)
        if problem:
            faults.append(f"{where} = {json.dumps(raw, default=str)} {problem}")
        else:
            values[section, name] = (value, str(path))


def _value(kind: Any, raw: Any, metadata: Mapping[str, Any]) -> tuple[Any, str]:
    """The typed value, or what is wrong with it."""
    if typing.get_origin(kind) is types.UnionType:
        kind = next(arm for arm in typing.get_args(kind) if arm is not type(None))
    if typing.get_origin(kind) is tuple:
        if typing.get_args(kind)[0] is str:
            good = isinstance(raw, list) and all(isinstance(item, str) and item for item in raw)
            return (tuple(raw), "") if good else (None, "is not a list of names")
        if isinstance(raw, list) and all(isinstance(item, str) and item.startswith("/") for item in raw):
            return tuple(Path(item) for item in raw), ""
        return None, "is not a list of absolute paths"
    if issubclass(kind, enum.Enum):
        if raw in (choices := [member.value for member in metadata.get("choices", kind)]):
            return kind(raw), ""
        return None, f"is not one of {', '.join(choices)}: {near(str(raw), choices)}"
    if kind is Path:
        return (Path(raw), "") if isinstance(raw, str) and raw else (None, "is not a path")
    if type(raw) is not kind:
        return None, f"is not of type {({int: 'integer', bool: 'boolean', str: 'string'})[kind]}"
    low, high = metadata.get("range", (None, None))
    if low is not None and not low <= raw <= high:
        return None, f"is outside {low} to {high}"
    return raw, ""


def _settings(built: Mapping[str, Any], values: Mapping[tuple[str, str], tuple[Any, str]]) -> Iterable[Setting]:
    for section, content in built.items():
        for item in dataclasses.fields(content):
            value = getattr(content, item.name)
            if item.metadata.get("secret") and value:
                value = "(set)"
            text = json.dumps(value, default=lambda other: str(other))
            origin = values.get((section, item.name), (None, BUILT_IN))[1]
            yield Setting(name=f"{section}.{item.name}", value=text, origin=origin)
