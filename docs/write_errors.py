"""Write docs/errors.md from the table that the tests run (tests/bad_input.py); ``--check`` only compares."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"
sys.path.insert(0, str(ROOT / "tests"))

HEAD = """# Errors

- Every error of this library is a `SurgeryError`, which is a `ValueError`: `except gs.SurgeryError` catches
  all.
- A message says what failed, lists the nearest valid choices, and ends with a call that works. Search this
  page for yours.
- A command prints the message without a traceback and exits with 2. It exits with 1 only where a check
  failed.

A call that fails changes nothing. `tests/test_bad_input.py` runs each call below, compares the message word
by word, and checks that the network, its gradients, its hooks, the random state and the folder are as
before. `model` is a small network, `x` its input.
"""


def page() -> str:
    """The text of the page."""
    from bad_input import TABLE

    parts = [HEAD]
    for section, rows in itertools.groupby(TABLE, key=lambda row: row.section):
        parts.append(f"## {section}\n")
        for row in rows:
            shown = f"$ {row.call}" if row.call.startswith("grl-surgery") else row.call
            said = row.message if row.error.isdigit() else f"{row.error}: {row.message}".rstrip(": ")
            parts.append(f"```text\n{shown}\n\n{said}\n```\n")
    return "\n".join(parts)


def main() -> int:
    """Write the page, or say whether it is up to date."""
    text = page()
    if "--check" in sys.argv:
        return 0 if PAGE.read_text(encoding="utf-8") == text else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
