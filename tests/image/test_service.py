"""Builds through the service: a worker process, keys in the real key store, and nothing left whatever kills what."""

import asyncio
import contextlib
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jindiskd.base.secret import Secret
from jindiskd.custody import KeyPort
from jindiskd.errors import AlreadyExists, InvalidArgument, JindiskError, NotFound
from jindiskd.image import refusals
from jindiskd.image.request import BaseKind
from jindiskd.image.running import BuildWorkerFailed
from jindiskd.image.service import ImageService
from jindiskd.image.store import ImageStore, verify
from jindiskd.keys.store import KeyState, Store
from jindiskd.luks2 import check

ROOT = Path(__file__).resolve().parent.parent.parent


class Setting:
    """A service with its store and keys."""

    def __init__(self, folder: Path) -> None:
        self.images = ImageStore(folder / "images")
        self.keys = Store.open(f"sqlite:///{folder}/keys.db", Secret(bytes(32)))
        self.service = ImageService(self.images, KeyPort(self.keys), broker_spki_sha256=bytes(32))

    def left(self) -> list[str]:
        """Names in the store's directory."""
        return sorted(path.name for path in self.images.root.iterdir())

    def states(self) -> dict[str, KeyState]:
        """Keys by image name."""
        return {record.name: record.state for record in self.keys.images()}


@pytest.fixture
def setting(tmp_path):
    made = Setting(tmp_path)
    yield made
    made.keys.close()


@contextlib.contextmanager
def opened(path: Path):
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def processes() -> set[int]:
    """Living processes that build for these tests: by what they have open, since other tests may run beside these."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and b"jindiskd.image.worker" in (entry / "cmdline").read_bytes() and _ours(entry):
                found.add(int(entry.name))
    return found


def _ours(entry: Path) -> bool:
    stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
    if int(stat[1]) == os.getpid():
        return True
    return any(os.fspath(link.readlink()).startswith(BASE_TEMP[-1]) for link in (entry / "fd").iterdir())


BASE_TEMP = ["/nowhere"]


@pytest.fixture(autouse=True)
def _base_temp(tmp_path_factory: pytest.TempPathFactory) -> None:
    BASE_TEMP[-1] = f"{tmp_path_factory.getbasetemp()}/"


async def gone(before: set[int]) -> None:
    """Wait until no worker but earlier ones lives."""

    def wait() -> None:
        for pid in processes() - before:
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(pid)
                assert select.select([fd], [], [], 10)[0], f"process {pid} lives on"
                os.close(fd)

    await asyncio.to_thread(wait)
    assert processes() - before == set()


async def test_build_makes_an_image_with_an_active_key(setting, request_for, disk_image) -> None:
    """The image verifies, its key is active for its launch digest, and opens its disk."""
    seen = []
    with opened(disk_image) as fd:
        manifest = await setting.service.build(request_for(name="web", seed=None), fd, seen.append)
    image = await setting.service.get("web")
    assert image.manifest == manifest
    verify(image)
    assert setting.left() == ["web"]
    record = setting.keys.image(manifest.image_id)
    assert (record.name, record.state, record.launch_digests) == ("web", KeyState.ACTIVE, (manifest.launch_digest,))
    assert record.resource == manifest.resource
    key = setting.keys.release(manifest.image_id, peer="test", measurement=b"", simulated=True)
    with image.disk.open("rb") as disk:
        disk.seek(manifest.partitions[2].offset_bytes)
        check.unlock(disk.read(manifest.volume.header_bytes), key)
    assert {progress.stage for progress in seen} == {"read", "prepare", "boot", "encrypt", "finish"}
    assert image.path.stat().st_mode & 0o777 == 0o755
    await setting.service.remove("web")
    assert (setting.left(), setting.states()) == ([], {})
    with pytest.raises(NotFound):
        await setting.service.remove("web")


async def test_rootfs_comes_through_a_pipe(setting, request_for, tar_stream) -> None:
    """A tar stream needs no file: the command line pipes it."""
    reading, writing = os.pipe()

    def feed() -> None:
        with os.fdopen(writing, "wb") as out:
            shutil.copyfileobj(io.BytesIO(tar_stream), out)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        manifest = await setting.service.build(request_for(base_kind=BaseKind.ROOTFS), reading, lambda _progress: None)
    finally:
        os.close(reading)
        thread.join()
    assert manifest.base_kind == "rootfs"


async def test_seeded_builds_never_share_a_key(setting, request_for, disk_image) -> None:
    """One seed under two names gives two keys; under one name in another store the same image."""
    with opened(disk_image) as fd:
        one = await setting.service.build(request_for(name="one"), fd, lambda _progress: None)
        two = await setting.service.build(request_for(name="two"), fd, lambda _progress: None)
    assert one.image_id != two.image_id
    keys = [
        bytes(setting.keys.release(m.image_id, peer="t", measurement=b"", simulated=True).reveal()) for m in (one, two)
    ]
    assert keys[0] != keys[1]


async def test_refusals_arrive_as_they_were_raised(setting, request_for, tmp_path) -> None:
    """The worker's error has its own class and text here, and nothing is left."""
    base = tmp_path / "empty"
    base.write_bytes(bytes(1 << 20))
    with opened(base) as fd, pytest.raises(refusals.NoPartitionTable, match="no GPT"):
        await setting.service.build(request_for(), fd, lambda _progress: None)
    assert (setting.left(), setting.states()) == ([], {})


