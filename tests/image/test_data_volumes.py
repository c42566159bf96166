"""Data volumes: each a disk with a key and an identity of its own, which opens with that key alone and holds a sound,
empty file system; what cannot be is refused before anything is done."""

import asyncio
import contextlib
import dataclasses
import json
import os
from uuid import UUID

import pytest

from jindiskd.base import document
from jindiskd.base.anchor import Anchor
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.custody import KeyPort
from jindiskd.errors import InvalidArgument, JindiskError, NotFound, NotSupported
from jindiskd.guest import config as guest
from jindiskd.image import data_volumes, vetting
from jindiskd.image import manifest as manifests
from jindiskd.image.cpio import Archive
from jindiskd.image.request import BuildTask, InitrdKind, VolumeFormat, VolumeRequest
from jindiskd.image.service import ImageService
from jindiskd.image.store import ImageDamaged, ImageStore, StoredImage, read_manifest, verify
from jindiskd.image.transfer import parts_of
from jindiskd.jindisk.device import OpenFile
from jindiskd.jindisk.errors import VolumeUnauthentic
from jindiskd.jindisk.export import bulk_export
from jindiskd.jindisk.volume import open_volume
from jindiskd.keys.store import Requester, Store
from jindiskd.keys.volumes import Volumes
from jindiskd.luks2 import check, xts
from jindiskd.luks2.populate import populate

MIB = 1 << 20
DATA = VolumeRequest(name="data", size_bytes=16 * MIB, mount="/srv/data")
LOGS = VolumeRequest(name="logs-2", size_bytes=16 * MIB, format=VolumeFormat.LUKS2, mount="/srv/logs")
RAW = VolumeRequest(name="raw", size_bytes=16 * MIB)
VOLUMES = (DATA, LOGS, RAW)
WHO = Requester(peer="test")


@pytest.fixture(scope="module")
def made(request_for, disk_image, tmp_path_factory):
    """An image with three volumes through the service: a worker, and keys in a real key store."""
    folder = tmp_path_factory.mktemp("volumes")
    images, keys = ImageStore(folder / "images"), Store.open(f"sqlite:///{folder}/keys.db", Secret(bytes(32)))
    service = ImageService(images, KeyPort(keys), broker_spki_sha256=bytes(32))

    async def build():
        with disk_image.open("rb") as base:
            request = request_for(name="web", format=VolumeFormat.JINDISK, volumes=VOLUMES)
            return await service.build(request, base.fileno(), lambda _progress: None)

    asyncio.run(build())
    yield images.get("web"), keys
    keys.close()


def config_of(image: StoredImage) -> guest.GuestConfig:
    entry = Archive.read((image.path / "initrd").read_bytes()).entries[guest.PATH]
    return document.load(guest.GuestConfig, entry.data, document="configuration")


def test_what_is_built_is_what_was_asked_for(made) -> None:
    """Files, manifest and configuration tell of the same volumes, each with an identity and a key of its own."""
    image, keys = made
    manifest, config = image.manifest, config_of(image)
    verify(image)
    names = [request.name for request in VOLUMES]
    assert [volume.name for volume in manifest.volumes] == [volume.name for volume in config.volumes] == names
    assert [volume.mount for volume in config.volumes] == ["/srv/data", "/srv/logs", ""]
    assert {volume.file for volume in manifest.volumes} <= {path.name for path in image.path.iterdir()}
    identities = {manifest.volume.uuid, *(volume.volume.uuid for volume in manifest.volumes)}
    assert len(identities) == 4
    assert [volume.resource for volume in config.volumes] == [f"default/{manifest.image_id}/{name}" for name in names]
    released = {bytes(keys.release_to(manifest.image_id, WHO, resource=volume.resource).reveal())
                for volume in config.volumes}  # fmt: skip
    released.add(bytes(keys.release_to(manifest.image_id, WHO).reveal()))
    assert len(released) == 4
    known = {record.volume: record for record in Volumes(keys).of_image(manifest.image_id)}
    jindisk = {volume.volume.uuid: volume for volume in manifest.volumes if volume.volume.anchor}
    assert known.keys() == {manifest.volume.uuid, *jindisk}
    assert {known[uuid].resource for uuid in jindisk} == {volume.resource for volume in jindisk.values()}
    for volume in manifest.volumes:
        assert (image.path / volume.file).stat().st_size == volume.disk_size_bytes
        assert (image.path / volume.file).stat().st_blocks * 512 < volume.disk_size_bytes // 2
    assert [part.name for part in parts_of(manifest)][3:] == [
        "disk.img", "volume-data.img", "volume-logs-2.img", "volume-raw.img",
    ]  # fmt: skip


