"""grl-surgery zoo: tries surgery on every network of a library."""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from grl_surgery.cli.console import FAILED, stdout, working
from grl_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from grl_surgery.zoo.ecosystem import NetworkRow
    from grl_surgery.zoo.ledger import Row

__all__ = ["zoo"]


class TierName(str, Enum):
    """What is shown of each network."""

    structural = "structural"
    numeric = "numeric"


def zoo(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help="Names, such as 'timm/vit_*'.")] = "*",
    tier: Annotated[
        TierName,
        typer.Option(
            help="structural: every network, on the meta device. numeric: real tensors, the smallest network "
            "of each file of timm and torchvision."
        ),
    ] = TierName.structural,
    ledger: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write one line of JSON a network.", show_default=False),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with that ledger; what failed is tried again.")
    ] = False,
    registry: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIBRARY",
            help="Networks of another library instead, such as transformers: every cut and use of each, "
            "against an oracle of hooks. Can be repeated; 'all' is each that is installed.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Processes.")] = 1,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="For one network.")] = 300.0,
    memory: Annotated[float, typer.Option(metavar="GB", help="For one process, in GiB.")] = 8.0,
) -> None:
    """Try surgery on every network of timm and torchvision by name; exit with 1 if one fails.

    Each is cut after its first, a middle and its last stage, after an operation, and on an edge into a join.
    """
    _check_ledger(ledger, resume)
    if registry and not set(registry) <= {"timm", "torchvision"}:
        raise typer.Exit(_ecosystem(registry, pattern, ledger, resume, jobs, timeout, memory))
    if registry and pattern == "*":
        pattern = f"{registry[0]}/*" if len(registry) == 1 else pattern
    with working("Importing"):
        from grl_surgery.zoo.ledger import read_rows, write_rows

    rows = read_rows(ledger) if ledger and resume else {}
    start = time.monotonic()
    tried = _try(_names(pattern, tier.value, rows), tier.value, ledger, jobs, timeout, memory)
    rows.update((row.name, row) for row in tried)
    if ledger:
        write_rows(ledger, rows.values())
    _print_summary(tried, time.monotonic() - start)
    raise typer.Exit(FAILED if any(row.result == "failed" for row in tried) else 0)


def _check_ledger(ledger: str | None, resume: bool) -> None:
    """Refuse a ledger that cannot be written, or that would be lost."""
    if resume and ledger is None:
        raise SurgeryError(
            "--resume goes on with a ledger, and none is named", example="--resume --ledger zoo.jsonl"
        )
    if ledger is not None and (Path(ledger).is_dir() or not Path(ledger).parent.is_dir()):
        raise SurgeryError(
            f"there can be no file {ledger!r}: it is a folder, or lies in none", example="zoo.jsonl"
        )
    if ledger and Path(ledger).exists() and not resume:
        raise SurgeryError(
            f"{ledger} exists, and what it holds would be lost", example=f"--ledger {ledger} --resume"
        )


