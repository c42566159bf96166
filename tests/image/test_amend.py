"""What becomes of fstab: the root is the mapping, and nothing that a host's disk could pose as is mounted."""

import pytest

from jindiskd.image.amend import amended_fstab

ROOT = "/dev/mapper/root"


def active(text: str) -> list[str]:
    return [line for line in amended_fstab(text, ROOT)[0].splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize(
    "line",
    ["UUID=1-2 / ext4 defaults,discard 0 1", "LABEL=cloudimg-rootfs\t/\text4\tdefaults,discard\t0 0",
     "/dev/vda1 / ext4 defaults,discard", "PARTUUID=x   /   ext4   defaults,discard 0 1"],
)  # fmt: skip
def test_root_is_the_mapping(line: str) -> None:
    """Whatever named the root before, its options stay."""
    assert active(line) == [f"{ROOT} / ext4 defaults,discard 0 0"]


def test_missing_root_is_added_and_a_second_dropped() -> None:
    """There is exactly one root line afterwards."""
    assert active("") == [f"{ROOT} / ext4 defaults 0 0"]
    assert active("UUID=1 / ext4 a 0 1\nUUID=2 / ext4 b 0 1") == [f"{ROOT} / ext4 a 0 0"]


@pytest.mark.parametrize(
    "line",
    ["UUID=1 /boot ext4 defaults 0 2", "LABEL=UEFI /boot/efi vfat umask=0077 0 1", "tmpfs /efi tmpfs x 0 0",
     "/dev/vdb1 /srv xfs x 0 0", "UUID=3 none swap sw 0 0", "/dev/vda5 swap swap sw", "host /mnt 9p trans=virtio 0 0",
     "host /mnt virtiofs x 0 0", "PARTLABEL=x /data ext4 x 0 0", "ID=x /data ext4 x 0 0"],
)  # fmt: skip
def test_outside_file_systems_are_left_out(line: str) -> None:
    """Boot partitions, other disks, swap on disks and shares of the host; the line stays to be read."""
    text, changes = amended_fstab(f"/dev/sda / ext4 x 0 1\n{line}\n", ROOT)
    assert text.splitlines()[1] == f"# left out by jindiskd: {line}"
    assert len(changes) == 2


@pytest.mark.parametrize(
    "line",
    ["tmpfs /tmp tmpfs x 0 0", "server:/x /mnt nfs x 0 0", "/swapfile none swap sw 0 0", "/a /b none bind 0 0", "odd"],
)
def test_the_rest_is_untouched(line: str) -> None:
    """What lies inside the root, or is the owner's business, stays; so do comments and odd lines."""
    text, _ = amended_fstab(f"# top\n/dev/sda / ext4 x 0 1\n\n{line}\n", ROOT)
    assert text == f"# top\n{ROOT} / ext4 x 0 0\n\n{line}\n"


def test_amending_again_changes_nothing() -> None:
    """An image built from an image's root has the same table."""
    once, _ = amended_fstab("UUID=1 / ext4 x 0 1\nUUID=2 /boot ext4 x 0 2\n", ROOT)
    assert amended_fstab(once, ROOT)[0] == once
