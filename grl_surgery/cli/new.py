"""grl-surgery new: writes a training script for one network, to be edited."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from grl_surgery.cli.console import stdout, working
from grl_surgery.cli.model_args import INPUTS, load
from grl_surgery.cli.options import InputSize, Model
from grl_surgery.errors import SurgeryError

__all__ = ["new"]


class RecipeName(str, Enum):
    """What is trained against what."""

    dann = "dann"
    cdan = "cdan"
    fairness = "fairness"


class TrainerName(str, Enum):
    """Who runs the loop."""

    plain = "plain"
    accelerate = "accelerate"


def new(
    recipe: Annotated[RecipeName, typer.Argument(help="What is trained against what.", show_default=False)],
    model: Model,
    after: Annotated[
        str | None,
        typer.Option(
            metavar="POINT",
            help="Where the head goes. [default: the last module before the logits]",
            show_default=False,
        ),
    ] = None,
    trainer: Annotated[TrainerName, typer.Option(help="Who runs the loop.")] = TrainerName.plain,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE.py", help="The script to write; it must not exist.")
    ] = "train.py",
    input_size: InputSize = None,
) -> None:
    """Write a training script for this network: proof, schedule, clipping, validator, resume.

    The script runs as it is, on random numbers. Its function datasets() is to be edited.
    """
    path = Path(output)
    if path.suffix != ".py":
        raise SurgeryError(f"{output!r} has no ending of a Python file", example="-o train.py")
    if path.exists():
        raise SurgeryError(
            f"{path} exists, and is not replaced: it may have been edited",
            example=f"-o {path.with_stem(path.stem + '_2')}",
        )
    loaded = load(model, False, None, input_size)
    if loaded.example_inputs is None:
        raise SurgeryError(f"it is not known what inputs {loaded.source} takes", example=INPUTS)
    with working("Looking at the network"):
        from grl_surgery.adaptation.script import training_script

        text = training_script(
            model,
            loaded.module,
            loaded.example_inputs,
            recipe=recipe.value,
            trainer=trainer.value,
            after=after,
            file=path.name,
        )
    path.write_text(text, encoding="utf-8")
    stdout().out(f"wrote {path}: edit its datasets(), then run it\n  python {path}", highlight=False)
