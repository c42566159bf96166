"""Directories become tar streams and tar streams become root file systems with everything they had, or are refused."""

import io
import os
import stat
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jindiskd.image import tarroot
from jindiskd.image.debugfs import FileSystemNotWritten
from jindiskd.image.refusals import TarRefused
from jindiskd.image.tarstream import stream_directory


def items_of(stream: bytes, tmp_path: Path) -> list[tarroot.Item]:
    """Spool and read a stream."""
    path = tmp_path / "stream"
    path.write_bytes(stream)
    with path.open("rb") as source:
        spooled, _ = tarroot.spool(source.fileno(), tmp_path)
    try:
        return tarroot.read_items(spooled)
    finally:
        os.close(spooled)


def streamed(folder: Path) -> bytes:
    """The stream of a directory, through a pipe as the command line sends it."""
    reading, writing = os.pipe()

    def write() -> None:
        stream_directory(folder, writing)
        os.close(writing)

    thread = threading.Thread(target=write)
    thread.start()
    with os.fdopen(reading, "rb") as out:
        data = out.read()
    thread.join()
    return data


def test_every_entry_arrives_as_it_was(root_image, kit) -> None:
    """Against the stream's own headers: type, mode, owner, time, link, device, attributes, content of each entry."""
    found = kit.listing(root_image)
    contents = {}
    for info, content in kit.tree_entries():
        name = f"/{info.name}"
        contents[name] = content if not info.islnk() else contents[f"/{info.linkname}"]
        said = found.pop(name)
        source = next(i for i, _ in kit.tree_entries() if f"/{i.name}" == f"/{info.linkname}") if info.islnk() else info
        kinds = {
            tarfile.REGTYPE: stat.S_IFREG, tarfile.DIRTYPE: stat.S_IFDIR, tarfile.SYMTYPE: stat.S_IFLNK,
            tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK, tarfile.FIFOTYPE: stat.S_IFIFO,
        }  # fmt: skip
        mode = 0o777 if source.issym() else source.mode
        assert said.startswith(f"{kinds[source.type] | mode:06o}\n"), name
        owner = next(line for line in said.splitlines() if line.startswith("User:")).split()
        assert owner[:4] == ["User:", str(source.uid), "Group:", str(source.gid)], name
        for line in said.splitlines():
            if line.lstrip().startswith(("ctime", "mtime", "crtime", "atime")):
                assert f"0x{int(source.mtime):08x}:00000000" in line, name
        links = next(line for line in said.splitlines() if line.startswith("Links:")).split()[1]
        if source.isdir():
            assert int(links) >= 2
        else:
            assert links == ("2" if source.name == "usr/bin/su" else "1"), name
        if source.issym() and len(source.linkname) < 60:
            assert f'Fast link dest: "{source.linkname}"' in said
        if source.ischr() or source.isblk():
            assert f"Device major/minor number: {source.devmajor:02d}:{source.devminor:02d} " in said, name
        for key in source.pax_headers:
            attribute = key.removeprefix("SCHILY.xattr.")
            assert f"{attribute} ({len(os.fsencode(source.pax_headers[key]))})" in said, name
    assert found == {}


def test_attribute_values_are_exact(root_image, kit) -> None:
    """Binary values survive byte by byte, as e2fsprogs reads them back."""
    for name, key, value in (
        ("/home/user/binary-attribute", "user.raw", bytes(range(256))),
        ("/home/user/binary-attribute", "user.long", b"v" * 3000),
        ("/usr/bin/ping", "security.capability", kit.capability()),
    ):
        argv = ["debugfs", "-R", f"ea_get -f /dev/stdout {name} {key}", root_image]
        assert subprocess.run(argv, capture_output=True, check=True).stdout == value


