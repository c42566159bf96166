"""Manual pages, made from the commands, the settings and the table of exit statuses.

`python -m jindiskd.cli.manpages DIRECTORY` writes jindisk(7), the way to a first guest; jindiskctl(1), jindisksetup(8),
jindiskd(8) and jindisk-broker(8); and the settings of the last two: jindiskd.toml(5) and jindisk-broker.toml(5), and
each as a file to begin with. All follows from the program alone: the same version gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

import jindiskd
from jindiskd import broker_config, config
from jindiskd.cli import guide
from jindiskd.cli.exits import MEANINGS
from jindiskd.cli.lazy import members
from jindiskd.cli.main import cli
from jindiskd.cli.serving import broker_command, daemon_command
from jindiskd.jindisksetup.main import cli as setup_cli

COMMON = frozenset(("json", "log_json", "no_legend", "help"))
ABOUT_JINDISKCTL = """
Talks to jindiskd(8) over the system bus. Results go to standard output, everything else to standard error. Whatever is
simulated says so in every listing: it proves nothing to anybody.
"""
ABOUT_JSON = """
With --json every command prints one object. Objects of the service appear with the names and values of their
properties on the bus: see org.jindisk1.Manager and its neighbours in /usr/share/dbus-1/interfaces. With --log-json
standard error is one object a line: "type" is progress, message or error, "id" is stable, and the last line alone has
"finished": true and "exit_status".
"""
ABOUT_JINDISKD = """
It builds images whose root only an attested guest can read, keeps their keys, launches them as libvirt domains, and
releases a key to a guest whose attestation report is genuine and fits the image.

It runs as the user jindiskd, without privileges, under its unit. Everybody may call it on the bus; polkit decides who
may do what (org.jindisk1.policy). It is told to stop by SIGTERM; SIGHUP has it check its configuration.

The broker that releases keys runs inside it, and whoever rules the host can then read the keys; or it passes guests on
to the broker of their owner, jindisk-broker(8), and can read nothing.
"""
ABOUT_BROKER = """
It keeps the keys of a guest owner's images, on a machine that the owner trusts, and releases a key to a guest whose
attestation report is genuine and fits the image. Guests come over vsock and through the relay of the host's
jindiskd(8), which can read nothing of it.

It is administered with jindiskctl broker: by its local socket, or over the network with a token. Several brokers may
share one PostgreSQL database behind a load balancer that passes TLS through. It is told to stop by SIGTERM; SIGHUP has
it check its configuration.
"""
ABOUT_SETTINGS = """
A TOML file. Files in the directory beside it are read after it in the order of their names, and override single
settings. Wrong settings are shown all at once, with the nearest right name: PROGRAM --check-config. PROGRAM
--show-config shows the settings in effect and the file that each comes from.
"""
ABOUT_JINDISKSETUP = """
Works on files and block devices, and needs no service. Results go to standard output, everything else to standard
error. It refuses to overwrite what it knows, unless told to with --force, and asks before it overwrites anything else.

A volume of version 2, the default, protects confidentiality, integrity and freshness of its content against whoever has
the disk. Version 1 is for interchange with the reference implementation's kernel module and protects nothing of that.
"""
ABOUT_KEYS = """
A key of version 2 is 32 random bytes; there is no password and nothing to guess. --key-file names a file that holds
exactly these bytes, or - for standard input; without it the key is asked for at the terminal, in hexadecimal. No option
takes a key itself, for the arguments of a process can be seen by others. Who loses the key loses the volume.
"""
ABOUT_FRESHNESS = """
A disk can be set back to what it was earlier. To notice that, the owner must remember the newest state somewhere else:
120 bytes, in the file that --anchor names. format and load make it, every session that writes keeps it up to date, and
every command that opens the volume refuses what it does not accept. It is no secret, but it must not lie where the
volume lies. Without it a warning says so; --unanchored is the decision to do without.

After a server was killed, the volume is in a state of its last session, not older than the last one reported to the
anchor file: see --report of serve.
"""
ABOUT_SETUP_JSON = """
With --json every command prints one object; its only member is named for what it is about: volume, export, check,
state or server. With --log-json standard error is one object a line: "type" is progress, message or error, and the last
line alone has "finished": true and "exit_status". Progress has "bytes" and "total".
"""
EXAMPLES = """
jindisksetup load disk.img vol --generate-key vol.key --anchor /safe/vol.anchor
jindisksetup serve vol --key-file vol.key --anchor /safe/vol.anchor --socket /run/vol.sock --daemon
nbdinfo nbd+unix:///?socket=/run/vol.sock
jindisksetup check --data vol --key-file vol.key --anchor /safe/vol.anchor
jindisksetup export vol back.img --key-file vol.key --anchor /safe/vol.anchor
"""


def escape(text: str) -> str:
    """Text for roff: nothing in it is a request or an escape."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "")
    return "\n".join("\\&" + line if line.startswith((".", "\\(aq")) else line for line in text.split("\n"))


