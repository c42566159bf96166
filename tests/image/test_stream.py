"""Images as streams: what is taken elsewhere is what was there, without a key; and nothing is believed of a stream."""

import asyncio
import dataclasses
import hashlib
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from jindiskd.base import document
from jindiskd.base.document import MalformedDocument
from jindiskd.base.secret import Secret
from jindiskd.custody import KeyPort
from jindiskd.errors import AlreadyExists, InvalidArgument, NotFound
from jindiskd.image import vetting
from jindiskd.image.manifest import Manifest
from jindiskd.image.request import ImportTask
from jindiskd.image.service import ImageService
from jindiskd.image.store import ImageDamaged, ImageStore, verify
from jindiskd.image.stream import (
    RECORD_LIMIT,
    SCHEMA,
    Header,
    Part,
    Reader,
    StreamDamaged,
    StreamNotWritten,
    StreamSilent,
    Writer,
)
from jindiskd.image.transfer import import_, parts_of
from jindiskd.keys.store import Store

MIB = 1 << 20


class Machine:
    """A service with a store of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.images = ImageStore(folder / "images")
        self.keys = Store.open(f"sqlite:///{folder}/keys.db", Secret(bytes(32)))
        self.service = ImageService(self.images, KeyPort(self.keys), broker_spki_sha256=bytes(32))

    def left(self) -> list[str]:
        return sorted(path.name for path in self.images.root.iterdir())

    async def export(self, name: str, target: Path) -> str:
        with target.open("wb") as out:
            return await self.service.export(name, out.fileno(), lambda _progress: None)

    async def take(
        self, source: Path | int, name: str = "", firmware=(), dirs=("/",), progress=None, idle_s: int = 300
    ) -> Manifest:
        fd = os.open(source, os.O_RDONLY) if isinstance(source, Path) else source
        try:
            return await self.service.import_(
                fd, name=name, firmware=firmware, firmware_dirs=dirs, idle_s=idle_s,
                progress=progress or (lambda _progress: None),
            )  # fmt: skip
        finally:
            os.close(fd)


@pytest.fixture(scope="module")
def built_owner(request_for, disk_image, tmp_path_factory) -> Machine:
    """A machine with an image, `web`, that tests leave as it is."""
    machine = Machine(tmp_path_factory.mktemp("built") / "owner")
    with disk_image.open("rb") as base:
        asyncio.run(
            machine.service.build(request_for(name="web", seed=None), base.fileno(), lambda _progress: None)
        )
    yield machine
    machine.keys.close()


@pytest.fixture(scope="module")
def exported(built_owner) -> tuple[Path, Manifest]:
    """The image as a stream."""
    path = built_owner.images.root.parent / "stream"
    asyncio.run(built_owner.export("web", path))
    return path, built_owner.images.get("web").manifest


@pytest.fixture
def machines(built_owner, tmp_path):
    """The owner's and a host."""
    host = Machine(tmp_path / "host")
    yield built_owner, host
    host.keys.close()


async def test_an_image_goes_from_machine_to_machine_without_its_key(machines, tmp_path):
    """Byte for byte what it was, holes included; the key stays, and the stream is of the same bytes again."""
    owner, host = machines
    manifest = owner.images.get("web").manifest
    digest = await owner.export("web", tmp_path / "stream")
    assert hashlib.sha256((tmp_path / "stream").read_bytes()).hexdigest() == digest
    stages = []
    taken = await host.take(tmp_path / "stream", progress=lambda step: stages.append(step.stage))
    assert taken == manifest
    assert {"read", "receive", "measure", "finish"} <= set(stages)
    one, two = owner.images.get("web"), host.images.get("web")
    verify(two)
    for file in ("vmlinuz", "initrd", "cmdline", "disk.img", "manifest.json"):
        assert (one.path / file).read_bytes() == (two.path / file).read_bytes(), file
    assert two.disk.stat().st_blocks <= one.disk.stat().st_blocks * 1.1
    assert (tmp_path / "stream").stat().st_size < one.disk.stat().st_size
    assert host.keys.images() == []
    assert await host.export("web", tmp_path / "again") == digest
    with pytest.raises(NotFound):
        await host.service.clone("web", "copy", "test", lambda _progress: None)
    await host.service.remove("web")
    assert host.left() == []
    await host.take(tmp_path / "stream")  # and again
    key = bytes(owner.keys.release(manifest.image_id, peer="test", measurement=b"", simulated=True).reveal())
    assert key not in (tmp_path / "stream").read_bytes()


