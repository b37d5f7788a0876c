"""Every network there is: writes docs/zoo.md from the ledgers in benchmarks/results.

python docs/make_zoo_page.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from grl_surgery.zoo.ecosystem import NetworkRow, read_network_rows, result_of
from grl_surgery.zoo.ledger import Row, read_rows
from grl_surgery.zoo.names import by_family, every_name

ROOT = Path(__file__).parent.parent
STRUCTURAL = ROOT / "benchmarks/results/zoo_structural.jsonl"
NUMERIC = ROOT / "benchmarks/results/zoo_numeric.jsonl"
ECOSYSTEM = ROOT / "benchmarks/results/zoo_ecosystem.jsonl"

PAGE = """# Every network there is

**{headline}**

Each network is cut after its first, a middle and its last stage, after one operation inside a block, and on
one edge into a join (where it has one), in train and in eval mode. This page is written from the ledgers
`benchmarks/results/zoo_structural.jsonl` and `zoo_numeric.jsonl`, one line a network.

- **Structural**: the network is built on the meta device. Each cut is made alone and taken out again,
  with the same keys and the class of the original. Then all cuts stand in one network, it runs, and the
  graph that autograd has recorded is walked from the outputs to the parameters: for each reversal alone,
  the signs of the paths to each parameter must be those that the recipe predicts, and no others. What
  does not run on the meta device, because its forward looks at values, runs on real tensors.
- **Numeric**: of each file of timm and torchvision the smallest network, on real tensors and on images as
  small as it takes. The forward is equal bit for bit, `verify_flip` holds, what is stripped computes the
  same bits, and the cut at the middle stage is exported to `.pt2`, read back and compared. A mode in
  which the network itself sends no gradient to a place proves nothing and does not count; each place is
  proved in one mode at least.

{figures}

```console no-run
$ grl-surgery zoo 'timm/vit_*'                                        # try some
$ grl-surgery zoo --ledger zoo.jsonl --jobs 2                         # all of them; --resume goes on
$ grl-surgery zoo --tier numeric --ledger numeric.jsonl --jobs 2
```

## By family

{table}
{notes}
## The ecosystem

Networks of other libraries, small and with random weights (`benchmarks/results/zoo_ecosystem.jsonl`). Each is
cut after an early, a middle and a late module, after an operation, on an edge into a sum, and gets a domain
head. What is cut in one mode is used in both, with other batches, lengths, masks, labels and flags; it is
stripped, copied, pickled and saved. Of transformers the base class of every architecture is tried, and some
classes for each kind of task. Every forward and every gradient is compared, bit for bit, with those of
the original under hooks of torch, and the proof has to say the same. What a library lists and what cannot be
built here stands below with the reason.

```console no-run
$ grl-surgery zoo --registry transformers --ledger transformers.jsonl
$ grl-surgery zoo 'monai/*UNet*' --registry monai                     # some of one library
$ grl-surgery zoo --registry all --jobs 2 --ledger ecosystem.jsonl    # what is installed of all of them
$ python -m grl_surgery.zoo.ecosystem --build-only monai              # each one is built, and runs once
```

