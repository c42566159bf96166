"""The key-encryption key sealed to this machine's TPM 2.0 and, if wanted, to the state of some of its registers.

A directory, mode 0700, has what tpm2_create made: `kek.pub` and `kek.priv`. Neither is secret without the TPM that made
them. The parent is the primary key of the owner hierarchy by the tools' default ECC template, which every call derives
anew, so that nothing is kept in the TPM. tpm2-tools do it; keys pass by pipes.

Where systemd starts the broker, a credential encrypted to the TPM does the same without any of this: see
docs/broker.md.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from pathlib import Path

from jindiskd.base.files import replace_file
from jindiskd.base.process import ToolFailed, run
from jindiskd.base.secret import Secret
from jindiskd.errors import EXIT_INTEGRITY, AlreadyExists, InvalidArgument, JindiskError
from jindiskd.keys.wrap import KEK_BYTES, KekMissing

TIMEOUT_S = 60.0
PUBLIC, PRIVATE = "kek.pub", "kek.priv"
_PCRS = re.compile(r"(sha1|sha256|sha384|sha512):[0-9]{1,2}(,[0-9]{1,2})*")


class KekNotUnsealed(JindiskError, code="KekNotUnsealed", exit_code=EXIT_INTEGRITY):
    """The TPM does not give the key-encryption key."""

    def __init__(self, directory: Path, problem: str) -> None:
        """`problem` is what the tool said last."""
        super().__init__(
            f"the TPM does not unseal the key-encryption key in {directory} ({problem}): if this machine or its boot "
            "was changed on purpose, put the key from its backup in the key's file and seal it again (--seal-kek)"
        )


class Tpm:
    """One TPM and the directory of what is sealed to it.

    Args:
        directory: of `kek.pub` and `kek.priv`.
        tcti: how the TPM is reached, as tpm2-tools write it.
        pcrs: registers that must be as they were, such as `sha256:7`; empty for none.
    """

    def __init__(self, directory: Path, tcti: str, pcrs: str) -> None:
        """Ask nothing yet. Raises `InvalidArgument`."""
        if pcrs and not _PCRS.fullmatch(pcrs):
            raise InvalidArgument("keys.tpm2_pcrs", pcrs, "write a bank and registers, such as sha256:0,7, or nothing")
        if not re.fullmatch(r"[a-z]+(:[ -~]*)?", tcti):
            raise InvalidArgument("keys.tpm2_tcti", tcti, "write it as for tpm2-tools, such as device:/dev/tpmrm0")
        self.directory, self._tcti, self._pcrs = directory, tcti, pcrs

    def unseal(self) -> Secret:
        """The key-encryption key; blocks for a second or so.

        Raises:
            KekMissing: nothing was sealed. KekNotUnsealed: the TPM refuses. ToolMissing: tpm2-tools are not there.
        """
        if not (self.directory / PUBLIC).exists():
            raise KekMissing(str(self.directory))
        try:
            return asyncio.run(self._unseal())
        except ToolFailed as exc:
            said = exc.stderr.strip().splitlines()
            raise KekNotUnsealed(self.directory, said[-1] if said else f"{exc.argv[0]}: status {exc.status}") from exc

    def seal(self, kek: Secret) -> None:
        """Seal a key-encryption key; blocks.

        Raises:
            AlreadyExists: one is sealed there already. ToolFailed, ToolMissing: nothing was written.
        """
        if (self.directory / PUBLIC).exists():
            raise AlreadyExists("sealed key in", str(self.directory))
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        asyncio.run(self._seal(kek))

    async def _primary(self, work: Path) -> Path:
        primary = work / "primary.ctx"
        await self._tool("tpm2_createprimary", "-Q", "-C", "o", "-g", "sha256", "-G", "ecc", "-c", primary)
        return primary

    async def _unseal(self) -> Secret:
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            loaded = work / "kek.ctx"
            files = ("-u", self.directory / PUBLIC, "-r", self.directory / PRIVATE)
            await self._tool("tpm2_load", "-Q", "-C", await self._primary(work), *files, "-c", loaded)
            unlock = ("-p", f"pcr:{self._pcrs}") if self._pcrs else ()
            found = Secret(bytearray(await self._tool("tpm2_unseal", "-c", loaded, *unlock)))
        if len(found) != KEK_BYTES:
            raise KekNotUnsealed(self.directory, f"what is sealed there has {len(found)} bytes")
        return found

    async def _seal(self, kek: Secret) -> None:
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            policy: tuple[str | Path, ...] = ()
            if self._pcrs:
                file = work / "policy"
                await self._tool("tpm2_createpolicy", "-Q", "--policy-pcr", "-l", self._pcrs, "-L", file)
                policy = ("-L", file)
            # No password, no migration to another TPM; with registers, their state is the only way in.
            attributes = "fixedtpm|fixedparent|" + ("adminwithpolicy" if self._pcrs else "userwithauth")
            public, private = work / PUBLIC, work / PRIVATE
            files = ("-u", public, "-r", private)
            primary = await self._primary(work)
            words = ("-Q", "-C", primary, "-g", "sha256", "-a", attributes, "-i", "-", *policy, *files)
            await self._tool("tpm2_create", *words, stdin=kek.reveal())
            # The public half last: while it is absent, nothing is sealed.
            replace_file(self.directory / PRIVATE, private.read_bytes(), 0o600)
            replace_file(self.directory / PUBLIC, public.read_bytes(), 0o600)

    async def _tool(self, program: str, *words: str | Path, stdin: bytearray | None = None) -> bytes:
        try:
            return await run([program, "-T", self._tcti, *words], timeout_s=TIMEOUT_S, stdin=stdin)
        finally:
            # Objects stay in a TPM that is reached without a resource manager, and it has room for three.
            await run(["tpm2_flushcontext", "-T", self._tcti, "-t"], timeout_s=TIMEOUT_S, ok=(0, 1))
