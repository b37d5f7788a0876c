"""Draw the badges of README.md from pyproject.toml and the ledgers; ``--check`` only compares.

python docs/make_badges.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "images" / "badges"


def facts() -> dict[str, tuple[str, str]]:
    """The name of each badge, with its two texts."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")

    def said(pattern: str) -> str:
        found = re.search(pattern, project, re.MULTILINE)
        if found is None:
            raise LookupError(f"pyproject.toml has no {pattern}")
        return found[1]

    minors = sorted(int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", project))
    ledger = (ROOT / "benchmarks" / "results" / "zoo_structural.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in ledger]
    networks = {row["name"]: row["result"] for row in rows}
    proved = sum(result == "ok" for result in networks.values())
    return {
        "version": ("version", said(r'^version = "([^"]+)"')),
        "python": ("Python", f"3.{minors[0]} – 3.{minors[-1]}"),
        "torch": ("PyTorch", f"≥ {said(r'torch>=([0-9.]+)')}"),
        "license": ("license", said(r'^license = "([^"]+)"')),
        "networks": ("networks cut and checked", f"{proved:,} of {len(networks):,}"),
    }


def badge(label: str, value: str) -> str:
    """One badge as SVG."""
    left, right = (round(6.6 * len(text) + 14) for text in (label, value))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="{label}: {value}"><title>{label}: {value}</title>'
        f'<rect width="{left + right}" height="20" rx="3" fill="#44505c"/>'
        f'<path d="M{left} 0h{right - 3}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3h-{right - 3}z" fill="#0b5a93"/>'
        '<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">'
        f'<text x="{left / 2:g}" y="14">{label}</text><text x="{left + right / 2:g}" y="14">{value}</text>'
        "</g></svg>\n"
    )


def main() -> int:
    """Write the badges, or say whether they are up to date."""
    drawn = {FOLDER / f"{name}.svg": badge(*texts) for name, texts in facts().items()}
    if "--check" in sys.argv:
        return int(any(not file.exists() or file.read_text("utf-8") != text for file, text in drawn.items()))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file, text in drawn.items():
        file.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
