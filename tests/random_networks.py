"""Random networks, each written as Python source and, independently of torch.fx, as a list of steps.

A :class:`Block` is a small program: every :class:`Step` is one line of a forward. It becomes a module whose
forward is real source code (:func:`build`), and :mod:`plain_interpreter` runs the same steps without it.
"""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

SHAPES = {"vec": (8,), "half": (4,), "tok": (2, 4), "img": (2, 2, 2), "ids": (2,)}
BATCH = 3


class Pair(NamedTuple):
    """What some blocks take and return."""

    left: Any
    right: Any


@dataclass(frozen=True)
class Operation:
    """One kind of line.

    Args:
        source: The line; ``{0}`` and ``{1}`` stand for its inputs, ``{m}`` for the path of its module.
        takes: Kinds of its inputs; ``"same"`` is whatever kind there is.
        gives: Kinds of its results; several are unpacked from a tuple.
        nodes: Names of what it leaves in a graph, in order; ``{m}`` is the module. The last is its value.
        module: What makes its module, if it has one.
        pure: The same without overwriting ``{0}``, for lines that do.
        uses: For each input the node that uses it, and as what argument: ``"cat:0[1]"``; by default the last
            node, in order.
        reads: The parameter that it reads past any module call.
    """

    source: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    nodes: tuple[str, ...]
    module: str | None = None
    pure: str | None = None
    uses: tuple[str, ...] = ()
    reads: str | None = None

    def use(self, place: int) -> tuple[str, str]:
        """Node and argument under which the input at ``place`` is used."""
        node, arg = self.uses[place].split(":") if self.uses else (self.nodes[-1], str(place))
        return node, arg


def _op(source: str, takes: str, gives: str, nodes: str, **options: Any) -> Operation:
    return Operation(source, tuple(takes.split()), tuple(gives.split()), tuple(nodes.split()), **options)


def _layer(module: str, kind: str, **options: Any) -> Operation:
    return _op("self.{m}({0})", kind, kind, "{m}", module=module, **options)


_EMBEDDING = _op("self.{m}({0})", "ids", "tok", "{m}", module="nn.Embedding(5, 4)")

OPERATIONS = [
    _op("torch.relu({0})", "same", "same", "relu"),
    _op("torch.tanh({0})", "same", "same", "tanh"),
    _op("F.gelu({0})", "same", "same", "gelu"),
    _op("{0} * 0.5", "same", "same", "mul"),
    _op("{0}.clone()", "same", "same", "clone"),
    _op("F.relu({0}, inplace=True)", "same", "same", "relu", pure="torch.relu({0})"),
    _op("{0}.mul_(0.5)", "same", "same", "mul_", pure="{0} * 0.5"),
    _op("{0}.add_({1})", "same same", "same", "add_", pure="{0} + {1}"),
    _op("operator.iadd({0}, {1})", "same same", "same", "add", pure="{0} + {1}"),
    _op("F.dropout({0}, 0.3, self.training)", "same", "same", "dropout"),
    _op("{0}.detach() * 1", "same", "same", "detach mul", uses=("detach:0",)),
    _op("{0} + {1}", "same same", "same", "add"),
    _op("{0} - {1}", "same same", "same", "sub"),
    _op("{0} * {1}", "same same", "same", "mul"),
    _op("torch.add({0}, {1}, alpha=0.5)", "same same", "same", "add"),
    _op("torch.where({0} > 0, {0}, {1})", "same same", "same", "gt where", uses=("where:1", "where:2")),
    _op("{0}.view({0}.size(0), 2, 2, 2)", "vec", "img", "size view"),
    _op("{0}.reshape({0}.shape[0], 2, 2, 2)", "vec", "img", "shape shape[0] reshape"),
    _op("{0}.unflatten(1, (2, 4))", "vec", "tok", "unflatten"),
    _op("{0}.flatten(1)", "img", "vec", "flatten"),
    _op("torch.flatten({0}, 1)", "tok", "vec", "flatten"),
    _op("{0}.reshape(-1, 8)", "tok", "vec", "reshape"),
    _op("{0}.permute(0, 1, 3, 2)", "img", "img", "permute"),
    _op("{0}.contiguous(memory_format=torch.channels_last)", "img", "img", "contiguous"),
    _op("{0}.transpose(1, 2).reshape(-1, 2, 4)", "tok", "tok", "transpose reshape", uses=("transpose:0",)),
    _op("{0}.chunk(2, 1)", "vec", "half half", "chunk chunk[0] chunk[1]", uses=("chunk:0",)),
    _op("{0}.unbind(1)", "tok", "half half", "unbind unbind[0] unbind[1]", uses=("unbind:0",)),
    _op("{0}[:, :4]", "vec", "half", "getitem"),
    _op("{0}[:, 1]", "tok", "half", "getitem"),
    _op("{0}.mean(1)", "tok", "half", "mean"),
    _op("torch.cat([{0}, {1}], 1)", "half half", "vec", "cat", uses=("cat:0[0]", "cat:0[1]")),
    _op("torch.stack(({0}, {1}), dim=1)", "half half", "tok", "stack", uses=("stack:0[0]", "stack:0[1]")),
    _op(
        "F.scaled_dot_product_attention({0}, {1}, {2})", "tok tok tok", "tok", "scaled_dot_product_attention"
    ),
    _op(
        "F.linear({0}, self.{m}.weight)",
        "vec",
        "vec",
        "{m}.weight linear",
        module="nn.Linear(8, 8)",
        reads="{m}.weight",
    ),
    _op("{0} * self.{m}", "same", "same", "{m} mul", module="nn.Parameter(torch.randn(()))", reads="{m}"),
    _op("{0} + self.{m}.add_(1)", "same", "same", "{m} add_ add", module="torch.zeros(())"),
    _EMBEDDING,
    _op(
        "self.{m}({0})",
        "tok",
        "tok states",
        "{m} {m}[0] {m}[1]",
        module="nn.GRU(4, 4, batch_first=True)",
        uses=("{m}:0",),
    ),
    _layer("nn.Linear(8, 8)", "vec"),
    _layer("nn.Linear(4, 4)", "half"),
    _layer("nn.Linear(4, 4)", "tok"),
    _layer("nn.LayerNorm(8)", "vec"),
    _layer("nn.BatchNorm1d(8)", "vec"),
    _layer("nn.Conv2d(2, 2, 3, padding=1)", "img"),
    _layer("nn.BatchNorm2d(2)", "img"),
    _layer("nn.Tanh()", "same"),
    _layer("nn.Identity()", "same"),
    _layer("nn.Dropout(0.3)", "same"),
    _layer("nn.ReLU()", "same"),
    _layer("nn.ReLU(inplace=True)", "same", pure="torch.relu({0})"),
]