def head(name: str, section: int, summary: str) -> list[str]:
    """The beginning of a page."""
    title = f'.TH {escape(name).upper()} {section} "" "jindiskd {escape(jindiskd.__version__)}" "jindiskd"'
    return [title, ".SH NAME", f"{escape(name)} \\- {escape(summary)}"]


def paragraphs(text: str) -> list[str]:
    """Paragraphs of a docstring."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines += [".PP", escape(" ".join(paragraph.split()))]
    return lines


def verbatim(text: str) -> list[str]:
    """Lines as they stand."""
    return [".PP", ".nf", *(escape(line) for line in text.strip().splitlines()), ".fi"]


def commands(words: Sequence[str]) -> list[str]:
    """What root types, as it stands."""
    return verbatim("\n".join(f"# {line}" for line in words))


def leaves(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that does something, with its words."""
    if isinstance(command, click.Group):
        for name, member in members(command).items():
            yield from leaves(member, (*words, name))
    else:
        yield words, command


def synopsis(words: tuple[str, ...], command: click.Command) -> str:
    """One line: the words, the options, the arguments."""
    parts = [rf"\fB{escape(' '.join(words))}\fR"]
    if any(isinstance(p, click.Option) and p.name not in COMMON for p in command.params):
        parts.append(r"[\fIOPTION\fR...]")
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    parts += [rf"\fI{escape(p.metavar or (p.name or '').upper())}\fR" for p in arguments]
    return " ".join(parts)


def option_lines(option: click.Option) -> list[str]:
    """One option with its help."""
    flags = ", ".join(rf"\fB{escape(flag)}\fR" for flag in option.opts)
    if not option.is_flag:
        choices = getattr(option.type, "choices", None)
        value = "|".join(choices) if choices else (option.metavar or option.type.name or "value").upper()
        flags += rf" \fI{escape(value)}\fR"
    text = option.help or ""
    if option.multiple:
        text += " May be given several times."
    return [".TP", flags, escape(text)]


def program_page(
    cli: click.Group, *, name: str, section: int, summary: str, form: str, about: Sequence[str]
) -> list[str]:
    """Most of the page of a program with commands; environment and references are added to it.

    Args:
        cli: the program.
        name: its name.
        section: of the manual.
        summary: for the line of the name.
        form: what follows the name in the synopsis, as roff.
        about: paragraphs behind the program's own help.
    """
    lines = head(name, section, summary)
    lines += [".SH SYNOPSIS", rf"\fB{escape(name)}\fR {form}"]
    lines += [".SH DESCRIPTION", *paragraphs(cli.help or "")]
    for text in about:
        lines += paragraphs(text)
    lines += [".SH OPTIONS", ".PP", "These may stand anywhere."]
    for option in cli.params:
        if isinstance(option, click.Option):
            lines += option_lines(option)
    lines += [".SH COMMANDS"]
    for words, command in leaves(cli, ()):
        lines += [".SS " + synopsis(words, command), *paragraphs(command.help or "")]
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.name not in COMMON:
                lines += option_lines(parameter)
    lines += [".SH EXIT STATUS"]
    for status, meaning in MEANINGS.items():
        lines += [".TP", str(status), escape(meaning)]
    return lines


def jindiskctl() -> str:
    """The page of the command line."""
    lines = program_page(
        cli,
        name="jindiskctl",
        section=1,
        summary="build, launch and attest encrypted virtual machines",
        form=r"[\fIOPTION\fR...] \fINOUN\fR \fIVERB\fR [\fIARGUMENT\fR...]",
        about=[ABOUT_JINDISKCTL],
    )
    lines += [".SH JSON", *paragraphs(ABOUT_JSON)]
    lines += [".SH ENVIRONMENT"]
    for name, meaning in (
        ("DBUS_SYSTEM_BUS_ADDRESS", "Address of the bus, if it is another than the system's."),
        ("TMPDIR", "Where the archive of a directory given to --rootfs is kept meanwhile; /var/tmp if unset."),
    ):
        lines += [".TP", rf"\fB{name}\fR", escape(meaning)]
    lines += [".SH SEE ALSO"]
    lines += [r"\fBjindisk\fR(7), \fBjindiskd\fR(8), \fBjindiskd.toml\fR(5), \fBjindisksetup\fR(8), \fBvirsh\fR(1)"]
    return "\n".join(lines) + "\n"