async def test_it_may_come_through_a_pipe(machines, exported):
    """From a program at the other end, and in pieces of any size."""
    stream, manifest = exported
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    def feed() -> None:
        data = stream.read_bytes()
        with os.fdopen(writing, "wb", buffering=0) as out:
            for at in range(0, len(data), 70_001):
                out.write(data[at : at + 70_001])

    thread = threading.Thread(target=feed)
    thread.start()
    taken = await machines[1].take(reading)
    thread.join()
    assert taken == manifest


async def test_names_and_identities_are_taken_once(machines, exported):
    """Under another name it is the same image; beside itself it cannot be; and of two at once one is first."""
    host, (stream, manifest) = machines[1], exported
    outcomes = await asyncio.gather(
        host.take(stream, name="one"), host.take(stream, name="two"), return_exceptions=True
    )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["AlreadyExists", "Manifest"]
    [name] = host.left()
    assert host.images.get(name).manifest == dataclasses.replace(manifest, name=name)
    with pytest.raises(AlreadyExists, match="the same image"):
        await host.take(stream, name="three")
    with pytest.raises(AlreadyExists, match=name):
        await host.take(stream, name=name)
    with pytest.raises(InvalidArgument):
        await host.take(stream, name="../../etc")
    assert host.left() == [name]


async def test_the_firmware_must_be_there(machines, exported, firmware, tmp_path):
    """By its digest, wherever callers may name one; otherwise the image could not be started."""
    host, (stream, manifest) = machines[1], exported
    with pytest.raises(NotFound, match=manifest.shape.firmware_sha256.hex()):
        await host.take(stream, dirs=(str(tmp_path),))
    other = tmp_path / "other.fd"
    other.write_bytes(firmware.read_bytes()[:-1] + b"?")
    with pytest.raises(NotFound):
        await host.take(stream, firmware=(str(other),), dirs=())
    here = tmp_path / firmware.name
    here.write_bytes(firmware.read_bytes())
    taken = await host.take(stream, dirs=(str(tmp_path),))
    assert taken.shape == dataclasses.replace(manifest.shape, firmware=str(here))
    await host.service.remove("web")
    assert (await host.take(stream, firmware=(str(here),), dirs=())).shape.firmware == str(here)


def remade(manifest: Manifest, parts: tuple[Part, ...] | None = None, schema: int = SCHEMA) -> bytes:
    """A stream with this header and no parts, in correct form."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream:
        with os.fdopen(writing, "wb") as out:
            fcntl_pipe_size(out.fileno())
            header = Header(schema=schema, manifest=manifest, parts=parts_of(manifest) if parts is None else parts)
            Writer(out.fileno()).header(header)
        return stream.read()


def fcntl_pipe_size(fd: int) -> None:
    import fcntl

    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, MIB)


def changed(**more) -> Callable[[Manifest], bytes]:
    return lambda manifest: remade(dataclasses.replace(manifest, **more))


def inside(name: str, **more) -> Callable[[Manifest], bytes]:
    return lambda manifest: remade(
        dataclasses.replace(manifest, **{name: dataclasses.replace(getattr(manifest, name), **more)})
    )


LIES = {
    "a name that leaves the store": (changed(name="../../etc/cron.d/x"), "name is none"),
    "a boot file elsewhere": (inside("kernel", file="../../../etc/passwd"), "kernel.file is not"),
    "a kernel of a tebibyte": (inside("kernel", size_bytes=1 << 40), "kernel has"),
    "an initrd of nothing": (inside("initrd", size_bytes=0), "initrd has 0"),
    "a disk of an exbibyte": (changed(disk_size_bytes=1 << 60), "disk_size_bytes"),
    "a disk of less than nothing": (changed(disk_size_bytes=-512), "disk_size_bytes"),
    "control sequences": (changed(distribution="\x1b]0;owned\x07"), "distribution is no printable"),
    "a text without end": (changed(distribution="x" * 300_000), "distribution is no printable"),
    "a firmware name that is none": (inside("shape", firmware="/usr/share/\n"), "shape.firmware"),
    "no processors": (inside("shape", vcpus=0), "vcpus"),
    "a strange processor": (inside("shape", cpu_model="EPYC,+x=$(id)"), "cpu_model"),
    "another image's key": (changed(resource="default/other/root"), "resource is not"),
    "an identity that is none": (changed(image_id="../x"), "image_id is no UUID"),
    "a time that is none": (changed(created="yesterday"), "created is no time"),
    "a digest of another length": (changed(launch_digest=b"1"), "launch_digest has 1"),
    "a format that is none": (inside("volume", format="zip"), "volume.format"),
    "an anchor of another length": (inside("volume", anchor=b"123"), "volume.anchor"),
    "changes without end": (changed(changes=("x",) * 500), "changes has 500"),
    "a guest policy that no image has": (inside("shape", guest_policy=1 << 40), "shape.guest_policy"),
    "a guest that may be migrated": (inside("shape", guest_policy=0x70000), "shape.guest_policy"),
    "an ID block of zeros": (changed(id_block=bytes(96), id_auth=bytes(4096)), "id_block"),
    "half of an ID block": (changed(id_auth=bytes(4096)), "id_block"),
    "a schema of tomorrow": (changed(schema=9), "schema is 9"),
}


class Here:
    """What the worker does with a stream, in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        ImageStore(folder / "store")

    def take(self, data: bytes) -> Path:
        """The staging directory, once the stream was taken."""
        self.count += 1
        staging = self.folder / f"staging{self.count}"
        staging.mkdir()
        stream = self.folder / "stream"
        stream.write_bytes(data)
        task = ImportTask(staging=str(staging), store=str(self.folder / "store"), firmware_dirs=("/",))
        with stream.open("rb") as source:
            import_(task, source.fileno(), lambda _progress: None)
        return staging

    def wrote(self) -> list[str]:
        return [path.name for path in (self.folder / f"staging{self.count}").iterdir()]


