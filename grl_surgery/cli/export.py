"""grl-surgery export: writes a network in another format."""

from __future__ import annotations

from typing import Annotated

import typer

from grl_surgery.cli.model_args import (
    check_output,
    load,
    write,
)
from grl_surgery.cli.options import (
    Batch,
    Checkpoint,
    InputSize,
    MadeFrom,
    ModelOrFile,
    Pretrained,
)

__all__ = ["export"]


def export(
    model: ModelOrFile,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="FILE", help=".safetensors, .pt2, .onnx, or a folder of code."
        ),
    ],
    inference: Annotated[
        bool, typer.Option("--inference", help="A .pt2 in eval mode, without reversals and heads.")
    ] = False,
    heads: Annotated[
        list[str] | None,
        typer.Option("--head", metavar="NAME", help="Keep this head's logits. May be repeated."),
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Only for batches of the example's size.")] = False,
    input_size: InputSize = None,
    batch: Batch = 2,
    made_from: MadeFrom = None,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Write a network, spliced or not, in another format."""
    check_output(output)
    loaded = load(model, pretrained, checkpoint, input_size, batch, made_from=made_from)
    purpose = "inference" if inference else None
    write(loaded.module, output, loaded, purpose=purpose, heads=heads or None, dynamic=not static)
