"""From the stored measurements to what a reader sees: one table, one plot for each row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "performance.json"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

TITLES = {
    "operation": "The operation, eager",
    "compiled": "Under torch.compile",
    "train_step": "A training step",
    "surgery": "Surgery",
    "verification": "`verify_flip`",
    "startup": "Starting",
    "gpu": "On a GPU",
}


def load(path: Path = RESULTS) -> dict[str, Any]:
    return json.loads(path.read_text())


def table(results: Mapping[str, Any]) -> str:
    """The table of the page: every figure with the range that holds eight of ten runs."""
    machine = results["machine"]
    lines = [
        f"Measured on {machine['date']}, {machine['processor']}, {machine['cores']} cores, one thread, "
        f"Python {machine['python']}, " + ", ".join(f"{k} {v}" for k, v in machine["versions"].items()) + ".",
        "",
        "| row | case | figure (10 to 90 % of the runs) | goal | met |",
        "|---|---|---|---|---|",
    ]
    for name, rows in results["rows"].items():
        for row in rows:
            figures = "; ".join(_figures(name, row))
            cells = (TITLES[name], row["case"], figures, row["goal"], row["met"] or "-")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], unit: str = "", scale: float = 1.0) -> str:
    median, low, high = (value * scale for value in values)
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def _figures(name: str, row: Mapping[str, Any]) -> Iterator[str]:
    if "ratio_to_fastest_peer" in row:
        yield f"{_spread(row['ratio_to_fastest_peer'])} of {row['fastest_peer']}"
        yield f"{_spread(row['ratio_to_floor'])} of the floor"
    if "bytes_forward_and_backward" in row:
        forward, backward = row["bytes_forward_and_backward"]["grl_surgery layer"]
        yield f"{forward} bytes forward, {backward / row['gradient_bytes']:.2f} gradients backward"
    if "added" in row:
        yield "ours {} and {}".format(*row["added"]["grl_surgery layer"])
        yield from (f"{peer} {count}" for peer, count in row["added"].items() if isinstance(count, str))
    if "graphs_and_breaks" in row:
        for who, found in row["graphs_and_breaks"].items():
            yield f"{who} {found['graphs']}" + (f" and {found['breaks']} breaks" if found["breaks"] else "")
    if "spliced_to_plain" in row:
        yield f"{_precise(row['spliced_to_plain'])} of the network"
        yield f"DANN {_precise(row['attached_to_by_hand'])} of the one by hand"
        inside = _peak(row, "with a reversal inside", "the network")
        yield f"peak memory {inside} and {_peak(row, 'attach_domain_head', 'DANN by hand')}"
    if "times_as_long" in row:
        yield from (
            f"{other} {_spread(row['times_as_long'][other])} times as long" for other in row["times_as_long"]
        )
    if "growth" in row:
        first, last = list(row["milliseconds"].values())[:: len(row["milliseconds"]) - 1]
        yield f"{_spread(row['growth'])} times, {first:.1f} to {last:.1f} ms"
    if "to_symbolic_trace" in row:
        yield f"{_spread(row['to_symbolic_trace'])} of fx.symbolic_trace"
    if "steps" in row:
        yield f"{_spread(row['steps'])} steps"
    if "seconds_more" in row:
        yield _spread(row["seconds_more"], " ms", 1e3)
    if "wrong" in row:
        yield f"{row['wrong']} wrong gradients"
    if "fraction" in row:
        yield _spread(row["fraction"])


def _precise(values: Sequence[float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*values)


def _peak(row: Mapping[str, Any], ours: str, other: str) -> str:
    return f"{row['peak_bytes'][ours] / row['peak_bytes'][other]:.4f}"


def write_table(results: Mapping[str, Any], page: Path = PAGE) -> None:
    """Exchange what stands between the two marks of the page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


# --- plots


def plot(results: Mapping[str, Any], folder: Path = IMAGES) -> list[Path]:
    """One picture for each row that was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, rows in results["rows"].items():
        bars = [bar for row in rows for bar in _bars(row)]
        if not bars:
            continue
        figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.24 * len(bars)), layout="constrained")
        places = range(len(bars))[::-1]
        for place, (_, (median, low, high), ours) in zip(places, bars, strict=True):
            axes.barh(place, median, color="tab:blue" if ours else "lightgray")
            axes.plot([low, high], [place, place], color="black", linewidth=1)
        axes.set_yticks(list(places), [label for label, _, _ in bars], fontsize=7)
        axes.set_title(TITLES[name].replace("`", ""), fontsize=9)
        axes.set_xlabel(_AXES[name], fontsize=8)
        if name in _LOGARITHMIC:
            axes.set_xscale("log")
        else:
            axes.set_xlim(left=0)
        path = folder / f"performance_{name}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        written.append(path)
    return written


_AXES = {
    "operation": "time of grl_surgery's layer, as a multiple of each",
    "compiled": "graphs compiled for 1,000 coefficients",
    "train_step": "time as a multiple of the other's",
    "surgery": "time as a multiple of insert_grl's, or growth",
    "verification": "training steps",
    "startup": "seconds of processor time",
    "gpu": "fraction of a copy's bandwidth",
}
_LOGARITHMIC = {"surgery"}

Bar = tuple[str, Sequence[float], bool]


def _bars(row: Mapping[str, Any]) -> Iterator[Bar]:
    """Label, median with its range, and whether it is ours."""
    if "ratio_to_each" in row:
        yield from (
            (f"{row['case']}: {other}", value, "surgery" in other)
            for other, value in row["ratio_to_each"].items()
        )
    if "graphs_and_breaks" in row:
        for who, found in row["graphs_and_breaks"].items():
            yield who, [found["graphs"]] * 3, "grl" in who
    if "spliced_to_plain" in row:
        yield f"{row['case']}: spliced / plain", row["spliced_to_plain"], True
        yield f"{row['case']}: attached / by hand", row["attached_to_by_hand"], True
    if "times_as_long" in row:
        yield from (
            (f"{row['case']}: {other}", value, False) for other, value in row["times_as_long"].items()
        )
    if "growth" in row:
        yield row["case"], row["growth"], True
    if "steps" in row:
        yield row["case"], row["steps"], True
    if "seconds" in row:
        yield from ((command, value, "grl" in command) for command, value in row["seconds"].items())
    if "fraction" in row:
        yield row["case"], row["fraction"], True