@pytest.fixture
def here(tmp_path) -> Here:
    return Here(tmp_path)


@pytest.mark.parametrize("what", LIES)
def test_a_manifest_that_lies_is_refused_before_anything_is_written(here, exported, what: str):
    """Each value is bounded; the sentence names it."""
    make, text = LIES[what]
    with pytest.raises(StreamDamaged) as caught:
        here.take(make(exported[1]))
    assert text in str(caught.value)
    assert here.wrote() == []


def test_partitions_of_a_vetted_manifest_lie_apart_and_within(exported):
    """One that overlaps another or leaves the disk is found; the genuine manifest has no fault."""
    manifest = exported[1]
    assert list(vetting.faults(manifest)) == []
    boot, uefi, root = manifest.partitions
    for parts in (
        (boot, dataclasses.replace(uefi, offset_bytes=boot.offset_bytes), root),
        (boot, uefi, dataclasses.replace(root, size_bytes=1 << 60)),
        (dataclasses.replace(boot, offset_bytes=-1), uefi, root),
        (dataclasses.replace(boot, name="\x1b[2J"), uefi, root),
    ):
        assert list(vetting.faults(dataclasses.replace(manifest, partitions=parts)))


def record(offset: int, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<BQI", 1, offset, len(data) if length is None else length) + data


PARTS = {
    "beyond its part": record((1 << 64) - 1, b"x"),
    "nothing": record(0, b""),
    "more than a record may have": record(0, b"x", RECORD_LIMIT + 1),
    "of another kind": b"\7",
    "a digest that does not fit": b"\0" + bytes(32),
}


@pytest.mark.parametrize("what", PARTS)
def test_records_that_lie_are_refused(here, exported, what: str):
    """Outside, empty, too long, unknown, or not what the digest says."""
    with pytest.raises(StreamDamaged):
        here.take(remade(exported[1]) + PARTS[what])
    assert "manifest.json" not in here.wrote()


def test_cut_off_changed_and_extended_streams_are_refused(here, exported):
    """At the header, between and within records, at the end; a changed byte of each part; another image's parts."""
    manifest, data = exported[1], exported[0].read_bytes()
    length = int.from_bytes(data[8:12], "little")
    first = 12 + length + 32
    for end in (0, 5, 10, 100, first - 1, first, first + 5, first + 60_000, len(data) - 8, len(data) - 1):
        with pytest.raises(StreamDamaged):
            here.take(data[:end])
    for at in (0, 9, 200, first - 5, first + 3, first + 1000, len(data) // 2, len(data) - 20, len(data) - 3):
        with pytest.raises((StreamDamaged, MalformedDocument)):
            here.take(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    for parts in ((), parts_of(manifest)[:3], (*parts_of(manifest), Part(name="extra", size_bytes=1))):
        with pytest.raises(StreamDamaged, match="other parts"):
            here.take(remade(manifest, parts))
    with pytest.raises(StreamDamaged, match="schema 2"):
        here.take(remade(manifest, schema=2))
    with pytest.raises(StreamDamaged, match="header of"):
        here.take(data[:8] + struct.pack("<I", 1 << 31) + data[12:])
    assert (here.take(data) / "manifest.json").exists()


async def test_a_damaged_stream_leaves_nothing_in_the_store(machines, exported):
    """Through the worker: its error, and neither image nor staging directory."""
    path = machines[1].images.root.parent / "bad"
    path.write_bytes(exported[0].read_bytes()[:-4])
    with pytest.raises(StreamDamaged, match="cut off"):
        await machines[1].take(path)
    assert machines[1].left() == []


async def test_a_sender_that_falls_silent_is_not_waited_for(machines, exported):
    """From the beginning, or in the middle: the error says for how long nothing came, and nothing is left."""
    data = exported[0].read_bytes()[:50_000]  # fits into a pipe
    for sent in (b"", data):
        reading, writing = os.pipe()
        os.write(writing, sent)
        with pytest.raises(StreamSilent, match=r"silent for 1 s: .*images.stream_idle_s"):
            await machines[1].take(reading, idle_s=1)
        os.close(writing)
        assert machines[1].left() == []


async def test_an_image_that_measures_otherwise_than_it_says_is_refused(machines, exported):
    """Digests in a stream are its sender's: what counts is computed from the files."""
    stream, manifest = exported
    host = machines[1]
    fd = os.open(stream, os.O_RDONLY)
    reader = Reader(fd)
    reader.header()
    folder = host.images.root.parent / "files"
    folder.mkdir()
    for part in parts_of(manifest):
        with (folder / part.name).open("wb") as out:
            os.truncate(out.fileno(), part.size_bytes)
            for offset, piece in reader.part(part):
                os.pwrite(out.fileno(), piece, offset)
    reader.end()
    os.close(fd)
    (folder / "cmdline").write_bytes(b"init=/bin/sh")
    sha = hashlib.sha256(b"init=/bin/sh").digest()
    lying = dataclasses.replace(manifest, cmdline=dataclasses.replace(manifest.cmdline, size_bytes=12, sha256=sha))
    path = folder / "stream"
    with path.open("wb") as out:
        writer = Writer(out.fileno())
        writer.header(Header(schema=SCHEMA, manifest=lying, parts=parts_of(lying)))
        for part in parts_of(lying):
            with (folder / part.name).open("rb") as source:
                writer.part(source.fileno(), part.size_bytes, lambda _count: None)
        writer.end()
    with pytest.raises(ImageDamaged, match="it measures as"):
        await host.take(path)
    assert host.left() == []


async def test_a_changed_image_is_not_exported(machines, tmp_path):
    """What was built is what leaves."""
    owner = machines[0]
    initrd = owner.images.get("web").path / "initrd"
    data = initrd.read_bytes()
    initrd.write_bytes(data + b"x")
    try:
        with pytest.raises(ImageDamaged, match="initrd"):
            await owner.export("web", tmp_path / "stream")
    finally:
        initrd.write_bytes(data)


async def test_a_pipe_that_nobody_reads_is_an_error(machines):
    """A reader that goes away ends the export, with a sentence."""
    owner = machines[0]
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(StreamNotWritten, match="pipe"):
        await owner.service.export("web", writing, lambda _progress: None)
    os.close(writing)


async def test_cancelling_an_import_leaves_nothing(machines, exported):
    """A sender that stops sending does not hold anything for ever."""
    reading, writing = os.pipe()
    data = exported[0].read_bytes()[:60_000]
    os.write(writing, data)
    reached = asyncio.Event()
    task = asyncio.create_task(
        machines[1].take(reading, progress=lambda step: reached.set() if step.stage == "receive" else None)
    )
    waiting = asyncio.create_task(reached.wait())
    await asyncio.wait({task, waiting}, timeout=5, return_when=asyncio.FIRST_COMPLETED)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    waiting.cancel()
    os.close(writing)
    assert machines[1].left() == []


def test_the_document_is_read_back(exported):
    """What a header says is what was written."""
    with exported[0].open("rb") as stream:
        header = Reader(stream.fileno()).header()
    assert header.manifest == exported[1]
    assert document.load(Header, document.dump(header), document="header") == header
