"""How far a guest is where another's broker decides: what it says itself, in order; and nothing where ours decides."""

from pathlib import Path

import pytest

from jindiskd.base.platform import Platform
from jindiskd.domain.guests import DomainSettings
from jindiskd.domain.service import DomainService
from jindiskd.domain.state import DomainState
from jindiskd.image.store import ImageStore


async def _nothing(*_: object) -> None:
    raise AssertionError("nothing is opened here")


def service(tmp_path: Path, *, relayed: bool) -> DomainService:
    settings = DomainSettings(
        runtime_dir=tmp_path / "run",
        console_dir=tmp_path / "console",
        simulated_root=None,
        vhost_device_vsock=Path("/nonexistent"),
        relayed=relayed,
    )
    images = ImageStore(tmp_path / "images")
    return DomainService(uri="test:///none", images=images, open_broker=_nothing, settings=settings)


@pytest.mark.parametrize("relayed", [True, False])
async def test_words_of_attestation_count_for_relayed_guests_alone(tmp_path: Path, relayed: bool) -> None:
    """Where the broker is ours, it says what it decided, and a guest's word for it is worth nothing."""
    domains = service(tmp_path, relayed=relayed)
    guest = domains._guests.claim("web", image="web", image_id="i", platform=Platform.SIMULATED_SNP)
    domains._guests.set(guest, DomainState.STARTED)
    seen = []
    for word in ("boot", "report", "key", "attested", "key"):
        domains._follower.heard(guest, word)
        seen.append(guest.view.state.value)
    started = ["started"] * 3
    assert seen == [*started, *(["attested", "released"] if relayed else ["started", "started"])]
    await domains.stop()


@pytest.mark.parametrize(
    ("relayed", "code", "end"),
    [
        (True, "E33", DomainState.REFUSED),
        (True, "E32", DomainState.REFUSED),
        (True, "E30", DomainState.FAILED),
        (False, "E33", DomainState.FAILED),
    ],
)
async def test_a_refusal_by_the_owner_is_one(tmp_path: Path, relayed: bool, code: str, end: DomainState) -> None:
    """What the guest was told by its broker; a broker that is away is no refusal."""
    domains = service(tmp_path, relayed=relayed)
    guest = domains._guests.claim("web", image="web", image_id="i", platform=Platform.SIMULATED_SNP)
    domains._guests.set(guest, DomainState.STARTED)
    domains._follower.heard(guest, f"fail {code}")
    assert guest.view.state is end
    assert f"({code})" in guest.view.reason
    await domains.stop()
