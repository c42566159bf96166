"""Everything that a user does with a volume, on one that a faulty writer has sealed."""

from jd import KEY, UUID1, Broker, MemoryDevice, World, content, small_geometry
from jd_forge import BLOCK, Forge

from jindiskd.base.secret import Secret
from jindiskd.jindisk.anchor import UNANCHORED
from jindiskd.jindisk.check import check_volume
from jindiskd.jindisk.errors import VolumeError
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.volume import Volume, open_volume

GEOMETRY = small_geometry()


def device(forge: Forge) -> MemoryDevice:
    return MemoryDevice(GEOMETRY.end * BLOCK, forge.blocks)


def opened(forge: Forge) -> Volume:
    return open_volume(device(forge), key=Secret(KEY), uuid=UUID1, anchor=UNANCHORED)


def attack(forge: Forge) -> None:
    """Everything that a user does with a volume; only errors of the family may come."""
    here = World(device=device(forge), broker=Broker(), key=Secret(KEY))
    try:
        volume = opened(forge)
    except VolumeError:
        return
    check_volume(volume, data=True)
    for lba in (0, 1, 100, 199, 1000, 2000, 4095):
        try:
            volume.read(lba * BLOCK, BLOCK)
        except VolumeError:
            continue
    try:
        session = Session(open_volume(here.device, key=here.key, uuid=UUID1, anchor=UNANCHORED), session_id=bytes(32))
        session.begin()
        for lba in (0, 50, 1000, 2000):
            session.write(lba * BLOCK + 5, content(lba))
        session.discard(0, 300 * BLOCK)
        session.flush()
        session.cleaner.clean(len(session.appender.free) + 1)
        session.close()
    except VolumeError:
        return
