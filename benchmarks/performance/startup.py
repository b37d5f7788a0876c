"""Processes from their start to their end: importing, --help, and printing a graph."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from measuring import Spread, _rotations

# Every public name is looked up, so that every module is imported that an import can import.
EVERYTHING = "import torch, grl_surgery as gs; [getattr(gs, name) for name in gs.__all__]"
USED = "import torch, grl_surgery as gs; gs.insert_grl, gs.attach_domain_head, gs.verify_flip"
COMMANDS: dict[str, list[str]] = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import grl_surgery": ["-c", "import torch, grl_surgery"],
    "its main verbs": ["-c", USED],
    "all its names": ["-c", EVERYTHING],
    "grl-surgery --help": ["-m", "grl_surgery", "--help"],
    "import torch, timm": ["-c", "import torch, timm"],
    "grl-surgery graph timm/resnet18": ["-m", "grl_surgery", "graph", "timm/resnet18"],
}


def rows(rounds: int, device: str = "cpu") -> Iterator[dict[str, Any]]:
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for names in _rotations(list(COMMANDS), max(3, rounds // 6)):
        for name in names:
            taken[name].append(_run([sys.executable, *COMMANDS[name]]))
    cpu = {name: [row[0] for row in pairs] for name, pairs in taken.items()}
    shared = {
        "seconds": {name: Spread.of(row) for name, row in cpu.items()},
        "seconds_on_the_clock": {name: Spread.of([row[1] for row in pairs]) for name, pairs in taken.items()},
    }
    for name, other, limit in (
        ("import grl_surgery", "import torch", 0.05),
        ("its main verbs", "import torch", 0.05),
        ("all its names", "import torch", 0.05),
        ("grl-surgery --help", None, 0.3),
        ("grl-surgery graph timm/resnet18", "import torch, timm", None),
    ):
        base = cpu[other] if other else [0.0] * len(cpu[name])
        more = Spread.of([a - b for a, b in zip(cpu[name], base, strict=True)])
        yield {
            "case": name + (f", beyond {other}" if other else ""),
            "seconds_more": more,
            **(shared if name == "import grl_surgery" else {}),
            "goal": "none was set" if limit is None else f"at most {limit:g} s",
            "met": "" if limit is None else "yes" if more.median <= limit else "no",
        }


def _run(command: Sequence[str]) -> tuple[float, float]:
    """Seconds of processor time, and on the clock, until the process has ended."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return used.ru_utime + used.ru_stime, time.perf_counter() - start
