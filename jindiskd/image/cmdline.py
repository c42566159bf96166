"""The kernel command line of an image: measured, so it must not leave a door open, and it is ours to fill.

Whoever holds the host has the guest's console. A word that opens a shell, starts another init, resumes from a disk or
gives the magic keys back turns a genuine, attested guest over to him.
"""

from __future__ import annotations

import re

from jindiskd.errors import EXIT_USAGE, JindiskError
from jindiskd.image.request import VolumeFormat

MAX_BYTES = 2047
"""What the kernel keeps on x86 without the NUL (COMMAND_LINE_SIZE)."""

MAPPED = "/dev/mapper/root"
ROOT = {VolumeFormat.LUKS2: MAPPED, VolumeFormat.JINDISK: "/dev/nbd0", VolumeFormat.JINDISK1: MAPPED}

_FIXED = (
    "ro",
    "noresume",  # a swap signature on a disk of the host's would load its memory into the kernel
    "panic=5",  # a positive number is the one form that gives a rescue shell in no initramfs-tools
    "console=ttyS0",
    "systemd.gpt_auto=0",
    "rd.systemd.gpt_auto=0",
    "systemd.getty_auto=no",
    "sysctl.kernel.sysrq=0",
    # What the host gives is not measured: systemd would take credentials, which set passwords and write files, from
    # SMBIOS and fw_cfg, and words of a command line from the EFI variable SystemdOptions.
    "systemd.import_credentials=no",
    "efi=noruntime",
    # A system that was never started asks on the console for root's password, or for an administrator to be (systemd
    # 256): the host would answer.
    "systemd.firstboot=off",
)
_SYSTEM = (
    "cryptopts=",  # an entry of /etc/crypttab in the initramfs would ask for a passphrase on the console
    "rd.shell=0",
    "rd.emergency=poweroff",
    # Nothing is assembled from whatever disks the host attaches.
    *(f"rd.{kind}=0" for kind in ("luks", "lvm", "md", "dm")),
)
"""For an initrd that a distribution made."""
_OURS = {"root", "ro", "rw", "resume", "noresume", "panic", "systemd.gpt_auto", "rd.systemd.gpt_auto"} | {
    "systemd.getty_auto",
    *(f"{prefix}systemd.import_credentials" for prefix in ("", "rd.")),
    "sysctl.kernel.sysrq",
    "systemd.firstboot",
    "efi",
    "noefi",
    "cryptopts",
    *(f"rd.{kind}" for kind in ("luks", "lvm", "md", "dm", "auto")),
}
_SHELLS = {"break", "init", "rdinit", "rd.break", "rd.shell", "rd.emergency", "single", "s", "1", "rescue", "emergency"}
_SYSTEMD = {"debug-shell", "debug_shell", "unit", "set_credential", "set_credential_binary", "crash_shell"} | {
    "confirm_spawn",  # asks on the console before each service is started, or not
    "condition_first_boot",
    "journald.forward_to_console",  # the host would read the journal
}
_UNSAFE = (
    _SHELLS
    | {f"{prefix}systemd.{word}" for word in _SYSTEMD for prefix in ("", "rd.")}
    | {"sysrq_always_enabled", "initrd", "-b", "rd.rescue", "systemd.setenv", "kgdboc", "kgdbwait", "ekgdboc"}
    | {"iomem", "mem_encrypt", "nokaslr", "ds", "cc", "ci.ds", "ci.datasource", "cloud-config-url", "fsck.mode", "ima"}
    | {"systemd.mask", "systemd.run", "systemd.wants", "efivar_ssdt", "acpi_rsdp", "lockdown"}
)
_SAFE_VALUES = {
    ("rd.shell", "0"),
    ("rd.emergency", "poweroff"),
    ("rd.emergency", "reboot"),
    ("rd.emergency", "halt"),
} | {
    ("lockdown", "integrity"),
    ("lockdown", "confidentiality"),
    ("mem_encrypt", "on"),
}
_WORD = re.compile(r"[!-~]+")


class UnsafeCommandLine(JindiskError, code="UnsafeCommandLine", exit_code=EXIT_USAGE):
    """A word for the kernel command line would open the guest to its host, or override what keeps it closed."""

    def __init__(self, words: list[str], why: str) -> None:
        """`words` are those refused, `why` what is wrong with them."""
        super().__init__(f"the command line is refused: {' '.join(map(repr, words))} {why}")
        self.words = tuple(words)


def command_line(volume: VolumeFormat, extra: str, *, debug: bool = False, system_initrd: bool = False) -> str:
    """The whole command line of an image, without its NUL.

    Args:
        volume: the format of the root.
        extra: words to add.
        debug: accept words that open shells. Such an image measures differently and is for looking inside only.
        system_initrd: the initrd is one that a distribution made.

    Raises:
        UnsafeCommandLine: names every word that is refused.
    """
    words = extra.split()
    odd = [word for word in words if not _WORD.fullmatch(word) or '"' in word]
    if odd:
        raise UnsafeCommandLine(odd, "has quotes or characters that are not printable ASCII; leave them out")
    if "--" in words:
        raise UnsafeCommandLine(["--"], "would pass what follows to init; leave it out")
    fixed = [word for word in words if _key(word) in _OURS]
    if fixed:
        raise UnsafeCommandLine(fixed, "would override what every image has; leave it out")
    unsafe = [word for word in words if _unsafe(word)]
    if unsafe and not debug:
        raise UnsafeCommandLine(unsafe, "would open the guest to its host; build a debug image if that is wanted")
    line = " ".join((f"root={ROOT[volume]}", *_FIXED, *(_SYSTEM if system_initrd else ()), *words))
    if len(line) > MAX_BYTES:
        raise UnsafeCommandLine([words[-1][:40]], f"makes the line longer than the {MAX_BYTES} bytes a kernel keeps")
    return line


def unsafe_words(line: str) -> list[str]:
    """The words of a whole command line that open the guest to its host; for images that are built already."""
    return [word for word in line.split() if _unsafe(word)]


def missing_words(line: str) -> list[str]:
    """The words that every image is built with now and a whole command line lacks; for images that are built already.

    Of two with one key the last counts, as it does to kernel and systemd.
    """
    last = {_key(word): word for word in line.split()}
    return [word for word in _FIXED if last.get(_key(word)) != word and word != "console=ttyS0"]


def _key(word: str) -> str:
    # The kernel takes hyphens and underscores for the same in the names of its parameters.
    return word.partition("=")[0].lower().replace("-", "_") if not word.startswith("-") else word


_UNSAFE_KEYS = {_key(word) for word in _UNSAFE}


def _unsafe(word: str) -> bool:
    key, _, value = word.partition("=")
    return _key(word) in _UNSAFE_KEYS and (key.lower(), value) not in _SAFE_VALUES
