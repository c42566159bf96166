"""Why a base image cannot be built from: one class a reason, all of the family `BaseRefused`."""

from __future__ import annotations

from jindiskd.errors import EXIT_USAGE, JindiskError


class BaseRefused(JindiskError):
    """The base, an image of a disk or a stream of a root file system, is not one that can be built from."""


class NoPartitionTable(BaseRefused, code="NoPartitionTable", exit_code=EXIT_USAGE):
    """There is no GPT."""

    def __init__(self, found: str) -> None:
        """`found` says what there is instead."""
        super().__init__(f"the base has no GPT but {found}: use a disk image with a GPT, such as a stock cloud image")


class PartitionTableDamaged(BaseRefused, code="PartitionTableDamaged", exit_code=EXIT_USAGE):
    """Both copies of the GPT are damaged, or the table contradicts itself."""

    def __init__(self, problem: str) -> None:
        """`problem` says what is wrong."""
        super().__init__(f"the base's GPT is damaged, {problem}: repair it with sgdisk or fetch the image again")


class BaseTruncated(BaseRefused, code="BaseTruncated", exit_code=EXIT_USAGE):
    """The base ends before its content does."""

    def __init__(self, what: str, needed_bytes: int, size_bytes: int) -> None:
        """`what` needs `needed_bytes` bytes where there are `size_bytes`."""
        super().__init__(
            f"the base is cut short: {what} needs {needed_bytes} bytes, there are {size_bytes}; fetch the image again"
        )


class AlreadyEncrypted(BaseRefused, code="AlreadyEncrypted", exit_code=EXIT_USAGE):
    """The root file system is inside an encrypted volume."""

    def __init__(self, kind: str) -> None:
        """`kind` is the volume's format."""
        super().__init__(f"the base is encrypted already ({kind}): build from the image before it was encrypted")


class NoRootPartition(BaseRefused, code="NoRootPartition", exit_code=EXIT_USAGE):
    """No partition holds a root file system."""

    def __init__(self) -> None:
        """There is nothing to add."""
        super().__init__(
            "the base has no root partition: none has the type of a root, or is ext4 with /etc/os-release or /etc/fstab"
        )


class RootNotExt4(BaseRefused, code="RootNotExt4", exit_code=EXIT_USAGE):
    """The root file system is of a kind that cannot be handled."""

    def __init__(self, kind: str) -> None:
        """`kind` says which it is, or what of ext4 it uses."""
        super().__init__(f"the base's root file system is {kind}: only plain ext4 can be built from, or a tar stream")


class RootDamaged(BaseRefused, code="RootDamaged", exit_code=EXIT_USAGE):
    """The root file system is damaged beyond what a preen repairs."""

    def __init__(self, problem: str) -> None:
        """`problem` is what was found."""
        super().__init__(
            f"the base's root file system is damaged ({problem}): repair it with e2fsck"
        )


class NoKernel(BaseRefused, code="NoKernel", exit_code=EXIT_USAGE):
    """No kernel with its modules was found."""

    def __init__(self, why: str) -> None:
        """`why` says what was looked for or is missing."""
        super().__init__(f"the base has no kernel to start ({why}): install one in it, with its modules")


class ImageFormatRefused(BaseRefused, code="ImageFormatRefused", exit_code=EXIT_USAGE):
    """A qcow2 image uses something that is not accepted, above all another file."""

    def __init__(self, problem: str) -> None:
        """`problem` says what it uses."""
        super().__init__(f"the base is a qcow2 image {problem}: flatten it with `qemu-img convert -O qcow2` first")


class BaseChanged(BaseRefused, code="BaseChanged", exit_code=EXIT_USAGE):
    """The base was written to during the build."""

    def __init__(self) -> None:
        """There is nothing to add."""
        super().__init__("the base changed while it was read: stop what uses it and build again")


class TarRefused(BaseRefused, code="TarRefused", exit_code=EXIT_USAGE):
    """A tar stream holds something that cannot become a root file system."""

    def __init__(self, problem: str) -> None:
        """`problem` names the entry and what is wrong."""
        super().__init__(f"the tar stream cannot be used: {problem}")
