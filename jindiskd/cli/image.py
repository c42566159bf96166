"""`jindiskctl image`: build images and look after them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import click

from jindiskd.base.platform import Platform, Tee
from jindiskd.base.process import run as run_program
from jindiskd.bus.contract import ROOT_PATH
from jindiskd.bus.lib import Variant
from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import Client, connected
from jindiskd.cli.completion import images
from jindiskd.cli.jobs import start_and_follow
from jindiskd.cli.lazy import LazyGroup
from jindiskd.cli.objects import MANAGER, Kind, Listing, Properties, show_one
from jindiskd.cli.output import moment, platform, size
from jindiskd.cli.parameters import Number, Size, Volume
from jindiskd.errors import InvalidArgument

IMAGE = "org.jindisk1.Image"
IMAGES = Kind(interface=IMAGE, getter="GetImage")
TAR_TIMEOUT_S = 3600.0


@click.group(
    cls=LazyGroup,
    places={
        "clone": "copies:clone",
        "export": "copies:export",
        "import": "copies:import_",
        "measure": "measure:measure",
        "sign": "sign:sign_",
        "volume": "volume:volume",
    },
)
@common
def image() -> None:
    """Build images with an encrypted root, and look after them."""


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@image.command()
@click.argument("name")
@click.option(
    "--base", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A disk image, raw or qcow2."
)
@click.option(
    "--rootfs", type=click.Path(exists=True, path_type=Path), help="A root file system: a directory, or a tar archive."
)
@click.option("--platform", "platform_", type=click.Choice([item.value for item in Platform]), help="What it is for.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["jindisk", "luks2", "jindisk1"]),
    help="How its root is encrypted; jindisk1, for the reference's kernel module, protects nothing from the host.",
)
@click.option(
    "--initrd",
    type=click.Choice(["own", "system"]),
    help="What opens its root: our own initrd, or what the base's system made with the package jindisk-initramfs, which"
    " opens jindisk and luks2.",
)
@click.option("--vcpus", type=click.IntRange(1), help="Processors of its guests; enters the launch digest.")
@click.option("--cpu-model", help="Processor model of its guests; enters the launch digest.")
@click.option("--firmware", type=click.Path(path_type=Path), help="Firmware of its guests; enters the launch digest.")
@click.option("--vouch-firmware", is_flag=True, help="You know that this firmware checks the kernel's measured hash.")
@click.option("--report-source", metavar="NAME", help="A plug-in by which its guests get their reports.")
@click.option(
    "--key-program",
    metavar="FILE",
    help="A program of the host that its guests ask for their key instead of the broker; for LUKS2.",
)
@click.option("--size", "size_", type=Size(), help="Size of its root file system, such as 20G.")
@click.option(
    "--volume",
    "volumes",
    multiple=True,
    type=Volume(),
    metavar="NAME:SIZE[:FORMAT][:MOUNT]",
    help="A further encrypted disk of its guests, with a key of its own, such as data:20G:/srv/data; FORMAT is jindisk"
    " or luks2. Without MOUNT it gets no file system, and is /dev/disk/by-jindisk/NAME. May be given several times.",
)
@click.option(
    "--disk-bus",
    type=click.Choice(["virtio", "scsi"]),
    help="How its domains have its disks; scsi is for domains with a virtio SCSI controller. Enters the launch digest.",
)
@click.option("--cmdline", help="Words to add to the kernel command line; enters the launch digest.")
@click.option("--debug", is_flag=True, help="Permit words there that open the guest to whoever has its console.")
@click.option(
    "--guest-policy",
    metavar="WORDS",
    help="What it demands of hosts, words with commas between: for SEV-SNP no-smt, single-socket, aes-256-xts,"
    " rapl-off, ciphertext-hiding, no-page-swap, abi=1.55, and what it allows: cxl, and with --debug debug; for SEV and"
    " SEV-ES domain, sev, abi=1.51. The policy of its release demands the same.",
)
@click.option("--id-key", type=_FILE, help="For SEV-SNP: sign it when it is built, as image sign does, with this key.")
@click.option("--author-key", type=_FILE, help="Sign the ID key with this one.")
@click.option("--guest-svn", type=Number(), default=0, help="Its security version in that signature.")
@click.option("--seed", help="For tests: make the image from this public text; it then protects nothing.")
@click.option("--no-wait", is_flag=True, help="Print the job and leave it to itself.")
@common
@pass_app
def build(app: App, /, name: str, base: Path | None, rootfs: Path | None, no_wait: bool, **options: Any) -> None:
    """Build an image NAME from a disk image or a root file system, and keep its key."""
    if (base is None) == (rootfs is None):
        raise click.UsageError("give either --base or --rootfs")
    check_signing(options, no_wait=no_wait)
    run(_build(app, name, base, rootfs, not no_wait, options))


def _build_options(given: dict[str, Any], *, rootfs: bool) -> dict[str, Any]:
    """The options of BuildImage."""
    kinds = {
        "platform_": ("platform", "s"),
        "format_": ("format", "s"),
        "initrd": ("initrd", "s"),
        "vcpus": ("vcpus", "u"),
        "cpu_model": ("cpu-model", "s"),
        "firmware": ("firmware", "s"),
        "vouch_firmware": ("vouch-firmware", "b"),
        "report_source": ("report-source", "s"),
        "key_program": ("key-program", "s"),
        "size_": ("size", "t"),
        "cmdline": ("cmdline", "s"),
        "disk_bus": ("disk-bus", "s"),
        "debug": ("debug", "b"),
        "guest_policy": ("guest-policy", "s"),
        "seed": ("seed", "s"),
    }
    options = {"base-kind": Variant("s", "rootfs" if rootfs else "disk")}
    for parameter, (name, kind) in kinds.items():
        value = given[parameter]
        if parameter == "key_program" and value:
            value = os.path.abspath(value)  # noqa: PTH100 (empty stays empty, and means the broker)
        if value or (value == "" and parameter in {"report_source", "key_program"}):
            options[name] = Variant(kind, os.fspath(value.absolute()) if isinstance(value, Path) else value)
    if given["volumes"]:
        options["volumes"] = Variant("a(stss)", [list(volume) for volume in given["volumes"]])
    return options


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file, open for reading."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


async def _archive(directory: Path, target: int) -> None:
    """Write a directory as a tar archive that keeps owners, attributes and capabilities, names in order."""
    words = ["tar", "--create", "--format=posix", "--sort=name", "--numeric-owner", "--xattrs", "--xattrs-include=*"]
    words += ["--acls", "--one-file-system", f"--directory={directory}", f"--file=/dev/fd/{target}", "."]
    await run_program(words, timeout_s=TAR_TIMEOUT_S, pass_fds=(target,))


async def _build(
    app: App, name: str, base: Path | None, rootfs: Path | None, wait: bool, given: dict[str, Any]
) -> None:
    options = _build_options(given, rootfs=rootfs is not None)
    if given["format_"] == "jindisk1":
        app.say("JinDisk 1 protects nothing from whoever has the disk: its keys lie there in clear")
    with contextlib.ExitStack() as stack:
        source = base or rootfs
        assert source is not None
        if source.is_dir():
            if base is not None:
                raise InvalidArgument("base", str(source), "it is a directory; use --rootfs")
            app.say(f"reading {source}")
            fd = stack.enter_context(tempfile.TemporaryFile(dir=os.environ.get("TMPDIR", "/var/tmp"))).fileno()  # noqa: S108 (an unnamed file)
            await _archive(source, fd)
        else:
            fd = stack.enter_context(opened(source))
        async with connected() as client:

            async def start() -> str:
                path: str = await client.call(ROOT_PATH, MANAGER, "BuildImage", name, 0, options, fds=[fd])
                return path

            if await start_and_follow(client, app, start, wait=wait) is None:
                return
            properties = await signed(client, name, given)
    app.show({"image": properties}, lambda: f"Built {described(properties)}.")


def check_signing(given: dict[str, Any], *, no_wait: bool) -> None:
    """Refuse before the work what could not be signed after it."""
    if not given["id_key"] and not given["author_key"]:
        return
    from jindiskd.attest.id_block import load_key
    from jindiskd.cli.sign import check_options  # which imports this module

    check_options(given)
    if no_wait:
        raise click.UsageError("an image is signed when the work is done: with --no-wait, use image sign afterwards")
    if given["platform_"] and Platform(given["platform_"]).tee is not Tee.SNP:
        raise click.UsageError(f"images for {given['platform_']} have no ID block: leave out --id-key")
    for path in filter(None, (given["id_key"], given["author_key"])):
        load_key(path)


async def signed(client: Client, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Sign an image that was built, if that was asked for; its properties."""
    if not given["id_key"]:
        return (await IMAGES.find(client, name))[1]
    from jindiskd.cli.sign import sign_image  # which imports this module

    return await sign_image(client, name, {**given, "family_id": bytes(16), "image_id": bytes(16)})


