"""Writes and reads programs that run without the Python code: .pt2 for PyTorch, .onnx for others."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from grl_surgery.errors import ExportError, SurgeryError
from grl_surgery.io.deepcopy import deep_copy
from grl_surgery.io.json_schema import each, field, optional
from grl_surgery.io.pt2_archive import EXTRA, check_archive
from grl_surgery.io.recipe import describe, tied
from grl_surgery.isolation.rng_state import preserve_rng_state, seed_everything
from grl_surgery.loading.inputs import as_arguments
from grl_surgery.loading.inputs import example_inputs as known_inputs
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.surgery.exported_program import mark_as_program
from grl_surgery.surgery.head_outputs import heads_that_keep
from grl_surgery.surgery.insert import head_names, inner_heads, reversals, strip
from grl_surgery.surgery.spliced_module import SplicedModule
from grl_surgery.verify.experiment import left_as_it_was, private_copy, tensors_in
from grl_surgery.verify.reference_model import cuts_by_module, with_reversals

__all__ = [
    "check_onnx",
    "check_program",
    "compare_outputs",
    "for_inference",
    "inputs_for",
    "outputs_for_inference",
    "outputs_of",
    "plain",
    "read_program",
    "write_onnx",
    "write_program",
]

Purpose = Literal["training", "inference"]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def for_inference(model: nn.Module, heads: Sequence[str] = ()) -> nn.Module:
    """The network in eval mode without reversals, and without the heads that are not asked for.

    Example:
        >>> from grl_surgery.surgery.insert import insert_grl
        >>> type(for_inference(insert_grl(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), after="0"))).__name__
        'Sequential'

    Raises:
        ExportError: There is no head of that name, or one whose logits a forward around it takes.
    """
    inside = inner_heads(model)
    if inside:
        path = inside[0].rpartition(".")[0]
        raise ExportError(
            f"the logits of the head {inside[0]!r} go to the forward of {type(model).__name__}, which would "
            "be another one without the head",
            example=f"export(model.{path}, 'm.onnx')",
        )
    unknown = [name for name in heads if name not in head_names(model)]
    if unknown:
        raise ExportError(f"there is no head {unknown[0]!r} to keep", choices=head_names(model))
    kept = model
    dropped = [name for name in head_names(model) if name not in heads]
    if dropped:
        kept = strip(model, dropped)
    plain = strip(kept) if any(cuts_by_module(kept).values()) else kept
    bare = with_reversals(kept, plain, nn.Identity) if heads else with_reversals(plain, plain, nn.Identity)
    return bare.eval()


def plain(model: nn.Module) -> nn.Module:
    """The network before surgery, as a copy of its own."""
    return deep_copy(strip(model) if any(cuts_by_module(model).values()) else model)


def inputs_for(model: nn.Module, example_inputs: Any) -> Inputs:
    """Arguments of forward, by position and by name."""
    given = example_inputs
    if given is None:
        given = known_inputs(strip(model) if any(cuts_by_module(model).values()) else model)
    if given is None:
        raise ExportError(
            f"it is not known what inputs {type(model).__name__} takes; a program is recorded by running it",
            example="export(m, 'm.pt2', example_inputs=(torch.randn(2, 3, 224, 224),))",
        )
    return as_arguments(given)


# ------------------------------------------------------------------------------------------------- .pt2


def write_program(model: nn.Module, path: Path, inputs: Inputs, purpose: Purpose, dynamic: bool) -> None:
    """Record a network with ``torch.export`` and write the program.

    Raises:
        ExportError: torch cannot record it, or the program has lost a reversal.
    """
    program = record(model, inputs, purpose, dynamic)
    lost = [name for name in reversals(model) if name not in _reversals_in(program.module().graph)]
    if lost:
        raise ExportError(f"the reversal {lost[0]!r} is not in the program that torch.export made")
    extra = {
        "purpose": purpose,
        "reversals": list(reversals(model)),
        "signed": [name for name, layer in reversals(model).items() if layer.signed],
        "heads": head_names(model),
        "tied": tied(model),
        "training": model.training,
        "recipe": _surgery_of(model),
    }
    try:
        with _quiet():
            torch.export.save(program, path, extra_files={EXTRA: json.dumps(extra)})
    except Exception as error:
        raise ExportError(
            f"torch.export cannot save this {type(model).__name__}: {_first_line(error)}",
            example="export(m, 'm.safetensors')",
        ) from error


def record(
    model: nn.Module, inputs: Inputs, purpose: Purpose = "training", dynamic: bool = True
) -> torch.export.ExportedProgram:
    """The network as a program, in its present mode, for any batch size if ``dynamic``."""
    private = _private(model)
    args, kwargs = _of_several(deep_copy(inputs)) if dynamic else deep_copy(inputs)
    shapes = _batch_sizes((args, kwargs)) if dynamic else None
    try:
        with (
            torch.set_grad_enabled(purpose == "training"),
            preserve_rng_state(),
            left_as_it_was(private),  # it shares tensors and objects with the user's network
            _quiet(),
        ):
            return torch.export.export(
                private, args, kwargs, dynamic_shapes=_by_argument(private, shapes, args, kwargs)
            )
    except SurgeryError:
        raise
    except Exception as error:
        raise ExportError(
            f"torch.export cannot record this {type(model).__name__}: {_first_line(error)}",
            example="example inputs of two or more; export(m, 'm.pt2', dynamic=False), for one batch size; "
            "or export(m, 'm.safetensors')",
        ) from error


def _private(model: nn.Module) -> nn.Module:
    """A copy over the same tensors, of a network with several graphs only the one of the present mode."""
    private = private_copy(model, {})
    if isinstance(private, SplicedModule):
        if private.grl_traced.mode_dependent:
            private = fx.GraphModule(private, copy.deepcopy(private.graph), type(model).__name__)
            private.train(model.training)
        _give_lists_of_their_own(private)
    return private


def _give_lists_of_their_own(network: fx.GraphModule) -> None:
    """torch.export runs a graph node by node, and hands modules lists that cannot be assigned to."""
    graph = network.graph
    for node in [node for node in graph.nodes if node.op == "call_module"]:
        for place, value in enumerate(node.args):
            if isinstance(value, list):
                with graph.inserting_before(node):
                    node.update_arg(place, graph.call_function(list, (tuple(value),)))
    network.recompile()


def _first_line(error: Exception) -> str:
    """Return the first line of torch's message, with the line that a colon announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {said[:300]}"


