"""Handovers of images built on a relay: whatever step a crash comes after, no visible image is without its key."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from jindiskd.base import document
from jindiskd.base.anchor import Anchor
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.errors import Busy, InvalidArgument, NotFound, NotSupported
from jindiskd.handed import HandedKeys, OwnersKeys
from jindiskd.image.manifest import BootFile, DataVolume, Manifest, Shape, Volume
from jindiskd.image.request import BaseKind, BuildRequest, VolumeFormat
from jindiskd.kbs import jwk
from jindiskd.keys import handover
from jindiskd.keys.changes import ROOT_READ, Change
from jindiskd.keys.handover import Amendment, BrokerCard

IMAGE = "11111111-1111-4111-8111-111111111111"
KEY = bytes(range(100, 132))
OWNER = ec.generate_private_key(ec.SECP256R1())
CARD = BrokerCard(spki_sha256=hashlib.sha256(b"").digest(), transfer_key=jwk.tee_jwk(OWNER.public_key()))
FILE = BootFile(file="x", size_bytes=1, sha256=bytes(32))
REQUEST = BuildRequest(
    name="web",
    platform=Platform.SIMULATED_SNP,
    format=VolumeFormat.LUKS2,
    base_kind=BaseKind.DISK,
    firmware="/f",
    vcpus=1,
    cpu_model="EPYC-v4",
)
MANIFEST = Manifest(
    schema=1,
    image_id=IMAGE,
    name="web",
    created="2026-01-01T00:00:00Z",
    platform=Platform.SIMULATED_SNP,
    base_sha256=bytes(32),
    base_kind="disk",
    distribution="",
    kernel_release="6",
    disk_size_bytes=1,
    partitions=(),
    volume=Volume(format="luks2", uuid="u", cipher="c"),
    kernel=FILE,
    initrd=FILE,
    cmdline=FILE,
    shape=Shape(firmware="/f", firmware_sha256=bytes(32), vcpus=1, cpu_model="EPYC-v4"),
    launch_digest=bytes(range(48)),
    broker_spki_sha256=CARD.spki_sha256,
    resource=f"default/{IMAGE}/root",
)


def prepared(folder: Path) -> HandedKeys:
    keys = HandedKeys(folder, CARD)
    keys.add_pending(IMAGE, "web", REQUEST.platform, Secret(KEY))
    keys.prepare(MANIFEST)
    return keys


def test_the_handover_opens_for_the_owner_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    """Key, digest, resource; in the file the key is not to be seen."""
    keys = prepared(tmp_path / "h")
    keys.activate(MANIFEST)
    keys.activate(MANIFEST)
    assert keys.states() == {IMAGE: "sealed"}
    opened = handover.open_(keys.export(IMAGE, None)[0], OWNER)
    assert bytes(opened.keys[MANIFEST.resource].reveal()) == KEY
    assert opened.handover.launch_digests == (MANIFEST.launch_digest,)
    (path,) = (tmp_path / "h").iterdir()
    assert KEY.hex() not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "h").stat().st_mode & 0o777 == 0o700
    keys.forget(IMAGE)
    keys.forget(IMAGE)
    assert list((tmp_path / "h").iterdir()) == []


def test_after_a_crash_the_store_decides(tmp_path: Path) -> None:
    """Before the handover is written nothing is left; after it, what became of the image is followed."""
    early = HandedKeys(tmp_path / "h", CARD)
    early.add_pending(IMAGE, "web", REQUEST.platform, Secret(KEY))
    assert HandedKeys(tmp_path / "h", CARD).pending() == []
    prepared(tmp_path / "h")
    again = HandedKeys(tmp_path / "h", CARD)
    assert list(again.pending()) == [IMAGE]
    assert again.states() == {IMAGE: "pending"}
    with pytest.raises(NotFound):
        again.export(IMAGE, None)
    again.activate(MANIFEST)
    assert list(again.pending()) == []
    assert again.export(IMAGE, None)[0].name == "web"
    prepared(tmp_path / "g")
    gone = HandedKeys(tmp_path / "g", CARD)
    gone.forget(IMAGE)
    assert gone.states() == {}
    with pytest.raises(NotFound):
        gone.activate(MANIFEST)


async def test_what_the_owner_decides_is_not_decided_here(tmp_path: Path) -> None:
    """Neither revocation nor another recipient; nor is a key taken for a clone."""
    keys = prepared(tmp_path / "h")
    theirs = OwnersKeys(keys)
    for call in (theirs.revoke(IMAGE, "me"), theirs.reinstate(IMAGE, "me"), theirs.accept_rollback(IMAGE, "", "me")):
        with pytest.raises(NotSupported, match="jindiskctl broker"):
            await call
    with pytest.raises(NotSupported, match="clone it where it was built"):
        keys.take(IMAGE, "me", "cloned")
    with pytest.raises(NotSupported, match="choose the root's format"):
        keys.take(IMAGE, "me", ROOT_READ)
    with pytest.raises(NotSupported, match="for another broker"):
        keys.released_to(replace(MANIFEST, broker_spki_sha256=bytes(32)))
    with pytest.raises(InvalidArgument):
        keys.export(IMAGE, replace(CARD))


def test_data_volumes_go_with_the_root(tmp_path: Path) -> None:
    """Each with its own key; those whose states are remembered with the state that their builder left them in."""
    anchor = Anchor(open=False, session=bytes(32), sequence=1, root=bytes(range(32)))
    uuids = ["22222222-2222-4222-8222-222222222222", "33333333-3333-4333-8333-333333333333"]
    volumes = tuple(
        DataVolume(
            name=name,
            resource=f"default/{IMAGE}/{name}",
            volume=Volume(format=form, uuid=uuid, cipher="c", anchor=anchor.pack() if form == "jindisk" else b""),
            size_bytes=1 << 24,
            disk_size_bytes=1 << 25,
        )
        for name, form, uuid in (("data", "jindisk", uuids[0]), ("logs", "luks2", uuids[1]))
    )
    manifest = replace(MANIFEST, volumes=volumes)
    keys = HandedKeys(tmp_path / "h", CARD)
    others = {"data": Secret(b"d" * 32), "logs": Secret(b"l" * 32)}
    keys.add_pending(IMAGE, "web", REQUEST.platform, Secret(KEY), volume_keys=others)
    keys.prepare(manifest)
    keys.activate(manifest)
    opened = handover.open_(keys.export(IMAGE, None)[0], OWNER)
    found = {resource.rpartition("/")[2]: bytes(key.reveal()) for resource, key in opened.keys.items()}
    assert found == {"root": KEY, "data": b"d" * 32, "logs": b"l" * 32}
    assert [(volume.volume, volume.resource) for volume in opened.handover.volumes] == [
        (uuids[0], f"default/{IMAGE}/data")
    ]
    assert opened.anchors == {uuids[0]: anchor}


def with_data(digest: bytes) -> tuple[Manifest, Anchor]:
    """The image with one more volume, and the state that its builder left that in."""
    anchor = Anchor(open=False, session=bytes(32), sequence=1, root=bytes(range(32)))
    volume = DataVolume(
        name="data",
        resource=f"default/{IMAGE}/data",
        volume=Volume(format="jindisk", uuid="22222222-2222-4222-8222-222222222222", cipher="c", anchor=anchor.pack()),
        size_bytes=1 << 24,
        disk_size_bytes=1 << 25,
    )
    return replace(MANIFEST, volumes=(volume,), launch_digest=digest), anchor


def test_a_change_of_volumes_is_handed_over(tmp_path: Path) -> None:
    """The new key alone, sealed; of an image that came from elsewhere too; in the order in which they happened."""
    keys = HandedKeys(tmp_path / "h", CARD)
    resource = f"default/{IMAGE}/data"
    told: list[None] = []
    keys.watch(lambda: told.append(None))
    assert keys.released_to(MANIFEST) == (MANIFEST.launch_digest,)
    after, anchor = with_data(b"2" * 48)
    change = Change(image_id=IMAGE, added=resource, before=keys.released_to(MANIFEST))
    keys.begin_change(change, Secret(KEY))
    with pytest.raises(Busy, match="was not finished"):
        keys.begin_change(change, Secret(KEY))
    assert keys.states() == {}
    keys.prepare_change(change, after)
    assert (keys.states(), keys.handovers()) == ({}, []), "not before it has happened"
    assert not keys.finish_change(change, after)
    keys.finish_change(change, after)
    assert (keys.states(), len(told)) == ({IMAGE: "sealed"}, 2)
    (made,) = keys.export(IMAGE, None)
    assert handover.read(document.dump(made)) == made
    opened = handover.open_(made, OWNER)
    assert {one: bytes(key.reveal()) for one, key in opened.keys.items()} == {resource: KEY}
    assert opened.anchors == {after.volumes[0].volume.uuid: anchor}
    assert made.amends == Amendment(before=(MANIFEST.launch_digest,), added=resource)
    assert made.launch_digests == (b"2" * 48,) == keys.released_to(after)
    gone = Change(image_id=IMAGE, removed=resource, before=(b"2" * 48,))
    keys.begin_change(gone, None)
    keys.prepare_change(gone, replace(MANIFEST, launch_digest=b"3" * 48))
    keys.finish_change(gone, MANIFEST)
    assert [one.launch_digests[0][:1] for one in keys.export(IMAGE, None)] == [b"2", b"3"]
    assert handover.open_(keys.export(IMAGE, None)[1], OWNER).keys == {}
    assert all(KEY.hex() not in path.read_text() for path in (tmp_path / "h").iterdir())
    keys.forget(IMAGE)
    assert list((tmp_path / "h").iterdir()) == []


def test_a_change_after_a_crash_is_what_the_store_decided(tmp_path: Path) -> None:
    """Known from the sealed handover alone: finished, or taken back, by a process that never had the key."""
    after, _ = with_data(b"2" * 48)
    change = Change(image_id=IMAGE, added=f"default/{IMAGE}/data", before=(MANIFEST.launch_digest,))
    for number, finish in enumerate((True, False)):
        folder = tmp_path / str(number)
        crashed = HandedKeys(folder, CARD)
        crashed.begin_change(change, Secret(KEY))
        crashed.prepare_change(change, after)
        again = HandedKeys(folder, CARD)
        (found,) = again.changes()
        assert (found.image_id, found.added, found.removed) == (IMAGE, change.added, "")
        with pytest.raises(Busy):
            again.begin_change(change, Secret(KEY))
        if finish:
            again.finish_change(found, after)
            assert len(again.export(IMAGE, None)) == 1
        else:
            again.undo_change(IMAGE)
            assert list(folder.iterdir()) == []
        assert again.changes() == []