@dataclass(frozen=True)
class Step:
    """One line of a forward: ``results = operation(inputs)``, or a call of the block at ``path``.

    Args:
        inputs: Numbers of the variables that it reads.
        results: Numbers of those that it sets.
        operation: What it does; None for the call of a block.
        path: Attribute of its module or block, as in ``layers[0]`` or ``a``.
        mode: It only happens in train (True) or in eval (False); the other mode runs ``other``.
        other: The same results in the other mode.
    """

    inputs: tuple[int, ...]
    results: tuple[int, ...]
    operation: Operation | None = None
    path: str = ""
    mode: bool | None = None
    other: Step | None = None


@dataclass
class Block:
    """A module with a forward of its own.

    Args:
        takes: Kinds of its arguments.
        gives: Kinds of what it returns.
        packed: How it takes its arguments: one by one, or in one tuple, dict or Pair.
        returns: How it returns: ``tensor``, ``tuple``, ``list``, ``dict`` or ``Pair``.
        results: Numbers of the variables that it returns; arguments are the variables 0, 1, ...
        children: What it holds, by path: source of a module, or a block. A path seen twice is one object.
    """

    takes: tuple[str, ...]
    gives: tuple[str, ...] = ()
    packed: str = "plain"
    returns: str = "tensor"
    steps: list[Step] = field(default_factory=list)
    results: tuple[int, ...] = ()
    children: dict[str, str | Block] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    evaluated: bool = False  # in eval mode although its parent trains, or the other way round


# ------------------------------------------------------------------------------------------ source code

PACKINGS = {
    "plain": "{0}, {1}",
    "tuple": "({0}, {1})",
    "dict": "{{'left': {0}, 'right': {1}}}",
    "Pair": "Pair({0}, {1})",
    "list": "[{0}, {1}]",
}
KEYS = {
    "tuple": ("[0]", "[1]"),
    "list": ("[0]", "[1]"),
    "dict": ("['left']", "['right']"),
    "Pair": ("[0]", "[1]"),
}
ITEMS = {
    "tuple": ("[0]", "[1]"),
    "list": ("[0]", "[1]"),
    "dict": ("[left]", "[right]"),
    "Pair": ("[0]", "[1]"),
}


def source_of(block: Block) -> str:
    """The forward of a block as Python."""
    names = [f"v{place}" for place in range(len(block.takes))]
    if block.packed == "plain":
        lines = [f"def forward(self, {', '.join(names)}):"]
    else:
        lines = ["def forward(self, packed):"]
        lines += [f"    {name} = packed{key}" for name, key in zip(names, KEYS[block.packed], strict=False)]
    for step in block.steps:
        if step.other is None:
            lines += [f"    {line}" for line in _lines(block, step)]
        else:
            lines += [f"    if {'' if step.mode else 'not '}self.training:"]
            lines += [f"        {line}" for line in _lines(block, step)]
            lines += ["    else:"]
            lines += [f"        {line}" for line in _lines(block, step.other)]
    lines.append(f"    return {_pack(block.returns, block.results)}")
    return "\n".join(lines)


