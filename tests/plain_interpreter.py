"""The oracle for random networks: runs a block's steps one by one, and reverses gradients by tensor hooks.

It knows nothing of torch.fx, and of this library only how it numbers names. Nothing is ever overwritten: a
value that shares memory with another one knows how it is read out of that memory, so what an in-place
operation does to every view of it is computed afresh, with its gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from random_networks import BATCH, ITEMS, Block, Operation, Pair, Step, module_path
from torch import nn

from grl_surgery.points import number

Place = tuple[Any, ...]  # where in the execution: numbers of steps, from the root inwards


@dataclass(frozen=True)
class Reversal:
    """``after`` a point, ``before`` a point, or on the edge from ``source`` to ``target`` as ``arg``."""

    kind: str
    at: str
    coeff: float
    target: str = ""
    arg: str = ""


# ------------------------------------------------------------------------------------------------ names


def named_places(block: Block) -> dict[Place, str]:
    """The name of every call and operation: its path, numbered over both modes where several share it."""
    rows = [list(_places(block, "", (), training)) for training in (True, False)]
    numbered = number([[(base, line) for _, base, line in row] for row in rows])
    return {
        place: name
        for row, names in zip(rows, numbered, strict=True)
        for (place, _, _), name in zip(row, names, strict=True)
    }


def _places(block: Block, prefix: str, where: Place, training: bool) -> Iterator[tuple[Place, str, Place]]:
    """Every call and operation in one mode, what it is called so far, and the line that it stands on."""
    for index, step in enumerate(block.steps):
        branch = step if step.other is None or step.mode == training else step.other
        line = (prefix, index, branch is step)
        place = (*where, index, branch is step)
        path = own_path(block, branch)
        if branch.operation is not None:
            for node in _computed(branch.operation):
                yield (*place, node), prefix + node.format(m=path), line
        else:
            yield place, prefix + path, line
            yield from _places(called(block, branch), f"{prefix}{path}.", place, training)


def _computed(operation: Operation) -> list[str]:
    """Its nodes but for items, which are named after what they are an item of, and for stored tensors."""
    called = operation.source.startswith("self.{m}(")
    return [node for node in operation.nodes if "[" not in node and (called or "{m}" not in node)]


def own_path(block: Block, step: Step) -> str:
    """Path of the step's module or block inside the block, under its first name."""
    return module_path(block.aliases.get(step.path, step.path))


def called(block: Block, step: Step) -> Block:
    """The block that the step calls."""
    child = block.children[block.aliases.get(step.path, step.path)]
    assert isinstance(child, Block)
    return child


# ------------------------------------------------------------------------------------------------ memory


class Memory:
    """A tensor that several values are read out of, and how often it has been written."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version = tensor, 0


class Value:
    """A tensor at one place of the execution.

    Args:
        memory: Where it lies.
        view: From the memory's tensor to this part of it.
        make: Computes it again after the memory has been written by way of another value.
        names: Of the points whose value this is.
    """

    def __init__(
        self, memory: Memory, view: Callable[..., torch.Tensor], make: Callable[[], torch.Tensor], names: Any
    ) -> None:
        self.memory, self.view, self.make, self.names = memory, view, make, tuple(names)
        self.same_tensor = [self]  # all values that are one tensor to Python
        self.before_reversal: Value | None = None
        self.parent: Value | None = None  # what it was read out of, as a view or by a reversal
        self.successor: Value | None = None  # the tensor after an in-place operation
        self.version, self.tensor = memory.version, make()
        self.is_float = self.tensor.is_floating_point()

    def read(self) -> torch.Tensor:
        if self.version != self.memory.version:
            self.version, self.tensor = self.memory.version, self.make()
        return self.tensor

    def write(self, tensor: torch.Tensor) -> None:
        self._settle_reversals()
        self._put(tensor)
        self.memory.version += 1
        self.version, self.tensor = self.memory.version, self.view(self.memory.tensor)

    def _settle_reversals(self) -> None:
        """What is written lies behind the reversals that led here, and does not pass them again."""
        if self.parent is not None:
            self.parent._settle_reversals()
        if self.before_reversal is self.parent is not None:
            self._put(self.read())
            self.make = lambda: self.view(self.memory.tensor)

    def _put(self, tensor: torch.Tensor) -> None:
        memory = self.memory
        old = memory.tensor
        # Where in the memory this value lies: the view of a tensor that holds its own indices.
        numbers = torch.arange(old.numel()).view(old.shape)
        numbers = torch.empty_strided(old.shape, old.stride(), dtype=torch.int64).copy_(numbers)
        index = self.view(numbers).reshape(-1)
        new = old.reshape(-1).scatter(0, index, tensor.expand(self.view(old).shape).reshape(-1))
        memory.tensor = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype).copy_(
            new.view(old.shape)
        )

    def derived(self, function: Callable[[torch.Tensor], torch.Tensor], names: Any) -> Value:
        """A value that shares this one's memory."""
        value = Value(
            self.memory,
            lambda tensor: function(self.view(tensor)),
            lambda: function(self.read()),
            names,
        )
        value.parent = self
        return value

    def same(self) -> Value:
        """The same tensor where it enters or leaves a module."""
        twin = self.derived(lambda x: x, self.names)
        twin.same_tensor, twin.before_reversal = self.same_tensor, self.before_reversal
        twin.same_tensor.append(twin)
        return twin

    def overwritten_by(self, successor: Value) -> None:
        for value in self.same_tensor:
            value.successor = successor
        if self.before_reversal is not None:
            self.before_reversal.overwritten_by(successor)

    def latest(self) -> Value:
        value = self
        while value.successor is not None:
            value = value.successor
        return value

    def reversed(self, coeff: float) -> Value:
        """The same value, its gradient times ``-coeff``."""

        def hooked() -> torch.Tensor:
            x = self.read()
            y = x.view_as(x)
            if y.requires_grad:
                y.register_hook(lambda gradient: gradient * -coeff)
            return y

        value = Value(self.memory, self.view, hooked, self.names)
        value.before_reversal = value.parent = self
        return value