def _surgery_of(model: nn.Module) -> dict[str, Any]:
    """The recipe without what only rebuilding needs."""
    recipe = describe(model)
    kept = ("source", "options", "class", "versions", "graph", "reversals")
    cuts = [{"path": part["path"], "cuts": part["cuts"]} for part in recipe["parts"]]
    return {**{key: recipe[key] for key in kept}, "parts": cuts}


def _batch_sizes(inputs: Any) -> Any:
    """The first axis is free, of every input that is as long there as the first one."""
    free = {id(tensor) for tensor in _of_one_batch(inputs)}
    return pytree.tree_map(lambda leaf: {0: torch.export.Dim.DYNAMIC} if id(leaf) in free else None, inputs)


def _of_one_batch(inputs: Any) -> list[torch.Tensor]:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    return [tensor for tensor in tensors if tensor.shape[0] == tensors[0].shape[0]]


def _of_several(inputs: Any) -> Any:
    """The inputs, with a batch of one twice: torch takes a size of 1 for one that is always 1."""
    single = {id(tensor) for tensor in _of_one_batch(inputs) if tensor.shape[0] == 1}
    return pytree.tree_map(
        lambda leaf: torch.cat([leaf, leaf]).detach() if id(leaf) in single else leaf, inputs
    )


def _by_argument(model: nn.Module, shapes: Any, args: Any, kwargs: Any) -> Any:
    if shapes is None:
        return None
    return shapes[0] if not kwargs else {**_named(model, shapes[0]), **shapes[1]}


