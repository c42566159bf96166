"""Work on images that does not end in time: its error names image, limit and setting, and nothing is left of it."""

import asyncio
import os
from pathlib import Path

import pytest

from jindiskd.backend.images import ImagesBackend
from jindiskd.base.deadline import within
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.broker_config import BrokerConfig
from jindiskd.bus.ports import BuildOrder, ImportOrder
from jindiskd.config import Config, ImagesConfig
from jindiskd.custody import KeyPort
from jindiskd.errors import TimedOut
from jindiskd.image.service import ImageService
from jindiskd.image.store import ImageStore
from jindiskd.jobs.job import JobState, Operation
from jindiskd.jobs.manager import JobManager
from jindiskd.keys.store import Store

LIMIT_S = 0.2  # a worker takes longer to start


async def test_a_build_and_an_import_are_given_up_in_time(tmp_path: Path, firmware: Path, disk_image: Path) -> None:
    """The job fails by its own error, not as a fault of ours; neither image nor key nor staging directory is left."""
    images = ImagesConfig(
        platform=Platform.SIMULATED_SNP, firmware=firmware, cpu_model="EPYC-v4",
        build_timeout_s=LIMIT_S,  # type: ignore[arg-type]  # less than a file could say
    )  # fmt: skip
    store = ImageStore(tmp_path / "images")
    keys = Store.open(f"sqlite:///{tmp_path}/keys.db", Secret(bytes(32)))
    service = ImageService(store, KeyPort(keys), broker_spki_sha256=bytes(32))
    config = Config(images=images, broker=BrokerConfig(allow_simulated=True))
    backend = ImagesBackend(service, None, None, config)  # type: ignore[arg-type]  # neither is asked
    jobs = JobManager()
    base = os.open(disk_image, os.O_RDONLY)
    reader, writer = os.pipe()  # a stream that never comes
    try:
        order = backend.checked(BuildOrder(name="web"))
        build = jobs.start(Operation.IMAGE_BUILD, ["web"], 0, lambda job: backend.build(order, base, job))
        take = jobs.start(
            Operation.IMAGE_IMPORT, [], 0, lambda job: backend.import_(ImportOrder(name="taken"), reader, job)
        )
        for job, said in ((build, "the build of image 'web'"), (take, "the import of image 'taken'")):
            await asyncio.wait_for(jobs.wait(job.number), 300)
            assert job.state is JobState.FAILED
            assert isinstance(job.error, TimedOut)
            assert f"the end of {said} did not happen within 0.2 s" in str(job.error)
            assert "images.build_timeout_s" in str(job.error)
        assert list(store.root.iterdir()) == []
        assert list(keys.images()) == []
    finally:
        for fd in (base, reader, writer):
            os.close(fd)
        await jobs.close()
        keys.close()


async def test_only_the_limit_is_told_as_such() -> None:
    """A time-out of the inside is its own, and what ends in time passes."""
    async with within(300, "the end", "wait"):
        pass
    with pytest.raises(TimeoutError, match="mine"):
        async with within(300, "the end", "wait"):
            raise TimeoutError("mine")
    with pytest.raises(TimedOut, match="the end did not happen within 0 s: wait"):
        async with within(0, "the end", "wait"):
            await asyncio.Event().wait()