def test_each_opens_with_its_own_key_alone(made, tmp_path, kit) -> None:
    """And holds a sound file system with its name, or nothing at all where none was asked for."""
    image, keys = made
    for volume in image.manifest.volumes:
        key = keys.release_to(image.manifest.image_id, WHO, resource=volume.resource)
        plain = tmp_path / volume.name
        if volume.volume.format == "luks2":
            header = (image.path / volume.file).read_bytes()[: volume.volume.header_bytes]
            with (
                check.unlock(header, key) as volume_key,
                (image.path / volume.file).open("rb") as source,
                plain.open("wb+") as out,
            ):
                out.truncate(volume.size_bytes)
                populate(
                    source.fileno(), out.fileno(), [(0, volume.size_bytes)], volume_key=volume_key,
                    source_offset_bytes=len(header), cipher=xts.decrypt,
                )  # fmt: skip
        else:
            uuid, anchor = UUID(volume.volume.uuid), Anchor.unpack(volume.volume.anchor)
            roots = keys.release_to(image.manifest.image_id, WHO)
            with OpenFile(image.path / volume.file, writable=False) as device:
                with pytest.raises(VolumeUnauthentic):
                    open_volume(device, key=roots, uuid=uuid, anchor=anchor)
                opened = open_volume(device, key=key, uuid=uuid, anchor=anchor)
                assert opened.size_bytes == volume.size_bytes
                with plain.open("wb+") as out:
                    bulk_export(opened, out.fileno())
        if volume.mount:
            kit.run("e2fsck", "-fn", plain)
            assert f"Filesystem volume name:   {volume.name}" in kit.run("dumpe2fs", "-h", plain)
        else:
            assert not plain.read_bytes().strip(b"\0")


def clear(image: StoredImage, keys: Store, volume: manifests.DataVolume, target) -> bytes:
    """What a JinDisk 2 data volume holds, opened with its key in its last known state."""
    record = Volumes(keys).get(volume.volume.uuid)
    with OpenFile(image.path / volume.file, writable=False) as device, target.open("wb+") as out:
        key = keys.release_to(image.manifest.image_id, WHO, resource=volume.resource)
        bulk_export(open_volume(device, key=key, uuid=UUID(record.volume), anchor=record.anchor), out.fileno())
    return bytes(target.read_bytes())


def test_a_clone_has_volumes_of_its_own(made, tmp_path) -> None:
    """With the content of the source's, under other keys and identities; its guests are told of these alone."""
    image, keys = made
    service = ImageService(ImageStore(image.path.parent), KeyPort(keys), broker_spki_sha256=bytes(32))
    asyncio.run(service.clone("web", "copy", "user 7", lambda _progress: None))
    copy = ImageStore(image.path.parent).get("copy")
    verify(copy)
    for old, new, told in zip(image.manifest.volumes, copy.manifest.volumes, config_of(copy).volumes, strict=True):
        assert (new.name, new.mount, new.size_bytes) == (old.name, old.mount, old.size_bytes)
        assert new.resource == told.resource == f"default/{copy.manifest.image_id}/{new.name}"
        assert new.volume.uuid != old.volume.uuid
        assert new.volume.uuid == (told.luks2 or told.jindisk).uuid
        first = keys.release_to(image.manifest.image_id, WHO, resource=old.resource)
        assert first != keys.release_to(copy.manifest.image_id, WHO, resource=new.resource)
    data = copy.manifest.volumes[0]
    assert clear(copy, keys, data, tmp_path / "new") == clear(image, keys, image.manifest.volumes[0], tmp_path / "old")
    asyncio.run(service.remove("copy"))
    assert Volumes(keys).of_image(copy.manifest.image_id) == []
    with pytest.raises(NotFound):
        keys.release_to(copy.manifest.image_id, WHO, resource=data.resource)


def test_a_stream_has_all_disks(made, firmware, tmp_path) -> None:
    """And an image that is taken from one has the same, byte for byte."""
    image, keys = made
    service = ImageService(ImageStore(image.path.parent), KeyPort(keys), broker_spki_sha256=bytes(32))
    other = Store.open(f"sqlite:///{tmp_path}/keys.db", Secret(bytes(32)))
    taking = ImageService(ImageStore(tmp_path / "images"), KeyPort(other), broker_spki_sha256=bytes(32))
    path = tmp_path / "stream"
    with path.open("wb+") as stream:
        asyncio.run(service.export("web", stream.fileno(), lambda _progress: None))
        stream.seek(0)
        places = {"name": "", "firmware": [str(firmware)], "firmware_dirs": [], "idle_s": 600}
        taken = asyncio.run(taking.import_(stream.fileno(), **places, progress=lambda _progress: None))
    assert taken.volumes == image.manifest.volumes
    for volume in taken.volumes:
        assert (tmp_path / "images/web" / volume.file).read_bytes() == (image.path / volume.file).read_bytes()
    other.close()


def test_the_same_seed_gives_the_same_disks(request_for, tmp_path) -> None:
    """Volumes of one build differ in all that is random, those of another with the same seed in nothing."""
    pair = (dataclasses.replace(DATA, name="a", mount="/a"), dataclasses.replace(DATA, name="b", mount="/b"))
    keys = {"a": Secret(bytes(32)), "b": Secret(bytes(32))}
    disks = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        task = BuildTask(
            request=request_for(volumes=pair), image_id="i", created="c", broker_spki_sha256=b"",
            staging=str(folder),
        )  # fmt: skip
        with contextlib.ExitStack() as stack:
            for prepared in data_volumes.prepare(task, keys, 1_700_000_000, stack):
                prepared.write(folder, lambda _done, _total: None)
        disks.append([(folder / manifests.volume_file(name)).read_bytes() for name in ("a", "b")])
    assert disks[0] == disks[1]
    assert disks[0][0] != disks[0][1]


