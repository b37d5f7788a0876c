"""Finds what the axes of a value mean, from the network that makes it.

The original network runs on its example inputs, on tensors without data where that works. Its layers say
which axis holds the channels: a convolution, a norm, a linear or recurrent layer, a transformer. A second run
with one more sample says which axis is the batch. Where no layer speaks, a run at another size of each input
axis says which axes are positions.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from grl_surgery.capture.python_state import preserve_python_state
from grl_surgery.isolation.rng_state import preserve_rng_state
from grl_surgery.isolation.tensor_copy import clone, on_meta, runs_slowly_on_meta, with_tensors
from grl_surgery.loading.inputs import as_arguments
from grl_surgery.nn.axis_roles import AxisRoles, Shape
from grl_surgery.points import escape, split_items, split_number
from grl_surgery.surgery.describe import quiet

__all__ = ["read_axes"]


@dataclass
class _Seen:
    """What one run of the network showed."""

    shape: Shape | None = None
    letters: str = ""
    batches: list[int] = field(default_factory=list)


def read_axes(base: nn.Module, point: str, inputs: Any, shape: Shape) -> AxisRoles:
    """What each axis of the value at a point means.

    Example:
        >>> net = nn.Sequential(nn.Conv1d(9, 16, 5), nn.ReLU())
        >>> read_axes(net, "1", torch.randn(4, 9, 128), (4, 16, 124))
        AxisRoles(letters='ncp', batch=4, grown=(5, 16, 124))

    Args:
        base: The network without surgery; not changed.
        point: Name of the point.
        inputs: Arguments of forward.
        shape: Shape of the value at the point for these inputs.
    """
    first = _look(base, point, inputs)
    look = functools.partial(_look, base, point, sizes_only=True)
    letters = first.letters or "?" * len(shape)
    if first.shape is None or len(first.shape) != len(shape):
        return AxisRoles("?" * len(shape))
    if any(a != b and letter != "p" for a, b, letter in zip(first.shape, shape, letters, strict=True)):
        return AxisRoles("?" * len(shape))  # another value than the one that the name means in a graph
    shape = first.shape
    axis, size, grown = _batch_axis(look, inputs, first)
    more = grown.shape if grown is not None and grown.shape and len(grown.shape) == len(shape) else None
    if more == shape and _has_counts(inputs):
        more = None  # counts among the inputs may say how many rows there are
    letters = _with_batch(letters, shape, more, size)
    if "c" not in letters:
        letters = _with_positions(letters, shape, look, inputs, axis)
    return AxisRoles(letters, size, more)


def _batch_axis(
    look: Callable[[Any], _Seen], inputs: Any, first: _Seen
) -> tuple[int, int | None, _Seen | None]:
    """The axis of the inputs that is the batch, its size, and what is seen with one more sample.

    It is the axis that layers which know their batch see growing; without such layers it is the first one.
    """
    seen: dict[int, tuple[int, int, _Seen]] = {}
    for axis in (0, 1):
        size, larger = _one_more(inputs, axis)
        if larger is None or size is None:
            continue
        run = look(larger)
        grew = sum(a != b for a, b in zip(first.batches, run.batches, strict=False))
        seen[axis] = (grew, size, run)
        if axis == 0 and grew == len(first.batches):
            break
    if not seen:
        return 0, None, None
    axis = max(seen, key=lambda key: (seen[key][0], -key))
    _, size, run = seen[axis]
    return axis, size, run


def _with_batch(letters: str, shape: Shape, more: Shape | None, size: int | None) -> str:
    """The letters with the axis that grows with the batch, and no other, as ``n``."""
    if more is None or size is None:
        return letters if "n" in letters or letters[:1] != "?" else f"n{letters[1:]}"
    axes = [axis for axis, (a, b) in enumerate(zip(shape, more, strict=True)) if b == a + 1]
    known = letters.find("n")
    axis = known if known in axes else axes[0] if axes else None
    found = ["?" if letter == "n" else letter for letter in letters]
    if axis is not None:
        found[axis] = "n"
    return "".join(found)


def _with_positions(
    letters: str, shape: Shape, look: Callable[[Any], _Seen], inputs: Any, batch_axis: int
) -> str:
    """The letters with the axes that change with the size of the input as positions, one left as ``c``."""
    found = list(letters)
    if found.count("?") > 1:
        for axis in range(_rank(inputs)):
            if axis == batch_axis:
                continue
            other = look(_doubled(inputs, axis)).shape
            if other is not None and len(other) == len(shape):
                for place, (before, after) in enumerate(zip(shape, other, strict=True)):
                    if before != after and found[place] == "?":
                        found[place] = "p"
    left = [place for place, letter in enumerate(found) if letter == "?"]
    wide = [place for place in left if shape[place] > 1]
    if "n" in found and len(wide or left) == 1:
        (channels,) = wide or left
        found = ["c" if p == channels else "p" if p in left else old for p, old in enumerate(found)]
    return "".join(found)


# ------------------------------------------------------------------------------------------ other inputs


def _first(inputs: Any) -> Tensor | None:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    return tensors[0] if tensors else None


def _has_counts(inputs: Any) -> bool:
    """Whether there is a vector of whole numbers among the inputs, such as lengths."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return any(t.dim() == 1 and not t.is_floating_point() and t.dtype != torch.bool for t in tensors)