def _pack(how: str, variables: tuple[int, ...]) -> str:
    names = [f"v{variable}" for variable in variables]
    return names[0] if how == "tensor" or len(names) == 1 else PACKINGS[how].format(*names)


def _lines(block: Block, step: Step) -> Iterator[str]:
    inputs = [f"v{variable}" for variable in step.inputs]
    targets = ", ".join(f"v{variable}" for variable in step.results)
    if step.operation is not None:
        yield f"{targets} = {step.operation.source.format(*inputs, m=step.path)}"
        return
    inner = block.children[block.aliases.get(step.path, step.path)]
    packed = inputs[0] if len(inputs) == 1 else PACKINGS[inner.packed].format(*inputs)
    if len(step.results) == 1 or inner.returns == "tuple":
        yield f"{targets} = self.{step.path}({packed})"
    else:
        yield f"packed = self.{step.path}({packed})"
        for variable, key in zip(step.results, KEYS[inner.returns], strict=True):
            yield f"v{variable} = packed{key}"


_counter = itertools.count()


def build(block: Block, seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The module that runs the block's source, with weights from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _module(block).to(dtype)


def _module(block: Block) -> nn.Module:
    import operator

    filename = f"<random network {next(_counter)}>"
    text = source_of(block)
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"torch": torch, "F": F, "operator": operator, "Pair": Pair}
    exec(compile(text, filename, "exec"), namespace)
    kind = type(f"Random{len(block.steps)}", (nn.Module,), {"forward": namespace["forward"]})
    module = kind()
    made: dict[str, Any] = {}
    for path, child in block.children.items():
        made[path] = _module(child) if isinstance(child, Block) else eval(child)
        _register(module, path, made[path])
    for path, target in block.aliases.items():
        _register(module, path, made[target])
    return module


def set_modes(module: nn.Module, block: Block, training: bool) -> None:
    """Train or eval mode, but the other one for the blocks that are marked so."""
    module.train(training)
    for path, child in block.children.items():
        if isinstance(child, Block):
            set_modes(module.get_submodule(module_path(path)), child, training != child.evaluated)


def _register(module: nn.Module, path: str, child: Any) -> None:
    """``layers[2]`` goes into a ModuleList, ``heads['a']`` into a ModuleDict, others are attributes."""
    container, _, key = path.rstrip("]").partition("[")
    if not key:
        if isinstance(child, torch.Tensor) and not isinstance(child, nn.Parameter):
            module.register_buffer(path, child)
        else:
            setattr(module, path, child)
    elif key.startswith("'"):
        if not hasattr(module, container):
            setattr(module, container, nn.ModuleDict())
        getattr(module, container)[key.strip("'")] = child
    else:
        if not hasattr(module, container):
            setattr(module, container, nn.ModuleList())
        getattr(module, container).append(child)


def module_path(path: str) -> str:
    """``layers[2]`` as modules are named: ``layers.2``."""
    return path.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "")


# ------------------------------------------------------------------------------------------- strategies


@st.composite
def blocks(draw: st.DrawFn, takes: tuple[str, ...], depth: int = 2) -> Block:
    """A block that takes tensors of these kinds."""
    block = Block(takes)
    if len(takes) == 2 and depth < 2:
        block.packed = draw(st.sampled_from(["plain", "tuple", "dict"]))
    block.evaluated = depth < 2 and draw(st.integers(0, 9)) == 9
    kinds = dict(enumerate(takes))
    for _ in range(draw(st.integers(1, 7 if depth == 2 else 4))):
        _add_step(draw, block, kinds, depth)
    if not set(kinds.values()) - {"ids", "states"}:
        block.children["embedding"] = _EMBEDDING.module
        _append(block, kinds, Step((0,), (), _EMBEDDING, "embedding"), _EMBEDDING.gives)
    tensors = [variable for variable, kind in kinds.items() if kind not in ("ids", "states")]
    last = [variable for variable in tensors if variable >= len(takes)] or tensors
    second = draw(st.sampled_from(tensors))
    block.results = (last[-1],)
    if draw(st.booleans()) and second != last[-1]:
        block.results = (last[-1], second)
        block.returns = draw(st.sampled_from(["tuple", "list", "dict", "Pair"]))
    block.gives = tuple(kinds[variable] for variable in block.results)
    return block


