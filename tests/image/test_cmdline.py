"""The measured command line leaves no door open, and nobody can talk it into one."""

import pytest

from jindiskd.image.cmdline import MAX_BYTES, UnsafeCommandLine, command_line, missing_words, unsafe_words
from jindiskd.image.request import VolumeFormat

FIXED = (
    "ro noresume panic=5 console=ttyS0 systemd.gpt_auto=0 rd.systemd.gpt_auto=0 systemd.getty_auto=no "
    "sysctl.kernel.sysrq=0 systemd.import_credentials=no efi=noruntime systemd.firstboot=off"
)


def test_what_every_image_has() -> None:
    """The words are exactly these: they are measured, so changing them changes every image."""
    assert command_line(VolumeFormat.LUKS2, "") == f"root=/dev/mapper/root {FIXED}"
    assert command_line(VolumeFormat.JINDISK, "") == f"root=/dev/nbd0 {FIXED}"


@pytest.mark.parametrize(
    "extra",
    ["quiet", "console=tty0 loglevel=3", "mitigations=auto,nosmt", "rd.shell=0 rd.emergency=poweroff",
     "lockdown=integrity", "  spaced   out ", "net.ifnames=0 systemd.log_level=debug audit=1"],
)  # fmt: skip
def test_harmless_words_are_added(extra: str) -> None:
    """They come behind the fixed words, in their order."""
    assert command_line(VolumeFormat.LUKS2, extra) == f"root=/dev/mapper/root {FIXED} {' '.join(extra.split())}"


UNSAFE = [
    "break", "break=mount", "init=/bin/sh", "init=/sbin/init", "rdinit=/bin/sh", "rd.break", "rd.break=pre-mount",
    "rd.shell", "rd.shell=1", "rd.emergency=shell", "systemd.debug-shell", "systemd.debug_shell=1",
    "rd.systemd.debug-shell", "single", "S", "s", "1", "rescue", "emergency", "-b", "systemd.unit=rescue.target",
    "rd.systemd.unit=emergency.target", "sysrq_always_enabled", "sysrq_always_enabled=1", "initrd=/x",
    "systemd.set_credential=a:b", "systemd.set-credential=a:b", "ds=nocloud;s=http://x/", "ci.ds=NoCloud",
    "lockdown=none", "kgdboc=ttyS0", "mem_encrypt=off", "systemd.run=/bin/x", "systemd.mask=x", "RD.BREAK",
    "efivar_ssdt=x", "systemd.crash_shell", "systemd.crash-shell=1", "systemd.confirm_spawn=console",
    "systemd.journald.forward_to_console=1", "systemd.condition-first-boot=yes",
]  # fmt: skip


@pytest.mark.parametrize("word", UNSAFE)
def test_words_that_open_the_guest(word: str) -> None:
    """Each is refused by name, alone and among others; only a debug image may have it."""
    for extra in (word, f"quiet {word} nosmt"):
        with pytest.raises(UnsafeCommandLine) as caught:
            command_line(VolumeFormat.LUKS2, extra)
        assert caught.value.words == (word,)
    assert command_line(VolumeFormat.LUKS2, word, debug=True).endswith(f" {word}")


@pytest.mark.parametrize(
    "word",
    ["root=/dev/sda1", "ro", "rw", "resume=/dev/sda2", "noresume", "panic=0", "panic=halt", "systemd.gpt_auto=1",
     "systemd.import_credentials=yes", "systemd.import-credentials", "efi=runtime", "efi=debug", "noefi",
     "systemd.gpt-auto=1", "rd.systemd.gpt_auto=1", "systemd.getty_auto=yes", "sysctl.kernel.sysrq=1",
     "systemd.firstboot=yes"],
)  # fmt: skip
def test_fixed_words_cannot_be_overridden(word: str) -> None:
    """Not even by a debug image: the last of two would win."""
    for debug in (False, True):
        with pytest.raises(UnsafeCommandLine, match="override"):
            command_line(VolumeFormat.LUKS2, word, debug=debug)


@pytest.mark.parametrize("extra", ['foo="init=/bin/sh"', "a\0b", "ünïcode", "a\x1bb", "-- single", "x" * MAX_BYTES])
def test_odd_text(extra: str) -> None:
    """Quotes, control characters, arguments to init and lines that the kernel would cut are refused."""
    with pytest.raises(UnsafeCommandLine):
        command_line(VolumeFormat.LUKS2, extra, debug=True)


def test_what_an_older_image_lacks() -> None:
    """Nothing of one that is built now; what was taken out, or overridden further on, is named."""
    line = command_line(VolumeFormat.JINDISK, "quiet console=tty0")
    assert missing_words(line) == []
    assert unsafe_words(line) == []
    older = line.replace(" efi=noruntime", "").replace(" noresume", "")
    assert missing_words(older) == ["noresume", "efi=noruntime"]
    assert missing_words(f"{line} efi=runtime") == ["efi=noruntime"]
