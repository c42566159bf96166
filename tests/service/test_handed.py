"""Handovers of images built on a relay: whatever step a crash comes after, no visible image is without its key."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from jindiskd.base.anchor import Anchor
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument, NotFound, NotSupported
from jindiskd.handed import HandedKeys, OwnersKeys
from jindiskd.image.manifest import BootFile, DataVolume, Manifest, Shape, Volume
from jindiskd.image.request import BaseKind, BuildRequest, VolumeFormat
from jindiskd.kbs import jwk
from jindiskd.keys import handover
from jindiskd.keys.changes import Change
from jindiskd.keys.handover import BrokerCard

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
    opened = handover.open_(keys.export(IMAGE, None), OWNER)
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
    assert again.export(IMAGE, None).name == "web"
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
    with pytest.raises(NotSupported, match="at the owner's broker alone"):
        keys.begin_change(Change(image_id=IMAGE, added=f"default/{IMAGE}/data"), Secret(bytes(32)))
    keys.undo_change(IMAGE)
    assert keys.changes() == ()
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
    opened = handover.open_(keys.export(IMAGE, None), OWNER)
    found = {resource.rpartition("/")[2]: bytes(key.reveal()) for resource, key in opened.keys.items()}
    assert found == {"root": KEY, "data": b"d" * 32, "logs": b"l" * 32}
    assert [(volume.volume, volume.resource) for volume in opened.handover.volumes] == [
        (uuids[0], f"default/{IMAGE}/data")
    ]
    assert opened.anchors == {uuids[0]: anchor}