def _named(model: nn.Module, values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(inspect.signature(model.forward).parameters, values, strict=False))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own deprecations, which the caller can do nothing about."""
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", kind)
        warnings.filterwarnings("ignore", message=".*(?:attribute|was not|Dynamo|tensor constant)")
        yield


def read_program(path: Path) -> nn.Module:
    """The program in a .pt2 file as a network whose reversals are layers again.

    The operation ``grl_surgery::reverse_gradient`` and the layer are the same reversal. With the layer the
    coefficient can be set, and ``verify_flip`` can put its oracle into the same places.

    Raises:
        ExportError: It is damaged, could run code, or has lost a reversal that it should have.
    """
    extra = check_archive(path)
    try:
        with _quiet():
            program = torch.export.load(path)
            network: Any = program.module()
    except Exception as error:
        raise ExportError(
            f"{path} is damaged or from another version of torch: {_first_line(error)}"
        ) from error
    wanted = each(field(extra, "reversals", list), str, "'reversals'")
    found = _reversals_in(network.graph)
    if field(extra, "purpose", str) == "training" and sorted(wanted) != sorted(found):
        lost = sorted(set(wanted) ^ set(found))
        raise ExportError(f"the program in {path} and its recipe disagree about the reversal {lost[0]!r}")
    _as_layers(network, each(optional(extra, "signed", list) or [], str, "'signed'"))
    for names in each(field(extra, "tied", list), list, "'tied'"):
        _tie(network, each(names, str, "'tied'"))
    mark_as_program(network, field(extra, "training", bool))
    args, kwargs = program.example_inputs or ((), {})
    if bool(args) != bool(kwargs):
        network.example_inputs = args or kwargs
    return network  # type: ignore[no-any-return]


def _tie(network: nn.Module, names: Sequence[str]) -> None:
    """Let these names mean one tensor again: a program holds one for each."""
    held = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    if any(name not in held or not torch.equal(held[name], held[names[0]]) for name in names):
        raise ExportError(f"the program has different tensors under {', '.join(names)[:200]}, which are one")
    for name in names[1:]:
        owner, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(owner), attribute, held[names[0]])


def _reversals_in(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The calls of the operation, by the layer whose coefficient they read."""
    operation = torch.ops.grl_surgery.reverse_gradient.default
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is operation and isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr":
            found.setdefault(str(node.args[1].target).rpartition(".")[0], []).append(node)
    return found


def _as_layers(network: Any, signed: Sequence[str]) -> None:
    """Replace each call of the operation by a call of a layer with the same coefficient."""
    for path, nodes in _reversals_in(network.graph).items():
        parent, _, name = path.rpartition(".")
        options: Any = dict(zip(("clip", "normalize"), nodes[0].args[2:], strict=False))
        layer = GradientReversal(**{**options, **nodes[0].kwargs})
        layer.coeff = network.get_submodule(path).coeff.detach().clone()
        layer.signed = path in signed or bool(layer.coeff < 0)
        network.get_submodule(parent)._modules[name] = layer
        for node in nodes:
            with network.graph.inserting_before(node):
                call = network.graph.call_module(path, (node.args[0],))
            node.replace_all_uses_with(call)
            coeff: Any = node.args[1]
            network.graph.erase_node(node)
            if not coeff.users:
                network.graph.erase_node(coeff)
    network.graph.lint()
    network.recompile()


def check_program(expected: Sequence[torch.Tensor], path: Path, inputs: Inputs) -> None:
    """Load the program that was written, and compare what it computes with what is expected.

    Raises:
        ExportError: It does not load, or computes something else.
    """
    compare_outputs(path, expected, read_program(path), inputs)


def compare_outputs(path: Path, expected: Sequence[torch.Tensor], again: nn.Module, inputs: Inputs) -> None:
    """Run a copy of what was read back, from the random numbers that the user's network saw.

    Raises:
        ExportError: It does not compute what is expected.
    """
    _compare(path, expected, tensors_in(_run(deep_copy(again), inputs)), 1e-5)