@pytest.mark.parametrize(
    ("volume", "word"),
    [
        ({"name": "root"}, "name"), ({"name": "Data"}, "name"), ({"name": "a" * 17}, "name"), ({"name": ""}, "name"),
        ({"name": "a/b"}, "name"), ({"size_bytes": MIB}, "size"), ({"size_bytes": 64 * MIB + 1}, "size"),
        ({"size_bytes": 32 << 40}, "size"), ({"format": VolumeFormat.JINDISK1}, "format"), ({"mount": "/"}, "mount"),
        ({"mount": "srv"}, "mount"), ({"mount": "/srv/../etc"}, "mount"), ({"mount": "/srv/"}, "mount"),
        ({"mount": "/usr"}, "mount"), ({"mount": "/dev/shm"}, "mount"), ({"mount": "/a b"}, "mount"),
        ({"mount": "/" + "a" * 300}, "mount"), ({"mount": "//srv"}, "mount"), ({"mount": "/srv\n"}, "mount"),
    ],
)  # fmt: skip
def test_volumes_that_cannot_be(request_for, volume, word) -> None:
    """Each refusal names what is wrong."""
    with pytest.raises(InvalidArgument, match=word):
        request_for(volumes=(dataclasses.replace(DATA, **volume),)).check()


def test_images_that_cannot_have_them(request_for) -> None:
    """Twice the same, too many, and ways of starting that have no place for a second key."""
    other = dataclasses.replace(DATA, name="other")
    for wrong in ((DATA, DATA), (DATA, other)):
        with pytest.raises(InvalidArgument, match="of a volume"):
            request_for(volumes=wrong).check()
    many = tuple(VolumeRequest(name=f"v{number}", size_bytes=16 * MIB) for number in range(guest.MAX_VOLUMES + 1))
    with pytest.raises(InvalidArgument, match="number of volumes"):
        request_for(volumes=many).check()
    request_for(volumes=many[1:]).check()
    for more in ({"platform": Platform.SEV_ES}, {"key_program": "/p"}, {"initrd": InitrdKind.SYSTEM}):
        request_for(volumes=(LOGS,), **more).check()
    request_for(volumes=(DATA, LOGS), initrd=InitrdKind.SYSTEM).check()
    for more in ({"platform": Platform.SEV_ES}, {"key_program": "/p"}):
        with pytest.raises(NotSupported, match="data volumes"):
            request_for(volumes=(DATA,), **more).check()


def test_manifests_of_before_are_read(made) -> None:
    """One of the first schema has no volumes; one of a later schema than ours is refused."""
    image, _ = made
    values = json.loads((image.path / manifests.FILE).read_text())
    values.pop("volumes")
    old = read_manifest(json.dumps({**values, "schema": 1}).encode(), "web")
    assert (old.schema, old.volumes) == (manifests.SCHEMA, ())
    with pytest.raises(ImageDamaged, match="schema 3"):
        read_manifest(json.dumps({**values, "schema": 3}).encode(), "web")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../disk"}, {"name": "root"}, {"resource": "default/x/data"}, {"size_bytes": -4096},
        {"disk_size_bytes": 0}, {"disk_size_bytes": 1 << 62}, {"mount": "/etc"},
        {"volume": manifests.Volume(format="jindisk", uuid="u", cipher="c")},
        {"volume": manifests.Volume(format="none", uuid="", cipher="c")},
        {"volume": manifests.Volume(format="jindisk", uuid="", cipher="\x1b[2J")},
        {"volume": manifests.Volume(format="jindisk", uuid="", cipher="c", anchor=b"1")},
    ],
)  # fmt: skip
def test_strange_manifests_are_refused(made, change) -> None:
    """A stream's manifest can name no other file, resource or size than a volume has."""
    manifest = made[0].manifest
    assert not list(vetting.faults(manifest))
    first, *others = manifest.volumes
    strange = dataclasses.replace(manifest, volumes=(dataclasses.replace(first, **change), *others))
    assert list(vetting.faults(strange))
    assert list(vetting.faults(dataclasses.replace(manifest, volumes=manifest.volumes * 3)))


def test_a_disk_that_is_not_there_is_missed(made) -> None:
    """An image is whole with all its disks alone."""
    image, _ = made
    path = image.path / image.manifest.volumes[0].file
    moved = path.rename(path.with_suffix(".gone"))
    try:
        with pytest.raises(ImageDamaged, match=r"volume-data\.img is missing"):
            verify(image)
    finally:
        moved.rename(path)
    size = path.stat().st_size
    os.truncate(path, size + 4096)
    try:
        with pytest.raises(JindiskError, match=r"volume-data\.img has another length"):
            verify(image)
    finally:
        os.truncate(path, size)
