"""What verify_flip costs beside one training step of the same network on the same inputs: memory and time.

    python benchmarks/performance/proof_cost.py [--only resnet50] [--rounds 3] [--write]

With --write the rows go into benchmarks/results/proof_cost.json and into docs/performance.md.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from measuring import Call, peak

import grl_surgery as gs

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "proof_cost.json"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- proof cost: begin -->", "<!-- proof cost: end -->"

# network, arguments, point, whether a head is attached there, inputs
CASES: dict[str, tuple[str, dict[str, Any], str, bool, tuple[int, ...]]] = {
    "resnet50": ("resnet50", {}, "layer3", False, (4, 3, 96, 96)),
    "resnet152": ("resnet152", {}, "layer3", False, (4, 3, 96, 96)),
    "vit_small": ("vit_small_patch16_224", {"img_size": 96}, "blocks.5", False, (4, 3, 96, 96)),
    "vit_large": ("vit_large_patch16_224", {"img_size": 96}, "blocks.11", False, (2, 3, 96, 96)),
    "resnet50 with a head": ("resnet50", {}, "global_pool", True, (4, 3, 96, 96)),
}


def measure(case: str, rounds: int) -> dict[str, Any]:
    """One row: bytes beyond what was held before, and seconds of processor time."""
    name, arguments, point, has_head, shape = CASES[case]
    torch.manual_seed(0)
    net = timm.create_model(name, **arguments).train()
    images = torch.randn(*shape)
    cut = gs.attach_domain_head if has_head else gs.insert_grl
    spliced: Any = cut(net, after=point, **({"example_inputs": images} if has_head else {}))

    def step() -> None:
        found = spliced(images)
        sum(part.square().mean() for part in (found if has_head else (found,))).backward()
        spliced.zero_grad(set_to_none=True)

    def proof() -> None:
        assert gs.verify_flip(spliced, net, images).ok

    calls = {"step": step, "proof": proof}
    for call in calls.values():
        call()
    taken = {which: [_seconds(calls[which]) for _ in range(rounds)] for which in calls}
    return {
        "case": f"{case}, {shape[0]} images of {shape[2]}x{shape[3]}",
        "weights": sum(p.numel() * p.element_size() for p in spliced.parameters()),
        "allocated": {which: peak(call) for which, call in calls.items()},
        "resident": {which: _resident(call) for which, call in calls.items()},
        "seconds": {which: statistics.median(times) for which, times in taken.items()},
        "goal": {"memory": 1.5, "time": 2.5},
    }


def _seconds(call: Call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _resident(call: Call) -> int:
    """How far the peak of resident memory rises above what is resident before; Linux alone tells."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def table(results: dict[str, Any]) -> str:
    """The rows of the page; memory in multiples of the weights, beyond the weights themselves."""
    lines = [
        f"Measured on {results['date']}, two cores shared with other programs, one thread, torch "
        f"{results['torch']}, timm {results['timm']}.",
        "",
        "| case | allocated: step, proof | ratio | resident: step, proof | ratio | steps of time |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        cells = [row["case"]]
        for kind in ("allocated", "resident"):
            step, proof = row[kind]["step"], row[kind]["proof"]
            cells += [f"{step / row['weights']:.2f}, {proof / row['weights']:.2f} W", f"{proof / step:.2f}"]
        cells.append(f"{row['seconds']['proof'] / row['seconds']['step']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for case in options.only:
        rows.append(measure(case, options.rounds))
        print(json.dumps(rows[-1]), flush=True)
    results = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__.partition("+")[0],
        "timm": timm.__version__,
        "rows": rows,
    }
    print(table(results))
    if options.write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
