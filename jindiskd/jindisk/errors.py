"""What can be wrong with a JinDisk volume: the classes of JinDisk 2's format document, section 16, and of JinDisk 1.

Messages name structure, index and raw block, never keys or contents. Each class knows the `errno` that a block device's
user is told.
"""

from __future__ import annotations

from errno import EIO, ENOSPC, EROFS

from jindiskd.base.anchor import State
from jindiskd.errors import EXIT_BUSY, EXIT_FAILED, EXIT_INTEGRITY, JindiskError


class VolumeError(JindiskError):
    """Family of all errors of a volume."""

    errno: int = EIO


class VolumeUnrecognised(VolumeError, code="VolumeUnrecognised", exit_code=EXIT_FAILED):
    """There is no volume of the version expected."""

    def __init__(self, where: str, version: int = 2) -> None:
        """`where` names the device or file."""
        what = f"there is no JinDisk {version} volume in {where}"
        super().__init__(f"{what}: check the device, and the offset of the partition")


class VolumeUnsupported(VolumeError, code="VolumeUnsupported", exit_code=EXIT_FAILED):
    """A version or feature that this release does not know."""

    def __init__(self, what: str, value: object) -> None:
        """`what` has the unknown `value`."""
        super().__init__(f"the volume's {what} {value} is not known here: use a newer release")


class VolumeMalformed(VolumeError, code="VolumeMalformed", exit_code=EXIT_INTEGRITY):
    """The plaintext header is nonsense, differs from the sealed one, or the device is too small."""

    def __init__(self, what: str, why: str) -> None:
        """`what` is the structure."""
        super().__init__(f"the volume's {what} is malformed: {why}")


class VolumeUnauthentic(VolumeError, code="VolumeUnauthentic", exit_code=EXIT_INTEGRITY):
    """A tag did not verify: wrong key or UUID, tampering, or bit rot."""

    def __init__(self, what: str) -> None:
        """`what` names the structure and its raw block."""
        super().__init__(f"{what} is not authentic: the key or UUID is wrong, or the disk was altered or is damaged")
        self.what = what


class VolumeStale(VolumeError, code="VolumeStale", exit_code=EXIT_INTEGRITY):
    """Authentic, but not a state that the anchor accepts."""

    def __init__(self, wanted: int, found: str, newest: State | None = None) -> None:
        """`wanted` is the anchor's sequence number, `found` says what is there, `newest` is its newest superblock."""
        super().__init__(
            f"the volume is not in an acceptable state: {wanted} is the last state known to the owner, the disk holds "
            f"{found}; it was set back or forked, restore the right disk"
        )
        self.newest = newest


class VolumeInconsistent(VolumeError, code="VolumeInconsistent", exit_code=EXIT_INTEGRITY):
    """Authentic, but against the format document: the fault of the program that wrote it."""

    def __init__(self, what: str, why: str) -> None:
        """`what` names the structure and its raw block."""
        super().__init__(f"{what} is authentic but inconsistent: {why}; export what can be read and report it")


class VolumeFenced(VolumeError, code="VolumeFenced", exit_code=EXIT_BUSY):
    """This process may no longer write."""

    errno = EROFS

    def __init__(self, why: str) -> None:
        """`why` the process gave up writing."""
        super().__init__(f"the volume is not written any more: {why}; open it anew")


class VolumeReadOnly(VolumeError, code="VolumeReadOnly", exit_code=EXIT_BUSY):
    """The volume was opened for reading."""

    errno = EROFS

    def __init__(self) -> None:
        """Nothing to name."""
        super().__init__("the volume is open for reading only: begin a session to write")


class VolumeDeviceFailed(VolumeError, code="VolumeDeviceFailed", exit_code=EXIT_FAILED):
    """The device below returned an error."""

    def __init__(self, what: str, cause: OSError) -> None:
        """`what` was being done."""
        super().__init__(f"the device failed {what}: {cause.strerror or 'short transfer'}; see the kernel's log")
        self.errno = cause.errno or EIO


class VolumeCrowded(VolumeError, code="VolumeCrowded", exit_code=EXIT_FAILED):
    """No segment can be freed: damaged segments hold the reserve."""

    errno = ENOSPC

    def __init__(self, damaged: int) -> None:
        """`damaged` segments cannot be cleaned."""
        super().__init__(
            f"the volume has no free segment and cleaning gains none ({damaged} damaged segments cannot be cleaned): "
            "trim unused blocks, or export what can be read to a new volume"
        )
