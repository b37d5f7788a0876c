"""Checks a classifier of the user's own before training: its sizes, and how it ends."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grl_surgery.errors import ShapeError, SurgeryError, one_line

__all__ = ["prepare_classifier"]

Shape = tuple[int, ...]


def prepare_classifier(head: nn.Module, shapes: Sequence[Shape], point: str) -> None:
    """Give lazy layers of a head their sizes, and check that the classifier fits the feature.

    The head runs once on zeros, in eval mode.

    Example:
        >>> from grl_surgery.nn.heads import DomainHead
        >>> head = DomainHead(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2)), num_domains=2)
        >>> prepare_classifier(head, [(4, 16)], "fc")
        >>> head.classifier[0].in_features
        16

    Args:
        head: A :class:`~grl_surgery.nn.heads.DomainHead` with a classifier of the user's own.
        shapes: Shapes of the feature, and of what it is conditioned on.
        point: Where the feature is from, for messages.

    Raises:
        ShapeError: The classifier cannot read the feature, or does not return logits.
    """
    classifier: Any = head.get_submodule("classifier")
    parameters = [p for p in head.parameters() if not nn.parameter.is_lazy(p)]
    like = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
    inputs = [torch.zeros(shape, dtype=like.dtype, device=like.device) for shape in shapes]
    wrong: list[str] = []
    last = _LastFunction()
    try:
        with _in_eval_mode(head), _reading(classifier, wrong), last, torch.no_grad():
            output = head(*inputs)
    except SurgeryError:
        raise
    except Exception as error:  # the classifier is the user's: anything can come out of it
        why = wrong[-1] if wrong else one_line(error)
        raise ShapeError(
            f"the classifier {type(classifier).__name__} cannot run on the value at {point!r}, of shape "
            f"{' and '.join(map(str, shapes))}: {why}",
            example="nn.Sequential(nn.LazyLinear(1024), nn.ReLU(), nn.LazyLinear(2)), whose layers "
            "take the size that they get",
        ) from error
    if output is last.returned and last.name in ("sigmoid", "softmax"):
        warnings.warn(
            f"the classifier {type(classifier).__name__} ends in a {last.name}: a loss on logits, such as "
            "domain_loss, applies another one to it, and such a head trains badly; let it return the value "
            f"before the {last.name}",
            stacklevel=3,
        )


@contextlib.contextmanager
def _in_eval_mode(head: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in head.modules()]
    head.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _reading(classifier: nn.Module, wrong: list[str]) -> Iterator[None]:
    """Note each layer that is called on another size than its own."""
    handles = []
    for path, module in classifier.named_modules():

        def note(module: nn.Module, args: Any, path: str = path) -> None:
            found = _misfit(module, args[0]) if args and isinstance(args[0], Tensor) else ""
            if found:
                name = f"its layer {path!r}, {type(module).__name__}," if path else type(module).__name__
                wrong.append(f"{name} reads {found}")

        handles.append(module.register_forward_pre_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _misfit(module: nn.Module, value: Tensor) -> str:
    """The width that a layer was built for and the one that it gets, if they differ."""
    for kind, attribute, axis in (
        (nn.Linear, "in_features", -1),
        (nn.modules.conv._ConvNd, "in_channels", 1),
        (nn.modules.batchnorm._BatchNorm, "num_features", 1),
    ):
        if isinstance(module, kind) and nn.modules.lazy.LazyModuleMixin not in type(module).__mro__:
            own = int(getattr(module, attribute))
            got = value.shape[axis] if value.dim() > abs(axis) - (axis < 0) else None
            if got != own:
                return f"{own} features, and gets a tensor of shape {tuple(value.shape)}"
    return ""


class _LastFunction(TorchFunctionMode):
    """Remembers which function of torch returned last, and what."""

    name = ""
    returned: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self.name, self.returned = str(getattr(func, "__name__", "")).strip("_"), output
        return output
