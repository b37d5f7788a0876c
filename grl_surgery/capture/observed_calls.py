"""Records the calls of modules and operations in one forward: order, shapes, edges."""

from __future__ import annotations

import dis
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from grl_surgery.capture.traceable_copy import has_forward, is_building_block
from grl_surgery.isolation.pytrees import tensors_in
from grl_surgery.isolation.rng_state import preserve_rng_state
from grl_surgery.isolation.tensor_copy import with_tensors
from grl_surgery.loading.inputs import as_arguments
from grl_surgery.points import escape

__all__ = ["Observed", "observe", "operation_name"]


@dataclass(frozen=True)
class Observed:
    """One call of a module, or one operation in a module's own forward.

    Args:
        name: Of the point: the module's path, or that of the module around the operation and the operation.
        path: Of the module; of the module around an operation.
        operation: What the operation is called; None for a module.
        place: How many operations of that name that forward ran before it.
        shape: Of the value; None where that is not one tensor.
        sources: For each argument that is another point's value itself: which argument, and which point.
        is_alone: Whether the forward around it ran once.
    """

    name: str
    path: str
    operation: str | None = None
    place: int = 0
    shape: tuple[int, ...] | None = None
    sources: tuple[tuple[str, str], ...] = ()
    is_alone: bool = True


def observe(network: nn.Module, inputs: Any) -> list[Observed] | None:
    """The points of one forward, in the order in which they begin; None where the network does not run.

    The network runs in its present mode, on copies of its tensors.

    Args:
        network: The network; not changed.
        inputs: Arguments of forward.
    """
    twin = with_tensors(network)
    watcher = _Watcher()
    for path, module in twin.named_modules():
        if has_forward(module) and not isinstance(module, torch.jit.ScriptModule):
            watcher.watch(module, path)
    args, kwargs = as_arguments(inputs)
    try:
        with torch.no_grad(), preserve_rng_state(), warnings.catch_warnings(), watcher:
            warnings.simplefilter("ignore")
            twin(*args, **kwargs)
    except Exception:  # the network is the user's: anything can come out of it
        return None
    return watcher.points()


class _Watcher(TorchFunctionMode):
    """Writes down the calls of modules and the operations in their own forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Observed] = []
        self.inside: list[tuple[str, bool, Counter[str]]] = []  # path, whether it is looked into, operations
        self.runs: Counter[str] = Counter()
        self.made_by: dict[int, tuple[int, Any]] = {}  # the tensor is kept, so that its id stays its own

    def watch(self, module: nn.Module, path: str) -> None:
        """Write down the calls of one module."""

        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            is_seen = not any(not looks_in for _, looks_in, _ in self.inside)
            self.inside.append((path, is_seen and not is_building_block(module), Counter()))
            self.runs[path] += 1
            if is_seen and path:
                self.note(Observed(escape(path), path), args, kwargs)
                places.append(len(self.found) - 1)
            else:
                places.append(-1)

        def end(_: nn.Module, args: Any, output: Any) -> None:
            self.inside.pop()
            place = places.pop()
            if place >= 0:
                self.result(place, output)

        places: list[int] = []
        module.register_forward_pre_hook(begin, with_kwargs=True)
        module.register_forward_hook(end, always_call=True)  # a forward may catch what its part raises

    def note(self, point: Observed, args: Any, kwargs: Any) -> None:
        """A point begins."""
        named = [*((str(place), value) for place, value in enumerate(args)), *kwargs.items()]
        flat = [
            (f"{arg}[{place}]" if isinstance(value, (tuple, list)) else arg, item)
            for arg, value in named
            for place, item in enumerate(value if isinstance(value, (tuple, list)) else [value])
        ]
        sources = ((arg, self.made_by[id(item)][0]) for arg, item in flat if id(item) in self.made_by)
        self.found.append(replace(point, sources=tuple((arg, str(place)) for arg, place in sources)))

    def result(self, place: int, output: Any) -> None:
        """A point is through."""
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) and not output.is_nested else None
        self.found[place] = replace(self.found[place], shape=shape)
        for tensor in tensors_in(output):
            self.made_by[id(tensor)] = (place, tensor)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation_name(function) if self.inside and self.inside[-1][1] else None
        if name is None:
            return function(*args, **kwargs)
        path, _, counted = self.inside[-1]
        written = _as_written(name, sys._getframe(1))
        base = f"{escape(path)}.{written}" if path else written
        self.note(Observed(base, path, name, counted[name]), args, kwargs)
        place = len(self.found) - 1
        counted[name] += 1
        value = function(*args, **kwargs)
        self.result(place, value)
        return value

    def points(self) -> list[Observed]:
        """Everything that was seen, those numbered that share a name."""
        total, seen = Counter(point.name for point in self.found), Counter[str]()
        names = []
        for point in self.found:
            seen[point.name] += 1
            names.append(point.name if total[point.name] == 1 else f"{point.name}#{seen[point.name]}")
        return [
            replace(
                point,
                name=name,
                sources=tuple((arg, names[int(place)]) for arg, place in point.sources),
                is_alone=self.runs[point.path] == 1,
            )
            for point, name in zip(self.found, names, strict=True)
        ]


# What torch calls an operator that Python code writes, and what a trace calls it.
_WRITTEN = {
    "add_": "add",
    "sub_": "sub",
    "mul_": "mul",
    "div": "truediv",
    "div_": "truediv",
    "pow_": "pow",
    "remainder": "mod",
    "remainder_": "mod",
    "floor_divide": "floordiv",
    "floor_divide_": "floordiv",
    "bitwise_not": "invert",
}


def _as_written(name: str, frame: FrameType) -> str:
    """The name of an operation as a trace has it: ``add`` for ``x += y``, ``add_`` for ``x.add_(y)``."""
    instruction = dis.opname[frame.f_code.co_code[frame.f_lasti]] if name in _WRITTEN else ""
    return _WRITTEN[name] if instruction.startswith(("BINARY", "INPLACE", "UNARY")) else name


def operation_name(function: Callable[..., Any]) -> str | None:
    """Name an operation as a graph does: ``add`` for ``+`` and ``+=``; None for one that only reads a size.

    Example:
        >>> functions = (torch.Tensor.__radd__, torch.relu, torch.Tensor.size)
        >>> tuple(map(operation_name, functions))
        ('add', 'relu', None)
    """
    name = str(getattr(function, "__name__", ""))
    if name in _READS or name in ("__get__", "__set__", "__delete__", "__format__", "__repr__"):
        return None
    if name.startswith("__") and name.endswith("__"):
        bare = name.strip("_")
        for prefix in ("r", "i"):
            if bare.startswith(prefix) and f"__{bare[1:]}__" in _OPERATORS:
                return bare[1:]
        return bare
    return name


_OPERATORS = frozenset(
    f"__{name}__"
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and",
        "or",
        "xor",
        "div",
    )
)
_READS = frozenset(
    [
        *(
            "size",
            "dim",
            "numel",
            "ndimension",
            "stride",
            "element_size",
            "is_contiguous",
            "nelement",
            "item",
        ),
        *("is_floating_point", "is_complex", "is_nested", "storage_offset", "tolist", "__len__", "__bool__"),
        *("__index__", "__int__", "__float__", "data_ptr", "get_device", "is_inference", "type", "__hash__"),
        *("_is_view", "is_same_size", "__iter__", "__contains__"),
    ]
)