def described(image: dict[str, Any]) -> str:
    """An image in half a sentence."""
    kind = "simulated image" if image["Simulated"] else "image"
    count = len(image["Volumes"])
    more = f", with {count} data volume{'s' if count > 1 else ''}" if count else ""
    return f"{kind} {image['Name']} ({image['Format']}, {size(image['SizeBytes'])}{more}) for {platform(image)}"


LISTING = Listing(
    interface=IMAGE,
    name="images",
    order=itemgetter("Name"),
    columns={
        "NAME": itemgetter("Name"),
        "PLATFORM": platform,
        "FORMAT": itemgetter("Format"),
        "SIZE": lambda item: size(item["SizeBytes"]),
        "VOLUMES": lambda item: " ".join(volume["name"] for volume in item["Volumes"]),
        "KEY": lambda item: item["State"] + (", seeded" if item["Seeded"] else ""),
        "DIGEST": lambda item: item["LaunchDigest"][:16],
        "CREATED": lambda item: moment(item["Created"]),
    },
    right=("SIZE",),
)


@image.command(name="list")
@common
@pass_app
def list_(app: App) -> None:
    """List the images."""
    run(LISTING.show(app))


@image.command()
@click.argument("name", shell_complete=images)
@common
@pass_app
def show(app: App, name: str) -> None:
    """Show an image."""
    run(show_one(app, IMAGES, name, "image", _fields))


