"""What it takes to start: importing, --help, and printing a graph."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from measuring import Spread, _rotations, verdict

# Timed inside the process, after `import torch`, so that torch's own spread is not in it.
AFTER = """import torch, time
start = time.process_time()
{then}
print(time.process_time() - start)"""
IMPORTS = {
    "import grl_surgery": AFTER.format(then="import grl_surgery"),
    "its main verbs": AFTER.format(
        then="import grl_surgery as gs; gs.insert_grl, gs.attach_domain_head, gs.verify_flip"
    ),
    "all its names": AFTER.format(
        then="import grl_surgery as gs; [getattr(gs, name) for name in gs.__all__]"
    ),
}
COMMANDS: dict[str, list[str]] = {
    "import torch": ["-c", "import torch"],
    "grl-surgery --help": ["-m", "grl_surgery", "--help"],
    "grl-surgery graph timm/resnet18": ["-m", "grl_surgery", "graph", "timm/resnet18"],
}


# As for a user: compiled once, when first imported.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def rows(rounds: int, device: str = "cpu") -> Iterator[dict[str, Any]]:
    for name in (*IMPORTS, *COMMANDS):
        _inside(IMPORTS[name]) if name in IMPORTS else _run(COMMANDS[name])
    taken: dict[str, list[float]] = {name: [] for name in (*IMPORTS, *COMMANDS)}
    for names in _rotations(list(taken), max(4, rounds // 6)):
        for name in names:
            taken[name].append(_inside(IMPORTS[name]) if name in IMPORTS else _run(COMMANDS[name]))
    seconds = {name: Spread.of(row) for name, row in taken.items()}
    limits = {
        "import grl_surgery": 0.05,
        "its main verbs": 0.05,
        "all its names": 0.05,
        "grl-surgery --help": 0.3,
    }
    for name, value in seconds.items():
        limit = limits.get(name)
        yield {
            "case": name + (", beyond import torch" if name in IMPORTS else ""),
            "seconds_more": value,
            **({"seconds": seconds} if name == "import grl_surgery" else {}),
            "goal": "none was set" if limit is None else f"at most {limit:g} s",
            "met": "" if limit is None else verdict(value, limit),
        }


def _inside(code: str) -> float:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, capture_output=True, check=True, env=ENVIRONMENT).stdout)


def _run(arguments: Sequence[str]) -> float:
    """Seconds of processor time until the process has ended."""
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return used.ru_utime + used.ru_stime
