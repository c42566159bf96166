"""The agent in an initramfs that a distribution makes: attests and opens the root and the data volumes, and leaves the
rest to the distribution's own scripts, which mount the root from where the measured command line says. Once they have,
it mounts the data volumes in it.

The same agent as in our own initrd. What differs is whose process 1 is: another's, which changes the root and deletes
the initramfs, so that what must outlive it, the storage process and the shutdown program, is copied to `/run/initramfs`
first, and lives there.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from jindiskd.guest import config as guest_config
from jindiskd.guest import kernel, power
from jindiskd.guest.codes import Code, GuestFailure
from jindiskd.guest.progress import Progress, Stage

if TYPE_CHECKING:
    from jindiskd.guest.config import DataVolume, GuestConfig

HOME = Path("/usr/lib/jindisk")
FILES = HOME / "files"
"""The names of all that is kept, relative to the root, directories before what is in them: `directory/`,
`link -> target`, `file`. A file may lie under a link of the distribution's."""
SHUTDOWN = HOME / "shutdown"
KEPT = Path("/run/initramfs")
"""Where systemd-shutdown goes back to; a tmpfs that is moved to the new root with /run."""
BOUND = ("dev", "proc", "sys", "run")
WITHOUT_PCLMULQDQ = ("OPENSSL_ia32cap", "~0x200000000")
"""As in our own initrd (`image.initrd.init_script`): three times as fast where the processor is emulated."""


def spare_the_emulator(path: Path = Path("/", guest_config.PATH)) -> None:
    """Have OpenSSL choose what an emulated processor is quick at; before it is loaded, so before the agent is.

    Raises:
        OSError, ValueError, TypeError, LookupError: there is no configuration, or it is not even JSON.
    """
    if str(json.loads(path.read_bytes())["platform"]).startswith("simulated-"):
        os.environ.setdefault(*WITHOUT_PCLMULQDQ)


def keep_agent(kept: Path = KEPT, listing: Path = FILES, shutdown: Path = SHUTDOWN, root: Path = Path("/")) -> None:
    """Copy the agent from the initramfs to a tmpfs of its own at `kept`, with `/shutdown` for the very end.

    Raises:
        OSError: memory is short, or a file is missing.
    """
    kept.mkdir(mode=0o755, exist_ok=True)
    kernel.mount("tmpfs", kept, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=0755")
    copy_agent(kept, listing.read_text(encoding="utf-8").splitlines(), root)
    shutil.copy(shutdown, kept / "shutdown")
    # dracut unpacks its initramfs over what is there, at the end, unless a shell seems to be there already.
    (kept / "usr/bin/sh").touch(mode=0o600)


def copy_agent(kept: Path, names: list[str], root: Path = Path("/")) -> None:
    """Copy what the lines of `FILES` name from `root` to `kept`."""
    for name in names:
        link, arrow, target = name.partition(" -> ")
        if arrow:
            (kept / link).symlink_to(target)
        elif name.endswith("/"):
            (kept / name).mkdir(mode=0o755)
        else:
            shutil.copy(root / name, kept / name)


def enter_kept(kept: Path = KEPT) -> None:
    """Make the copy this process's root, in a mount namespace of its own, so that the mounts it takes are nobody's else
    and end with it."""
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("", Path("/"), "", kernel.MS_REC | kernel.MS_PRIVATE)
    for name in BOUND:
        recursive = kernel.MS_REC if name == "sys" else 0  # configfs may be mounted below it
        kernel.mount(f"/{name}", kept / name, "", kernel.MS_BIND | recursive)
    os.chroot(kept)
    os.chdir("/")


def measured_config() -> GuestConfig:
    """The configuration in the initramfs; what it takes to read it is imported only here.

    Raises:
        GuestFailure: `CONFIG`: there is none that this agent understands.
    """
    try:
        spare_the_emulator()
    except Exception:  # noqa: BLE001 - whatever it is, the host gets to see the code alone
        raise GuestFailure(Code.CONFIG) from None
    from jindiskd.guest import agent

    return agent.measured_config()


def unlock(progress: Progress) -> None:
    """Open the root, and the data volumes with it.

    Raises:
        GuestFailure: with the code for what went wrong; volumes that are open then stay so.
    """
    config = measured_config()
    from jindiskd.guest import agent

    watchdog = power.Watchdog(config.timeout_s, progress)
    settings = agent.harden_kernel()
    if config.jindisk:
        try:
            keep_agent()
            enter_kept()
        except OSError:
            raise GuestFailure(Code.STORAGE) from None
    nodes = agent.Agent(progress).open_volumes(config)
    if not all(node.exists() for node in nodes):
        raise GuestFailure(Code.ACTIVATION)
    agent.soften_kernel(settings)
    progress.close()
    watchdog.stop()


def nodes_of(volumes: Sequence[DataVolume]) -> list[Path]:
    """The block devices of open data volumes, by the names that the kernel or the agent gave them: no disk of the
    host's can be one."""
    from jindiskd.guest import storage, udev

    return [
        storage.node(number) if volume.jindisk is not None else udev.MAPPER / volume.mapping
        for number, volume in enumerate(volumes, 1)
    ]


def mount_volumes(root: Path) -> None:
    """Mount the data volumes in the system whose root is mounted at `root`.

    Raises:
        GuestFailure: with the code for what went wrong.
    """
    config = measured_config()
    from jindiskd.guest import agent

    agent.mount_volumes(config, nodes_of(config.volumes), root)


def abandon() -> None:
    """Have the volumes closed that are open, since the boot cannot go on."""
    from jindiskd.guest import opening

    opening.close_open()


def or_off(work: Callable[[], None], progress: Progress) -> NoReturn:
    """End with status 0 when the work is done, and otherwise not at all: the machine goes off."""
    code = Code.INTERNAL
    try:
        work()
        os._exit(0)
    except GuestFailure as failure:
        code = failure.code
    except BaseException:  # noqa: BLE001 - must not show why
        code = Code.INTERNAL
    try:
        abandon()
    finally:
        power.give_up(code, progress)


def main() -> NoReturn:
    """What a distribution's scripts call first: ends with status 0 when all volumes are open."""
    progress = Progress()
    or_off(lambda: unlock(progress), progress)


def mounting() -> NoReturn:
    """What they call when the root is mounted, with the place: ends with status 0 when the data volumes are, too."""
    or_off(lambda: mount_volumes(Path(sys.argv[1])), Progress())


def running() -> NoReturn:
    """What they call when the root is mounted, right before the system's init: the host may know."""
    try:
        progress = Progress()
        progress.stage(Stage.RUNNING)
        progress.close()
    finally:
        os._exit(0)


def give_up() -> NoReturn:
    """What a distribution's scripts call in the place of a rescue shell."""
    power.give_up(Code.INITRAMFS, Progress())
