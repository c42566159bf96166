"""The settings of `jindisk-broker`; read by `jindiskd.config` as those of jindiskd are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from jindiskd.config import CollateralConfig, KekConfig, LogLevel

DEFAULT_FILE = Path("/etc/jindisk-broker/broker.toml")
GUEST_PORT = 19012


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """[service]: where the broker keeps its things and how it talks."""

    state_dir: Path = field(
        default=Path("/var/lib/jindisk-broker"), metadata={"help": "TLS identity and, unless set elsewhere, keys"}
    )
    runtime_dir: Path = field(default=Path("/run/jindisk-broker"), metadata={"help": "the socket of administration"})
    log_level: LogLevel = field(default=LogLevel.INFO, metadata={"help": "what is logged"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """[listen]: where guests, relays, administrators and Prometheus come in."""

    guests: str = field(
        default=f"*:{GUEST_PORT}", metadata={"help": "host:port for guests and relays, with TLS; none if empty"}
    )
    unix: Path | None = field(default=None, metadata={"help": "unix socket for guests and relays, with TLS"})
    vsock_port: int = field(
        default=0, metadata={"range": (0, (1 << 32) - 2), "help": "AF_VSOCK port for guests on this machine; 0: none"}
    )
    admin: str = field(
        default="", metadata={"help": "host:port for administrators with a token, with TLS; none if empty"}
    )
    metrics: str = field(
        default="",
        metadata={"help": "host:port for /metrics and /healthz, without TLS: keep it off open networks"},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminConfig:
    """[admin]: who may administer by the local socket, besides root and the broker's own user."""

    group: str = field(default="", metadata={"help": "a group whose members may; none if empty"})


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """[broker]: who gets keys."""

    allow_simulated: bool = field(
        default=False, metadata={"help": "accept reports of simulated firmware, which prove nothing; for development"}
    )
    simulated_root: Path | None = field(
        default=None,
        metadata={"help": "the simulated platform's certificate, ark.pem, if its reports are accepted"},
    )
    simulated_sev: Path | None = field(
        default=None,
        metadata={"help": "the simulated SEV platform's certificates, a JSON file, if its launches are accepted"},
    )
    verifiers: tuple[str, ...] = field(
        default=(), metadata={"help": "plug-ins that judge evidence as well; what they accept is believed"}
    )
    session_lifetime_s: int = field(
        default=60, metadata={"range": (5, 3600), "help": "seconds after which a challenge dies"}
    )
    max_sessions: int = field(default=4096, metadata={"range": (1, 65536), "help": "sessions at once, in all"})
    max_sessions_per_peer: int = field(
        default=512,
        metadata={"range": (1, 65536), "help": "sessions at once of one address; all guests of a relay have one"},
    )
    max_connections: int = field(default=4096, metadata={"range": (1, 65536), "help": "connections at once, in all"})
    max_connections_per_peer: int = field(
        default=1024, metadata={"range": (1, 65536), "help": "connections at once of one address"}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysConfig(KekConfig):
    """[keys]: the key store and the key that all others are wrapped by."""

    database: str = field(
        default="",
        metadata={
            "help": "SQLAlchemy URL of the key store; SQLite in the state directory if empty. Several brokers share one"
            " PostgreSQL: postgresql://user@host/name",
            "secret": True,
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings."""

    service: ServiceConfig = field(default_factory=ServiceConfig)
    listen: ListenConfig = field(default_factory=ListenConfig)
    admin: AdminConfig = field(default_factory=AdminConfig)
    broker: BrokerConfig = field(default_factory=BrokerConfig)
    keys: KeysConfig = field(default_factory=KeysConfig)
    collateral: CollateralConfig = field(default_factory=CollateralConfig)

    @property
    def collateral_dir(self) -> Path:
        """Certificates and revocation lists of the processors' makers."""
        return self.collateral.dir or self.service.state_dir / "collateral"

    @property
    def database_url(self) -> str:
        """URL of the key store."""
        return self.keys.database or f"sqlite:///{self.service.state_dir}/keys.db"

    @property
    def database_file(self) -> Path | None:
        """The SQLite file that the service makes itself; None for another database."""
        return None if self.keys.database else self.service.state_dir / "keys.db"

    @property
    def admin_socket(self) -> Path:
        """The socket of administration."""
        return self.service.runtime_dir / "admin.sock"
