"""Runs a spliced network once to check items, edges and shapes."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from grl_surgery.autograd_graph import nodes_below
from grl_surgery.capture.capture import module_paths
from grl_surgery.errors import ShapeError, SurgeryError
from grl_surgery.isolation.pytrees import tensors_in
from grl_surgery.isolation.rng_state import preserve_rng_state
from grl_surgery.isolation.tensor_copy import with_tensors
from grl_surgery.loading.inputs import as_arguments
from grl_surgery.points import (
    split_items,
)
from grl_surgery.surgery.scope_checks import arguments_of
from grl_surgery.surgery.spliced_module import (
    Cut,
)

__all__ = ["check_arguments", "check_by_running", "clone_all"]


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
    output = _run(twin, inputs)
    if output is None:  # on these inputs it does not run at all, which is not for surgery to judge
        return
    used = nodes_below([value.grad_fn for value in tensors_in(output)])
    for cut in cuts:
        nodes = [v.grad_fn for v in passed[cut.module] if isinstance(v, torch.Tensor) and v.grad_fn]
        if nodes and not any(node in used for node in nodes) and not cut.is_head:
            raise SurgeryError(
                f"the network does not use the value {cut}, so a reversal there would have no effect",
                choices=[point for point in module_paths(network) if point == split_items(str(cut.at))[0]],
            )
    idle = [cut for cut in cuts if cut.kind == "after" and cut.has_items and not passed[cut.module]]
    if not idle or _run(twin.train(not twin.training), inputs) is None:
        return
    idle = [cut for cut in idle if not passed[cut.module]]  # there may be a value in the other mode only
    if idle:
        raise ShapeError(
            f"on these inputs the value {idle[0]} is no tensor of floating point numbers, so a reversal "
            "would have no effect",
            example="example_inputs=x, with which it is one",
        )


def _run(network: nn.Module, inputs: Any) -> Any:
    """What a network returns, in a tuple; None where it does not run."""
    args, kwargs = as_arguments(inputs)
    try:
        with torch.enable_grad(), preserve_rng_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return (network(*args, **kwargs),)
    except SurgeryError:
        raise
    except Exception:  # the network is the user's: anything can come out of it
        return None


def check_arguments(network: nn.Module, cuts: Sequence[Cut], find_inputs: Callable[[], Any]) -> None:
    """Refuse a reversal of an argument that example inputs show to be nothing a gradient flows through.

    Args:
        network: Before or after surgery; only the signature of its forward counts.
        cuts: Of which those behind arguments are looked at.
        find_inputs: Returns arguments of forward, or None where none are known.

    Raises:
        ShapeError: The argument is a tensor of integers, None, or no tensor at all.
    """
    paths = module_paths(network)
    names = {cut: split_items(str(cut.at))[0] for cut in cuts if cut.kind == "after"}
    named = {cut: name for cut, name in names.items() if name in arguments_of(network) and name not in paths}
    inputs = find_inputs() if named else None
    if inputs is None:
        return
    args, kwargs = as_arguments(inputs)
    try:
        given = inspect.signature(network.forward).bind_partial(*args, **kwargs).arguments
    except TypeError:  # the network says so itself when it is called
        return
    for name in named.values():
        value = given.get(name, _NOTHING)
        if value is not _NOTHING and not any(
            t.is_floating_point() or t.is_complex() for t in tensors_in(value)
        ):
            is_tensor = isinstance(value, torch.Tensor)
            kind = (
                f"of {str(value.dtype).removeprefix('torch.')}" if is_tensor else f"a {type(value).__name__}"
            )
            raise ShapeError(
                f"the argument {name!r} is {kind}: no gradient flows through it, so a reversal there would "
                "have no effect",
                example="after='block', the path of a module that reads it",
            )


_NOTHING = object()


def clone_all(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor for a run that may overwrite it; a parameter stays one."""
    whole = isinstance(tensor, nn.Parameter) or nn.parameter.is_lazy(tensor)
    return copy.deepcopy(tensor) if whole else tensor.detach().clone()
