"""Tells which values of a graph can have a gradient, before it runs."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx, nn

from grl_surgery.capture.node_names import is_item, operation
from grl_surgery.capture.node_uses import skip_boundaries

__all__ = ["is_computed_from_floats", "is_integral", "is_state"]

# Operations that return integers or truth values, whatever they are given.
_INTEGRAL = frozenset(
    """
    eq ne lt le gt ge equal isclose isfinite isin isinf isnan logical_and logical_not logical_or logical_xor
    and_ or_ xor invert bitwise_and bitwise_not bitwise_or bitwise_xor argmax argmin argsort bool bucketize
    byte char count_nonzero int long multinomial nonzero one_hot searchsorted short signbit
    """.split()  # noqa: SIM905
)
# Operations that keep the dtype of what they are given first.
_KEEPS_DTYPE = frozenset(
    """
    getitem broadcast_to clone contiguous cpu cuda detach expand expand_as flatten flip movedim permute repeat
    reshape roll select squeeze t transpose unflatten unsqueeze view
    """.split()  # noqa: SIM905
)


def is_integral(value: fx.Node) -> bool:
    """Whether an operation of torch says that the value is of integers or truth values."""
    node = skip_boundaries(value)
    while node.op in ("call_function", "call_method") and node.args and operation(node) in _KEEPS_DTYPE:
        if not isinstance(node.args[0], fx.Node):
            return False
        node = skip_boundaries(node.args[0])
    package = str(getattr(node.target, "__module__", None)).partition(".")[0]
    known = node.op == "call_method" or (
        node.op == "call_function" and package in ("torch", "_operator", "None")
    )
    return known and operation(node) in _INTEGRAL


def is_state(model: nn.Module, value: fx.Node) -> bool:
    """Whether it is the two tensors that an LSTM hands to its next call."""
    node = skip_boundaries(value)
    if is_item(node) and node.args[1] == 1:
        return type(_held(model, skip_boundaries(cast(fx.Node, node.args[0])))) is nn.LSTM
    return type(_held(model, node)) is nn.LSTMCell


def is_computed_from_floats(model: nn.Module, value: fx.Node) -> bool:
    """Whether parameters, or buffers of floating point, go into it; if not, it may well be a mask."""
    seen: set[fx.Node] = set()
    rest = [value]
    while rest:
        node = rest.pop()
        held = _held(model, node)
        stored = held.parameters() if isinstance(held, nn.Module) else [held]
        if any(isinstance(tensor, torch.Tensor) and tensor.is_floating_point() for tensor in stored):
            return True
        rest += [source for source in node.all_input_nodes if source not in seen]
        seen.update(node.all_input_nodes)
    return False


def _held(model: nn.Module, node: fx.Node) -> Any:
    """The module or tensor of the network itself that the node calls or reads."""
    if node.op not in ("call_module", "get_attr"):
        return None
    try:
        return operator.attrgetter(str(node.target))(model)
    except AttributeError:  # it was spliced in
        return None