def outputs_of(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """Every tensor that the user's own network returns, which a file has to return as well.

    It is the network itself that runs, and no copy of it, which could be another function.
    """
    with left_as_it_was(model):
        return _kept(tensors_in(_run(model, inputs)))


def outputs_for_inference(model: nn.Module, inputs: Inputs, heads: Sequence[str]) -> list[torch.Tensor]:
    """The same in eval mode, without the logits of heads that are not asked for."""
    with left_as_it_was(model):
        value = _run(model.eval(), inputs)
        names = [name for name in head_names(model) if name not in heads_that_keep(model)]
        if isinstance(value, tuple) and names and len(names) + 1 == len(value):
            value = [part for name, part in zip((None, *names), value, strict=True) if name in (None, *heads)]
        elif isinstance(value, Mapping):
            unwanted = {f"{name}_logits" for name in names if name not in heads}
            value = {key: part for key, part in value.items() if key not in unwanted}
        return _kept(tensors_in(value))


def _kept(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies: a network may return memory of its own that is put back afterwards."""
    return [value.detach().clone() for value in values]


def _run(network: nn.Module, inputs: Inputs) -> Any:
    """Return the outputs of a network, from the same random numbers every time."""
    args, kwargs = deep_copy(inputs)
    try:
        with preserve_rng_state(), torch.no_grad():
            seed_everything(0)
            return network(*args, **kwargs)
    except SurgeryError:
        raise
    except Exception as error:
        raise ExportError(
            f"this {type(network).__name__} does not run on the example inputs: {_first_line(error)}",
            example="export(m, path, example_inputs=(x,)), where m(x) runs",
        ) from error


def _compare(
    path: Path, expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor], tolerance: float
) -> None:
    if [tuple(x.shape) for x in expected] != [tuple(x.shape) for x in found]:
        raise ExportError(f"{path.name} returns {len(found)} tensors of other shapes than the network")
    for one, other in zip(expected, found, strict=True):
        finite = one[one.isfinite()] if one.is_floating_point() else one
        scale = max(float(finite.abs().max()), 1.0) if finite.numel() else 1.0
        precision = 8 * torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0
        try:
            torch.testing.assert_close(
                other, one, rtol=0, atol=max(tolerance, precision) * scale, equal_nan=True
            )
        except AssertionError as error:
            raise ExportError(
                f"{path.name} computes other values than the network: {' '.join(str(error).split())[:200]}"
            ) from error


# ------------------------------------------------------------------------------------------------ .onnx


def write_onnx(
    model: nn.Module, path: Path, inputs: Inputs, heads: Sequence[str], dynamic: bool, count: int
) -> None:
    """Write a network without reversals for ONNX Runtime; inputs and ``count`` outputs keep their names.

    Raises:
        ExportError: A package is missing, or torch cannot translate the network.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _need(package)
    program = record(model, inputs, "inference", dynamic)
    names = _output_names(model, heads, count - len(heads))
    try:
        with _quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(program, verbose=False, output_names=names, dynamo=True)
            assert made is not None
            made.save(str(path), external_data=False)
    except Exception as error:
        raise ExportError(
            f"torch.onnx cannot translate this {type(model).__name__}: {_first_line(error)}",
            example="export(m, 'm.pt2', purpose='inference')",
        ) from error


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ExportError(
            f".onnx needs the package {package}, which is not installed",
            example="pip install 'grl-surgery[export]'",
        ) from error


def _output_names(model: nn.Module, heads: Sequence[str], count: int) -> list[str]:
    """``output``, and heads by their names; ONNX wants other names than those of the inputs."""
    own = ["output"] if count == 1 else [f"output_{place}" for place in range(count)]
    taken = {*inspect.signature(model.forward).parameters, *own}
    return [*own, *(f"{name}_logits" if name in taken else name for name in heads)]


def check_onnx(expected: Sequence[torch.Tensor], path: Path, inputs: Inputs) -> None:
    """Run what was written in ONNX Runtime and compare what it computes with what is expected.

    Raises:
        ExportError: It does not run there, or computes something else.
    """
    runtime = _need("onnxruntime")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        given = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
        names = [row.name for row in session.get_inputs()]
        feed = {name: x.detach().cpu().numpy() for name, x in zip(names, given, strict=True)}
        found = [torch.from_numpy(value) for value in session.run(None, feed)]
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot run {path.name}: {str(error)[:300]}") from error
    _compare(path, [x.cpu() for x in expected], found, 1e-4)
