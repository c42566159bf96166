"""The data volumes of an image: each a disk of its own, with its own key, whose encrypted volume begins with the disk.

Used in the worker, for builds and clones alike. As with the root, clear text is kept in unlinked files only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from jindiskd.base.secret import Secret
from jindiskd.guest import config as guest
from jindiskd.image import manifest as manifests
from jindiskd.image import randomness
from jindiskd.image.debugfs import FileSystem
from jindiskd.image.request import KEY_BYTES, BuildTask, VolumeRequest, resource_of
from jindiskd.image.sparse import block_ranges, path_of, unlinked_file
from jindiskd.image.tools import tool
from jindiskd.image.volume import Expectation, SealedVolume, placeholder, prepare_volume

Keys = Mapping[str, Secret]
"""The key of each data volume by its name, 32 bytes each."""
GRANULE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A data volume to be: known before its disk exists, as the guest's measured configuration names it."""

    asked: VolumeRequest
    resource: str
    clear: int
    """Descriptor of what goes into it."""
    sealed: SealedVolume

    @property
    def config(self) -> guest.DataVolume:
        """What the guest is told of it."""
        return described(self.asked, self.resource, self.sealed.expected)

    def write(self, staging: Path, share: Callable[[int, int], None]) -> manifests.DataVolume:
        """Write its disk into the staging directory, synced."""
        size = -(-self.sealed.size_bytes // GRANULE) * GRANULE
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        disk = os.open(staging / manifests.volume_file(self.asked.name), flags, 0o644)
        try:
            os.truncate(disk, size)
            ranges = block_ranges(self.clear, 0, self.asked.size_bytes)
            volume = self.sealed.fill(self.clear, disk, ranges, 0, share)
            os.fchmod(disk, 0o644)
            os.fsync(disk)
        finally:
            os.close(disk)
        return manifests.DataVolume(
            name=self.asked.name,
            resource=self.resource,
            volume=volume,
            size_bytes=self.asked.size_bytes,
            disk_size_bytes=size,
            mount=self.asked.mount,
        )


def described(asked: VolumeRequest, resource: str, expected: Expectation) -> guest.DataVolume:
    """A data volume in the guest's configuration."""
    return guest.DataVolume(
        name=asked.name,
        resource=resource,
        luks2=expected if isinstance(expected, guest.Luks2Expectation) else None,
        jindisk=expected if isinstance(expected, guest.JindiskExpectation) else None,
        mount=asked.mount,
    )


def placeholders(task: BuildTask) -> tuple[guest.DataVolume, ...]:
    """What stands for the data volumes while they are not there: enough to know which modules they will need."""
    return tuple(
        described(asked, resource_of(task.image_id, asked.name), placeholder(asked.format))
        for asked in task.request.volumes
    )


def prepare(
    task: BuildTask, keys: Keys, time: int, stack: ExitStack, contents: Mapping[str, int] | None = None
) -> Sequence[Prepared]:
    """All data volumes of a build, in the order asked for.

    Args:
        task: the build.
        keys: of the volumes; they stay the caller's.
        time: Unix seconds, what the volumes say of their making.
        stack: gets what must be closed at the end.
        contents: descriptors of what goes into each, by name; made anew if not given.
    """
    found = []
    for asked in task.request.volumes:
        if contents is None:
            clear = content(asked, task.request.stream(f"content of volume {asked.name}"), time, Path(task.staging))
            stack.callback(os.close, clear)
        else:
            clear = contents[asked.name]
        sealed = stack.enter_context(prepare_volume(task, keys[asked.name], asked.size_bytes, time, asked=asked))
        resource = resource_of(task.image_id, asked.name)
        found.append(Prepared(asked=asked, resource=resource, clear=clear, sealed=sealed))
    return found


def content(asked: VolumeRequest, rng: randomness.Rng, time: int, scratch: Path) -> int:
    """What goes into a new volume: an empty file system where it is to be mounted, else nothing; the descriptor."""
    fd = unlinked_file(scratch)
    try:
        os.truncate(fd, asked.size_bytes)
        if asked.mount:
            uuid = randomness.new_uuid(rng)
            # Its inode tables are written by the guest's kernel, in its own time: a large volume is made quickly.
            extended = f"hash_seed={uuid},root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1,nodiscard"
            options = ("-b", "4096", "-m", "1", "-L", asked.name, "-U", uuid, "-E", extended)
            environment = FileSystem(fd, now=time).environment
            tool(["mke2fs", "-q", "-F", "-t", "ext4", *options, path_of(fd)], pass_fds=(fd,), env=environment)
    except BaseException:
        os.close(fd)
        raise
    return fd


def joined(keys: Keys, names: Sequence[str]) -> Secret:
    """The keys one after the other, as they go to a worker."""
    data = bytearray()
    for name in names:
        data += keys[name].reveal()
    return Secret(data)


@contextmanager
def parted(data: Secret, names: Sequence[str]) -> Iterator[Keys]:
    """What `joined` made, as keys again; wiped at the end."""
    with ExitStack() as stack:
        stack.enter_context(data)
        keys = {}
        for number, name in enumerate(names):
            at = number * KEY_BYTES
            keys[name] = stack.enter_context(Secret(bytearray(data.reveal()[at : at + KEY_BYTES])))
        yield keys
