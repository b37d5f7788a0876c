"""The oracle: a plain network, and torch's own hooks on the value at which a reversal is to stand.

Nothing here knows this library. Python's, numpy's and torch's random numbers begin anew in every run.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["Recording", "Seen", "Spot", "call", "gradients", "leaves", "objective", "record", "reversed_at"]

Key = int | str | None


@dataclass(frozen=True)
class Spot:
    """Where a gradient is reversed in a plain network.

    Args:
        path: Of a module that the forward calls once.
        key: Which item of what it returns; None where it returns a tensor.
        operation: An operation in the module's own forward instead, as Python names it.
        count: Which call of that operation, from 0.
        argument: The argument of it that is reversed, instead of its result.
    """

    path: str
    key: Key = None
    operation: str = ""
    count: int = 0
    argument: int | None = None


@dataclass(frozen=True)
class Seen:
    """A value that a forward computed; of an operation, which arguments were computed too."""

    spot: Spot
    value: torch.Tensor
    repeated: bool
    tensor_arguments: tuple[int, ...] = ()
    in_place: bool = False


@dataclass
class Recording:
    """The values of modules and operations in the order of the forward; how often each was called."""

    modules: list[Seen]
    operations: list[Seen]
    calls: Counter[str]
    counts: Counter[tuple[str, str]]
    output: Any


# ------------------------------------------------------------------------------------------------- running


def call(network: nn.Module, inputs: Any, seed: int = 0) -> Any:
    """Run a network on its own copies of the inputs, with the same random numbers in every call."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    given = copy.deepcopy(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return network(**given) if isinstance(given, Mapping) else network(*given)


