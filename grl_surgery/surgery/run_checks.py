"""Runs a spliced network once to tell what nothing else can: items, edges, shapes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from grl_surgery.autograd_graph import nodes_below
from grl_surgery.capture.capture import module_paths
from grl_surgery.errors import SurgeryError
from grl_surgery.isolation.pytrees import tensors_in
from grl_surgery.isolation.rng_state import preserve_rng_state
from grl_surgery.isolation.tensor_copy import with_tensors
from grl_surgery.loading.inputs import as_arguments
from grl_surgery.points import (
    split_items,
)
from grl_surgery.surgery.spliced_module import (
    Cut,
)

__all__ = ["check_by_running", "clone_all"]


def check_by_running(network: nn.Module, cuts: Sequence[Cut], find_inputs: Callable[[], Any]) -> None:
    """Refuse an item that a value does not have, an edge that is not there, and what nothing uses.

    Args:
        network: The result of surgery; it runs on copies of its tensors.
        cuts: Those of its cuts that nothing but a run can tell about.
        find_inputs: Returns arguments of forward, or None where none are known.

    Raises:
        ShapeError: There is no such item.
        SurgeryError: There is no such edge, or the network does not use the value.
    """
    inputs = find_inputs() if cuts else None
    if inputs is None:
        return
    twin = with_tensors(network, copied=clone_all)
    passed: dict[str, list[Any]] = {cut.module: [] for cut in cuts}
    for name, outputs in passed.items():
        twin.get_submodule(name).register_forward_hook(lambda _, __, value, kept=outputs: kept.append(value))
    args, kwargs = as_arguments(inputs)
    try:
        with torch.enable_grad(), preserve_rng_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = twin(*args, **kwargs)
    except SurgeryError:
        raise
    except Exception:  # on these inputs it does not run at all, which is not for surgery to judge
        return
    used = nodes_below([value.grad_fn for value in tensors_in(output)])
    for cut in cuts:
        nodes = [v.grad_fn for v in passed[cut.module] if isinstance(v, torch.Tensor) and v.grad_fn]
        if nodes and not any(node in used for node in nodes) and not cut.is_head:
            raise SurgeryError(
                f"the network does not use the value {cut}, so a reversal there would have no effect",
                choices=[point for point in module_paths(network) if point == split_items(str(cut.at))[0]],
            )


def clone_all(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor for a run that may overwrite it; a parameter stays one."""
    whole = isinstance(tensor, nn.Parameter) or nn.parameter.is_lazy(tensor)
    return copy.deepcopy(tensor) if whole else tensor.detach().clone()
