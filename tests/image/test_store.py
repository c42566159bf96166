"""The store shows whole images only, under names that are taken once, and cleans up after crashes."""

import dataclasses
import os
import signal
import subprocess
import sys

import pytest

from jindiskd.base import document
from jindiskd.base.document import MalformedDocument
from jindiskd.errors import AlreadyExists, Busy, InvalidArgument, NotFound
from jindiskd.image.store import ImageDamaged, ImageStore, verify


@pytest.fixture
def store(tmp_path) -> ImageStore:
    return ImageStore(tmp_path / "images")


@pytest.fixture
def add(store, built):
    """Put an image into the store under a name, by links to one that was built."""

    def make(name: str):
        manifest, source = built
        staging = store.stage()
        try:
            for entry in source.iterdir():
                if entry.name != "manifest.json":
                    os.link(entry, staging.path / entry.name)
            renamed = dataclasses.replace(manifest, name=name)
            (staging.path / "manifest.json").write_bytes(document.dump(renamed))
            return store.commit(staging, name)
        finally:
            staging.close()

    return make


def test_committed_images_are_listed(store, add) -> None:
    """An image is there after commit, with its manifest and nothing left of staging."""
    assert store.list() == []
    add("b")
    image = add("a")
    assert [found.manifest.name for found in store.list()] == ["a", "b"]
    assert store.get("a") == image
    assert sorted(path.name for path in store.root.iterdir()) == ["a", "b"]
    verify(image)


def test_names_are_taken_once(store, add) -> None:
    """A second image of a name is refused, and the first stays as it is."""
    first = add("a")
    with pytest.raises(AlreadyExists):
        store.require_free("a")
    before = first.disk.stat().st_ino
    with pytest.raises(AlreadyExists):
        add("a")
    assert first.disk.stat().st_ino == before
    assert [path.name for path in store.root.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "ü", "-x", "x" * 64, "a\0", "a\n", "_a"])
def test_bad_names(store, name: str) -> None:
    """Names that are no plain directory names never reach the file system."""
    for call in (store.get, store.remove, store.require_free):
        with pytest.raises(InvalidArgument):
            call(name)


def test_removed_images_are_gone(store, add) -> None:
    """Removal leaves nothing; what is not there cannot be removed."""
    add("a")
    store.remove("a")
    assert list(store.root.iterdir()) == []
    for call in (store.get, store.remove):
        with pytest.raises(NotFound):
            call("a")


def test_staging_without_commit_leaves_nothing(store) -> None:
    """Closing removes whatever was written."""
    staging = store.stage()
    (staging.path / "disk.img").write_bytes(b"x")
    assert store.list() == []
    staging.close()
    assert list(store.root.iterdir()) == []


def test_leftovers_are_cleaned_but_not_those_in_use(store) -> None:
    """What a killed process left goes at start; what a living one holds stays."""
    program = (
        "import os, signal, sys; from pathlib import Path; from jindiskd.image.store import ImageStore;"
        "s = ImageStore(Path(sys.argv[1])).stage(); (s.path / 'disk.img').write_bytes(b'x');"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, store.root], check=False)
    assert done.returncode == -signal.SIGKILL
    (store.root / ".removed-0123").mkdir()
    living = store.stage()
    left = [path.name for path in store.root.iterdir()]
    assert len(left) == 3
    removed = store.clean()
    assert set(removed) == set(left) - {living.path.name}
    assert [path.name for path in store.root.iterdir()] == [living.path.name]
    living.close()


def test_one_owner(store) -> None:
    """Two services cannot share a store."""
    with store.owned(), pytest.raises(Busy), ImageStore(store.root).owned():
        pass
    with store.owned():
        pass


def test_odd_directories_do_not_stop_the_listing(store, add) -> None:
    """A manifest that is damaged, foreign or of the future is reported for what it is, and the rest still listed."""
    good = add("good")
    for name, content, kind in (
        ("nothing", None, NotFound),
        ("garbage", b"{", MalformedDocument),
        ("other", (good.path / "manifest.json").read_bytes(), ImageDamaged),
        (
            "future",
            (good.path / "manifest.json").read_bytes().replace(b'"schema": 1', b'"schema": 2'),
            ImageDamaged,
        ),
    ):
        (store.root / name).mkdir()
        if content is not None:
            (store.root / name / "manifest.json").write_bytes(content)
        with pytest.raises(kind):
            store.get(name)
    assert [found.manifest.name for found in store.list()] == ["good"]


def test_unexpected_files_are_not_committed(store, built) -> None:
    """What is made visible is an image and nothing else."""
    staging = store.stage()
    (staging.path / "manifest.json").write_bytes(document.dump(built[0]))
    (staging.path / "secret").touch()
    with pytest.raises(ImageDamaged, match="unexpected secret"):
        store.commit(staging, built[0].name)
    staging.close()
    assert store.list() == []


@pytest.mark.parametrize("file", ["vmlinuz", "initrd", "cmdline", "disk.img"])
def test_verify_notices_changes(store, add, file: str) -> None:
    """A boot file of another content or a disk of another length is damage."""
    image = add("a")
    path = image.path / file
    content = path.read_bytes()
    path.unlink()  # the test's images share their files
    path.write_bytes(content[:-1])
    with pytest.raises(ImageDamaged):
        verify(image)
