"""What an administrator is told of where the key-encryption key is."""

from pathlib import Path

import pytest

from jindiskd.keys.kek import KekPlace, KekSource


@pytest.mark.parametrize(("mode", "told"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_key_that_others_may_read_is_told_of(tmp_path: Path, mode: int, told: bool) -> None:
    """It is made for its owner alone; a copy from a backup may not be."""
    place = KekPlace(
        source=KekSource.FILE, file=tmp_path / "kek", tpm2_dir=tmp_path, tpm2_tcti="device:/dev/tpmrm0", tpm2_pcrs="",
        credentials=None,
    )  # fmt: skip
    assert "chmod" not in place.warning()
    place.load(create=True).close()
    assert "chmod" not in place.warning()
    place.file.chmod(mode)
    assert ("chmod 600" in place.warning()) is told
    assert "--seal-kek" in place.warning()
