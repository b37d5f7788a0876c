"""Tries surgery on one network of the ecosystem; an oracle of plain hooks judges each trial."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

import grl_surgery as gs
from grl_surgery.zoo.hooked import (
    Recording,
    Seen,
    Spot,
    call,
    gradients,
    leaves,
    record,
    reversed_at,
)

__all__ = ["Trials", "try_everything"]

Mode = Literal["train", "eval"]
_MODES: tuple[Mode, Mode] = ("train", "eval")


class Wrong(Exception):
    """A result that is not the oracle's."""


class Disagrees(Exception):
    """The proof says otherwise than the oracle."""


class Skipped(Exception):
    """There is nothing to try here."""


@dataclass
class Trials:
    """What came of the trials of one network: for each, ``ok`` or what stands against it."""

    scope: str = ""
    places: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    splice_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    role: str
    name: str
    spot: Spot


def try_everything(model: nn.Module, inputs: Any) -> Trials:
    """Try every cut and every use of one network; the model's own state is put back after each run."""
    return _Network(model, inputs).trials()


class _Network:
    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = model, inputs
        self.state = {name: value.detach().clone() for name, value in _values(model)}
        self.result = Trials()
        self.known: dict[tuple[Mode, Spot | None], tuple[dict[str, torch.Tensor | None], Any]] = {}
        self.spliced: tuple[nn.Module, _Place] | None = None
        self.edges: dict[_Place, Any] = {}

    # --------------------------------------------------------------------------------------- the trials

    def trials(self) -> Trials:
        seen: dict[Mode, Recording] = {mode: self._record(mode) for mode in _MODES}
        batch = next((value.shape[0] for value in leaves(self.inputs) if value.dim()), 0)
        places = self._with_one_edge(list(_places(seen, batch)))
        if not places:
            self.result.outcomes["built"] = "skipped: no gradient reaches a module in either mode"
            return self.result
        for number, place in enumerate(places):
            self.result.places[place.role] = place.name
            if place.role == "head":
                continue
            self._try(place.role, functools.partial(self._cut, place, _MODES[number % 2]))
        head = next((place for place in places if place.role == "head"), None)
        if head is not None:
            self._try("head", functools.partial(self._head, head))
        if self.spliced is not None:
            spliced, place = self.spliced
            self._try("pickle", functools.partial(self._pickled, place))
            for name, inputs in self._other_inputs():
                self._try(name, functools.partial(self._same, spliced, inputs, place.spot, "train"))
            self._try("strip", functools.partial(self._stripped, spliced))
            self._try("deepcopy", functools.partial(self._copied, spliced, place))
            if hasattr(self.model, "save_pretrained"):
                self._try("save_pretrained", functools.partial(self._saved, spliced))
        return self.result

    def _try(self, role: str, trial: Callable[[], str | None]) -> None:
        torch.set_grad_enabled(True)
        try:
            note = trial()
            self.result.outcomes[role] = "ok"
            if note:
                self.result.notes.append(f"{role}: {note}")
        except Skipped as error:
            self.result.outcomes[role] = f"skipped: {error}"
        except Wrong as error:
            self.result.outcomes[role] = f"wrong: {error}"
        except Disagrees as error:
            self.result.outcomes[role] = f"disagrees: {error}"
        except MemoryError:
            raise
        except Exception as error:
            if "can't allocate memory" in str(error):
                raise MemoryError from error
            self.result.outcomes[role] = _failure(error)
        self._put_back()

    def _cut(self, place: _Place, made_in: Mode) -> str | None:
        """Cut in one mode; used and proved in both."""
        before = time.process_time()
        keyword: dict[str, Any] = {"after": place.name}
        if place.spot.argument is not None:
            edge = self._edge(place)
            if edge is None:
                raise gs.SurgeryError(
                    f"the listing has no edge into argument {place.spot.argument} of {place.name}"
                )
            keyword = {"edge": edge}
        if place.spot.operation:
            keyword["example_inputs"] = self.inputs
        self.model.train(made_in == "train")
        spliced = gs.insert_grl(self.model, **keyword)
        self.result.splice_ms.append(1e3 * (time.process_time() - before))
        if len(gs.reversals(spliced)) != 1:
            raise Wrong(f"{len(gs.reversals(spliced))} reversals")
        if set(spliced.state_dict()) != set(self.model.state_dict()):
            raise Wrong("other keys in the state_dict")
        if not place.spot.operation:
            self.result.scope = self.result.scope or _scope(spliced, self.model)
        silent = []
        for mode in _MODES:
            note = self._same(spliced, self.inputs, place.spot, mode)
            if note == _SILENT:
                silent.append(mode)
                continue
            if place.role in ("middle", "operation") or mode != made_in:
                self._prove(spliced, mode)
        if place.role == "middle" or self.spliced is None:
            self.spliced = spliced, place
        return f"no gradient comes in {' and '.join(silent)} mode" if silent else None

    def _with_one_edge(self, places: list[_Place]) -> list[_Place]:
        """The places with the first edge that is listed; in eval mode torch's own blocks run in one step."""
        self.model.eval()
        edges = [place for place in places if place.role == "edge"]
        listed = (place for place in edges if self._edge(place) is not None)
        chosen = next(listed, edges[0] if edges else None)
        return [place for place in places if place.role != "edge" or place is chosen]

    def _edge(self, place: _Place) -> Any:
        """The edge into that argument of that operation, out of the listing; None where it is not there."""
        if place in self.edges:
            return self.edges[place]
        prefix, found = "", None
        depth = place.name.count(".") + 1
        block = self.model.get_submodule(place.spot.path)
        for model, prefix, inputs in (
            (self.model, "", self.inputs),
            (self.model, "", None),  # a run lists the operations of functions that a graph takes whole
            (block, f"{place.spot.path}.", None),
        ):
            name = place.name.removeprefix(prefix)
            with contextlib.suppress(gs.SurgeryError):
                listed = gs.graph(model, depth=1 if prefix else depth, example_inputs=inputs)
                into = [edge for edge in listed.edges if edge.target == name]
                found = next((e for e in into if str(e.arg) == str(place.spot.argument)), None)
                if found:
                    break
        if found is not None:
            found = type(found)(prefix + found.source, prefix + found.target, found.arg)
        self.edges[place] = found
        return found

    def _same(self, spliced: nn.Module, inputs: Any, spot: Spot, mode: Mode) -> str | None:
        """Compare forward and gradients with those of the hooked original, bit for bit."""
        plain, plain_output = self._run(inputs, mode, None)
        wanted, wanted_output = self._run(inputs, mode, spot)
        if not _same_bits(plain_output, wanted_output):
            raise Skipped("the oracle's hook changes the forward")
        spliced.train(mode == "train")
        with self._left_as_it_was(spliced):
            output = call(spliced, inputs)
            found = gradients(spliced, output)
        difference = _difference(output, wanted_output)
        if difference:
            raise Wrong(f"in {mode} mode {difference}")
        off = [name for name in wanted if not _equal(found.get(name), wanted[name])]
        if off and self._is_rounding(off, found, wanted):
            return f"in {mode} mode {len(off)} gradients differ in the last bits"
        if off:
            kept = sum(_equal(found.get(name), plain[name]) for name in off)
            count = f"{len(off)} of {len(wanted)} gradients, {kept} of them not reversed"
            raise Wrong(f"in {mode} mode {count}, such as {off[0]}")
        return _SILENT if all(_equal(plain[name], wanted[name]) for name in wanted) else None

    def _is_rounding(self, names: list[str], found: Any, wanted: Any) -> bool:
        for name in names:
            one, other = found.get(name), wanted[name]
            if (
                one is None
                or other is None
                or not torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
            ):
                return False
        return True

    def _prove(self, spliced: nn.Module, mode: Mode) -> None:
        """The oracle has found that all is right: so must the proof."""
        with self._left_as_it_was(spliced):
            report = gs.verify_flip(spliced, self.model, self.inputs, mode=mode)
        if not report.ok:
            raise Disagrees(f"in {mode} mode the proof says: {_line(report)}")

    def _head(self, place: _Place) -> str | None:
        """The task's gradients are the original's; those of the domain are reversed at the head alone."""
        m = gs.attach_domain_head(
            self.model,
            after=place.name,
            num_domains=2,
            name="domain",
            hidden=16,
            dropout=0.0,
            example_inputs=self.inputs,
        )
        head = copy.deepcopy(m.get_submodule("domain"))
        for name in [name for name, part in head.named_modules() if type(part) is gs.GradientReversal]:
            head.set_submodule(name, nn.Identity())
        for mode in _MODES:
            plain, wanted = self._run(self.inputs, mode, None)
            m.train(mode == "train")
            head.train(mode == "train")
            with self._left_as_it_was(m):
                output = call(m, self.inputs)
                task, logits = _without_logits(output)
                if difference := _difference(task, wanted):
                    raise Wrong(f"in {mode} mode {difference}")
                domain = gradients(m, _weighted(logits))
            with self._left_as_it_was(m):  # a spectral norm goes on in every call
                found = gradients(m, task_output(call(m, self.inputs)))
            off = [name for name in plain if not _equal(found.get(name), plain[name])]
            if off and not self._is_rounding(off, found, plain):
                raise Wrong(f"in {mode} mode the task's gradient of {off[0]} is another one")
            self._compare_domain(place.spot, head, domain, logits, mode)
        return None

    def _compare_domain(
        self, spot: Spot, head: nn.Module, found: Any, logits: torch.Tensor, mode: Mode
    ) -> None:
        original = copy.deepcopy(self.model).train(mode == "train")
        caught: list[torch.Tensor] = []

        def catch(value: torch.Tensor) -> torch.Tensor:
            caught.append(value)
            return value

        with reversed_at(original, spot, catch):
            call(original, self.inputs)
        again = head(caught[0])
        if not torch.equal(again, logits):
            raise Skipped("the head reads something else than the value at the point")
        right = gradients(original, _weighted(again))
        for name, wanted in right.items():
            if not _equal(found.get(name), None if wanted is None else -wanted) and not self._is_rounding(
                [name], found, {name: None if wanted is None else -wanted}
            ):
                raise Wrong(f"in {mode} mode the domain's gradient of {name} is not the negative one")

    def _stripped(self, spliced: nn.Module) -> None:
        stripped = gs.strip(spliced)
        if type(stripped) is not type(self.model):
            raise Wrong(f"strip gives a {type(stripped).__name__}")
        if list(stripped.state_dict()) != list(self.model.state_dict()) or gs.reversals(stripped):
            raise Wrong("strip leaves something behind")
        plain, wanted = self._run(self.inputs, "train", None)
        output = call(stripped.train(), self.inputs)
        found = gradients(stripped, output)
        if _difference(output, wanted) or not all(_equal(found.get(name), plain[name]) for name in plain):
            raise Wrong("what strip gives computes something else")

    def _copied(self, spliced: nn.Module, place: _Place) -> str | None:
        return self._same(copy.deepcopy(spliced), self.inputs, place.spot, "eval")

    def _pickled(self, place: _Place) -> str | None:
        try:
            pickle.loads(pickle.dumps(self.model))
        except Exception as error:
            raise Skipped("the original does not pickle") from error
        again = pickle.loads(pickle.dumps(gs.insert_grl(self.model, after=place.name)))
        return self._same(again, self.inputs, place.spot, "eval")

    def _saved(self, spliced: Any) -> None:
        """The original can read what the spliced network saves, or the spliced one has no such method."""
        if not hasattr(spliced, "save_pretrained"):
            raise Skipped("a graph has no save_pretrained")
        original: Any = self.model
        with tempfile.TemporaryDirectory() as folder:
            try:
                original.save_pretrained(folder)
                type(original).from_pretrained(folder)
            except Exception as error:
                raise Skipped("what the original saves is not read back either") from error
        with tempfile.TemporaryDirectory() as folder:
            spliced.save_pretrained(folder)
            read = type(original).from_pretrained(folder)
        state, wanted = read.state_dict(), original.state_dict()
        off = [name for name in wanted if name not in state or not torch.equal(state[name], wanted[name])]
        if off:
            raise Wrong(f"{len(off)} tensors come back otherwise, such as {off[0]}")

    # -------------------------------------------------------------------------------------- other inputs

    def _other_inputs(self) -> Iterator[tuple[str, Any]]:
        """Other sizes and other arguments, where the original takes them."""
        for name, inputs in (*_other_sizes(self.inputs), *self._other_arguments()):
            try:
                with torch.no_grad():
                    original = copy.deepcopy(self.model).train()
                    call(original, inputs)
                    call(original.eval(), inputs)
            except Exception:
                continue
            yield name, inputs

    def _other_arguments(self) -> Iterator[tuple[str, Any]]:
        if not isinstance(self.inputs, Mapping):
            return
        parameters = inspect.signature(self.model.forward).parameters
        ids = next((v for k, v in self.inputs.items() if v.dim() == 2 and not v.is_floating_point()), None)
        for name, value in _FLAGS.items():
            if name in parameters or (name in _THROUGH_KWARGS and "kwargs" in parameters):
                yield f"{name}={value}", {**self.inputs, name: value}
        if ids is not None and "attention_mask" in parameters and "attention_mask" not in self.inputs:
            mask = torch.ones_like(ids)
            yield "attention_mask", {**self.inputs, "attention_mask": mask}
            padded = mask.clone()
            padded[0, -3:] = 0
            yield "padded attention_mask", {**self.inputs, "attention_mask": padded}
        if "labels" in parameters and "labels" not in self.inputs:
            for labels in self._labels(ids):
                inputs = {**self.inputs, "labels": labels}
                with contextlib.suppress(Exception), torch.no_grad():
                    call(copy.deepcopy(self.model).eval(), inputs)
                    yield "labels", inputs
                    return

    def _labels(self, ids: torch.Tensor | None) -> Iterator[torch.Tensor]:
        batch = next(iter(leaves(self.inputs))).shape[0]
        yield torch.zeros(batch, dtype=torch.int64)
        if ids is not None:
            yield torch.ones_like(ids)

    # -------------------------------------------------------------------------------------- the original

    def _record(self, mode: Mode) -> Recording:
        return record(copy.deepcopy(self.model).train(mode == "train"), self.inputs)

    def _run(self, inputs: Any, mode: Mode, spot: Spot | None) -> tuple[dict[str, torch.Tensor | None], Any]:
        key = mode, spot
        if inputs is self.inputs and key in self.known:
            return self.known[key]
        original = copy.deepcopy(self.model).train(mode == "train")
        with reversed_at(original, spot) if spot else contextlib.nullcontext():
            output = call(original, inputs)
        found = gradients(original, output), output
        if inputs is self.inputs:
            self.known[key] = found
        return found

    def _put_back(self) -> None:
        with torch.no_grad():
            for name, value in _values(self.model):
                if name in self.state and value.shape == self.state[name].shape:
                    value.data.copy_(self.state[name])

    @contextlib.contextmanager
    def _left_as_it_was(self, network: nn.Module) -> Iterator[None]:
        """Put back what a run changes: tensors, and what modules count or keep in attributes."""
        before = [(module, _own(module)) for module in network.modules()]
        lists = [(v, [*v]) for _, kept in before for v in kept.values() if type(v) is list]
        try:
            yield
        finally:
            for module, kept in before:
                for key in _own(module).keys() - kept.keys():
                    del vars(module)[key]
                vars(module).update(kept)
            for value, items in lists:
                value[:] = items
            for path, module in network.named_modules():
                with contextlib.suppress(AttributeError):  # a head, or a reversal
                    own = self.model.get_submodule(path)._buffers
                    module._buffers.update((name, own[name]) for name in module._buffers if name in own)
            self._put_back()


