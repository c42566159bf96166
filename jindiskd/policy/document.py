"""Writes docs/policy.md's tables: `python -m jindiskd.policy.document FILE` replaces what is between its two marks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from jindiskd.policy import form

BEGIN = "<!-- settings: written by python -m jindiskd.policy.document -->"
END = "<!-- end of settings -->"
TITLES = {
    "release": "when and how often a key is given",
    "platform": "what kind of platform",
    "revocation": "certificates that AMD has taken back",
    "snp": "what a SEV-SNP report must say",
    "tdx": "what a TDX quote must say",
    "sev": "SEV and SEV-ES, which are measured at launch",
}


def lines() -> Iterator[str]:
    """The tables, in Markdown."""
    for section, known in form.sections().items():
        yield f"### [{section}]: {TITLES[section]}"
        yield ""
        yield "| setting | what | default, and why |"
        yield "|---|---|---|"
        for entry in known.values():
            yield f"| `{entry.name}` | {entry.field.metadata['help']}{_range(entry)} | {entry.field.metadata['why']} |"
        yield ""


def _range(entry: form.Entry) -> str:
    metadata = entry.field.metadata
    if "range" in metadata:
        return f" ({metadata['range'][0]} to {metadata['range'][1]})"
    if "choices" in metadata:
        return f" (of {', '.join(metadata['choices'])})"
    if "length" in metadata:
        return f" ({metadata['length']} bytes each, hexadecimal)"
    return ""


def main(path: Path) -> None:
    """Rewrite the tables in the file."""
    text = path.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    path.write_text(f"{head}{BEGIN}\n\n" + "\n".join(lines()) + f"\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
