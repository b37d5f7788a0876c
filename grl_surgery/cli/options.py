"""The options that several commands take."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from grl_surgery.errors import SurgeryError


def _check_batch(context: typer.Context, batch: int) -> int:
    source = context.get_parameter_source("batch")
    is_written = source is not None and source.name == "COMMANDLINE"
    if is_written and context.params.get("input_size") is None:
        raise SurgeryError(
            "--batch is of the inputs that --input-size makes",
            example=f"--input-size 3x64x64 --batch {batch}",
        )
    return batch


class Mode(str, Enum):
    """The mode to verify in."""

    train = "train"
    eval = "eval"
    both = "both"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm/NAME, torchvision/NAME, transformers/NAME, package.module:factory or file.py:factory.",
        show_default=False,
    ),
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Load the library's pretrained weights.")]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="FILE", help="Load these weights, strictly.", show_default=False)
]
After = Annotated[
    list[str] | None,
    typer.Option(
        metavar="POINT",
        help="Reverse every use of this point's value: a name, 'glob:layer3.*' or 're:...'. May be repeated.",
        show_default=False,
    ),
]
Before = Annotated[
    list[str] | None,
    typer.Option(metavar="POINT", help="Reverse what flows back out of this point.", show_default=False),
]
OnEdge = Annotated[
    list[str] | None,
    typer.Option(
        "--edge", metavar="'A -> B'", help="Reverse this one use of A's value, no other.", show_default=False
    ),
]
Coeff = Annotated[float, typer.Option(metavar="NUMBER", help="The gradient is multiplied by minus this.")]
Signed = Annotated[
    bool, typer.Option("--signed", help="Take a negative coefficient, which does not reverse the gradient.")
]
InputSize = Annotated[
    str | None,
    typer.Option(
        metavar="3x64x64",
        help="Size of one example input, without batch.",
        show_default=False,
        is_eager=True,  # --batch asks for it
    ),
]
Batch = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="Inputs in a batch, with --input-size.", callback=_check_batch),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write the network: .safetensors, .pt2, .onnx, or a folder of code.",
        show_default=False,
    ),
]
ModelOrFile = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|FILE",
        help="timm/NAME, torchvision/NAME, transformers/NAME, package.module:factory or file.py:factory; "
        "or a .safetensors, .pt2 or folder that export wrote.",
        show_default=False,
    ),
]
ModelOrCheckpoint = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|FILE",
        help="A model as for 'graph', or a .safetensors or folder that export wrote; a .pt2 cannot be cut.",
        show_default=False,
    ),
]
MadeFrom = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="For a FILE of a network of your own: what makes the network.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