def _ecosystem(
    registries: Sequence[str],
    pattern: str,
    ledger: str | None,
    resume: bool,
    jobs: int,
    timeout: float,
    memory: float,
) -> int:
    """Try the networks of other libraries; the status to exit with."""
    import fnmatch
    import functools

    from rich.console import Console

    with working("Listing networks"):
        from grl_surgery.zoo import ecosystem
        from grl_surgery.zoo.workers import run_all

        names = [name for library in _installed(registries) for name in _networks_of(library)]
    names = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise SurgeryError(
            f"{pattern!r} matches no network of {', '.join(registries)}", example="'monai/*Net'"
        )
    rows = ecosystem.read_network_rows(ledger) if ledger and resume else {}
    err = Console(stderr=True)
    start = time.monotonic()
    work = functools.partial(ecosystem.try_network, seconds=timeout)
    waiting = [name for name in names if name not in rows or ecosystem.is_old(rows[name])]
    tried: list[NetworkRow] = []
    limit = ecosystem.WALL * timeout + 10
    for row in run_all(work, waiting, ecosystem.no_row, jobs=jobs, timeout=limit, memory=memory):
        tried.append(row)
        if ledger:
            with Path(ledger).open("a", encoding="utf-8") as file:
                file.write(ecosystem.line_of(row))
        for role, text in row.outcomes.items():
            if not text.startswith(("ok", "skipped")):
                line = f"{row.name}: {role} {row.places.get(role, '')}: {text}"
                err.print(line, markup=False, highlight=False, soft_wrap=True)
        if not row.built:
            err.print(f"{row.name}: not built: {row.reason}", markup=False, highlight=False, soft_wrap=True)
    rows.update((row.name, row) for row in tried)
    if ledger:
        ecosystem.write_network_rows(ledger, rows.values())
    built = [row for row in tried if row.built]
    good = [row for row in built if ecosystem.result_of(row) == "ok"]
    stdout().out(
        f"{len(good):,} of {len(built):,} networks right at every place; {len(tried) - len(built):,} of "
        f"{len(tried):,} not built here; {time.monotonic() - start:,.0f} s",
        highlight=False,
    )
    return 0 if len(good) == len(built) else FAILED


def _installed(registries: Sequence[str]) -> Sequence[str]:
    """The libraries asked for; of ``all``, those that are there."""
    import importlib.util

    from grl_surgery.zoo.sources import REGISTRIES

    if "all" in registries:
        return [name for name in REGISTRIES if importlib.util.find_spec(name)]
    for name in registries:
        if name not in REGISTRIES:
            raise SurgeryError(
                f"--registry {name!r} is no library that is tried",
                choices=[*REGISTRIES, "timm", "torchvision"],
                example="--registry transformers",
            )
    return registries


def _networks_of(library: str) -> list[str]:
    from grl_surgery.zoo.sources import networks_of

    return networks_of(library)


def _names(pattern: str, tier: str, rows: dict[str, Row]) -> list[str]:
    """The names to try, without those that a ledger says are done."""
    with working("Listing networks"):
        from grl_surgery.zoo.names import by_family, matching
        from grl_surgery.zoo.numeric import smallest
        from grl_surgery.zoo.tiers import versions

        names = matching(pattern)
    done = {row.name for row in rows.values() if row.result == "ok" and row.versions == versions(row.name)}
    if tier == "structural":
        return [name for name in names if name not in done]
    done = {rows[name].family for name in done}
    families = {key: members for key, members in by_family(names).items() if key not in done}
    with working(f"Looking for the smallest network in each of {len(families)} files"):
        return [smallest(members) for members in families.values()]


def _try(
    names: Sequence[str], tier: str, ledger: str | None, jobs: int, timeout: float, memory: float
) -> list[Row]:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from grl_surgery.zoo import tiers
    from grl_surgery.zoo.ledger import add_row
    from grl_surgery.zoo.workers import run_all

    err = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:3], MofNCompleteColumn(), TimeRemainingColumn())
    rows = []
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(names))
        work = tiers.structural if tier == "structural" else tiers.numeric

        def failed(name: str, reason: str, seconds: float) -> Row:
            return tiers.failure(name, "structural" if tier == "structural" else "numeric", reason, seconds)

        for row in run_all(work, names, failed, jobs=jobs, timeout=timeout, memory=memory):
            rows.append(row)
            if ledger:
                add_row(ledger, row)
            if row.result == "failed":
                err.print(f"{row.name}: {row.reason}", markup=False, highlight=False, soft_wrap=True)
            progress.update(task, advance=1, description=row.name)
    return rows


def _print_summary(rows: Sequence[Row], seconds: float) -> None:
    say = stdout()
    good = [row for row in rows if row.result == "ok"]
    say.out(f"{len(good):,} of {len(rows):,} networks, {seconds:,.0f} s", highlight=False)
    if good:
        work, splice = sum(row.seconds for row in rows), median(row.splice_ms for row in good)
        say.out(f"{work:,.0f} s of processor time; median of one splice {splice:.1f} ms", highlight=False)