def jindisksetup_page() -> str:
    """The page of the tool for volumes."""
    lines = program_page(
        setup_cli,
        name="jindisksetup",
        section=8,
        summary="set up JinDisk volumes",
        form=r"[\fIOPTION\fR...] \fICOMMAND\fR [\fIARGUMENT\fR...]",
        about=[ABOUT_JINDISKSETUP],
    )
    lines += [".SH KEYS", *paragraphs(ABOUT_KEYS), ".SH FRESHNESS", *paragraphs(ABOUT_FRESHNESS)]
    lines += [".SH JSON", *paragraphs(ABOUT_SETUP_JSON)]
    lines += [".SH EXAMPLES", ".nf"]
    lines += [escape(line) for line in EXAMPLES.strip().splitlines()]
    lines += [".fi", ".SH SEE ALSO"]
    lines += [r"\fBjindiskctl\fR(1), \fBcryptsetup\fR(8), \fBnbdcopy\fR(1), \fBqemu-img\fR(1)"]
    return "\n".join(lines) + "\n"


def jindiskd_page() -> str:
    """The page of the service."""
    daemon = daemon_command(lambda **_: 0)
    lines = head("jindiskd", 8, "trusted startup of encrypted virtual machine images")
    lines += [".SH SYNOPSIS", r"\fBjindiskd\fR [\fIOPTION\fR...]"]
    lines += [".SH DESCRIPTION", *paragraphs(daemon.help or "")]
    lines += paragraphs(ABOUT_JINDISKD)
    lines += [".SH OPTIONS"]
    for option in daemon.params:
        if isinstance(option, click.Option):
            lines += option_lines(option)
    lines += [".SH THE UNIT", *paragraphs(guide.UNIT), *commands(guide.UNIT_COMMANDS)]
    lines += paragraphs(guide.UNIT_COPY)
    lines += [".SH FILES"]
    for name, meaning in (
        (str(config.DEFAULT_FILE), "The configuration, see jindiskd.toml(5). Nothing needs to be in it."),
        (
            "/usr/share/doc/jindiskd/examples",
            "Every setting with its default; settings for a machine without hardware.",
        ),
        ("/var/lib/jindiskd", "Key-encryption key, key store, TLS identity, images."),
        ("/run/jindiskd", "Sockets of running guests."),
        ("/etc/credstore.encrypted/jindisk.kek", "The key-encryption key, if the service manager is to give it."),
    ):
        lines += [".TP", escape(name), escape(meaning)]
    lines += [".SH EXIT STATUS"]
    for status, meaning in MEANINGS.items():
        lines += [".TP", str(status), escape(meaning)]
    lines += [".SH SEE ALSO", r"\fBjindisk\fR(7), \fBjindiskctl\fR(1), \fBjindiskd.toml\fR(5), \fBlibvirtd\fR(8)"]
    return "\n".join(lines) + "\n"


def broker_page() -> str:
    """The page of the owner's broker."""
    command = broker_command(lambda **_: 0)
    lines = head("jindisk-broker", 8, "key broker of encrypted virtual machine images")
    lines += [".SH SYNOPSIS", r"\fBjindisk-broker\fR [\fIOPTION\fR...]"]
    lines += [".SH DESCRIPTION", *paragraphs(command.help or ""), *paragraphs(ABOUT_BROKER), ".SH OPTIONS"]
    for option in command.params:
        if isinstance(option, click.Option):
            lines += option_lines(option)
    lines += [".SH FILES"]
    for name, meaning in (
        (str(broker_config.DEFAULT_FILE), "The configuration, see jindisk-broker.toml(5)."),
        ("/var/lib/jindisk-broker", "Key-encryption key, key store, TLS identity."),
        ("/run/jindisk-broker/admin.sock", "The socket of administration."),
        ("/etc/credstore.encrypted/jindisk.kek", "The key-encryption key, if the service manager is to give it."),
    ):
        lines += [".TP", escape(name), escape(meaning)]
    lines += [".SH EXIT STATUS"]
    for status, meaning in MEANINGS.items():
        lines += [".TP", str(status), escape(meaning)]
    lines += [".SH SEE ALSO", r"\fBjindiskctl\fR(1), \fBjindisk-broker.toml\fR(5), \fBjindiskd\fR(8)"]
    return "\n".join(lines) + "\n"


def _kind(hint: object) -> str:
    """What a setting takes, in words."""
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if typing.get_origin(hint) is tuple:
        return "a list of absolute paths"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    return {int: "an integer", bool: "true or false", str: "text", Path: "a path"}[typing.cast("type", hint)]


