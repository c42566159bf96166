"""The table of long tests: what passed, what failed, what did not run, and of which source each result is."""

from collections.abc import Iterable, Mapping

from results import Result, counted


def table(tests: Iterable[str], known: Mapping[str, Result]) -> str:
    """A line for each test with all its cases, then those that failed or did not run by name, and the sums."""
    groups: dict[str, list[str]] = {}
    for test in tests:
        groups.setdefault(test.removeprefix("tests/").partition("[")[0], []).append(test)
    head = ("test", "cases", "passed", "skipped", "failed", "not run", "seconds", "of processor", "counted", "source")
    rows = [head]
    sums, failed, missing = [0] * 7, [], []
    for name, cases in groups.items():
        found = [known[case] for case in cases if case in known]
        counts = [sum(one.outcome == outcome for one in found) for outcome in ("passed", "skipped", "failed")]
        failed += [case for case in cases if case in known and known[case].outcome == "failed"]
        missing += [case for case in cases if case not in known]
        times = [sum(one.seconds for one in found), sum(one.processor_s for one in found)]
        numbers = [len(cases), *counts, len(cases) - len(found), *(round(seconds) for seconds in times)]
        sums = [a + b for a, b in zip(sums, numbers, strict=True)]
        rows.append(
            (
                name,
                *(str(number) for number in numbers),
                counted(found),
                ", ".join(sorted({str(one.source) for one in found})),
            )
        )
    rows.append(("all", *(str(number) for number in sums), "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(row[column].rjust(widths[column]) for column in range(1, 8)),
            row[8].ljust(widths[8]),
            row[9],
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *(f"FAILED {case}" for case in failed), *(f"NOT RUN {case}" for case in missing)])
