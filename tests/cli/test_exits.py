"""Exit statuses: the command line's table is that of the whole error tree."""

import importlib
import pkgutil

import jindiskd
from jindiskd.cli.exits import BY_CODE, MEANINGS
from jindiskd.errors import EXIT_FAILED, JindiskError


def test_the_table_holds_every_error_with_a_status_of_its_own() -> None:
    """An error that is missing here would end the command with 1 instead of what the manual says."""
    for module in pkgutil.walk_packages(jindiskd.__path__, "jindiskd."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    # Errors that tests define are not the program's.
    own = {code: kind for code, kind in JindiskError.by_code.items() if kind.__module__.startswith("jindiskd")}
    expected = {code: kind.exit_code for code, kind in own.items() if kind.exit_code != EXIT_FAILED}
    assert dict(BY_CODE) == expected
    assert {kind.exit_code for kind in own.values()} <= set(MEANINGS)
