"""Where a service's key-encryption key is: the same for jindiskd and jindisk-broker.

The key is the unit's credential, a file, or sealed to a TPM. A key is drawn for a new store alone: beside keys that are
stored already it would open none of them.
"""

from __future__ import annotations

import enum
import stat
from dataclasses import dataclass
from pathlib import Path

from jindiskd.base.secret import Secret
from jindiskd.keys.tpm import Tpm
from jindiskd.keys.wrap import CREDENTIAL, KekMissing, load_kek


class KekSource(enum.StrEnum):
    """Where the key-encryption key comes from."""

    AUTO = "auto"
    CREDENTIAL = "credential"
    FILE = "file"
    TPM2 = "tpm2"


@dataclass(frozen=True, slots=True, kw_only=True)
class KekPlace:
    """Where one service's key-encryption key is."""

    source: KekSource
    file: Path
    tpm2_dir: Path
    tpm2_tcti: str
    tpm2_pcrs: str
    credentials: Path | None
    """The unit's credentials directory; None where the service manager gave none."""

    @property
    def tpm(self) -> Tpm:
        """The TPM. Raises `InvalidArgument`."""
        return Tpm(self.tpm2_dir, self.tpm2_tcti, self.tpm2_pcrs)

    @property
    def found(self) -> str:
        """Where it is taken from now: `tpm2`, `credential` or `file`."""
        if self.source is KekSource.AUTO:
            return (KekSource.CREDENTIAL if self._credential else KekSource.FILE).value
        return self.source.value

    @property
    def _credential(self) -> bool:
        return self.credentials is not None and (self.credentials / CREDENTIAL).exists()

    def load(self, *, create: bool) -> Secret:
        """The key; drawn where it may be (`create`), is a file, and none is there yet. Blocks, with a TPM for a second.

        Raises:
            KekMissing, KekUnusable: it is not there, or none. KekNotUnsealed: the TPM refuses.
        """
        if self.source is KekSource.TPM2:
            return self.tpm.unseal()
        if self.source is KekSource.CREDENTIAL and not self._credential:
            raise KekMissing(f"the unit's credential {CREDENTIAL}")
        create = create and self.source is not KekSource.CREDENTIAL
        return load_kek(self.file, None if self.source is KekSource.FILE else self.credentials, create=create)

    def seal(self, *, create: bool) -> str:
        """Seal the key of the file to the TPM, drawing one if there is none and it may be; says what to do next.

        Raises:
            AlreadyExists: one is sealed already. KekMissing, KekUnusable, ToolFailed, ToolMissing.
        """
        with load_kek(self.file, None, create=create) as kek:
            self.tpm.seal(kek)
        return (
            f'Sealed in {self.tpm2_dir}. Now set kek = "tpm2" in [keys], keep a copy of {self.file} offline, and '
            "delete that file."
        )

    def warning(self) -> str:
        """What an administrator should know of it, a sentence; empty where nothing."""
        if self.found != KekSource.FILE:
            return ""
        better = f"better give the unit the credential {CREDENTIAL}, or seal it to the TPM (--seal-kek)"
        if self._others_may:
            return f"the key-encryption key is a file that others may read: chmod 600 {self.file}; {better}"
        return f"the key-encryption key is a file, {self.file}: {better}"

    @property
    def _others_may(self) -> bool:
        """Whether the file's mode lets others in, as a copy from a backup may have it; it is made with 0600."""
        try:
            return bool(self.file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))
        except OSError:
            return False
