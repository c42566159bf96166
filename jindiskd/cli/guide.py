"""The page jindisk(7): from the packages to an encrypted guest, for somebody who has nothing but the manual.

The tests of the packages take the commands out of the built page and run them as they stand.
"""

from __future__ import annotations

from collections.abc import Sequence

ABOUT = """
An owner of a virtual machine turns its disk image into one whose root is encrypted; a host starts it as an ordinary
libvirt domain; early in its boot the guest proves by an attestation report what it is, and gets the key of its disk
from a key broker. Nothing is typed, and whoever reads the disk or the host's memory has neither key nor content.

jindiskd(8) builds images and launches guests on the host, jindiskctl(1) is its command line, jindisk-broker(8) is the
broker on the owner's own machine, and jindisksetup(8) works on encrypted volumes without any of them.
"""
PACKAGES = """
The host has the packages jindiskd and jindiskctl, the owner's own machine jindisk-broker and jindiskctl; each brings
jindisk-common. jindisk-initramfs is for the inside of guests that keep their distribution's initramfs, and for nothing
else: see INITRAMFS OF THE DISTRIBUTION.
"""
FIRMWARE = """
Guests need firmware that has room for the hashes of their kernel. In Debian these are the packages ovmf-generic, for
simulated guests, ovmf-amdsev, for SEV and SEV-SNP, and ovmf-inteltdx, from Debian 14 (forky) on. On Debian 12 and 13
name that release among the sources of apt, with a lower priority than your own (apt_preferences(5)); the packages
hold no programs and depend on nothing:
"""
FIRMWARE_COMMANDS = ("apt-get install -t forky ovmf ovmf-generic ovmf-amdsev ovmf-inteltdx",)
SETTINGS = """
A machine without SEV-SNP or TDX can do everything on a simulated platform. That proves nothing and protects nothing
from this host, and every listing says so. On a machine that has them, leave this step out; images are then for
SEV-SNP:
"""
SETTINGS_COMMANDS = (
    "install -D -m 644 /usr/share/doc/jindiskd/examples/simulated.toml /etc/jindiskd/jindiskd.toml.d/simulated.toml",
)
DOCTOR = """
Start the service with these settings, and see what host, kernel and libvirt still need, with the remedy for each:
"""
DOCTOR_COMMANDS = ("systemctl restart jindiskd", "jindiskctl doctor")
BASE = """
Make an image, from a stock disk image (--base FILE), or from a root file system with a kernel, such as one of
mmdebstrap(1):
"""
BASE_COMMANDS = (
    "mmdebstrap --include=systemd-sysv,udev,linux-image-cloud-amd64 bookworm /var/tmp/root.tar",
    "jindiskctl image build demo --rootfs /var/tmp/root.tar",
)
LAUNCH = """
Launch it. The command follows the guest until its system runs from the encrypted root, and otherwise says why it did
not:
"""
LAUNCH_COMMANDS = (
    "jindiskctl launch demo",
    "jindiskctl domain console demo",
    "jindiskctl audit list",
    "jindiskctl domain stop demo",
)
AFTERWARDS = """
From now on it is a domain like any other: virsh start demo and virt-manager attest and unlock it too. A domain of
your own becomes a guest of an image by jindiskctl domain adopt.
"""
OWNERS = """
The broker runs in the service unless told otherwise, and whoever rules the host can then read the keys. To keep them
from the host, install jindisk-broker on a machine that you trust, start its service, and print its card there:
"""
OWNERS_COMMANDS = (
    "systemctl enable --now jindisk-broker",
    "jindiskctl broker card --output owner.json",
)
OWNERS_HOST = """
On the host put the card into /etc/jindiskd, and these lines into a file of /etc/jindiskd/jindiskd.toml.d:
"""
OWNERS_SETTINGS = """
[broker]
deployment = "relay"
[relay]
broker = "ADDRESS:19012"
card = "/etc/jindiskd/owner.json"
"""
OWNERS_IMAGES = """
New images pin that broker and no other. The key of one goes to it sealed, in a file: the first command on the host, the
second on the owner's machine:
"""
OWNERS_IMAGES_COMMANDS = (
    "jindiskctl key export demo --output demo.json",
    "jindiskctl broker image import demo.json",
)
INITRAMFS = """
By default a guest starts by an initrd of ours, which opens the root and has no shell. For a system that needs what
its own initramfs does, install jindisk-initramfs in the base, of the release that the base is of (initramfs-tools, or
dracut with systemd), and build with
"""
INITRAMFS_COMMANDS = ("jindiskctl image build web --base web.img --initrd system",)
INITRAMFS_UPDATE = """
The root is then jindisk or luks2; jindisk1 is refused. A kernel that is updated in the guest is started after
jindiskctl image update: /usr/share/doc/jindisk-initramfs says how, and what such a guest gives up.
"""
RIGHTS = """
Root may do everything. Others are judged by polkit, by the actions org.jindisk1.build-image, manage-images,
launch-domain, attach-console, adopt-domain, open-device, close-device, manage-keys, approve-release, manage-policy,
inspect and cancel-others-jobs. A file below /etc/polkit-1/rules.d such as this lets a group launch guests:
"""
RULE = """
polkit.addRule(function (action, subject) {
    if (action.id == "org.jindisk1.launch-domain" && subject.isInGroup("vm"))
        return polkit.Result.YES;
});
"""
FAILURES: Sequence[tuple[str, str]] = (
    (
        "the service is not available",
        "systemctl status jindiskd, and journalctl -u jindiskd: it names the setting or file.",
    ),
    ("no stateless firmware", "The packages of firmware above are not there."),
    ("refused", "jindiskctl attest explain DOMAIN says what of the measurement differs, and what to do."),
    ("not in the latest state", "An older copy of the disk was attached: jindisksetup(8), FRESHNESS."),
    (
        "the guest stopped before its system ran",
        "jindiskctl domain console DOMAIN: its last line has a code, such as E21.",
    ),
    ("not authorised", "RIGHTS, above."),
)
BACKUP = """
Back up /var/lib/jindiskd/kek (or the credential jindisk.kek), keys.db and broker.pem together, while the service is
stopped, and not beside the images: without them no disk can be opened, and with them all can.
"""

# For jindiskd(8).

UNIT = """
jindiskd.service is started by the first call on the bus, by a guest that connects to jindiskd.socket, and with the
machine where it is enabled. It says when it is ready, gives signs of life from its event loop, and is ended and
started again where they stay out (WatchdogSec). When it stops, guests run on, and their vsock devices with them; when
it comes back, it finds them. It is not started again where that cannot help: after the exit statuses 2, 3 and 8.

The key-encryption key is drawn into a file beside the keys unless the service manager has it. To give it one, sealed
to this machine, and to its TPM if it has one, before there are any keys:
"""
UNIT_COMMANDS = (
    "mkdir -p -m 700 /etc/credstore.encrypted",
    "head -c 32 /dev/urandom | systemd-creds encrypt --name=jindisk.kek - /etc/credstore.encrypted/jindisk.kek",
    "systemctl restart jindiskd",
)
UNIT_COPY = """
Where there are keys already, seal /var/lib/jindiskd/kek instead, and then remove it. Such a credential opens on this
machine alone: systemd-creds decrypt gives the 32 bytes for a copy that is kept elsewhere.
"""
