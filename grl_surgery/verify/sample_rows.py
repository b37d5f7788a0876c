"""Checks that the logits of a head keep the samples of a batch apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from grl_surgery.verify.experiment import Experiment, private_copy

__all__ = ["mixed_rows"]


def mixed_rows(network: nn.Module, experiment: Experiment, heads: Sequence[str]) -> Iterator[str]:
    """Say which heads give logits that one sample does not have to itself.

    The network runs in eval mode, in which batch norm takes no statistics from the batch. Which axis of the
    inputs counts samples is measured on the output: along it a change of one entry moves one row. Where
    there is no such axis, or one sample only, nothing is said.

    Args:
        network: The spliced network; it runs on copies.
        experiment: Its values and inputs.
        heads: Names of its heads, in the order of their logits.
    """
    if not heads:
        return
    evaluated = private_copy(network, {}).eval()
    try:
        outputs = experiment.outputs(evaluated, experiment.inputs, heads)
        moved = _with_another_last_sample(evaluated, experiment, outputs[0], heads)
        if not moved:
            return
        batch = len(outputs[0])
    except Exception:  # it does not run in eval mode, or not with such values
        return
    for name, before, after in zip(heads, outputs[1:], moved[1:], strict=True):
        rows = _rows_that_move(before, after)
        count = len(before) // batch
        own = [range((batch - 1) * count, batch * count), range(batch - 1, len(before), batch)]
        if len(before) % batch or not any(set(rows) <= set(entries) for entries in own):
            yield (
                f"the logits of the head {name!r} mix samples: another sample {batch - 1} of {batch} moves "
                f"{_listed(rows)} of {len(before)}; name the layout of the features, as in pool='lnc' where "
                "the sequence comes first and the batch second"
            )


def _with_another_last_sample(
    network: nn.Module, experiment: Experiment, output: torch.Tensor, heads: Sequence[str]
) -> list[torch.Tensor]:
    """The outputs where the last sample is another one; none where no axis of an input counts samples.

    Along an axis that does, a change of one entry moves one row of the output. The last step of a sequence
    moves its own row only as well, so that the first entry is changed too.
    """
    batch = len(output) if output.dim() else 0
    if batch < 2:
        return []
    given = [leaf for leaf in pytree.tree_leaves(experiment.inputs) if isinstance(leaf, torch.Tensor)]
    for which, tensor in enumerate(given):
        for axis in range(tensor.dim() if tensor.is_floating_point() else 0):
            if tensor.shape[axis] != batch:
                continue
            for entry in (0, batch - 1):
                changed = _changed(experiment.inputs, which, axis, entry)
                moved = experiment.outputs(network, changed, heads)
                if _rows_that_move(output, moved[0]) != [entry]:
                    break
            else:
                return moved
    return []


def _changed(inputs: Any, which: int, axis: int, entry: int) -> Any:
    """The inputs with other values in one entry of one axis of one tensor."""
    count = -1

    def change(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count != which:
            return tensor
        other = tensor.detach().clone()
        other.select(axis, entry).mul_(-1.5).add_(1.0)
        return other

    return pytree.tree_map_only(torch.Tensor, change, inputs)


def _rows_that_move(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Rows that are another but for rounding: kernels add in another order where sizes change."""
    difference = (before - after).abs().flatten(1).amax(1)
    scale = float(before.abs().amax()) or 1.0
    return [int(row) for row in (difference > 1e-5 * scale).nonzero().flatten()]


def _listed(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:4]))
    return f"{'row' if len(rows) == 1 else 'rows'} {shown}{', ...' if len(rows) > 4 else ''}"