def test_directory_streams_the_same_bytes_each_time(tmp_path) -> None:
    """Two streams of one tree are equal, whatever order the directory is read in; GNU tar reads them."""
    tree = tmp_path / "tree"
    (tree / "b/deep").mkdir(parents=True)
    (tree / "a").write_bytes(os.urandom(100_000))
    os.link(tree / "a", tree / "b/also-a")
    (tree / "b/link").symlink_to("../a")
    os.mkfifo(tree / "pipe")
    (tree / "b/deep/file").touch(mode=0o4751)
    (tree / "b/deep/file").chmod(0o4751)
    (tree / os.fsdecode(b"not-utf8-\xff")).write_text("x")
    one = streamed(tree)
    assert streamed(tree) == one
    names = subprocess.run(["tar", "-tf", "-"], input=one, capture_output=True, check=True).stdout.split(b"\n")
    assert [os.fsdecode(name) for name in names][:3] == ["./", "a", "b/"]
    found = {item.path: item for item in items_of(one, tmp_path)}
    assert found["/a"].links == ["/b/also-a"]
    assert found["/b/deep/file"].info.mode == 0o4751
    assert found["/b/link"].info.linkname == "../a"
    assert "/" + os.fsdecode(b"not-utf8-\xff") in found


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to make devices and set capabilities")
def test_special_files_of_a_directory(tmp_path, kit) -> None:
    """Owners, devices and capabilities of a real tree are in its stream, and come out of the file system made of it."""
    tree = tmp_path / "tree"
    tree.mkdir()
    os.mknod(tree / "zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    (tree / "tool").write_bytes(b"tool")
    os.chown(tree / "tool", 12, 70000)
    try:
        os.setxattr(tree / "tool", "security.capability", kit.capability())
    except OSError:
        pytest.skip("this file system keeps no capabilities")
    found = {item.path: item.info for item in items_of(streamed(tree), tmp_path)}
    assert (found["/zero"].devmajor, found["/zero"].devminor, found["/zero"].ischr()) == (1, 5, True)
    assert (found["/tool"].uid, found["/tool"].gid) == (12, 70000)
    kit.make_ext4(tmp_path / "root", 32 << 20, streamed(tree), tmp_path)
    argv = ["debugfs", "-R", "ea_get -f /dev/stdout /tool security.capability", tmp_path / "root"]
    assert subprocess.run(argv, capture_output=True, check=True).stdout == kit.capability()


def entry(name: str, **more) -> tuple[tarfile.TarInfo, bytes]:
    """A tar entry with odd fields."""
    info = tarfile.TarInfo(name)
    for key, value in more.items():
        setattr(info, key, value)
    return info, b""


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ([], "no entries"),
        ([entry("../etc/passwd")], "leads out"),
        ([entry("a/../../b")], "leads out"),
        ([entry("line\nend")], "line end"),
        ([entry("carriage\rreturn")], "line end"),
        ([entry("x" * 256)], "longer than 255"),
        ([entry("/".join(["y" * 200] * 30))], "longer than 4095"),
        ([entry("a", type=tarfile.LNKTYPE, linkname="missing")], "no earlier file"),
        ([entry("d", type=tarfile.DIRTYPE), entry("a", type=tarfile.LNKTYPE, linkname="d")], "no earlier file"),
        ([entry("a"), entry("a/b")], "no directory"),
        ([entry("a", type=tarfile.SYMTYPE, linkname="/etc"), entry("a/passwd")], "no directory"),
        ([entry("a"), entry("b"), entry("b", type=tarfile.LNKTYPE, linkname="a")], "twice"),
        ([entry("a", type=tarfile.SYMTYPE, linkname="x\ny")], "cannot be stored"),
        ([entry("a", mtime=-5)], "out of range"),
        ([entry("a", uid=1 << 40)], "out of range"),
        ([entry("a", type=b"Z")], "unknown type"),
        ([entry("a", type=tarfile.CHRTYPE, devmajor=4096)], "device number"),
        ([entry("a", pax_headers={"SCHILY.xattr.user.x": "v" * 5000})], "extended attribute"),
    ],
)
def test_streams_that_cannot_be_a_root(entries, match: str, tmp_path, kit) -> None:
    """Each is refused with its reason, before a file system is made."""
    with pytest.raises(TarRefused, match=match):
        items_of(kit.make_tar(entries), tmp_path)