def _fields(found: Properties) -> dict[str, str]:
    pairs = {
        "name": found["Name"],
        "id": found["ImageId"],
        "platform": platform(found),
        "attestation": "simulated: proves nothing" if found["Simulated"] else "by hardware",
        "format": found["Format"],
        "size": f"{size(found['SizeBytes'])} ({found['SizeBytes']} bytes)",
        "key": key_state(found),
        "launch digest": found["LaunchDigest"],
        "processors": str(found["Vcpus"]),
        **({"guest policy": f"0x{found['GuestPolicy']:x}"} if found["GuestPolicy"] else {}),
        **({"signed by": f"{found['IdKeyDigest']}, version {found['GuestSvn']}"} if found["IdKeyDigest"] else {}),
        "distribution": found["Distribution"],
        "kernel": found["KernelRelease"],
        "created": moment(found["Created"]),
    }
    for volume in found["Volumes"]:
        where = f", mounted at {volume['mount']}" if volume["mount"] else ", no file system"
        pairs[f"volume {volume['name']}"] = f"{volume['format']}, {size(volume['size-bytes'])}{where}"
    return pairs


@image.command()
@click.argument("name", shell_complete=images)
@click.option("--kernel", type=_FILE, required=True, help="The kernel, such as /boot/vmlinuz-... of its system.")
@click.option("--initrd", type=_FILE, required=True, help="The initramfs that its system made for that kernel.")
@common
@pass_app
def update(app: App, name: str, kernel: Path, initrd: Path) -> None:
    """Give the image NAME, built with --initrd system, another kernel and initramfs that its system made.

    It measures otherwise then: its key is released to the new digest once its policy allows that.
    """
    run(_update(app, name, kernel, initrd))


async def _update(app: App, name: str, kernel: Path, initrd: Path) -> None:
    with opened(kernel) as kernel_fd, opened(initrd) as initrd_fd:
        async with connected() as client:
            path, _ = await IMAGES.find(client, name)

            async def start() -> str:
                job: str = await client.call(path, IMAGE, "Update", 0, 1, {}, fds=[kernel_fd, initrd_fd])
                return job

            await start_and_follow(client, app, start, wait=True)
            _, properties = await IMAGES.find(client, name)
    digest = properties["LaunchDigest"]
    app.show(
        {"image": properties},
        lambda: (
            f"Image {name} starts kernel {properties['KernelRelease']} and measures as {digest}.\n"
            f'Its key is released to that when its policy has: [snp] measurements = ["{digest}"]'
        ),
    )


def key_state(image: dict[str, Any]) -> str:
    """The state of an image's key in words."""
    if image["State"] == "unknown":
        return "not here: the broker that the image pins has it"
    return str(image["State"]) + (", made from a public seed: protects nothing" if image["Seeded"] else "")


@image.command()
@click.argument("name", shell_complete=images)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--no-wait", is_flag=True, help="Print the job and leave it to itself.")
@common
@pass_app
def remove(app: App, name: str, yes: bool, no_wait: bool) -> None:
    """Remove an image and its key. What copies of its disk hold can never be read again."""
    run(_remove(app, name, yes, not no_wait))


async def _remove(app: App, name: str, yes: bool, wait: bool) -> None:
    async with connected() as client:
        path, found = await IMAGES.find(client, name)
        app.confirm(f"Remove {described(found)} and its key for good?", f"removing image {name}", yes=yes)
        if await start_and_follow(client, app, lambda: client.call(path, IMAGE, "Remove", {}), wait=wait) is None:
            return
    app.show({"removed": found["Name"]}, lambda: f"Removed image {found['Name']} and its key.")
