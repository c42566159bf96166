"""A PostgreSQL cluster of one's own: in a temporary directory, on a unix socket there, run by the user postgres."""

import contextlib
import os
import pwd
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

USER = "postgres"


class Cluster:
    """A cluster whose server may be stopped and started."""

    def __init__(self, folder: Path) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not found:
            pytest.skip("PostgreSQL is not installed: scripts/setup installs it")
        self.programs, self.folder = found[-1].parent, folder
        self.folder.chmod(0o711)
        self.data = folder / "data"
        self.data.mkdir(mode=0o700)
        owner = pwd.getpwnam(USER)
        os.chown(self.data, owner.pw_uid, owner.pw_gid)
        words = ("--auth=trust", "--username=broker", "--encoding=UTF8", "--locale=C", "--no-sync")
        self._run("initdb", *words, self.data)
        with (self.data / "postgresql.conf").open("a") as stream:
            # What a power cut would do is PostgreSQL's matter; here processes are killed.
            stream.write(f"listen_addresses = ''\nunix_socket_directories = '{self.data}'\nfsync = off\n")
            stream.write("max_connections = 60\nshared_buffers = 32MB\n")
        self.start()

    def _run(self, program: str, *words: object) -> str:
        command = [str(self.programs / program), *map(str, words)]
        if os.geteuid() == 0:
            command = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", *command]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=300)
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self) -> None:
        log = self.data / "log"
        with contextlib.suppress(FileNotFoundError):
            log.unlink()
        self._run("pg_ctl", "start", "-w", "-t", "120", "-D", self.data, "-l", log, "-s")

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "-w", "-t", "120", "-m", "immediate", "-D", self.data, "-s")

    def database(self, name: str) -> str:
        """Make a database; its URL."""
        self._run("createdb", "-h", self.data, "-U", "broker", name)
        return f"postgresql://broker@/{name}?host={self.data}"


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A running cluster, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="pg-") as name:
        made = Cluster(Path(name))
        try:
            yield made
        finally:
            with contextlib.suppress(AssertionError):
                made.stop()
