"""Clones, exports and imports by the command line and the bus: what is held, what is refused, what is left."""

import json
import os
import signal
import subprocess
import xml.etree.ElementTree as ET

import pytest


def left_behind(daemon) -> list[str]:
    """What is in the store besides its lock."""
    return sorted(path.name for path in (daemon.state / "images").iterdir() if path.name != ".lock")


def test_a_clone_has_a_key_of_its_own(daemon, rootfs):
    """Cloned, listed, measured, removed; the source goes on as it was."""
    daemon.ctl("image", "build", "web", "--rootfs", str(rootfs))
    out = daemon.ctl("image", "clone", "web", "copy")
    assert out.startswith("Cloned image web into simulated image copy (jindisk, ")
    one, two = (daemon.json("image", "show", name)["image"] for name in ("web", "copy"))
    assert one["State"] == two["State"] == "active"
    assert one["LaunchDigest"] != two["LaunchDigest"]
    assert one["ImageId"] != two["ImageId"]
    assert daemon.json("image", "measure", "copy")["launch_digest"] == two["LaunchDigest"]
    shown = [daemon.json("key", "show", name)["key"] for name in ("web", "copy")]
    assert shown[0]["volumes"][0]["volume"] != shown[1]["volumes"][0]["volume"]
    assert "choose another" in daemon.ctl("image", "clone", "web", "copy", status=6)
    assert "image name" in daemon.ctl("image", "clone", "web", "a/b", status=2)
    daemon.ctl("image", "clone", "none", "x", status=3)
    daemon.ctl("key", "revoke", "web")
    assert "revoked" in daemon.ctl("image", "clone", "web", "x", status=7)
    daemon.ctl("image", "remove", "web", "--yes")
    assert left_behind(daemon) == ["copy"]
    kinds = [row["kind"] for row in daemon.json("audit", "list")["rows"]]
    assert kinds.count("cloned") == 1