def _rank(inputs: Any) -> int:
    first = _first(inputs)
    return 0 if first is None else first.dim()


def _one_more(inputs: Any, axis: int) -> tuple[int | None, Any]:
    """The size of an axis of the first input, and inputs with one more there; (None, None) without one."""
    args, kwargs = as_arguments(inputs)
    values = (*args, *kwargs.values())
    listed = next((v for v in values if isinstance(v, list) and v and isinstance(v[0], Tensor)), None)
    if listed is not None and values and values[0] is listed:  # a batch that is a list of images
        if axis:
            return None, None
        size = len(listed)
        longer = [[*v, v[0]] if isinstance(v, list) and len(v) == size else v for v in values]
    else:
        first = _first(values)
        if first is None or first.dim() <= axis:
            return None, None
        size = first.size(axis)
        longer = [
            pytree.tree_map_only(Tensor, lambda t: _repeated(t, _axis_of(t, axis, size)), v) for v in values
        ]
    names = list(kwargs)
    return size, (
        dict(zip(names, longer[len(args) :], strict=True))
        if isinstance(inputs, Mapping)
        else tuple(longer[: len(args)])
    )


def _axis_of(tensor: Tensor, axis: int, size: int) -> int | None:
    """The axis of a further input that is the batch: the same one, the first, or any other of that size."""
    order = [axis, 0, *range(tensor.dim())]
    if tensor.is_nested:
        return 0 if tensor.size(0) == size else None
    return next((a for a in order if a < tensor.dim() and tensor.shape[a] == size), None)


def _repeated(tensor: Tensor, axis: int | None) -> Tensor:
    """The tensor with its first entry along an axis once more.

    A vector that says for each node of a batch of graphs to which graph it belongs gets a new graph.
    """
    if axis is None:
        return tensor
    if tensor.is_nested:
        rows = tensor.unbind()
        return torch.nested.as_nested_tensor([*rows, rows[0]], layout=tensor.layout)
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if whole and tensor.dim() == 1 and tensor.numel() > 1 and tensor[0] == 0:
        steps = tensor[1:] - tensor[:-1]
        if bool(((steps == 0) | (steps == 1)).all()):
            return torch.cat([tensor, tensor[-1:] + 1])
    return torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)


def _doubled(inputs: Any, axis: int) -> Any:
    first = _first(inputs)
    assert first is not None
    size = first.shape[axis]

    def double(tensor: Tensor) -> Tensor:
        fits = tensor.dim() > axis and tensor.shape[axis] == size
        return torch.cat([tensor, tensor], dim=axis) if fits else tensor

    return pytree.tree_map_only(Tensor, double, inputs)


# ---------------------------------------------------------------------------------------------- one run


