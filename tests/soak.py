"""Many more random networks than the test suite has time for: ``make soak``.

Prints what became of them, and every failure with the network's source; exits 1 if there was one.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import platform
import sys
import time
import traceback
import warnings
from collections import Counter

import hypothesis
import test_random_networks
import torch
from hypothesis import HealthCheck, given, seed, settings
from random_networks import Block, source_of
from test_random_networks import Case, cases, check

CHUNK = 250


def soak(start: int) -> tuple[Counter[str], list[str]]:
    """Check one chunk of networks; the chunk's number is its seed."""
    outcomes, failures = Counter[str](), []
    test_random_networks.note = lambda text: None  # type: ignore[assignment]

    @seed(start)
    @settings(max_examples=CHUNK, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases())
    def run(case: Case) -> None:
        try:
            outcomes[check(case)] += 1
        except Exception:
            outcomes["failed"] += 1
            failures.append(f"seed {start}: {case}\n{sources(case.block)}\n{traceback.format_exc()}")

    run()
    return outcomes, failures


def sources(block: Block, path: str = "the network") -> str:
    """The forwards of a network and of all blocks in it."""
    inner = [sources(child, name) for name, child in block.children.items() if isinstance(child, Block)]
    return "\n".join([f"# {path}", source_of(block), *inner])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--minutes", type=float, default=24 * 60, help="start no new chunk after this time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    begun = time.monotonic()
    outcomes, failed = Counter[str](), 0
    chunks = range(options.seed, options.seed + -(-options.count // CHUNK))
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=4) as pool:
        for found, failures in pool.imap_unordered(soak, chunks):
            outcomes += found
            failed += len(failures)
            print("\n\n".join(failures), end="\n" if failures else "", flush=True)
            minutes = (time.monotonic() - begun) / 60
            print(f"{minutes:6.1f} min  {outcomes.total():6d} networks  {dict(outcomes)}", flush=True)
            if minutes > options.minutes:
                pool.terminate()
                break
    print(
        f"{outcomes.total()} networks from seed {options.seed} on {datetime.date.today()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, hypothesis {hypothesis.__version__}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