def test_an_image_goes_out_and_comes_back(daemon, rootfs, tmp_path):
    """To a file, removed, and in again: the same image without its key, which is said wherever it matters."""
    daemon.ctl("image", "build", "web", "--rootfs", str(rootfs), "--format", "luks2")
    before = daemon.json("image", "show", "web")["image"]
    file = tmp_path / "web.image"
    out = daemon.json("image", "export", "web", str(file))
    assert (out["file"], out["size_bytes"]) == (str(file), file.stat().st_size)
    assert file.stat().st_mode & 0o777 == 0o600
    assert "exists already" in daemon.ctl("image", "export", "web", str(file), status=6)
    daemon.ctl("image", "export", "web", str(file), "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["web.image"]
    assert "the same image" in daemon.ctl("image", "import", str(file), "--as", "other", status=6)
    daemon.ctl("image", "remove", "web", "--yes")
    said = daemon.ctl("image", "import", str(file), "--as", "other")
    assert "Its key is not here" in said
    after = daemon.json("image", "show", "other")["image"]
    assert after == {**before, "Name": "other", "State": "unknown"}
    assert "the broker that the image pins has it" in daemon.ctl("image", "show", "other")
    refused = daemon.ctl("launch", "other", status=1)
    assert "at the broker that the image pins" in refused
    assert "relay" in refused
    assert daemon.json("domain", "list")["domains"] == []
    daemon.ctl("image", "clone", "other", "x", status=3)
    assert "import" in daemon.ctl("job", "list")
    daemon.ctl("image", "remove", "other", "--yes")
    assert left_behind(daemon) == []


def test_streams_through_pipes(daemon, rootfs, tmp_path):
    """Standard output of one command is standard input of another, as with a shell on another machine between."""
    daemon.ctl("image", "build", "web", "--rootfs", str(rootfs), "--format", "luks2")
    sent = subprocess.run(
        [*command(), "image", "export", "web", "-"], env=daemon.environment, capture_output=True, timeout=300
    )
    assert sent.returncode == 0, sent.stderr
    data = sent.stdout
    assert data.startswith(b"JDIMAGE1")
    daemon.ctl("image", "remove", "web", "--yes")
    taking = subprocess.Popen(
        [*command(), "image", "import", "-"], env=daemon.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = taking.communicate(data, timeout=300)
    assert taking.returncode == 0, err
    assert b"Imported simulated image web" in out
    daemon.ctl("image", "remove", "web", "--yes")
    bad = tmp_path / "bad"
    bad.write_bytes(data[:-100])
    assert "cut off" in daemon.ctl("image", "import", str(bad), "--as", "x", status=8)
    bad.write_bytes(b"not a stream at all")
    assert "JDIMAGE1" in daemon.ctl("image", "import", str(bad), status=8)
    assert left_behind(daemon) == []


def command() -> list[str]:
    import sys
    from pathlib import Path

    return [str(Path(sys.executable).parent / "jindiskctl")]


def test_an_image_is_held_while_it_is_read(daemon, rootfs):
    """While it is exported to somebody slow it is neither removed nor cloned nor launched; ^C gives it free."""
    daemon.ctl("image", "build", "web", "--rootfs", str(rootfs), "--format", "luks2")
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [*command(), "--log-json", "image", "export", "web", "-"], env=daemon.environment, stdin=subprocess.DEVNULL,
        stdout=writing, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writing)
    for line in process.stderr:
        if json.loads(line).get("stage") == "write":
            break
    for words in (("image", "remove", "web", "--yes"), ("image", "clone", "web", "x"), ("launch", "web")):
        assert "being exported" in daemon.ctl(*words, status=6), words
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    os.close(reading)
    daemon.ctl("image", "remove", "web", "--yes")
    assert left_behind(daemon) == []


@pytest.mark.parametrize("kind", ["directory", "device", "write-only"])
def test_descriptors_of_other_kinds_are_refused(daemon, tmp_path, kind):
    """A stream comes from a file, a pipe or a socket that can be read."""
    script = (
        "import asyncio, os, sys\n"
        "from jindiskd.cli.client import connected\n"
        "async def main():\n"
        "    flags = os.O_WRONLY if sys.argv[2] == 'write-only' else os.O_RDONLY\n"
        "    fd = os.open(sys.argv[1], flags)\n"
        "    async with connected(agent=False) as client:\n"
        "        await client.call('/org/jindisk1', 'org.jindisk1.Manager', 'ImportImage', 0, {}, fds=[fd])\n"
        "asyncio.run(main())\n"
    )
    (tmp_path / "file").write_bytes(b"x")
    path = {"directory": tmp_path, "device": "/dev/null", "write-only": tmp_path / "file"}[kind]
    import sys

    done = subprocess.run(
        [sys.executable, "-c", script, path, kind], env=daemon.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "file descriptor is not open for reading" in done.stderr or "pass a regular file" in done.stderr


def test_what_launch_would_define_is_shown_and_defines_nothing(daemon, rootfs):
    """The domain's XML with the image's boot files, and the name and memory asked for."""
    daemon.ctl("image", "build", "web", "--rootfs", str(rootfs), "--format", "luks2")
    text = daemon.ctl("domain", "xml", "other", "--image", "web", "--memory", "3G")
    root = ET.fromstring(text)
    assert (root.findtext("name"), root.find("memory").get("unit"), root.findtext("memory")) == ("other", "MiB", "3072")
    assert root.findtext("os/kernel") == str(daemon.state / "images/web/vmlinuz")
    assert daemon.json("domain", "xml", "--image", "web")["xml"].count("<name>web</name>") == 1
    assert daemon.json("domain", "list")["domains"] == []


def test_guests_are_not_started_on_another_machine(unstarted, rootfs):
    """A libvirt elsewhere: said before anything is done, with what to do instead."""
    text = unstarted.configuration.read_text().replace("test:///none", "qemu+tcp://me@127.0.0.1:1/system")
    unstarted.configuration.write_text(text)
    unstarted.start()
    unstarted.ctl("image", "build", "web", "--rootfs", str(rootfs), "--format", "luks2")
    for words in (("launch", "web"), ("domain", "adopt", "theirs", "web")):
        said = unstarted.ctl(*words, status=1)
        assert "qemu+tcp://127.0.0.1/system" in said
        assert "run jindiskd there" in said
    assert "domains.libvirt_uri" in said