{ecosystem}
"""


def headline(rows: Mapping[str, Row], names: Sequence[str]) -> str:
    """The one number, as it stands wherever it is said."""
    good = sum(row.result == "ok" for row in rows.values())
    return f"{good:,} of {len(names):,} networks"


def page(
    structural: Mapping[str, Row],
    numeric: Mapping[str, Row],
    names: Sequence[str],
    ecosystem: Mapping[str, NetworkRow] | None = None,
) -> str:
    """The page that these ledgers give."""
    return PAGE.format(
        headline=headline(structural, names),
        figures="\n".join(f"- {line}" for line in _figures(structural, numeric, names)),
        table="\n".join(_table(structural, numeric, names)),
        notes="".join(_notes(structural, numeric, names)),
        ecosystem="\n".join(
            ecosystem_lines(read_network_rows(ECOSYSTEM) if ecosystem is None else ecosystem)
        ),
    )


def _figures(structural: Mapping[str, Row], numeric: Mapping[str, Row], names: Sequence[str]) -> list[str]:
    rows = list(structural.values())
    good = [row for row in rows if row.result == "ok"]
    seconds = sum(row.seconds for row in rows)
    splice = median(row.splice_ms for row in good)
    inside = sum(row.root == "inside" for row in good)
    graphs = sum(row.facts.get("boundary") == 0 for row in good)
    calls = sum(row.facts.get("graph") == 0 for row in good)
    real = sum(row.device == "cpu" for row in good)
    files = len(by_family(names))
    proved = sum(row.result == "ok" for row in numeric.values())
    flipped = sum(row.facts.get("flipped", 0) for row in numeric.values())
    programs = sum(row.facts.get("program") == "equal" for row in numeric.values())
    libraries = sorted({part for row in rows for part in row.versions.split(", ")})
    return [
        f"Structural: {len(rows):,} tried in {seconds / 60:.0f} minutes of processor time, "
        f"{seconds / len(rows):.1f} s each; median of one `insert_grl` {splice:.0f} ms. "
        f"{inside} are cut inside modules, because their root cannot be traced; {real} ran on real tensors.",
        f"Of each network, every result is a graph in {graphs:,}, and keeps its class in {calls:,}; "
        f"in the other {len(good) - graphs - calls:,} that depends on the place.",
        f"Numeric: {proved} of {files} files; {flipped:,} gradients of parameters flipped, bit for bit; "
        f"{programs} exported and read back equal.",
        f"Measured with {', '.join(libraries)}.",
    ]


def _table(structural: Mapping[str, Row], numeric: Mapping[str, Row], names: Sequence[str]) -> list[str]:
    proofs = {row.family: row for row in numeric.values()}
    lines = ["| file | networks | structural | numeric | images | flipped |", "|---|---|---|---|---|---|"]
    for family, members in by_family(names).items():
        good = sum(name in structural and structural[name].result == "ok" for name in members)
        proof = proofs.get(family)
        cells = [family, str(len(members)), str(good), *(_proof(proof) if proof else ("not tried", "", ""))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _proof(row: Row) -> tuple[str, str, str]:
    name = row.name.partition("/")[2]
    if row.result != "ok":
        return f"{name}: failed", "", ""
    return f"{name}", str(row.facts["input"]), f"{row.facts['flipped']:,}"


def _notes(structural: Mapping[str, Row], numeric: Mapping[str, Row], names: Sequence[str]) -> list[str]:
    """Whatever is not as it should be, name by name."""
    missing = [name for name in names if name not in structural]
    failed = [row for rows in (structural, numeric) for row in rows.values() if row.result != "ok"]
    programs = [row for row in numeric.values() if row.facts.get("program", "equal") != "equal"]
    notes = []
    if missing:
        notes.append(f"\n## Not tried yet\n\n{len(missing):,} names are not in the structural ledger yet.\n")
    if failed:
        lines = (f"- `{row.name}`, {row.tier}: {row.reason}" for row in failed)
        notes.append("\n## What fails\n\n" + "\n".join(lines) + "\n")
    if programs:
        lines = (f"- `{row.name}`: {row.facts['program']}" for row in programs)
        notes.append("\n## Not exported\n\n" + "\n".join(lines) + "\n")
    return notes


def ecosystem_lines(rows: Mapping[str, NetworkRow]) -> list[str]:
    """A table by library, and below it every network that is not as it should be."""
    kinds = ("ok", "refused", "broken", "wrong", "disagrees", "not built")
    lines = [
        "| library | listed | built | right | refused | broken | wrong | proof disagrees | not built |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    libraries: dict[str, list[NetworkRow]] = {}
    for row in rows.values():
        libraries.setdefault(row.library, []).append(row)
    for library, members in sorted(libraries.items()):
        results = [result_of(row) for row in members]
        built = len(members) - results.count("not built")
        cells = [library, str(len(members)), str(built), *(str(results.count(kind)) for kind in kinds)]
        lines.append(f"| {' | '.join(cells)} |")
    versions = sorted({part for row in rows.values() for part in row.versions.split(", ")})
    dates = sorted({row.date for row in rows.values() if row.date})
    when = f"{dates[0]} to {dates[-1]}" if len(dates) > 1 else "".join(dates)
    lines += ["", f"Measured {when} with {', '.join(versions)}." if versions else "Nothing is measured yet."]
    lines += _states(rows)
    for kind, title in (
        ("wrong", "Wrong"),
        ("disagrees", "Where the proof disagrees"),
        ("broken", "Broken"),
        ("refused", "Refused"),
    ):
        found = [
            f"- `{row.name}`, {role} {row.places.get(role, '')}: {_plain(text.partition(': ')[2])}"
            for row in rows.values()
            for role, text in row.outcomes.items()
            if text.startswith(kind)
        ]
        lines += ["", f"### {title}", "", *found] if found else []
    missing = [f"- `{row.name}`: {_plain(row.reason)}" for row in rows.values() if not row.built]
    return [*lines, "", "### Not built here", "", *missing] if missing else lines


def _states(rows: Mapping[str, NetworkRow]) -> list[str]:
    """Which states of this library were tried, where that was more than one."""
    counts = Counter(row.code for row in rows.values())
    if len(counts) < 2:
        return []
    said = [f"{count} with {code or 'one that nobody noted'}" for code, count in counts.most_common()]
    return ["", f"The rows are of {len(counts)} states of this library's code: {', '.join(said)}."]


def _plain(text: str) -> str:
    """A sentence in which nothing is markup, cut where it becomes long."""
    cut = text.replace("`", "'").replace("<", "&lt;").replace("[", "\\[")
    return cut if len(cut) <= 200 else f"{cut[:200]}..."


def main() -> None:
    """Write the page."""
    text = page(read_rows(STRUCTURAL), read_rows(NUMERIC), every_name())
    (ROOT / "docs/zoo.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
