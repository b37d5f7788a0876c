"""grl-surgery insert: splices reversals into a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from grl_surgery import points
from grl_surgery.cli.console import stdout, working
from grl_surgery.cli.model_args import (
    check_can_be_cut,
    check_output,
    check_places,
    load,
    splice,
    write,
)
from grl_surgery.cli.options import (
    After,
    Batch,
    Before,
    Checkpoint,
    Coeff,
    InputSize,
    MadeFrom,
    ModelOrCheckpoint,
    OnEdge,
    Output,
    Pretrained,
    Signed,
)
from grl_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import nn

    from grl_surgery.loading.model_zoo import LoadedModel

__all__ = ["insert"]


def insert(
    model: ModelOrCheckpoint,
    after: After = None,
    before: Before = None,
    edge: OnEdge = None,
    coeff: Coeff = 1.0,
    signed: Signed = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print how the generated forward changes, as a diff.")
    ] = False,
    output: Output = None,
    input_size: InputSize = None,
    batch: Batch = 2,
    made_from: MadeFrom = None,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Splice reversals in and print where they are; -o writes the result."""
    if dry_run and output is not None:
        raise SurgeryError("--dry-run writes nothing, so --output would do nothing: give one of them")
    check_places(model, after, before, edge, coeff, signed=signed)
    check_output(output)
    loaded = load(model, pretrained, checkpoint, input_size, batch, made_from=made_from)
    check_can_be_cut(loaded)
    with working("Splicing"):
        spliced = splice(loaded, after, before, edge, coeff, signed)
    if dry_run:
        _print_diff(spliced)
        return
    _print_reversals(loaded, spliced)
    if output is not None:
        write(spliced, output, loaded)


def _print_reversals(loaded: LoadedModel, spliced: nn.Module) -> None:
    """Every reversal with its place, its coefficient, and the edges on which it reverses the gradient."""
    from grl_surgery.surgery.spliced_module import surgery_of
    from grl_surgery.viz import reversed_edges, spliced_parts

    say = stdout()
    parts = spliced_parts(spliced)
    done = {path: surgery_of(part) for path, part in parts.items()}
    count = sum(len(surgery.cuts) for surgery in done.values() if surgery)
    say.out(
        f"{loaded.source}: {type(loaded.module).__name__} with {count} reversal{'s' if count > 1 else ''}",
        highlight=False,
    )
    for path, part in parts.items():
        prefix = f"{points.escape(path)}." if path else ""
        surgery = done[path]
        for cut in surgery.cuts if surgery else ():
            coeff = float(part.get_submodule(cut.module).coeff)  # type: ignore[arg-type]
            name = f"{path}.{cut.module}" if path else cut.module
            say.out(f"\n{name}  {cut.within(path)}, coeff {coeff:g}", highlight=False)
            for edge in reversed_edges(part, cut):
                say.out(f"  {edge.within(prefix)}", highlight=False)


def _print_diff(spliced: nn.Module) -> None:
    from grl_surgery.surgery.spliced_module import SplicedModule, surgery_of
    from grl_surgery.viz import forward_diff, spliced_parts

    styles = {"+": "green", "-": "red", "@": "cyan"}
    for path, part in spliced_parts(spliced).items():
        surgery = surgery_of(part)
        for cut in surgery.cuts if surgery else ():
            if surgery and cut.module in surgery.hooked:
                stdout().print(f"+ {cut.module}: {cut.within(path)}, at the module's call", style="green")
        if isinstance(part, SplicedModule):
            for line in forward_diff(part, path or type(part).__name__).splitlines():
                stdout().print(Text(line, styles.get(line[:1], "")), soft_wrap=True)