async def test_bad_and_taken_names(setting, request_for, disk_image) -> None:
    """Refused before a worker starts; of two builds of one name at once, one goes ahead."""
    with opened(disk_image) as fd:
        with pytest.raises(InvalidArgument):
            await setting.service.build(request_for(name="../x"), fd, lambda _progress: None)
        outcomes = await asyncio.gather(
            *(setting.service.build(request_for(name="a"), fd, lambda _progress: None) for _ in range(2)),
            return_exceptions=True,
        )
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["AlreadyExists", "Manifest"]
        with pytest.raises(AlreadyExists):
            await setting.service.build(request_for(name="a"), fd, lambda _progress: None)
    assert setting.states() == {"a": KeyState.ACTIVE}


@pytest.mark.parametrize("stage", ["read", "prepare", "boot", "encrypt", "finish"])
async def test_cancelling_leaves_nothing(setting, request_for, disk_image, stage: str) -> None:
    """At each stage: no process, no file, no key."""
    before = processes()
    with opened(disk_image) as fd:
        reached = asyncio.Event()
        task = asyncio.create_task(
            setting.service.build(request_for(), fd, lambda p: reached.set() if p.stage == stage else None)
        )
        await asyncio.wait_for(reached.wait(), 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await gone(before)
    assert (setting.left(), setting.states()) == ([], {})


@pytest.mark.parametrize("stage", ["prepare", "boot"])
async def test_killed_worker(setting, request_for, disk_image, stage: str) -> None:
    """A worker that is killed is an error, and nothing is left of the build."""
    before = processes()

    def kill(progress) -> None:
        if progress.stage == stage:
            for pid in processes() - before:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    with opened(disk_image) as fd, pytest.raises(BuildWorkerFailed, match="-9"):
        await setting.service.build(request_for(), fd, kill)
    assert (setting.left(), setting.states()) == ([], {})


PROGRAM = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from jindiskd.custody import KeyPort
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.image.request import BaseKind, BuildRequest, VolumeFormat
from jindiskd.image.service import ImageService
from jindiskd.image.store import ImageStore
from jindiskd.keys.store import Store
folder, base, stage, firmware = sys.argv[1:]
store = ImageStore(Path(folder) / "images")
if stage == "committed":
    Store.activate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
def at(progress):
    if progress.stage == stage:
        print("here", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
service = ImageService(store, KeyPort(Store.open(f"sqlite:///{{folder}}/keys.db", Secret(bytes(32)))),
                       broker_spki_sha256=bytes(32))
request = BuildRequest(name="x", platform=Platform.SIMULATED_SNP, format=VolumeFormat.LUKS2, base_kind=BaseKind.DISK,
                       firmware=firmware, vcpus=1, cpu_model="EPYC-v4")
asyncio.run(service.build(request, os.open(base, os.O_RDONLY), at))
"""


@pytest.mark.parametrize("stage", ["read", "boot", "encrypt", "finish", "committed"])
async def test_killed_service(setting, request_for, disk_image, tmp_path, stage: str) -> None:
    """A service killed at any stage leaves no worker; the next start finishes what was renamed and clears the rest."""
    before = processes()
    program = PROGRAM.format(root=str(ROOT))
    argv = [sys.executable, "-c", program, tmp_path, disk_image, stage, request_for().firmware]
    done = await asyncio.to_thread(subprocess.run, argv, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    await gone(before)
    assert list(setting.states().values()) == [KeyState.PENDING]
    visible = [image.manifest.name for image in await setting.service.list()]
    assert visible == (["x"] if stage == "committed" else [])
    await setting.service.reconcile()
    assert setting.left() == visible
    assert setting.states() == dict.fromkeys(visible, KeyState.ACTIVE)


async def test_key_is_nowhere_but_in_the_store(setting, request_for, disk_image, capfd) -> None:
    """Not in arguments, environments, output, or files; searched for while the build runs and afterwards."""
    found = []
    key: list[bytes] = []
    before = processes()

    def look(_progress) -> None:
        if not key:
            record = setting.keys.images()[0]
            row = setting.keys._engine.connect().exec_driver_sql("select wrapped from images").scalar_one()
            from jindiskd.keys import wrap

            secret = wrap.unwrap(Secret(bytes(32)), bytes(row), purpose="volume key", owner=record.image_id)
            key.append(bytes(secret.reveal()))
        for pid in processes() - before:
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    found.append(Path(f"/proc/{pid}/{name}").read_bytes())

    with opened(disk_image) as fd:
        await setting.service.build(request_for(seed=None), fd, look)
    out, err = capfd.readouterr()
    texts = [*found, out.encode(), err.encode()]
    texts += [path.read_bytes() for path in setting.images.root.rglob("*") if path.is_file()]
    assert len(texts) > 5
    for trace in (key[0], key[0].hex().encode(), key[0].hex().upper().encode()):
        assert not any(trace in text for text in texts)


def test_worker_refuses_a_wrong_key(request_for, disk_image, tmp_path) -> None:
    """A key of another length ends in an internal error with a reference, without the key in any output."""
    key = b"short key that must not be shown"[:31]
    reading, writing = os.pipe()
    os.write(writing, key)
    os.close(writing)
    argv = [sys.executable, "-m", "jindiskd.image.worker", "--key", str(reading), "--base", "0"]
    from jindiskd.base import document
    from jindiskd.image.request import BuildTask

    task = BuildTask(
        request=request_for(), image_id="x", created="", broker_spki_sha256=bytes(32), staging=str(tmp_path)
    )
    line = json.dumps(document.to_plain(task)).encode() + b"\n"
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(reading,), cwd=ROOT
    )
    os.close(reading)
    process.stdin.write(line)
    process.stdin.flush()
    out = process.stdout.read()
    err = process.stderr.read()
    assert process.wait(10) == 1
    process.stdin.close()
    process.stdout.close()
    process.stderr.close()
    assert json.loads(out)["error"] == "Internal"
    assert key not in out + err


def test_a_workers_memory_is_its_own() -> None:
    """No core file, no dump by whatever the host pipes dumps to, no debugger of the user that the base's tools are."""
    program = (
        "import ctypes, resource, sys; from jindiskd.image import worker\n"
        "def look(_fd): print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE)[0]); "
        "sys.exit(0)\n"  # PR_GET_DUMPABLE, linux/prctl.h
        "worker.read_line = look; sys.argv[1:] = []; worker.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0"]


def test_worker_errors_are_all_known() -> None:
    """What a worker can name can be raised again by name."""
    from jindiskd.image.running import as_raised

    for code, kind in JindiskError.by_code.items():
        error = as_raised(code, "a text")
        assert type(error) is kind
        assert str(error) == "a text"
