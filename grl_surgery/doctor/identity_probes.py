"""Records calls that return their input unchanged, and measures what they do to the gradient."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from grl_surgery.capture.recorded_functions import function_classes
from grl_surgery.doctor.sandbox import Sandbox
from grl_surgery.isolation.shared_copy import share_copy

__all__ = [
    "Factor",
    "IdentityCall",
    "IdentityProbe",
    "Key",
    "ratio",
    "source_line",
]

Kind = Literal["module", "function", "hook"]
Key = tuple[Kind, str, str, int]
Factor = float | tuple[float, ...] | None


@dataclass
class IdentityCall:
    """One call whose output equals its input.

    Args:
        kind: A module, an autograd Function, or a hook on a tensor.
        path: Of the module; otherwise of the module whose forward makes the call.
        name: Of the class, or of the hook.
        number: How many calls of the same were before it.
        inside: Numbers of the module calls that were running.
        source: File and line that make the call.
        enters: The autograd node that a gradient enters; None where autograd made none.
        below: The nodes that it goes on to.
        measure: What the gradient is multiplied by, measured with a gradient of random numbers.
        neutralise: Make this call pass the gradient on unchanged in the backward pass to come.
        arguments: Numbers that it was called with, by position.
        own: Class of the module or of the Function.
        call: Number of the module call, for modules.
        tensor: Which of the arguments is passed on.
    """

    kind: Kind
    path: str
    name: str
    number: int
    inside: tuple[int, ...]
    source: str | None
    enters: Any
    below: tuple[Any, ...]
    measure: Callable[[], Factor]
    neutralise: Callable[[], None] | None
    arguments: dict[int | str, float]
    own: Any
    call: int = -1
    tensor: int = 0

    @property
    def is_backward_hook(self) -> bool:
        """Whether it is the Function by which torch calls a module's full backward hooks."""
        return self.kind == "function" and str(self.own.__module__).startswith("torch.nn")

    @property
    def key(self) -> Key:
        """The same in every run."""
        return (self.kind, self.path, self.name, self.number)