def _look(base: nn.Module, point: str, inputs: Any, *, sizes_only: bool = False) -> _Seen:
    """Run the network once and look at the value of a point; as far as the run comes."""
    seen = _Seen()
    recurrent = runs_slowly_on_meta(base)
    with (
        preserve_rng_state(),
        preserve_python_state(dict(base.named_modules())),
        quiet(),
        torch.enable_grad(),  # without gradients, transformers of torch take another way inside
    ):
        for training in (False, True):  # one mode may lack the point
            run = functools.partial(_run, base, point, inputs, training, sizes_only)
            seen = run(on_meta) if not recurrent else _Seen()
            if seen.shape is None:  # it makes tensors on the host
                with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                    seen = run(functools.partial(mode.from_tensor, static_shapes=True))
            if seen.shape is None:  # it looks at values
                seen = run(clone)
            if seen.shape is not None:
                break
    return seen


def _run(
    base: nn.Module,
    point: str,
    inputs: Any,
    training: bool,
    sizes_only: bool,
    copied: Callable[[Tensor], Tensor],
) -> _Seen:
    seen = _Seen()
    with contextlib.suppress(Exception):  # what was seen until then is enough
        tree = with_tensors(base, copied=copied).train(training)
        for parameter in tree.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        args, kwargs = pytree.tree_map_only(Tensor, copied, as_arguments(inputs))
        observer = _Observer(tree, point, seen, sizes_only)
        observer.record_arguments(base, args, kwargs)
        with observer.watching(), observer:
            tree(*args, **kwargs)
    return seen


class _EnoughSeenError(Exception):
    """Ends a run of which nothing more is needed."""


class _Observer(TorchFunctionMode):
    """Gives the values of a running network letters for their axes, and records the one at a point."""

    def __init__(self, tree: nn.Module, point: str, seen: _Seen, sizes_only: bool) -> None:
        super().__init__()
        self.sizes_only = sizes_only
        self.tree = tree
        self.seen = seen
        whole, self.items = split_items(point)
        self.name, self.number = split_number(whole)
        self.letters: dict[int, tuple[Tensor, str]] = {}
        self.counts: Counter[str] = Counter()
        self.around: list[str] = []

    # -- where the run is

    def record_arguments(self, base: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The arguments of forward are points by their names."""
        names = list(inspect.signature(base.forward).parameters)
        for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
            self.record(name, value)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the calls of the tree's modules."""
        paths: dict[int, list[str]] = {}
        for path, module in self.tree.named_modules(remove_duplicate=False):
            paths.setdefault(id(module), []).append(path)
        handles: list[Any] = []
        for module in self.tree.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            names = paths[id(module)]
            enter = functools.partial(self._enter, names[0])
            leave = functools.partial(self._leave, names)
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str, module: nn.Module, args: Any) -> None:
        self.around.append(path)

    def _leave(self, paths: Sequence[str], module: nn.Module, args: Any, output: Any) -> None:
        self.around.pop()
        read = _first(args)
        said = list(_said_by(module, output))
        for value, letters in said:
            self.keep(value, letters)
        # What a layer reads has its axes in the order of what it returns first.
        if read is not None and said and "n" in said[0][1] and len(said[0][1]) == read.dim():
            self.seen.batches.append(read.shape[said[0][1].index("n")])
        for path in paths:
            self.record(escape(path), output)

    def record(self, name: str, value: Any) -> None:
        """Keep what shows of the value, if it is the one at the point.

        Raises:
            _EnoughSeenError: The value was seen, and a layer that knows which axis is the batch.
        """
        if self.seen.shape is not None and self.seen.batches:
            raise _EnoughSeenError
        self.counts[name] += 1
        if name != self.name or (self.number is not None and self.counts[name] != self.number):
            return
        with contextlib.suppress(KeyError, IndexError, TypeError):
            for item in self.items:
                value = value[item]
        if isinstance(value, Tensor) and self.seen.shape is None:
            shape, letters = tuple(value.shape), self.of(value)  # read both first: that is recorded as well
            self.seen.shape, self.seen.letters = shape, letters

    # -- letters

    def of(self, value: Any) -> str:
        """The letters of a value; empty where none are known."""
        found = self.letters.get(id(value))
        return found[1] if found and len(found[1]) == found[0].dim() else ""

    def keep(self, value: Any, letters: str) -> None:
        """Remember the letters of a value, and the value, so that its id stays its own."""
        if isinstance(value, Tensor) and letters and len(letters) == value.dim():
            self.letters[id(value)] = (value, letters)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function of torch and derive the letters of what it returns."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = str(getattr(func, "__name__", ""))
        if not self.sizes_only or name.strip("_") in _CHANNELS_FIRST:
            self._look_at(func, name, args, kwargs, output)
        path = escape(self.around[-1]) if self.around else ""
        called = _operation(name)
        self.record(f"{path}.{called}" if path else called, output)
        return output

    def _look_at(self, func: Any, name: str, args: Any, kwargs: Any, output: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if made and tensors:
            with contextlib.suppress(Exception):  # letters are a help; the run goes on without them
                self._derive(func, name, args, kwargs, tensors, made)

    def _derive(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], made: list[Tensor]
    ) -> None:
        read = tensors[0]
        known = self.of(read)
        plain = name.strip("_")
        if plain in _CHANNELS_FIRST:
            letters = "nc" + "p" * (made[0].dim() - 2)
            if read.dim() == made[0].dim() and not plain.startswith(("group", "instance")):
                self.seen.batches.append(read.shape[0])
            self.keep(made[0], letters)
        elif (
            plain in ("linear", "matmul")
            and made[0].dim() >= 2
            and (plain == "linear" or tensors[-1].dim() == 2)
        ):
            rest = known or "?" * read.dim()
            mixes_positions = "c" in rest and rest[-1] != "c"
            self.keep(made[0], rest if mixes_positions else f"{rest[:-1]}c")
        elif plain == "layer_norm":
            shape = args[1] if len(args) > 1 else kwargs.get("normalized_shape", ())
            self.keep(made[0], known or ("?" * (read.dim() - 1) + "c" if len(shape) == 1 else ""))
        elif plain == "embedding":
            ids = next((t for t in tensors if not t.is_floating_point()), read)
            self.keep(made[0], (self.of(ids) or "?" * ids.dim()) + "c")
        elif plain in _RESHAPING and known:
            self.keep(made[0], _regrouped(known, tuple(read.shape), tuple(made[0].shape)))
        elif plain in _MOVING and known:
            for value, letters in zip(made, _probed(func, args, kwargs, read, known), strict=False):
                self.keep(value, letters)
        elif plain not in _MIXING:
            self._inherit(plain, tensors, made)

    def _inherit(self, name: str, tensors: list[Tensor], made: list[Tensor]) -> None:
        """What keeps the shape keeps the letters: the best known ones among those of its arguments."""
        for value in made:
            same = [
                self.of(tensor)
                for tensor in tensors
                if tensor.shape == value.shape
                or ((name in _SAME_AXES or "pool" in name) and tensor.dim() == value.dim())
            ]
            best = min((letters for letters in same if letters), key=lambda s: s.count("?"), default="")
            if not best and "pool" in name and value.dim() == _dims_of_pool(name):
                best = "nc" + "p" * (value.dim() - 2)
            self.keep(value, best)