_SILENT = "no gradient"
_FLAGS: dict[str, Any] = {
    "output_hidden_states": True,
    "return_dict": False,
    "use_cache": False,
    "output_attentions": True,
}
_THROUGH_KWARGS = ("output_hidden_states", "return_dict")


# ------------------------------------------------------------------------------------------------- places


def _places(seen: Mapping[Mode, Recording], batch: int) -> Iterator[_Place]:
    """Early, middle and late boundaries of modules; an operation, and edges of blocks in the middle.

    Of edges, those nearest to the middle come first. A head reads the value nearest to the middle that has a
    row for each sample: experts have one a token.
    """
    both = [
        item for item in seen["train"].modules if _is_plain(item, seen) and _in(item, seen["eval"].modules)
    ]
    if not both:
        both = [i for mode in _MODES for i in seen[mode].modules if _is_plain(i, seen, strict=False)]
    blocks = [
        item for item in both if any(o.spot.path.startswith(f"{item.spot.path}.") for o in both)
    ] or both
    chosen = [blocks[0], blocks[len(blocks) // 2], blocks[-1]]
    if blocks is not both and len(blocks) < 3:
        chosen = [both[0], both[len(both) // 2], both[-1]]
    for role, item in zip(("early", "middle", "late"), chosen, strict=True) if both else ():
        yield _Place(role, _name_of(item.spot), item.spot)
    sized = [place for place, item in enumerate(blocks) if item.value.dim() and item.value.shape[0] == batch]
    for place in sorted(sized, key=lambda place: abs(place - len(blocks) // 2))[:1]:
        yield _Place("head", _name_of(blocks[place].spot), blocks[place].spot)
    operations = [
        item
        for item in seen["train"].operations
        if item.spot.operation in _TELLING and _is_operation(item, seen)
    ]
    if operations:
        item = operations[len(operations) // 2]
        yield _Place("operation", _operation_name(item, seen), item.spot)
    edges = [i for i in operations if i.spot.operation == "add" and i.tensor_arguments == (0, 1)]
    middle = len(edges) // 2
    for place in sorted(range(len(edges)), key=lambda place: abs(place - middle))[:6]:
        item = edges[place]
        spot = Spot(item.spot.path, operation="add", count=item.spot.count, argument=1)
        yield _Place("edge", _operation_name(item, seen), spot)


def _name_of(spot: Spot) -> str:
    return spot.path + ("" if spot.key is None else f"[{spot.key}]")


def _is_plain(item: Seen, seen: Mapping[Mode, Recording], strict: bool = True) -> bool:
    counts = [seen[mode].calls[item.spot.path] for mode in _MODES]
    return (
        not item.repeated
        and "#" not in item.spot.path
        and (set(counts) == {1} if strict else set(counts) <= {0, 1})
    )


def _in(item: Seen, others: list[Seen]) -> bool:
    return any(other.spot == item.spot for other in others)


def _is_operation(item: Seen, seen: Mapping[Mode, Recording]) -> bool:
    counts = [_count(item, seen[mode]) for mode in _MODES]
    return _is_plain(item, seen) and len(set(counts)) == 1 and _in(item, seen["eval"].operations)


def _count(item: Seen, recording: Recording) -> int:
    return recording.counts[item.spot.path, item.spot.operation]


def _operation_name(item: Seen, seen: Mapping[Mode, Recording]) -> str:
    spot = item.spot
    number = f"#{spot.count + 1}" if _count(item, seen["train"]) > 1 else ""
    return f"{spot.path}.{spot.operation}{number}"


_TELLING = (
    "add",
    "mul",
    "matmul",
    "cat",
    "softmax",
    "silu",
    "tanh",
    "sigmoid",
    "scaled_dot_product_attention",
)


# ------------------------------------------------------------------------------------------------- outputs


def task_output(output: Any) -> Any:
    """The network's own output, without the logits of its domain head."""
    return _without_logits(output)[0]


def _weighted(logits: torch.Tensor) -> torch.Tensor:
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()


def _without_logits(output: Any) -> tuple[Any, torch.Tensor]:
    if isinstance(output, Mapping) and "domain_logits" in output:
        other = copy.copy(output)
        logits = other["domain_logits"]
        return _Without(other), logits
    if hasattr(output, "domain_logits"):
        return _Without(output), output.domain_logits
    if isinstance(output, tuple) and len(output) == 2:
        return output[0], output[1]
    raise Wrong(f"the network with a head returns a {type(output).__name__} without logits")


class _Without:
    """An output that is a mapping or an object, of which the logits do not count."""

    def __init__(self, output: Any) -> None:
        values = output if isinstance(output, Mapping) else vars(output)
        self.kind = type(output)
        self.values = {key: value for key, value in values.items() if key != "domain_logits"}


def _difference(found: Any, wanted: Any) -> str:
    """How one output differs from another; empty where all bits are the same."""
    kind = found.kind if isinstance(found, _Without) else type(found)
    if kind is not type(wanted):
        return f"it returns a {kind.__name__}, not a {type(wanted).__name__}"
    if isinstance(wanted, Mapping):
        keys = list(found.values if isinstance(found, _Without) else found)
        if keys != list(wanted):
            return f"it returns {keys}, not {list(wanted)}"
    return "" if _same_bits(found, wanted) else "the forward is another one"


def _same_bits(one: Any, other: Any) -> bool:
    first, second = list(leaves(one)), list(leaves(other))
    return len(first) == len(second) and all(map(_equal, first, second))


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """The same bits; a zero and no gradient are told apart, minus zero and zero are not."""
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype or one.is_sparse != other.is_sparse:
        return False
    if one.is_sparse:
        one, other = one.to_dense(), other.to_dense()
    return bool(
        torch.equal(one, other)
        or (one.is_floating_point() and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))
    )


def _scope(spliced: nn.Module, model: nn.Module) -> str:
    return (
        "graph"
        if isinstance(spliced, fx.GraphModule)
        else "own class"
        if isinstance(spliced, type(model))
        else type(spliced).__name__
    )


def _failure(error: Exception) -> str:
    """A refusal by its sentence, anything else by its error and where it was raised."""
    if isinstance(error, gs.SurgeryError):
        return f"refused: {_line(error)}"
    return f"broken: {type(error).__name__}: {_line(error)} {_where(error)}"


def _values(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers, and parameters too: a codebook writes into its own in the forward."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _own(module: nn.Module) -> dict[str, Any]:
    """What a module holds under names of its own, beside registered tensors and other modules."""
    return {key: value for key, value in vars(module).items() if key[0] != "_" and key != "training"}


def _line(value: object) -> str:
    text = " ".join(str(value).split())
    return text[:240]


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""


# -------------------------------------------------------------------------------------------------- inputs


def _other_sizes(inputs: Any) -> Iterator[tuple[str, Any]]:
    """Another batch, other lengths and other images, made of the given ones."""
    tensors = list(leaves(inputs))
    batch = {tensor.shape[0] for tensor in tensors if tensor.dim()}
    if len(batch) == 1 and all(tensor.dim() for tensor in tensors):
        yield "batch of 3", _each(inputs, lambda x: torch.cat([x, x[:1]]))
    ids = next((x for x in tensors if x.dim() == 2), None)
    if ids is not None and ids.shape[1] > 6:
        length = ids.shape[1]
        yield (
            "shorter",
            _each(inputs, lambda x: x[:, : length - 3] if x.dim() > 1 and x.shape[1] == length else x),
        )
    if any(x.dim() >= 4 and x.shape[-1] == x.shape[-2] >= 64 for x in tensors):
        yield "smaller image", _each(inputs, lambda x: x[..., :-32, :-32].contiguous() if x.dim() >= 4 else x)


def _each(inputs: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _each(value, change) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(_each(value, change) for value in inputs)
    return change(inputs) if isinstance(inputs, torch.Tensor) else inputs