@dataclass
class IdentityProbe:
    """Records what passes its input on while the network of a rig runs inside ``recording``.

    Args:
        rig: The private network.
        pristine: The same network before anything ran; modules are measured on twins of its modules.
        neutral: Hooks of these calls pass the gradient on unchanged.
    """

    rig: Sandbox
    pristine: nn.Module
    neutral: frozenset[Key] = frozenset()
    passings: list[IdentityCall] = field(default_factory=list)
    modules: dict[int, str] = field(default_factory=dict)
    running: list[tuple[int, str]] = field(default_factory=list)
    home_of: dict[Any, str] = field(default_factory=dict)
    failed_in: str | None = None

    @classmethod
    def of(cls, rig: Sandbox, neutral: frozenset[Key] = frozenset()) -> IdentityProbe:
        """A watch over a rig that has not run yet."""
        return cls(rig, share_copy(rig.network), neutral)

    @contextlib.contextmanager
    def recording(self) -> Iterator[IdentityProbe]:
        """Record until the block ends."""
        with contextlib.ExitStack() as stack:
            self._watch_modules(stack)
            self._watch_functions(stack)
            self._watch_tensor_hooks(stack)
            try:
                yield self
            except BaseException:
                self.failed_in = self.running[-1][1] if self.running else ""
                raise

    def _number(self, kind: Kind, path: str, name: str) -> int:
        return sum(row.key[:3] == (kind, path, name) for row in self.passings)

    def _here(self) -> tuple[tuple[int, ...], str]:
        return tuple(call for call, _ in self.running), self.running[-1][1] if self.running else ""

    # -- modules

    def _watch_modules(self, stack: contextlib.ExitStack) -> None:
        for path, module in self.rig.network.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for handle in (
                module.register_forward_pre_hook(self._enter(path), with_kwargs=True),
                module.register_forward_hook(self._leave(path), with_kwargs=True),
            ):
                stack.callback(handle.remove)

    def _enter(self, path: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = len(self.modules)
            self.modules[call] = path
            self.running.append((call, path))
            versions[call] = [value._version for value in args if isinstance(value, Tensor)]

        versions = self._versions
        return enter

    @property
    def _versions(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = self.__dict__.setdefault("_found_versions", {})
        return found

    def _leave(self, path: str) -> Any:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call, _ = self.running.pop()
            tensors = [value for value in args if isinstance(value, Tensor)]
            unchanged = self._versions[call] == [value._version for value in tensors]
            self._attribute(path, tensors, output)
            place = next((at for at, value in enumerate(args) if _same(value, output)), None)
            if place is None or not unchanged or not _is_one_tensor(output):
                return
            value = args[place]
            inside, _ = self._here()
            self.passings.append(
                IdentityCall(
                    kind="module",
                    path=path,
                    name=type(module).__qualname__,
                    number=self._number("module", path, type(module).__qualname__),
                    inside=inside,
                    source=_line_of(type(module).forward),
                    enters=output.grad_fn,
                    below=(value.grad_fn,) if value.grad_fn is not None else (),
                    measure=self._alone(path, args, kwargs, place),
                    neutralise=None,
                    arguments=_numbers(args) | _numbers_by_name(kwargs),
                    own=type(module),
                    call=call,
                    tensor=place,
                )
            )

        return leave

    def _alone(self, path: str, args: Sequence[Any], kwargs: dict[str, Any], place: int) -> Any:
        """Call a twin of the module, as it was in the beginning, with nothing around it."""
        held = [value.detach().clone() if isinstance(value, Tensor) else value for value in args]

        def measure() -> Factor:
            leaf = held[place].requires_grad_()
            given = [leaf.clone() if at == place else value for at, value in enumerate(held)]
            output = share_copy(self.pristine.get_submodule(path))(*given, **kwargs)
            probe = _probe(output)
            if not output.requires_grad:
                return 0.0
            (found,) = torch.autograd.grad(output, leaf, probe.clone(), allow_unused=True)
            return ratio(probe, found)

        return measure

    def _attribute(self, path: str, inputs: Sequence[Tensor], output: Any) -> None:
        """Whatever this module's forward made, and no module inside it, is its own."""
        stop = {value.grad_fn for value in inputs}
        rest = [value.grad_fn for value in _tensors(output)]
        while rest:
            node = rest.pop()
            if node is not None and node not in stop and node not in self.home_of:
                self.home_of[node] = path
                rest += [below for below, _ in node.next_functions]

    # -- autograd Functions

    def _watch_functions(self, stack: contextlib.ExitStack) -> None:
        for kind in list(function_classes()):
            contextual = kind.setup_context is not torch.autograd.Function.setup_context
            name = "setup_context" if contextual else "forward"
            if name not in kind.__dict__:
                continue
            original = kind.__dict__[name]
            record = self._record_context if contextual else self._record_forward
            setattr(kind, name, staticmethod(record(kind, original.__get__(None, kind))))
            stack.callback(setattr, kind, name, original)

    def _record_forward(self, kind: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(ctx: Any, *args: Any) -> Any:
            output = original(ctx, *args)
            self._add_function(kind, ctx, args, output)
            return output

        return forward

    def _record_context(self, kind: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        def setup_context(ctx: Any, inputs: Any, output: Any) -> Any:
            result = original(ctx, inputs, output)
            self._add_function(kind, ctx, inputs, output)
            return result

        return setup_context

    def _add_function(self, kind: Any, ctx: Any, args: Sequence[Any], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        pairs = ((i, j) for j, y in enumerate(outputs) for i, x in enumerate(args) if _same(x, y))
        place, leaving = next(pairs, (None, 0))
        if place is None or not hasattr(ctx, "next_functions"):
            return
        slot = sum(isinstance(value, Tensor) for value in args[:place])
        inside, path = self._here()
        goes_on = bool(ctx.needs_input_grad[place])
        probe = _probe(outputs[leaving])

        def measure() -> Factor:
            edges = ctx.next_functions
            if not goes_on or slot >= len(edges) or edges[slot][0] is None:
                return None
            (found,) = torch.autograd.grad(
                GradientEdge(ctx, leaving), GradientEdge(*edges[slot]), probe.clone(), retain_graph=True
            )
            return ratio(probe, found)

        def neutralise() -> None:
            if goes_on:
                _pass_on(ctx, leaving, slot)

        name = kind.__qualname__.removeprefix("GeneratedBackwardFor_").removesuffix("_default")
        self.passings.append(
            IdentityCall(
                kind="function",
                path=path,
                name=name,
                number=self._number("function", path, name),
                inside=inside,
                source=source_line(),
                enters=ctx if goes_on else None,
                below=(),
                measure=measure,
                neutralise=neutralise,
                arguments=_numbers(args),
                own=kind,
                tensor=place,
            )
        )

    # -- hooks on tensors

    def _watch_tensor_hooks(self, stack: contextlib.ExitStack) -> None:
        original = Tensor.register_hook

        def register_hook(tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Any:
            name = getattr(hook, "__qualname__", type(hook).__qualname__)
            inside, path = self._here()
            probe = _probe(tensor)

            def measure() -> Factor:
                entered = probe.clone()
                found = hook(entered)
                return ratio(probe, entered if found is None else found)

            row = IdentityCall(
                kind="hook",
                path=path,
                name=name,
                number=self._number("hook", path, name),
                inside=inside,
                source=source_line(),
                enters=tensor.grad_fn,
                below=(),
                measure=measure,
                neutralise=None,
                arguments={},
                own=hook,
            )
            self.passings.append(row)
            return original(tensor, _ignore if row.key in self.neutral else hook)  # type: ignore[no-untyped-call]

        Tensor.register_hook = register_hook  # type: ignore[method-assign]
        stack.callback(setattr, Tensor, "register_hook", original)


def _ignore(gradient: Tensor) -> None:
    """A hook that leaves the gradient as it is."""


def _pass_on(node: Any, leaving: int, slot: int) -> None:
    """Give the input in this slot the gradient of that output, whatever the node's backward makes of it."""
    kept: dict[int, Tensor | None] = {}

    def keep(entered: Sequence[Tensor | None]) -> None:
        gradient = entered[leaving]
        kept[leaving] = None if gradient is None else gradient.clone()  # a backward may overwrite it

    def replace(left: Sequence[Tensor | None], entered: Sequence[Tensor | None]) -> Any:
        return tuple(kept[leaving] if at == slot else value for at, value in enumerate(left))

    node.register_prehook(keep)
    node.register_hook(replace)


# ------------------------------------------------------------------------------------------- the measurements


def ratio(entered: Tensor, left: Tensor | None) -> Factor:
    """What one gradient is multiplied by to give the other: a number, one for each sample, or None.

    Example:
        >>> ratio(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[-1.0, -2.0], [-6.0, -8.0]]))
        (-1.0, -2.0)
    """
    if left is None:
        return 0.0
    if left.shape != entered.shape:
        return None
    before, after = entered.detach().double(), left.detach().double()
    for dims in (tuple(range(before.dim())), tuple(range(1, before.dim()))):
        if not dims and before.dim():
            return None
        factor = (before * after).sum(dims, keepdim=True) / (before * before).sum(dims, keepdim=True)
        if bool(((after - factor * before).abs() <= 1e-5 * after.abs().max()).all()):
            found = [float(f"{value:.6g}") for value in factor.flatten().tolist()]
            return found[0] if len(set(found)) == 1 else tuple(found)
    return None


def _probe(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(like.shape, generator=generator)
    return drawn.to(like.device, like.dtype if like.is_floating_point() else torch.float32)


def _same(value: Any, output: Any) -> bool:
    """Whether a tensor leaves as it came, but for rounding."""
    if not (isinstance(value, Tensor) and _is_one_tensor(output) and value.is_floating_point()):
        return False
    if value.shape != output.shape or value.dtype != output.dtype or not value.numel():
        return False
    with torch.no_grad():
        close = torch.allclose(value.detach(), output.detach(), rtol=1e-5, atol=1e-7, equal_nan=True)
    return close and bool(value.detach().any())  # zeros are equal whatever was done to them


def _is_one_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _numbers(args: Sequence[Any]) -> dict[int | str, float]:
    return {at: float(value) for at, value in enumerate(args) if _is_number(value)}


def _numbers_by_name(kwargs: dict[str, Any]) -> dict[int | str, float]:
    return {name: float(value) for name, value in kwargs.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.is_floating_point()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------- lines of source

_TORCH = os.path.dirname(torch.__file__)
_OWN = os.path.dirname(os.path.dirname(__file__))


def source_line(frame: FrameType | None = None) -> str | None:
    """File and line of the innermost frame that is neither torch's nor this library's."""
    found: FrameType | None = frame or sys._getframe(1)
    while found is not None and found.f_code.co_filename.startswith((_TORCH, _OWN, "<")):
        found = found.f_back
    return None if found is None else _short(found.f_code.co_filename, found.f_lineno)


def _line_of(function: Any) -> str | None:
    code = getattr(function, "__code__", None)
    if code is None or code.co_filename.startswith("<"):
        return None
    return _short(code.co_filename, code.co_firstlineno)


def _short(file: str, line: int) -> str:
    """The file as its owner would call it: without the folder that Python finds it in."""
    folders = [os.path.join(os.path.abspath(folder), "") for folder in (*sys.path, os.curdir)]
    known = [folder for folder in folders if file.startswith(folder)]
    return f"{file[len(max(known, key=len, default='')) :]}:{line}"