def leaves(value: Any, _seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """The tensors in an output, however nested, in order."""
    seen = set() if _seen is None else _seen
    if isinstance(value, torch.Tensor):
        yield value
        return
    if (
        value is None
        or isinstance(value, (str, bytes, int, float, bool, nn.Module, type))
        or id(value) in seen
    ):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        items: Any = value.values()
    elif isinstance(value, (list, tuple)):
        items = value
    elif dataclasses.is_dataclass(value):
        items = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:  # a cache of keys and values, and the like
        items = getattr(value, "__dict__", {}).values() if not callable(value) else ()
    for item in list(items):
        yield from leaves(item, seen)


def objective(output: Any) -> torch.Tensor | None:
    """A fixed random linear function of everything that an output holds and that has a gradient."""
    generator = torch.Generator().manual_seed(1)
    total = None
    done: set[int] = set()
    for value in leaves(output):
        if not value.requires_grad or id(value) in done:
            continue
        done.add(id(value))
        real = torch.view_as_real(value) if value.is_complex() else value
        weights = torch.randn(real.shape, generator=generator).to(real.dtype)
        term = (real * weights).sum()
        total = term if total is None else total + term.to(total.dtype)
    return total


def gradients(network: nn.Module, output: Any) -> dict[str, torch.Tensor | None]:
    """The gradient of :func:`objective` by the name of each parameter."""
    total = output if isinstance(output, torch.Tensor) and output.dim() == 0 else objective(output)
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if total is None or not total.requires_grad:
        return dict.fromkeys(named)
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


# ----------------------------------------------------------------------------------------------- reversing


def _reversed(value: torch.Tensor) -> torch.Tensor:
    """The same value, from which the negative gradient flows on."""
    if not value.requires_grad:
        return value
    same = value.clone()
    same.register_hook(torch.neg)  # type: ignore[no-untyped-call]
    return same


def _change(output: Any, key: Key, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The output with one tensor in it exchanged, in a container of the same class."""
    if key is None:
        return change(output)
    if isinstance(output, tuple) and isinstance(key, int):
        items = list(output)
        items[key] = change(items[key])
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    other = copy.copy(output)
    other[key] = change(other[key])
    return other


@contextlib.contextmanager
def reversed_at(
    network: nn.Module, spot: Spot, change: Callable[[torch.Tensor], torch.Tensor] = _reversed
) -> Iterator[None]:
    """While the body runs, the gradient is reversed at a spot; hooks on the network do it."""
    module = network.get_submodule(spot.path)
    if not spot.operation:
        handle = module.register_forward_hook(lambda _m, _i, output: _change(output, spot.key, change))
        with contextlib.closing(_Handles([handle])):
            yield
        return
    with _OwnOperations(network, _Changing(spot, change)):
        yield


class _Handles:
    def __init__(self, handles: Sequence[Any]) -> None:
        self.handles = handles

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


class _Changing:
    """What is done to the operations of one module's own forward: one of them is changed."""

    def __init__(self, spot: Spot, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.spot, self.change, self.count = spot, change, 0

    def __call__(self, path: str, func: Any, args: Any, kwargs: Any) -> Any:
        spot = self.spot
        if path != spot.path or called(func) != spot.operation:
            return func(*args, **kwargs)
        self.count += 1
        if self.count - 1 != spot.count:
            return func(*args, **kwargs)
        if spot.argument is None:
            return self.change(func(*args, **kwargs))
        changed = list(args)
        changed[spot.argument] = self.change(changed[spot.argument])
        return func(*changed, **kwargs)


class _OwnOperations(TorchFunctionMode):
    """Hands every operation to a function, with the path of the module whose own forward is running."""

    def __init__(self, network: nn.Module, handle: Callable[[str, Any, Any, Any], Any]) -> None:
        super().__init__()
        self.network, self.handle = network, handle
        self.stack: list[str] = []
        self.handles: list[Any] = []

    def __enter__(self) -> Any:
        for path, module in self.network.named_modules():
            self.handles.append(module.register_forward_pre_hook(self._entering(path)))
            self.handles.append(module.register_forward_hook(self._leaving, always_call=True))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def _entering(self, path: str) -> Callable[[Any, Any], None]:
        return lambda _module, _args: self.stack.append(path)

    def _leaving(self, _module: Any, _args: Any, _output: Any) -> None:
        self.stack.pop()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.handle(self.stack[-1] if self.stack else "", func, args, kwargs or {})


def called(func: Any) -> str:
    """What an operation is called in the source: ``add`` for ``+`` and for ``+=``."""
    name = str(getattr(func, "__name__", ""))
    if name.startswith("__"):
        name = name.strip("_")
        name = {"iadd": "add", "radd": "add", "rmul": "mul", "imul": "mul"}.get(name, name)
    return name


# ----------------------------------------------------------------------------------------------- recording


def record(network: nn.Module, inputs: Any) -> Recording:
    """Run a network once and keep what its modules and their own operations computed, where a gradient comes.

    Only values count that the objective sends a gradient other than zero.
    """
    seen = _Recorder(network)
    handles = [
        m.register_forward_hook(seen.leaving(path), with_kwargs=False)
        for path, m in network.named_modules()
        if path
    ]
    with contextlib.closing(_Handles(handles)), _OwnOperations(network, seen.operation):
        output = call(network, inputs)
    found = Recording([], [], seen.calls, seen.counts, output)
    total = objective(output)
    values = [item.value for item in (*seen.modules, *seen.operations)]
    if total is None or not total.requires_grad or not values:
        return found
    flows = torch.autograd.grad(total, values, allow_unused=True)
    alive = [
        flow is not None and bool(flow.abs().max() > 0) if flow is not None and flow.numel() else False
        for flow in flows
    ]
    for item, is_alive in zip((*seen.modules, *seen.operations), alive, strict=True):
        if is_alive:
            (found.operations if item.spot.operation else found.modules).append(item)
    return found


class _Recorder:
    def __init__(self, network: nn.Module) -> None:
        self.modules: list[Seen] = []
        self.operations: list[Seen] = []
        self.calls: Counter[str] = Counter()
        self.counts: Counter[tuple[str, str]] = Counter()

    def leaving(self, path: str) -> Callable[[Any, Any, Any], Any]:
        def leave(_module: Any, _args: Any, output: Any) -> Any:
            self.calls[path] += 1
            first = next(_items(output), None)
            if first is None:
                return None
            key, value = first
            apart = value.clone()  # what the module itself does with the value is no use of its output
            self.modules.append(Seen(Spot(path, key), apart, self.calls[path] > 1))
            return _change(output, key, lambda _value: apart)

        return leave

    def operation(self, path: str, func: Any, args: Any, kwargs: Any) -> Any:
        before = [
            i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and arg.grad_fn is not None
        ]
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            name = called(func)
            count = self.counts[path, name]
            self.counts[path, name] += 1
            if path and result.requires_grad and result.is_floating_point():
                in_place = any(result is arg for arg in args)
                spot = Spot(path, operation=name, count=count)
                self.operations.append(Seen(spot, result, self.calls[path] > 0, tuple(before), in_place))
        return result


def _items(output: Any) -> Iterator[tuple[Key, torch.Tensor]]:
    pairs: Any = ()
    if isinstance(output, torch.Tensor):
        pairs = [(None, output)]
    elif isinstance(output, Mapping):
        pairs = output.items()
    elif isinstance(output, (tuple, list)):
        pairs = enumerate(output)
    for key, value in pairs:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.requires_grad:
            yield key, value
