"""grl-surgery strip: removes reversals and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from grl_surgery.cli.console import FAILED, stdout, working
from grl_surgery.cli.model_args import (
    check_can_be_cut,
    check_output,
    check_places,
    is_exported,
    load,
    run,
    splice,
    write,
)
from grl_surgery.cli.options import (
    After,
    Batch,
    Before,
    Checkpoint,
    InputSize,
    MadeFrom,
    ModelOrCheckpoint,
    OnEdge,
    Output,
    Pretrained,
)
from grl_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import nn

    from grl_surgery.loading.model_zoo import LoadedModel

__all__ = ["strip"]


def strip(
    model: ModelOrCheckpoint,
    after: After = None,
    before: Before = None,
    edge: OnEdge = None,
    output: Output = None,
    input_size: InputSize = None,
    batch: Batch = 2,
    made_from: MadeFrom = None,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Take reversals and heads out of a FILE, and write the original network with -o.

    Of a MODEL: splice reversals in, take them out again, and show that the network is the one it was.
    """
    if is_exported(model) and (after or before or edge):
        raise SurgeryError(
            f"all that was spliced into {model} is taken out: leave out --after, --before and --edge"
        )
    check_places(model, after, before, edge, may_have_reversals=is_exported(model))
    check_output(output)
    loaded = load(model, pretrained, checkpoint, input_size, batch, made_from=made_from)
    check_can_be_cut(loaded)
    from grl_surgery.surgery.insert import strip as take_out

    if is_exported(model):
        stripped = take_out(loaded.module)
        tensors, before_it = len(stripped.state_dict()), len(loaded.module.state_dict())
        counts = f"{tensors} of {before_it} tensors"
        stdout().out(f"{model}: {type(stripped).__name__} again, {counts}", highlight=False)
        if output is not None:
            write(stripped, output, loaded)
        return
    with working("Splicing and stripping"):
        stripped = take_out(splice(loaded, after, before, edge, 1.0))
        checks = _compare(loaded, stripped)
    _print_checks(checks)
    if output is not None:
        write(stripped, output, loaded)
    raise typer.Exit(0 if all(same for _, same, _ in checks) else FAILED)


Check = tuple[str, bool, str]


def _compare(loaded: LoadedModel, stripped: nn.Module) -> list[Check]:
    """List what must be as it was, whether it is, and how much was compared."""
    model = loaded.module.eval()
    kept, found = model.state_dict(), stripped.state_dict()
    outputs = run(loaded, model), run(loaded, stripped.eval())
    return [
        ("class", type(stripped) is type(model), type(model).__name__),
        ("state_dict", list(kept) == list(found) and _identical(kept, found), f"{len(kept)} tensors"),
        ("outputs", _identical(*outputs), "in eval mode, on the example inputs"),
    ]


def _identical(expected: Any, actual: Any) -> bool:
    import torch

    try:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return True


def _print_checks(checks: Sequence[Check]) -> None:
    for what, same, detail in checks:
        verdict = Text("identical", "green") if same else Text("DIFFERENT", "bold red")
        stdout().print(Text.assemble(f"{what:<12}", verdict, f"  {detail}"), soft_wrap=True)
