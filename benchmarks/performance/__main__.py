"""Everything that docs/performance.md says, measured in one run: ratios of interleaved runs.

    python benchmarks/performance [--only operation surgery] [--rounds 24] [--device cuda] [--json FILE]

With all rows it writes benchmarks/results/performance.json, the plots docs/images/performance_*.png and the
table in docs/performance.md; with another device or some rows only, the JSON alone.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import report
import torch
from measuring import keep_freed_memory
from peers import versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(report.TITLES), default=list(report.TITLES))
    parser.add_argument("--rounds", type=int, default=24, help="of the fastest rows; slow ones take fewer")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="where to store; by default benchmarks/results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    keep_freed_memory()
    results: dict[str, Any] = {"machine": _machine(options.device), "rounds": options.rounds, "rows": {}}
    for name in options.only:
        start = time.perf_counter()
        print(f"== {report.TITLES[name]}", flush=True)
        results["rows"][name] = []
        for row in importlib.import_module(name).rows(options.rounds, options.device):
            results["rows"][name].append(row)
            figures = "; ".join(report._figures(name, row))
            print(f"{row['case']}: {figures}. Goal: {row['goal']}. Met: {row['met'] or '-'}", flush=True)
        print(f"   {time.perf_counter() - start:.0f} s", flush=True)
    whole = options.device == "cpu" and options.only == list(report.TITLES)
    path = options.json or report.RESULTS.with_name(
        "performance.json" if whole else f"performance_{options.device}_{'_'.join(options.only)}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"stored in {path}")
    if path == report.RESULTS:
        stored = report.load()
        report.write_table(stored)
        report.plot(stored)


def _machine(device: str) -> dict[str, Any]:
    processor = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next(line.partition(":")[2].strip() for line in lines if "model name" in line)


if __name__ == "__main__":
    main()
