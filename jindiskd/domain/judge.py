"""Whether a domain, as it is defined now, would attest as its image: asked before each start, without asking libvirt.

Everything here blocks on files: call it in a thread, one call at a time. Hashes of files are kept as long as the files
are unchanged, so that an answer takes milliseconds once a domain has been judged.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

from jindiskd.attest.firmware import enforcement_problem
from jindiskd.base.platform import Platform, Tee
from jindiskd.domain import capabilities, check, xml
from jindiskd.domain.binding import Binding
from jindiskd.domain.capabilities import Host
from jindiskd.domain.security import Stated
from jindiskd.domain.spec import data_disks
from jindiskd.domain.xml import MalformedDomain
from jindiskd.errors import EXIT_REFUSED, JindiskError, NotFound, NotSupported
from jindiskd.image.manifest import BootFile, Manifest
from jindiskd.image.request import DiskBus
from jindiskd.image.store import ImageStore

MAX_HASHED_BYTES = 1 << 30
MAX_KEPT = 1024

KeyProblem = Callable[[str], str]
"""Why the key of an image id is not released, as the end of a sentence; empty if it may be. Blocks."""


class StartRefused(JindiskError, code="StartRefused", exit_code=EXIT_REFUSED):
    """A domain would not attest, so that it is not started."""

    def __init__(self, name: str, problem: str) -> None:
        """`problem` is one sentence."""
        super().__init__(f"domain {name!r} is not started: {problem}")
        self.problem = problem


class Judge:
    """Judges domains against the image store, the state of keys and the host."""

    def __init__(self, images: ImageStore, *, key_problem: KeyProblem, simulation: bool) -> None:
        """`simulation`: whether simulated platforms are accepted."""
        self._images, self._key_problem, self._simulation = images, key_problem, simulation
        self._hashes: dict[str, tuple[tuple[int, ...], bytes]] = {}
        self._lock = threading.Lock()
        self.host: Host | None = None
        """What hardware can start here, as last asked; None while not known."""

    def problem(self, root: ET.Element, binding: Binding, name: str) -> str:
        """Why the domain must not start, in one sentence with a remedy; empty if it may.

        Args:
            root: its definition, live or not.
            binding: our record of it.
            name: of the domain, for the remedy.
        """
        again = f"run 'jindiskctl domain adopt {name} {binding.image}'"
        try:
            stored = self._images.get(binding.image)
        except NotFound:
            return f"its image {binding.image!r} is not in the store"
        except JindiskError as exc:
            return f"its image {binding.image!r} cannot be used ({exc})"
        manifest = stored.manifest
        if manifest.image_id != binding.image_id:
            return f"image {binding.image!r} has been built anew since the domain was adopted: {again}"
        try:
            if xml.binding_of(root) is None:
                return f"its definition no longer names its image: {again}"
            changed = self._changed(root, manifest)
        except (MalformedDomain, OSError, ValueError) as exc:
            return f"what it boots cannot be read ({exc}): {again}"
        if changed:
            return f"{changed} is not what image {binding.image!r} was measured with: {again}, or build the image again"
        measured = manifest.platform.simulated or manifest.platform.tee is Tee.TDX  # what boots goes to registers
        unchecked = "" if measured else enforcement_problem(manifest.shape.firmware_sha256)
        if unchecked:
            return f"its firmware {unchecked}: build image {binding.image!r} again with one that does"
        disks = data_disks(manifest, stored.path)
        found = itertools.chain(
            check.faults(root, simulated=manifest.platform.simulated),
            check.root_bus_faults(root, os.fspath(stored.disk), scsi=manifest.disk_bus == DiskBus.SCSI),
            check.volume_faults(root, disks, scsi=manifest.disk_bus == DiskBus.SCSI),
            check.stray_faults(root, stored.path, disks),
        )
        faults = [str(fault) for fault in found]
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            return f"its {faults[0]}{more}: {again}"
        withheld = self._key_problem(manifest.image_id)
        if withheld:
            return f"the key of image {binding.image!r} {withheld}"
        return self._host_problem(manifest.platform)

    def refuse(self, root: ET.Element, binding: Binding, name: str) -> None:
        """Raise `StartRefused` with what `problem` says, if it says anything."""
        problem = self.problem(root, binding, name)
        if problem:
            raise StartRefused(name, problem)

    def _changed(self, root: ET.Element, manifest: Manifest) -> str:
        """The part of what is measured that differs from the manifest, as the beginning of a sentence."""
        boot, shape = xml.boot_inputs(root), manifest.shape
        files: tuple[tuple[str, str, BootFile | bytes], ...] = (
            ("its firmware", boot.firmware, shape.firmware_sha256),
            ("its kernel", boot.kernel, manifest.kernel),
            ("its initrd", boot.initrd, manifest.initrd),
        )
        for what, path, expected in files:
            digest = expected if isinstance(expected, bytes) else expected.sha256
            try:
                found = self._sha256(Path(path))
            except OSError as exc:
                return f"{what}, {path} ({exc.strerror or exc}),"
            if found != digest:
                return f"{what}, {path},"
        if hashlib.sha256(boot.cmdline.encode()).digest() != manifest.cmdline.sha256:
            return "its kernel command line"
        if boot.vcpus != shape.vcpus:
            return f"its number of processors, {boot.vcpus},"
        if manifest.platform.tee is not Tee.TDX and boot.cpu_model != shape.cpu_model:
            return f"its processor model, {boot.cpu_model},"
        return xml.stated(root).differs(Stated.of_image(manifest))

    def _host_problem(self, platform: Platform) -> str:
        if platform.simulated:
            return "" if self._simulation else "its platform is simulated, and broker.allow_simulated is off"
        if self.host is None:
            return "it is not known yet what this host can start: try again in a moment"
        try:
            capabilities.require(self.host, platform)
        except NotSupported as exc:
            return str(exc)
        return ""

    def _sha256(self, path: Path) -> bytes:
        """Of a file, computed again only where its identity, size or times have changed.

        The path is from a definition, which others write: what would wait for a writer, or never ends, is no boot file.
        """
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ValueError(f"{path} is no regular file")
            mark = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            with self._lock:
                kept = self._hashes.get(str(path))
            if kept is not None and kept[0] == mark:
                return kept[1]
            if found.st_size > MAX_HASHED_BYTES:
                raise ValueError(f"{path} has {found.st_size} bytes")
            digest = hashlib.file_digest(stream, "sha256").digest()
        with self._lock:
            if len(self._hashes) >= MAX_KEPT:
                self._hashes.clear()
            self._hashes[str(path)] = (mark, digest)
        return digest
