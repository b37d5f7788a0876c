"""Refuses surgery on a program read from a .pt2 file, which has one mode and nothing to cut."""

from __future__ import annotations

import types

from torch import fx, nn

from grl_surgery.errors import SurgeryError

__all__ = ["check_no_program", "is_program", "mark_as_program"]

_MARK = "grl_surgery.program"


def mark_as_program(network: fx.GraphModule, training: bool) -> None:
    """Fix the mode that the program was recorded in; there is nothing in it that could change."""
    for module in network.modules():
        module.training = training
    network.meta[_MARK] = True  # which copies keep
    network.__dict__["train"] = types.MethodType(_train, network)
    network.__dict__["eval"] = types.MethodType(_eval, network)


def is_program(model: object) -> bool:
    """Whether :func:`grl_surgery.load` has read this network from a ``.pt2`` file, or it is a copy of one.

    Example:
        >>> is_program(nn.Linear(4, 2))
        False
    """
    return isinstance(model, fx.GraphModule) and _MARK in getattr(model, "meta", {})


def check_no_program(model: object, verb: str) -> None:
    """Refuse to cut a program.

    Args:
        model: Any network.
        verb: The function that would cut it, as it is called.

    Raises:
        SurgeryError: With what to cut instead.
    """
    if is_program(model):
        raise SurgeryError(
            "this network was loaded from a .pt2: a program is complete, and cannot be cut or stripped",
            example=f"{verb}(load('m.safetensors')), the checkpoint of the same network",
        )


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    if mode == self.training:
        return self
    modes = {True: "train", False: "eval"}
    raise SurgeryError(
        f"this program was recorded in {modes[self.training]} mode and has no other",
        example=f"export(m.{modes[mode]}(), 'm.pt2') before",
    )


def _eval(self: nn.Module) -> nn.Module:
    return _train(self, False)