def fresh(tensor: torch.Tensor, names: Any = ()) -> Value:
    memory = Memory(tensor)
    return Value(memory, lambda x: x, lambda: memory.tensor, names)


# --------------------------------------------------------------------------------------------- execution


class Interpreter:
    """Runs a block's steps with the modules and parameters of the network that was built from it.

    What a head at the point ``tapped`` reads is left in ``tap``.
    """

    def __init__(
        self, block: Block, module: nn.Module, reversals: Sequence[Reversal] = (), tapped: str = ""
    ) -> None:
        self.block, self.module, self.reversals, self.tapped = block, module, reversals, tapped
        self.tap: torch.Tensor | None = None
        self.names = named_places(block)
        self.points: dict[str, bool] = {}  # of those with a tensor: whether anything uses it
        self.edges: list[tuple[tuple[str, ...], str, str]] = []
        self.features: list[str] = []  # points with a row for each sample
        self.ends: dict[str, bool] = {}  # of what can stand in before=: whether it takes tensors only
        self.layers: set[str] = set()  # paths of the layers that are called

    def run(self, *inputs: torch.Tensor) -> Any:
        """What the network returns."""
        arguments = [self.define(fresh(x), f"v{place}") for place, x in enumerate(inputs)]
        results = self.call(self.block, self.module, "", (), arguments)
        tensors = [self.read(value, "output", "") for value in results]
        return pack(self.block.returns, tensors)

    def call(self, block: Block, module: nn.Module, prefix: str, where: Place, args: list[Value]) -> Any:
        variables = dict(enumerate(args))
        for index, step in enumerate(block.steps):
            taken = step if step.other is None or step.mode == module.training else step.other
            place = (*where, index, taken is step)
            inputs = [variables[number].latest() for number in taken.inputs]
            if taken.operation is None:
                results = self.step_into(block, module, taken, prefix, place, inputs)
            else:
                results = self.operate(block, module, taken, prefix, place, inputs)
            variables.update(zip(taken.results, results, strict=True))
        return [variables[number].latest() for number in block.results]

    def step_into(
        self, block: Block, module: nn.Module, step: Step, prefix: str, place: Place, inputs: list[Value]
    ) -> list[Value]:
        inner, path, name = called(block, step), own_path(block, step), self.names[place]
        args = ["0"] if len(inputs) == 1 else ["0", "1"]
        if inner.packed != "plain" and len(inputs) > 1:
            keys = ITEMS["tuple"] if inner.packed == "Pair" else ITEMS[inner.packed]
            args = [f"0{key}" for key in keys]
        entered, once = [], {}
        self.ends[name] = not all(value.is_float for value in inputs)
        for value, arg in zip(inputs, args, strict=True):
            value = self.use(value, name, arg, once)
            entered.append(value.same())
        submodule = module.get_submodule(path)
        results = self.call(inner, submodule, f"{prefix}{path}.", place, entered)
        if inner.returns == "tensor":
            items = [name]
        else:
            items = [name + key for key in ITEMS["tuple" if inner.returns == "Pair" else inner.returns]]
        outside = {name for value in inputs for name in value.names}
        left = []
        for value, item in zip(results, items, strict=True):
            value = value.same()
            # What only passes through is called by where it left: from outside, a call hides what it takes.
            value.names = tuple(name for name in value.names if name not in outside)
            left.append(self.define(value, item))
        return left

    def operate(
        self, block: Block, module: nn.Module, step: Step, prefix: str, place: Place, inputs: list[Value]
    ) -> list[Value]:
        operation = step.operation
        assert operation is not None
        path = own_path(block, step)
        if operation.source.startswith("self.{m}("):
            self.layers.add(prefix + path)

        def name_of(node: str) -> str:
            node = node.partition("[")[0]
            return self.names.get((*place, node), prefix + node.format(m=path))

        used, once = [], {}
        for index, value in enumerate(inputs):
            node, arg = operation.use(index)
            used.append(self.use(value, name_of(node), arg, once))
        source = (operation.pure or operation.source).replace("{m}", step.path)
        environment: dict[str, Any] = {
            "torch": torch,
            "F": F,
            "operator": operator,
            "self": module,
            "Pair": Pair,
        }
        if operation.reads:
            held = operation.reads.format(m=step.path)
            value = fresh(eval(f"self.{held}", {"self": module}))
            value = self.define(value, prefix + operation.reads.format(m=path), is_end=False)
            environment["held"] = self.use(value, name_of(operation.nodes[-1]), "1", {}).read()
            source = source.replace(f"self.{held}", "held")
        function = eval(f"lambda x0=None, x1=None, x2=None: {source.format('x0', 'x1', 'x2')}", environment)
        ends = {operation.use(number)[0] for number in range(len(inputs))} or {operation.nodes[-1]}
        if len(ends) == 1:
            mixed = operation.source.startswith("torch.where") or "ids" in operation.takes
            self.ends[name_of(*ends)] = mixed
        return self.results_of(operation, function, used, name_of)

    def results_of(
        self, operation: Operation, function: Any, used: list[Value], name_of: Callable[[str], str]
    ) -> list[Value]:
        tensors = [value.read() for value in used]
        result = function(*tensors)
        names = [name_of(operation.nodes[-1])]
        if len(operation.gives) > 1:
            names = [f"{name_of(operation.nodes[0])}[{place}]" for place in range(len(operation.gives))]
        if operation.pure:
            used[0].write(result)
            overwritten = self.define(used[0].derived(lambda x: x, ()), names[0])
            used[0].overwritten_by(overwritten)
            return [overwritten]
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        values = []
        for place, (tensor, name) in enumerate(zip(results, names, strict=False)):
            shared = tensor.untyped_storage().data_ptr() == tensors[0].untyped_storage().data_ptr()
            rest = tensors[1:]
            if shared and len(results) > 1:
                value = used[0].derived(lambda x, place=place, rest=rest: function(x, *rest)[place], ())
            elif shared:
                value = used[0].derived(lambda x, rest=rest: function(x, *rest), ())
            else:
                value = fresh(tensor)
            values.append(self.define(value, name))
        return values

    # -- reversals

    def define(self, value: Value, name: str, is_end: bool = True) -> Value:
        value.names = (*value.names, name)
        if not value.is_float:
            return value
        self.points.setdefault(name, False)
        if value.read().shape[:1] == (BATCH,):
            self.features.append(name)
        if name == self.tapped:
            self.tap = value.read().clone()
        for reversal in self.reversals:
            if reversal.kind == "after" and reversal.at == name:
                value = value.reversed(reversal.coeff)
        return value

    def use(self, value: Value, target: str, arg: str, once: dict[Any, Value]) -> Value:
        """The value as the target gets it; before a call, what it takes twice is reversed once."""
        self.read(value, target, arg)
        for reversal in self.reversals:
            if reversal.kind == "edge" and reversal.at in value.names:
                if (reversal.target, reversal.arg) == (target, arg):
                    value = value.reversed(reversal.coeff)
            elif reversal.kind == "before" and reversal.at == target:
                if (value, reversal) not in once:
                    once[value, reversal] = value.reversed(reversal.coeff)
                value = once[value, reversal]
        return value

    def read(self, value: Value, target: str, arg: str) -> torch.Tensor:
        if value.is_float:
            self.points[value.names[-1]] = True
            self.edges.append((value.names, target, arg))
        return value.read()


def pack(how: str, tensors: Sequence[Any]) -> Any:
    """The structure that the block's return statement makes."""
    if how == "tensor":
        return tensors[0]
    if how == "dict":
        return dict(zip(("left", "right"), tensors, strict=True))
    return {"tuple": tuple, "list": list, "Pair": lambda pair: Pair(*pair)}[how](tensors)