def test_later_entries_replace_earlier(tmp_path, kit) -> None:
    """As with tar itself: the last entry of a name counts; missing parents are made as root's."""
    first, second = entry("a/b", mode=0o600)[0], entry("./a//b", mode=0o644)[0]
    found = {item.path: item.info for item in items_of(kit.make_tar([(first, b""), (second, b"")]), tmp_path)}
    assert found["/a/b"].mode == 0o644
    assert (found["/a"].isdir(), found["/a"].mode, found["/a"].uid) == (True, 0o755, 0)


def test_compressed_or_cut_streams(tmp_path, tar_stream) -> None:
    """No guessing: a compressed stream, text, and a stream that ends within an entry are refused."""
    import gzip

    for stream in (gzip.compress(tar_stream), b"hello" * 1000, tar_stream[: len(tar_stream) // 2], b""):
        with pytest.raises(TarRefused):
            spool_and_make(stream, tmp_path)


def spool_and_make(stream: bytes, tmp_path: Path) -> None:
    source = tmp_path / "stream"
    source.write_bytes(stream)
    with source.open("rb") as opened:
        spooled, _ = tarroot.spool(opened.fileno(), tmp_path)
    try:
        items = tarroot.read_items(spooled)
        uuid = "11111111-2222-4333-8444-555555555555"
        os.close(tarroot.make_root(spooled, items, size_bytes=64 << 20, uuid=uuid, scratch=tmp_path))
    finally:
        os.close(spooled)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_altered_streams_are_read_or_refused(data, tmp_path, kit) -> None:
    """Whatever bytes a stream has, reading it ends in items or in a refusal, never in another error."""
    stream = bytearray(kit.make_tar(kit.tree_entries()[:12]))
    for _ in range(data.draw(st.integers(1, 20))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    try:
        items_of(bytes(stream), tmp_path)
    except TarRefused:
        pass


def test_stream_ends_quietly_when_nobody_reads(tmp_path) -> None:
    """A reader that goes away is an error to the caller, not a signal."""
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        stream_directory(tmp_path, writing)
    os.close(writing)


def test_tar_stream_of_python_matches_gnu_tar(tmp_path) -> None:
    """A stream that GNU tar made, with attributes in its way, is understood too."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_text("content")
    try:
        os.setxattr(tree / "file", "user.binary", bytes(range(1, 200)))
    except OSError:
        pytest.skip("this file system keeps no extended attributes")
    argv = ["tar", "--xattrs", "--xattrs-include=*", "--format=posix", "-C", tree, "-cf", "-", "."]
    stream = subprocess.run(argv, capture_output=True, check=True).stdout
    found = {item.path: item.info for item in items_of(stream, tmp_path)}
    value = found["/file"].pax_headers["SCHILY.xattr.user.binary"]
    assert os.fsencode(value) == bytes(range(1, 200))
    assert io.BytesIO(stream).read(1)


def test_names_too_long_for_a_command(tmp_path, kit) -> None:
    """debugfs would take the tail of an overlong line for a command of its own: it is never sent one."""
    name, other = ("/".join(['"' * 250] * 12 + [last]) for last in "xy")
    link = entry(other, type=tarfile.LNKTYPE, linkname=name)
    with pytest.raises(FileSystemNotWritten, match="too long"):
        spool_and_make(kit.make_tar([entry(name), link]), tmp_path)


def test_size_beyond_the_stream(tmp_path, kit) -> None:
    """An entry that claims more than is there is refused before room is made for it."""
    stream = bytearray(kit.make_tar([entry("a"), entry("b")]))
    header = stream[512:1024]
    header[124:136] = b"77777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    stream[512:1024] = header
    with pytest.raises(TarRefused, match="ends within"):
        items_of(bytes(stream), tmp_path)