def _add_step(draw: st.DrawFn, block: Block, kinds: dict[int, str], depth: int) -> None:
    repeated = [path for path, child in block.children.items() if isinstance(child, Block)]
    choice = draw(st.integers(0, 9))
    if choice < 2 and depth > 0:
        count = draw(st.integers(1, 2))
        inputs = tuple(_recent(draw, kinds) for _ in range(count))
        child = draw(blocks(tuple(kinds[i] for i in inputs), depth - 1))
        path = _new_path(draw, block, child)
        _append(block, kinds, Step(inputs, (), None, path), child.gives)
    elif choice == 2 and repeated:
        path = draw(st.sampled_from(repeated))
        child = block.children[path]
        candidates = [[v for v, kind in kinds.items() if kind == wanted] for wanted in child.takes]
        if all(candidates):
            inputs = tuple(draw(st.sampled_from(variables)) for variables in candidates)
            _append(block, kinds, Step(inputs, (), None, _maybe_alias(draw, block, path)), child.gives)
    elif choice == 3:
        first = _draw_operation(draw, block, kinds)
        kind = kinds[first[0][0]] if first[1].gives == ("same",) else first[1].gives[0]
        if len(first[1].gives) == 1:
            _append_branch(draw, block, kinds, first, kind)
    else:
        inputs, operation, path = _draw_operation(draw, block, kinds)
        gives = tuple(kinds[inputs[0]] if kind == "same" else kind for kind in operation.gives)
        _append(block, kinds, Step(inputs, (), operation, path), gives)


def _append(block: Block, kinds: dict[int, str], step: Step, gives: tuple[str, ...]) -> None:
    results = tuple(range(len(kinds), len(kinds) + len(gives)))
    kinds.update(zip(results, gives, strict=True))
    block.steps.append(Step(step.inputs, results, step.operation, step.path))


def _append_branch(draw: st.DrawFn, block: Block, kinds: dict[int, str], first: Any, kind: str) -> None:
    """The same kind of value computed in one way in train mode and in another way in eval mode."""
    inputs, operation, path = first
    same = {v: k for v, k in kinds.items() if k == kind}
    if not same:
        return
    result = (len(kinds),)
    fitting = [op for op in OPERATIONS if op.takes[0] == "same" and op.gives == ("same",)]
    second_operation = draw(st.sampled_from(fitting))
    second_inputs = tuple(draw(st.sampled_from(list(same))) for _ in second_operation.takes)
    second_path = _module_for(draw, block, second_operation)
    mode = draw(st.booleans())
    other = Step(second_inputs, result, second_operation, second_path)
    block.steps.append(Step(inputs, result, operation, path, mode, other))
    kinds[result[0]] = kind


def _recent(draw: st.DrawFn, kinds: dict[int, str]) -> int:
    """One of the variables, the latest ones more often."""
    return draw(st.sampled_from([v for v, kind in kinds.items() if kind != "states"][::-1]))


def _draw_operation(
    draw: st.DrawFn, block: Block, kinds: dict[int, str]
) -> tuple[tuple[int, ...], Operation, str]:
    first = _recent(draw, kinds)
    kind = kinds[first]
    present = set(kinds.values())
    fitting = [
        op
        for op in OPERATIONS
        if (op.takes[0] == kind or (op.takes[0] == "same" and kind != "ids"))
        and all(other in ("same", *present) for other in op.takes[1:])
    ]
    operation = draw(st.sampled_from(fitting))
    others = [v for v, k in kinds.items() if k == kind]
    inputs = (first, *(draw(st.sampled_from(others)) for _ in operation.takes[1:]))
    return inputs, operation, _module_for(draw, block, operation)


def _module_for(draw: st.DrawFn, block: Block, operation: Operation) -> str:
    """Path of the module that the operation calls: a new one, or one that there is already."""
    if operation.module is None:
        return ""
    present = [path for path, child in block.children.items() if child == operation.module]
    if present and draw(st.booleans()):
        return _maybe_alias(draw, block, draw(st.sampled_from(present)))
    return _new_path(draw, block, operation.module)


def _maybe_alias(draw: st.DrawFn, block: Block, path: str) -> str:
    child = block.children[path]
    is_module = isinstance(child, Block) or (child.startswith("nn.") and "Parameter" not in child)
    if not is_module or draw(st.integers(0, 3)):
        return path
    alias = f"alias{len(block.aliases)}"
    block.aliases[alias] = path
    return alias


def _new_path(draw: st.DrawFn, block: Block, child: str | Block) -> str:
    number = len(block.children)
    is_module = isinstance(child, Block) or (child.startswith("nn.") and "Parameter" not in child)
    style = draw(st.sampled_from(["plain", "plain", "plain", "list", "dict"])) if is_module else "plain"
    if style == "list":
        path = f"layers[{sum(path.startswith('layers[') for path in block.children)}]"
    elif style == "dict":
        path = f"heads['h{number}']"
    else:
        path = f"m{number}"
    block.children[path] = child
    return path
