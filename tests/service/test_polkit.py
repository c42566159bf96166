"""The real polkit decides, asked by a service that is not root."""

import os
import shutil
import time
from collections.abc import Iterator

import pytest
from polkitbus import POLKITD, SERVICE, Rules, ctl, polkitd

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="needs root to become other users and to mount"),
    pytest.mark.skipif(not POLKITD.exists(), reason="polkitd is not installed"),
]


@pytest.fixture
def polkit(unstarted, private_bus) -> Iterator[Rules]:
    """polkitd on the private bus."""
    with polkitd(unstarted, private_bus) as rules:
        yield rules


@pytest.fixture
def service(unstarted):
    """The service under a user of its own."""
    for path in (unstarted.folder, unstarted.state, *(unstarted.state / "simulated-root").rglob("*")):
        os.chown(path, SERVICE, SERVICE)
    os.chown(unstarted.state / "simulated-root", SERVICE, SERVICE)
    unstarted.start(uid=SERVICE)
    return unstarted


def settled(service, rules: Rules, body: str, *words: str) -> tuple[int, str]:
    """Change the rules, and call until polkitd, which watches its folder, has noticed."""
    before = ctl(service, *words)
    rules.write(body)
    until = time.monotonic() + 120
    while (now := ctl(service, *words)) == before and time.monotonic() < until:
        time.sleep(0.1)
    return now


def test_polkit_decides_what_each_user_may_do(polkit, service, rootfs):
    """Looking is free, rights are asked one by one, and what is asked names the thing in question."""
    assert ctl(service, "status")[0] == 0
    assert ctl(service, "image", "list")[0] == 0
    status, text = ctl(service, "audit", "list")
    assert (status, "needs authentication" in text) == (5, True)

    allow_inspect = 'if (action.id == "org.jindisk1.inspect" && subject.user == "nobody") return polkit.Result.YES;'
    assert settled(service, polkit, allow_inspect, "audit", "list")[0] == 0
    assert ctl(service, "audit", "verify")[0] == 0
    archive = service.folder / "root.tar"
    shutil.copy(rootfs, archive)
    archive.chmod(0o644)
    assert ctl(service, "image", "build", "mine", "--rootfs", str(archive))[0] == 5

    refuse = "return polkit.Result.NO;"
    status, text = settled(service, polkit, refuse, "audit", "list")
    assert (status, "not authorised for org.jindisk1.inspect" in text) == (5, True)

    # Root is not asked. The name of the image is a detail that only the service may tell polkit.
    for name in ("one", "two"):
        service.ctl("image", "build", name, "--rootfs", str(archive))
    only_one = (
        'if (action.id == "org.jindisk1.manage-images" && action.lookup("image") == "one") return polkit.Result.YES;'
    )
    assert settled(service, polkit, only_one, "image", "remove", "one", "--yes")[0] == 0
    assert ctl(service, "image", "remove", "two", "--yes")[0] == 5
    assert [image["Name"] for image in service.json("image", "list")["images"]] == ["two"]
    # Whoever may decide about keys may also look.
    imply = 'if (action.id == "org.jindisk1.manage-keys") return polkit.Result.YES;'
    assert settled(service, polkit, imply, "key", "revoke", "two")[0] == 0
    assert ctl(service, "audit", "list")[0] == 0


def test_without_polkit_only_root_may(service):
    """And the refusal says why."""
    status, text = ctl(service, "audit", "list")
    assert (status, "only root may do this" in text) == (5, True)
    assert ctl(service, "status")[0] == 0
    service.ctl("audit", "list")