def _operation(name: str) -> str:
    """What the name of a function of torch is as the name of a point."""
    bare = name.strip("_") if name.startswith("__") else name
    return bare[:-1] if bare in ("add_", "sub_", "mul_", "div_") else bare


_CHANNELS_FIRST = {
    *(f"conv{d}d" for d in (1, 2, 3)),
    *(f"conv_transpose{d}d" for d in (1, 2, 3)),
    "batch_norm",
    "group_norm",
    "instance_norm",
}
_RESHAPING = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"}
_MOVING = {
    *("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t"),
    *("mean", "sum", "amax", "amin", "max", "min", "median", "std", "var", "norm", "logsumexp"),
    *("squeeze", "unsqueeze", "getitem", "select", "narrow", "unbind", "select_scatter"),
}
_MIXING = {"bmm", "baddbmm", "einsum", "tensordot", "scaled_dot_product_attention", "expand", "stack"}
_SAME_AXES = {
    *("cat", "concat", "concatenate", "chunk", "split", "tensor_split", "split_with_sizes"),
    *("pad", "interpolate", "upsample", "roll", "repeat_interleave", "index_select", "dropout"),
}


def _dims_of_pool(name: str) -> int:
    return next((dims + 2 for dims in (1, 2, 3) if f"pool{dims}d" in name), 0)