def settings(program: str = "jindiskd", file: Path = config.DEFAULT_FILE, schema: type = config.Config) -> str:
    """The page of a program's configuration."""
    lines = head(f"{program}.toml", 5, f"configuration of {program}")
    lines += [".SH SYNOPSIS", escape(str(file)), ".br", escape(f"{file}.d/*.toml")]
    lines += [".SH DESCRIPTION"]
    lines += paragraphs(ABOUT_SETTINGS.replace("PROGRAM", program))
    for section, kind in config.sections(schema).items():
        about = (inspect.getdoc(kind) or "").partition(": ")[2]
        lines += [f".SH [{escape(section).upper()}]", ".PP", escape(about[:1].upper() + about[1:])]
        hints = typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            default = item.default.value if isinstance(item.default, enum.Enum) else item.default
            facts = [_kind(hints[item.name])]
            if "range" in item.metadata:
                facts.append("{} to {}".format(*item.metadata["range"]))
            if default not in {None, ""}:
                facts.append("default " + json.dumps(default, default=str))
            text = item.metadata["help"]
            lines += [
                ".TP",
                rf"\fB{escape(item.name)}\fR",
                escape(f"{text[:1].upper()}{text[1:]} ({'; '.join(facts)})."),
            ]
    lines += [".SH SEE ALSO", rf"\fB{escape(program)}\fR(8), \fBjindiskctl\fR(1)"]
    return "\n".join(lines) + "\n"


def broker_settings() -> str:
    """The page of the broker's configuration."""
    return settings("jindisk-broker", broker_config.DEFAULT_FILE, broker_config.Config)


def guide_page() -> str:
    """The page of the first steps."""
    lines = head("jindisk", 7, "from the packages to an encrypted guest")
    lines += [".SH DESCRIPTION", *paragraphs(guide.ABOUT), *paragraphs(guide.PACKAGES)]
    lines += [".SH QUICK START", *paragraphs(guide.FIRMWARE), *commands(guide.FIRMWARE_COMMANDS)]
    lines += [*paragraphs(guide.SETTINGS), *commands(guide.SETTINGS_COMMANDS)]
    lines += [*paragraphs(guide.DOCTOR), *commands(guide.DOCTOR_COMMANDS)]
    lines += [*paragraphs(guide.BASE), *commands(guide.BASE_COMMANDS)]
    lines += [*paragraphs(guide.LAUNCH), *commands(guide.LAUNCH_COMMANDS), *paragraphs(guide.AFTERWARDS)]
    lines += [".SH THE OWNER'S BROKER", *paragraphs(guide.OWNERS), *commands(guide.OWNERS_COMMANDS)]
    lines += [*paragraphs(guide.OWNERS_HOST), *verbatim(guide.OWNERS_SETTINGS)]
    lines += [*paragraphs(guide.OWNERS_IMAGES), *commands(guide.OWNERS_IMAGES_COMMANDS)]
    lines += [".SH INITRAMFS OF THE DISTRIBUTION", *paragraphs(guide.INITRAMFS)]
    lines += [*commands(guide.INITRAMFS_COMMANDS), *paragraphs(guide.INITRAMFS_UPDATE)]
    lines += [".SH RIGHTS", *paragraphs(guide.RIGHTS), *verbatim(guide.RULE)]
    lines += [".SH WHEN SOMETHING FAILS"]
    for sign, step in guide.FAILURES:
        lines += [".TP", escape(sign), escape(step)]
    lines += [".SH BACKUP", *paragraphs(guide.BACKUP), ".SH SEE ALSO"]
    lines += [
        r"\fBjindiskctl\fR(1), \fBjindiskd\fR(8), \fBjindiskd.toml\fR(5), \fBjindisk-broker\fR(8), \fBvirsh\fR(1)"
    ]
    return "\n".join(lines) + "\n"


def sample(program: str = "jindiskd", schema: type = config.Config) -> str:
    """Every setting with its default, commented out: a file to begin with."""
    lines = [f"# Settings of {program}, all as they are by default: see {program}.toml(5)."]
    for section, kind in config.sections(schema).items():
        lines += ["", f"[{section}]"]
        for item in dataclasses.fields(kind):
            default = item.default.value if isinstance(item.default, enum.Enum) else item.default
            value = "(none)" if default is None else json.dumps(default, default=str)
            lines += [f"# {line}" for line in textwrap.wrap(item.metadata["help"], 100)]
            lines += [f"#{item.name} = {value}"]
    return "\n".join(lines) + "\n"


def broker_sample() -> str:
    """The broker's."""
    return sample("jindisk-broker", broker_config.Config)


PAGES = {
    "jindisk.7": guide_page,
    "jindiskctl.1": jindiskctl,
    "jindiskd.8": jindiskd_page,
    "jindisk-broker.8": broker_page,
    "jindiskd.toml.5": settings,
    "jindisk-broker.toml.5": broker_settings,
    "jindisksetup.8": jindisksetup_page,
    "jindiskd.toml": sample,
    "jindisk-broker.toml": broker_sample,
}


def main() -> int:
    """Write all pages into the directory named on the command line."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m jindiskd.cli.manpages DIRECTORY", file=sys.stderr)
        return 2
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        (target / name).write_text(make(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
