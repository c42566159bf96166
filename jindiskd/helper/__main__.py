"""`jindisk-helper`: started by its socket unit for each connection, which is descriptor 3."""

from __future__ import annotations

import os
import socket
import sys
import syslog
from pathlib import Path

import click

from jindiskd.errors import InvalidArgument, JindiskError
from jindiskd.helper import service
from jindiskd.helper.states import SOCKET
from jindiskd.helper.verbs import Settings

FIRST = 3  # sd_listen_fds(3)
PLACE = click.Path(path_type=Path, readable=False)
"""Not looked at: root, as the unit has it, may not read what is the service's."""


def handed_over() -> socket.socket:
    """The connection that the service manager accepted.

    Raises:
        InvalidArgument: there is none.
    """
    mine = os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1"
    if not mine:
        raise InvalidArgument("descriptor", FIRST, "this is started by jindisk-helper.socket")
    os.set_inheritable(FIRST, False)
    return socket.socket(fileno=FIRST)


@click.command()
@click.option("--user", default="jindiskd", help="The service's user.")
@click.option("--states", type=PLACE, default=SOCKET, help="Where the service hears of states.")
@click.option("--run", type=PLACE, default=Path("/run/jindisk-helper"), help="Where faults lie.")
@click.option("--listen", type=click.Path(), help="Accept connections here, where no service manager does.")
def main(user: str, states: Path, run: Path, listen: str | None) -> None:
    """Map volumes on this host for jindiskd."""
    syslog.openlog("jindisk-helper", syslog.LOG_PID, syslog.LOG_DAEMON)
    try:
        run.mkdir(mode=0o755, parents=True, exist_ok=True)
        found = service.user_of(user)
        # A service that runs as root, by hand: workers are nobody's then, never root's.
        worker = found if found.uid else service.user_of("nobody")
        settings = Settings(service_uid=found.uid, user=worker, states=states, run=run)
        if listen is not None:
            service.listen(listen, settings)
        with handed_over() as stream:
            service.handle(stream, settings)
    except JindiskError as exc:
        sys.exit(service.failure(exc))


if __name__ == "__main__":
    main()
