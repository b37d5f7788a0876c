"""grl-surgery attach: attaches a domain head behind a point."""

from __future__ import annotations

from typing import Annotated

import typer

from grl_surgery.cli.console import stdout, working
from grl_surgery.cli.model_args import (
    check_can_be_cut,
    check_output,
    check_places,
    load,
    write,
)
from grl_surgery.cli.options import (
    Batch,
    Checkpoint,
    Coeff,
    InputSize,
    MadeFrom,
    ModelOrCheckpoint,
    Output,
    Pretrained,
    Signed,
)

__all__ = ["attach"]


def attach(
    model: ModelOrCheckpoint,
    after: Annotated[str, typer.Option(metavar="POINT", help="The head reads this point's value.")],
    output: Output = None,
    name: Annotated[str, typer.Option(metavar="NAME", help="Of the head.")] = "domain",
    num_domains: Annotated[int, typer.Option("--domains", metavar="N", help="Number of domains.")] = 2,
    coeff: Coeff = 1.0,
    signed: Signed = False,
    input_size: InputSize = None,
    batch: Batch = 2,
    made_from: MadeFrom = None,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Attach a domain head behind a reversal and print it; -o writes the result."""
    check_places(model, [after], None, None, coeff, signed=signed)
    check_output(output)
    loaded = load(model, pretrained, checkpoint, input_size, batch, made_from=made_from)
    check_can_be_cut(loaded)
    from grl_surgery.surgery.attach_head import attach_domain_head

    with working("Attaching"):
        spliced = attach_domain_head(
            loaded.module,
            after,
            name=name,
            num_domains=num_domains,
            coeff=coeff,
            signed=signed,
            example_inputs=loaded.example_inputs,
        )
    say = stdout()
    say.out(f"{loaded.source}: {type(loaded.module).__name__} with a head after {after}\n", highlight=False)
    say.out(f"({name}): {spliced.get_submodule(name)}", highlight=False)
    if output is not None:
        write(spliced, output, loaded)