def _regrouped(letters: str, before: Shape, after: Shape) -> str:
    """The letters after a reshape: axes that stay, that are merged, and that are split."""
    made, i, j = "", 0, 0
    while i < len(before) and j < len(after):
        start, first = i, j
        left, right = before[i], after[j]
        while left != right:
            if left < right:
                i += 1
                left *= before[i]
            else:
                j += 1
                right *= after[j]
        merged = {letter for letter, size in zip(letters[start : i + 1], before[start:], strict=False)}
        if i == start and j == first:
            made += letters[i]
        elif j == first:
            made += _merged(merged)
        else:
            made += ("p" if merged == {"p"} else "?") * (j - first + 1)
        i, j = i + 1, j + 1
    rest = letters[i:] if len(after) - j == len(before) - i else "p" * (len(after) - j)
    return made + rest


def _merged(letters: set[str]) -> str:
    if letters == {"p"}:
        return "p"
    return "?" if letters & {"n", "?"} else "c"


_DISTINCT = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069)


def _probed(func: Any, args: Any, kwargs: Any, read: Tensor, letters: str) -> list[str]:
    """The letters of what a function returns that moves or drops axes: it runs on axes of distinct sizes."""
    sizes = [distinct if size != 1 else 1 for size, distinct in zip(read.shape, _DISTINCT, strict=False)]
    probe = torch.empty(sizes, device="meta")
    moved = func(*pytree.tree_map(lambda v: probe if v is read else v, args), **kwargs)
    results = [leaf for leaf in pytree.tree_leaves(moved) if isinstance(leaf, Tensor)]
    ones = [letter for letter, size in zip(letters, sizes, strict=True) if size == 1]
    named = {size: letter for letter, size in zip(letters, sizes, strict=True) if size != 1}
    found = []
    for result in results:
        if result.dim() == len(letters) and not any(
            size in named and named[size] != letters[axis] for axis, size in enumerate(result.shape)
        ):
            found.append(
                "".join(
                    "p" if size == 1 and old != 1 else letter
                    for letter, size, old in zip(letters, result.shape, sizes, strict=True)
                )
            )
        else:
            made = [named.get(size, "?") for size in result.shape]
            found.append("".join(ones[0] if letter == "?" and len(ones) == 1 else letter for letter in made))
    return found


# --------------------------------------------------------------------------------- what layers say of axes


def _said_by(module: nn.Module, output: Any) -> Iterator[tuple[Tensor, str]]:
    """The tensors that a layer returns whose axes it names, and the letters of these."""
    if isinstance(module, nn.RNNBase) and isinstance(output, tuple) and len(output) == 2:
        batched = "npc" if module.batch_first else "pnc"
        values, hidden = output
        if isinstance(values, PackedSequence):
            yield values.data, "?c"
        elif isinstance(values, Tensor):
            yield values, batched if values.dim() == 3 else "pc"
        for state in hidden if isinstance(hidden, tuple) else (hidden,):
            if isinstance(state, Tensor):
                yield state, "pnc" if state.dim() == 3 else "pc"
    elif isinstance(module, nn.RNNCellBase):
        for state in output if isinstance(output, tuple) else (output,):
            yield state, "nc"
    elif isinstance(module, nn.MultiheadAttention) and isinstance(output, tuple):
        yield output[0], "npc" if module.batch_first else "pnc"
        if isinstance(output[1], Tensor):
            yield output[1], "n" + "?" * (output[1].dim() - 1)
    elif isinstance(module, _TRANSFORMERS) and isinstance(output, Tensor):
        attention = next((m for m in module.modules() if isinstance(m, nn.MultiheadAttention)), None)
        if attention is not None:
            yield output, "npc" if attention.batch_first else "pnc"
    elif isinstance(output, Tensor):
        letters = _LIBRARY_FORMATS.get(_format(module), "")
        if len(letters) == output.dim():
            yield output, letters


_TRANSFORMERS = (
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
    nn.Transformer,
)
_LIBRARY_FORMATS = {"NCHW": "ncpp", "NHWC": "nppc", "NLC": "npc", "NCL": "ncp"}


def _format(module: nn.Module) -> str:
    """timm writes the layout of what a layer returns into ``output_fmt``."""
    value = getattr(module, "output_fmt", "")
    return str(getattr(value, "value", value))
