"""What a definition names as boot files is somebody else's choice: judging it must end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jindiskd.domain import xml
from jindiskd.domain.binding import Binding
from jindiskd.domain.judge import Judge
from jindiskd.domain.spec import from_manifest
from jindiskd.image.store import ImageStore

from .conftest import add_image

UUID = "11111111-2222-4333-8444-555555555555"


@pytest.mark.parametrize("what", ["pipe", "zeros", "directory"])
@pytest.mark.parametrize("element", ["loader", "kernel", "initrd"])
def test_a_boot_file_that_has_no_end_is_refused(tmp_path: Path, what: str, element: str) -> None:
    """A pipe would wait for a writer, and a device for ever go on; whoever may edit the definition can name them."""
    (tmp_path / "images").mkdir()
    store = ImageStore(tmp_path / "images")
    manifest = add_image(store, "demo")
    os.mkfifo(tmp_path / "pipe")
    path = {"pipe": str(tmp_path / "pipe"), "zeros": "/dev/zero", "directory": str(tmp_path)}[what]
    spec = from_manifest(
        manifest, store.root / "demo", name="web", uuid=UUID, memory_mib=256, console_log=Path("/c.log"), vsock=None
    )
    root = xml.parse(xml.write(spec))
    binding = Binding(image="demo", image_id=manifest.image_id, platform=manifest.platform)
    judge = Judge(store, key_problem=lambda _image_id: "", simulation=True)
    assert judge.problem(root, binding, "web") == ""
    named = root.find(f"os/{element}")
    assert named is not None
    named.text = path
    assert "run 'jindiskctl domain adopt web demo'" in judge.problem(root, binding, "web")
