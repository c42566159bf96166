"""The error tree: one class a condition, with its D-Bus name and exit code.

Every error raised on purpose is a `JindiskError`. A class writes its own sentence from named facts,
and says what to do. On the bus it is `org.jindisk1.Error.<code>`, on the command line `exit_code`.
Errors that belong to one package are defined in that package and register themselves here.
Standard library only: the guest's agent imports this module.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_FOUND = 3
EXIT_UNCHANGED = 4
EXIT_NOT_AUTHORIZED = 5
EXIT_BUSY = 6
EXIT_REFUSED = 7
EXIT_INTEGRITY = 8
EXIT_UNAVAILABLE = 69
EXIT_INTERRUPTED = 130


class JindiskError(Exception):
    """Root of every error raised on purpose. Its text is one or two sentences for people, without secrets."""

    code: ClassVar[str] = "Failed"
    exit_code: ClassVar[int] = EXIT_FAILED
    by_code: ClassVar[dict[str, type[JindiskError]]] = {}

    def __init_subclass__(cls, *, code: str | None = None, exit_code: int = EXIT_FAILED, **kwargs: object) -> None:
        """Register `code`; a class without one is a family and cannot be looked up by name."""
        super().__init_subclass__(**kwargs)
        if code is None:
            return
        if code in JindiskError.by_code:
            raise TypeError(f"error code {code} is taken by {JindiskError.by_code[code].__qualname__}")
        cls.code, cls.exit_code = code, exit_code
        JindiskError.by_code[code] = cls


class InvalidArgument(JindiskError, code="InvalidArgument", exit_code=EXIT_USAGE):
    """A value given by the caller is not usable."""

    def __init__(self, what: str, value: object, remedy: str) -> None:
        """Name the thing (`what`), the value as given, and what would be right."""
        super().__init__(f"{what} {value!r} cannot be used: {remedy}")
        self.what, self.value, self.remedy = what, value, remedy


class NotFound(JindiskError, code="NotFound", exit_code=EXIT_NOT_FOUND):
    """A named thing does not exist."""

    def __init__(self, kind: str, name: str) -> None:
        """`kind` is a noun such as "image"."""
        super().__init__(f"there is no {kind} {name!r}")
        self.kind, self.name = kind, name


class AlreadyExists(JindiskError, code="AlreadyExists", exit_code=EXIT_BUSY):
    """A name is taken."""

    def __init__(self, kind: str, name: str) -> None:
        """`kind` is a noun such as "image"."""
        super().__init__(f"{kind} {name!r} exists already: choose another name or remove it first")
        self.kind, self.name = kind, name


class Busy(JindiskError, code="Busy", exit_code=EXIT_BUSY):
    """Something is in use and the request would disturb it."""

    def __init__(self, what: str, why: str) -> None:
        """`what` is the thing, `why` what holds it and how to free it."""
        super().__init__(f"{what} is busy: {why}")


class Cancelled(JindiskError, code="Cancelled", exit_code=EXIT_INTERRUPTED):
    """Work was cancelled by request; nothing of it is left."""

    def __init__(self, what: str) -> None:
        """`what` is the operation, for example "image build"."""
        super().__init__(f"{what} was cancelled")


class TimedOut(JindiskError, code="Timeout"):
    """Something did not happen in time."""

    def __init__(self, what: str, seconds: float, remedy: str = "") -> None:
        """`what` did not happen within `seconds`; `remedy` says what would help, where that is known."""
        super().__init__(f"{what} did not happen within {seconds:g} s" + (f": {remedy}" if remedy else ""))
        self.seconds = seconds


class NotSupported(JindiskError, code="NotSupported"):
    """This host, build or release cannot do what was asked."""

    def __init__(self, what: str, remedy: str) -> None:
        """`what` is not possible here; `remedy` says what would make it so."""
        super().__init__(f"{what} is not supported here: {remedy}")


class NoSpace(JindiskError, code="NoSpace"):
    """The file system is full."""

    def __init__(self, path: str, needed_bytes: int | None = None) -> None:
        """`path` lies on the file system concerned."""
        need = f" ({needed_bytes} bytes are needed)" if needed_bytes else ""
        super().__init__(f"no space left for {path}{need}: free some, or configure another directory")


class NotAuthorized(JindiskError, code="NotAuthorized", exit_code=EXIT_NOT_AUTHORIZED):
    """The caller may not do this."""

    def __init__(self, action: str) -> None:
        """`action` is the right that is missing."""
        super().__init__(f"not authorised for {action}: run as root, or have polkit grant it")


class ServiceUnavailable(JindiskError, code="ServiceUnavailable", exit_code=EXIT_UNAVAILABLE):
    """A service we need does not answer."""

    def __init__(self, service: str, remedy: str) -> None:
        """`service` is a unit or program name."""
        super().__init__(f"{service} is not available: {remedy}")


class Internal(JindiskError, code="Internal"):
    """A fault of ours; the journal has it under the reference."""

    def __init__(self, reference: str) -> None:
        """`reference` is the incident number written to the log."""
        super().__init__(f"internal error, see the journal for {reference}")
