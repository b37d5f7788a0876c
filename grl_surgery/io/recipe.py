"""Stores a spliced network as plain data, and builds it again without running code of the file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, get_args, get_type_hints

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from grl_surgery.errors import ExportError, SurgeryError, one_line
from grl_surgery.io.deepcopy import deep_copy
from grl_surgery.io.head_config import describe_head, rebuild_head
from grl_surgery.io.json_schema import each, field, optional
from grl_surgery.io.model_sources import build_source, find_source, module_lines, within_memory
from grl_surgery.io.tensor_data import excerpt, is_alike, not_in_the_state, plain_tensor
from grl_surgery.isolation.shared_copy import replace_submodule, share_copy
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.points import Edge
from grl_surgery.surgery.insert import reversals, splice, strip
from grl_surgery.surgery.spliced_module import Cut, SplicedModule, Surgery, surgery_of

__all__ = ["FORMAT", "Recipe", "describe", "rebuild", "reversal_options", "same_tensors", "tied"]

Recipe = dict[str, Any]
FORMAT = 1
_KINDS = get_args(get_type_hints(Cut)["kind"])
_VERSIONED = ("grl-surgery", "torch", "timm", "torchvision")


# ---------------------------------------------------------------------------------------------- writing


def describe(model: nn.Module, source: str | None = None, options: Mapping[str, Any] | None = None) -> Recipe:
    """Everything but the weights that makes a spliced network what it is.

    Example:
        >>> from grl_surgery.surgery.insert import insert_grl
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> describe(insert_grl(net, after="0"))["parts"][0]["cuts"]
        [{'kind': 'after', 'at': '0', 'module': 'grl_0', 'condition': None}]

    Args:
        model: The network; spliced, or not.
        source: What it was made from, such as ``"timm/resnet18"``; found for timm's and torchvision's.
        options: What else its maker was given, such as ``{"num_classes": 10}``; found with the source.
    """
    parts = _parts(model)
    plain = strip(model) if parts else model
    found, given = find_source(plain) if source is None else (source, {})
    lines = module_lines(plain)
    return {
        "format": FORMAT,
        "source": found,
        "options": dict(given if options is None else options),
        "class": f"{type(plain).__module__}.{type(plain).__qualname__}",
        "versions": _versions(),
        "modules": lines,
        "parts": [_part(path, part) for path, part in sorted(parts.items(), key=lambda row: -len(row[0]))],
        "graph": _graph_hash(parts),
        "reversals": _coefficients(model),
        "train": [path for path, module in model.named_modules() if module.training],
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
        "dtype": _common_dtype(plain),
        "tied": tied(model),
        "unsaved": {name: excerpt(name, tensor) for name, tensor in not_in_the_state(model).items()},
    }


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    return {path: m for path, m in model.named_modules() if surgery_of(m)}


def _surgery(part: nn.Module) -> Surgery:
    done = surgery_of(part)
    assert done is not None
    return done


def _part(path: str, part: nn.Module) -> dict[str, Any]:
    cuts = _surgery(part).cuts
    return {
        "path": path,
        "cuts": [_cut_data(cut) for cut in cuts],
        "heads": {cut.module: _head_data(part, cut) for cut in cuts if cut.is_head},
        "graph": _all_lines(part),
    }


def _cut_data(cut: Cut) -> dict[str, Any]:
    at = [cut.at.source, cut.at.target, cut.at.arg] if isinstance(cut.at, Edge) else cut.at
    data: dict[str, Any] = {"kind": cut.kind, "at": at, "module": cut.module, "condition": cut.condition}
    more = {
        "operations": [list(place) for place in cut.operations],
        "mask": cut.mask,
        "also": [*cut.also],
        "keeps_logits": cut.keeps_logits,
    }
    return data | {name: value for name, value in more.items() if value}


def _head_data(part: nn.Module, cut: Cut) -> dict[str, Any]:
    head = part.get_submodule(cut.module)
    return {"class": f"{type(head).__module__}.{type(head).__qualname__}", "settings": describe_head(head)}


def _coefficients(model: nn.Module) -> dict[str, Any]:
    """The exact coefficient of every reversal, by its path, with its dtype."""
    return {
        path: {"coeff": float(layer.coeff).hex(), "dtype": _name_of(layer.coeff.dtype)}
        | reversal_options(layer)
        for path, layer in reversals(model).items()
    }


def reversal_options(layer: GradientReversal) -> dict[str, Any]:
    """The options of a reversal that are not the default, by the names of its arguments."""
    options = {"signed": layer.signed, "clip": layer.clip, "normalize": layer.normalize}
    return {name: value for name, value in options.items() if value not in (None, False)}


def tied(model: nn.Module) -> list[list[str]]:
    """Names under which the state_dict holds one and the same tensor."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _common_dtype(model: nn.Module) -> str | None:
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return _name_of(found.pop()) if len(found) == 1 else None


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# ----------------------------------------------------------------------------------------------- graphs


def _graph_hash(parts: Mapping[str, nn.Module]) -> str:
    text = "\n".join(f"{path}\n{line}" for path in sorted(parts) for line in _all_lines(parts[path]))
    return hashlib.sha256(text.encode()).hexdigest()


def _all_lines(part: nn.Module) -> list[str]:
    """The cuts at calls, then the graphs of all modes: what each mode is, and a line for each operation."""
    done = _surgery(part)
    hooked = [f"{cut.module} {cut}, at the call" for cut in done.cuts if cut.module in done.hooked]
    if not isinstance(part, SplicedModule):
        return hooked
    traced = part.grl_traced
    lines = [f"{traced.mode_dependent} {flags}" for flags in traced.graphs]
    graphs = [line for graph in traced.graphs.values() for line in _graph_lines(graph)]
    buffers = dict(part.named_buffers())
    constants = [f"{name} = {_bytes_hash(name, buffers[name])}" for name in sorted(traced.constants)]
    return [*hooked, *lines, *graphs, *constants]


def _graph_lines(graph: fx.Graph) -> list[str]:
    place = {node: index for index, node in enumerate(graph.nodes)}

    def said(node: fx.Node) -> fx.node.Argument:
        return _Said(f"%{place[node]}")

    return [
        f"%{place[node]} = {node.op} {_target(node.target)} {_text(map_arg(node.args, said))} "
        f"{_text(map_arg(node.kwargs, said))} {node.meta.get('point', '')}"
        for node in graph.nodes
    ]


class _Said(str):
    """Text that stands for a node and is not quoted."""

    def __repr__(self) -> str:
        return str(self)


def _target(target: Any) -> str:
    if isinstance(target, str):
        return target
    module = getattr(target, "__module__", None) or "torch"
    return f"{module}.{getattr(target, '__qualname__', type(target).__qualname__)}"


def _text(value: Any) -> str:
    """The same in every process: no addresses, and functions by name."""
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(_text, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_text(key)}: {_text(item)}' for key, item in value.items())}}}"
    if callable(value) and not isinstance(value, str):
        return _target(value)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _bytes_hash(name: str, tensor: torch.Tensor) -> str:
    flat = plain_tensor(name, tensor).reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return f"{_name_of(tensor.dtype)}{tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


# --------------------------------------------------------------------------------------------- rebuilding


def rebuild(
    recipe: Recipe,
    tensors: Mapping[str, torch.Tensor],
    model: nn.Module | Callable[[], nn.Module] | None = None,
    heads: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """The network of a recipe with these weights.

    Args:
        recipe: As :func:`describe` made it; not trusted.
        tensors: Its state_dict; tied tensors under one of their names.
        model: The network to cut, or what makes it, instead of the recipe's source. It is not changed.
        heads: Heads of the user's own classes, by name.

    Raises:
        ExportError: Something is not as the recipe says; the message names the first difference.
    """
    if field(recipe, "format", int) != FORMAT:
        raise ExportError(f"the recipe has the format {recipe['format']}; this version reads format {FORMAT}")
    limit = 4 * sum(tensor.nbytes for tensor in tensors.values()) + 2**28
    stripped = _base(recipe, model, limit)
    changed = _changed_versions(recipe)
    _compare_lines(
        each(field(recipe, "modules", list), str, "'modules'"),
        module_lines(stripped),
        "the network is built",
        changed,
    )
    try:
        # Which mode a forward is traced in depends on the flags, so they come first.
        flags = set(each(field(recipe, "train", list), str, "'train'"))
        for path, module in stripped.named_modules():
            module.training = path in flags
        with within_memory(limit):
            spliced = _replay(recipe, stripped, heads or {}, changed)
    except ExportError:
        raise
    except SurgeryError as error:
        raise ExportError(f"the recipe cannot be replayed: {error}{changed}") from error
    _set_state(recipe, spliced, tensors)
    _compare_unsaved(recipe, spliced)
    for path, module in spliced.named_modules():
        module.training = path in flags
    if changed:
        warnings.warn(
            f"the file was written with other versions{changed}; modules and graph are the same, but a last "
            "bit may differ",
            stacklevel=4,
        )
    return spliced


def _base(recipe: Recipe, model: nn.Module | Callable[[], nn.Module] | None, limit: int) -> nn.Module:
    source = optional(recipe, "source", str)
    if model is None and source is None:
        kind = field(recipe, "class", str)[:120]
        raise ExportError(
            f"the file does not say how to make the {kind} that was cut: pass one",
            example=f"load(path, model={kind.rpartition('.')[2]}(...))",
        )
    if model is None:
        base = build_source(cast(str, source), field(recipe, "options", dict), limit)
    elif isinstance(model, nn.Module):
        base = deep_copy(model)
    else:
        base = model()
        if not isinstance(base, nn.Module):
            raise ExportError(f"model() returned a {type(base).__name__}, not an nn.Module")
    dtype = optional(recipe, "dtype", str)
    if dtype not in (None, _common_dtype(base)):  # it would make complex buffers real, and round others
        base = base.to(_dtype(dtype))
    for name in each(field(recipe, "frozen", list), str, "'frozen'"):
        parameter = dict(base.named_parameters()).get(name)
        if parameter is not None:
            parameter.requires_grad_(False)
    return base


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None) if re.fullmatch(r"b?float\d+", name) else None
    if not isinstance(dtype, torch.dtype):
        raise ExportError(f"{name[:40]!r} is no dtype of a network")
    return dtype


def _changed_versions(recipe: Recipe) -> str:
    """Return what to add to a message where the file was written with other versions."""
    written, here = field(recipe, "versions", dict), _versions()
    relevant = ["grl-surgery", "torch", str(recipe.get("source") or "").partition("/")[0]]
    changed = [
        f"{package} {str(written[package])[:30]} in the file, {here.get(package, 'none')} here"
        for package in relevant
        if package in written and written[package] != here.get(package)
    ]
    return f" ({'; '.join(changed)})" if changed else ""


def _compare_lines(written: Sequence[str], found: Sequence[str], what: str, changed: str) -> None:
    if list(written) == list(found):
        return
    shared = min(len(written), len(found))
    place = next((n for n in range(shared) if written[n] != found[n]), shared)
    pair = [lines[place].strip()[:200] if place < len(lines) else "nothing" for lines in (written, found)]
    raise ExportError(
        f"{what} differently here than when the file was written{changed}:\n"
        f"  in the file: {pair[0]}\n  here:        {pair[1]}"
    )


def _replay(recipe: Recipe, base: nn.Module, own_heads: Mapping[str, nn.Module], changed: str) -> nn.Module:
    """Make every cut again, in the innermost module first."""
    tree = share_copy(base)
    for part in each(field(recipe, "parts", list), dict, "'parts'"):
        path = field(part, "path", str)
        if path not in dict(tree.named_modules()):
            raise ExportError(f"the recipe cuts in {path[:80]!r}, and there is no such module")
        host = tree.get_submodule(path)
        cuts = [_cut(data) for data in each(field(part, "cuts", list), dict, "'cuts'")]
        made = _made(host, cuts, field(part, "heads", dict), own_heads)
        spliced = splice(host, cuts, made)
        if surgery_of(spliced) is None or [cut.module for cut in _surgery(spliced).cuts] != list(made):
            raise ExportError(f"the cuts in {path[:80]!r} lie deeper in the network than the recipe says")
        lines = each(field(part, "graph", list), str, "'graph'")
        _compare_lines(lines, _all_lines(spliced), "the graph is", changed)
        if not path:
            tree = spliced
        else:
            replace_submodule(tree, host, spliced)
    if field(recipe, "graph", str) != _graph_hash(_parts(tree)):
        raise ExportError(f"the hash of the graph is not the one in the file{changed}")
    return tree


def _cut(data: Mapping[str, Any]) -> Cut:
    kind, at, module = field(data, "kind", str), data.get("at"), field(data, "module", str)
    if kind not in _KINDS or not module.isidentifier() or module[0] == "_":
        raise ExportError(f"the recipe has a cut of kind {kind[:40]!r} called {module[:80]!r}")
    if kind != "edge":
        place: str | Edge = field(data, "at", str)
    elif isinstance(at, list) and len(at) == len(get_args(tuple[str, str, str])):
        place = Edge(*each(at, str, "'at'"))
    else:
        raise ExportError(f"the recipe has a cut on the edge {repr(at)[:80]}")
    operations = tuple(_operation(row) for row in optional(data, "operations", list) or ())
    also = each(optional(data, "also", list) or [], str, "'also'")
    condition, mask = optional(data, "condition", str), optional(data, "mask", str)
    keeps = bool(optional(data, "keeps_logits", bool))
    return Cut(kind, place, module, condition, operations, mask, tuple(also), keeps)  # type: ignore[arg-type]


def _operation(row: Any) -> tuple[str, str, str, int]:
    """Read where a cut is at an operation that no graph shows."""
    match row:
        case [str(point), str(path), str(name), int(place)] if type(place) is int and place >= 0:
            return point, path, name, place
    raise ExportError(f"the recipe has a cut at the operation {repr(row)[:80]}")


def _made(
    host: nn.Module, cuts: Sequence[Cut], heads: Mapping[str, Any], own: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """New reversals and heads for the cuts of one module."""
    made: dict[str, nn.Module] = {}
    for cut in cuts:
        if cut.module in made or hasattr(host, cut.module):
            raise ExportError(f"the recipe splices in {cut.module!r}, and the network has that already")
        made[cut.module] = _head(cut.module, heads, own) if cut.is_head else GradientReversal()
    return made


def _head(name: str, heads: Mapping[str, Any], own: Mapping[str, nn.Module]) -> nn.Module:
    data = field(heads, name, dict)
    settings = optional(data, "settings", dict)
    if name in own:
        return deep_copy(own[name])
    if settings is None:
        kind = field(data, "class", str)[:120]
        raise ExportError(
            f"the head {name!r} ({kind}) has parts of your own classes, which no file can make: pass one",
            example=f"load(path, heads={{{name!r}: MyHead()}})",
        )
    return rebuild_head(settings)


# ------------------------------------------------------------------------------------------------ weights


def _set_state(recipe: Recipe, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Weights, ties, frozen parameters and coefficients."""
    if sorted(map(sorted, tied(model))) != sorted(map(sorted, field(recipe, "tied", list))):
        raise ExportError(f"the tied tensors of the file are {recipe['tied']}, here they are {tied(model)}")
    wanted = model.state_dict(keep_vars=True)
    given = dict(tensors)
    for names in tied(model):
        held = [name for name in names if name in given]
        given.update((name, given[held[0]]) for name in names if held)
    _compare_shapes(wanted, given)
    for name, tensor in wanted.items():
        _set_tensor(name, tensor, given[name])
    frozen = set(each(field(recipe, "frozen", list), str, "'frozen'"))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(name not in frozen)
    _set_coefficients(model, field(recipe, "reversals", dict))


def _set_tensor(name: str, tensor: torch.Tensor, value: torch.Tensor) -> None:
    try:
        tensor.data = tensor.data.to(value.dtype)
        with torch.no_grad():
            tensor.copy_(value)
    except RuntimeError as error:
        attribute = name.rpartition(".")[2]
        raise ExportError(
            f"no values can be written into {name!r}: {one_line(error)}",
            example=f"a tensor with memory for each element: self.register_buffer({attribute!r}, "
            "value.contiguous())",
        ) from error


def _compare_unsaved(recipe: Recipe, model: nn.Module) -> None:
    written = optional(recipe, "unsaved", dict) or {}  # older files do not say
    here = not_in_the_state(model)
    other = [
        name for name in here if name in written and not is_alike(here[name], field(written, name, dict))
    ]
    if other:
        attribute = other[0].rpartition(".")[2]
        raise ExportError(
            f"the forward reads {other[0]!r}, which is not in the state_dict, and the network has other "
            "values there than when the file was written",
            example=f"a buffer, which the file holds: self.register_buffer({attribute!r}, ...)",
        )


def _compare_shapes(wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    missing = [name for name in wanted if name not in given]
    extra = [name for name in given if name not in wanted]
    other = [name for name in wanted if name in given and wanted[name].shape != given[name].shape]
    if missing or extra:
        what = f"has no {missing[0]!r}" if missing else f"has {extra[0][:80]!r}, which the network has not"
        raise ExportError(f"the file {what} ({len(missing)} missing, {len(extra)} unexpected)")
    if other:
        shapes = [tuple(held[other[0]].shape) for held in (given, wanted)]
        raise ExportError(
            f"{other[0]!r} has the shape {shapes[0]} in the file and {shapes[1]} in the network "
            f"({len(other)} differ)"
        )


def _set_coefficients(model: nn.Module, recorded: Mapping[str, Any]) -> None:
    layers = reversals(model)
    if list(layers) != list(recorded):
        raise ExportError(f"the file has the reversals {list(recorded)[:8]}, the network {list(layers)[:8]}")
    for path, layer in layers.items():
        data = field(recorded, path, dict)
        try:
            value = float.fromhex(field(data, "coeff", str))
        except (ValueError, OverflowError) as error:
            raise ExportError(f"the coefficient of {path!r} is {str(data['coeff'])[:40]!r}") from error
        layer.coeff = layer.coeff.to(_dtype(field(data, "dtype", str)))
        layer.signed = data.get("signed") is True
        layer.clip = _clip(path, data.get("clip"))
        layer.normalize = data.get("normalize") is True
        try:
            layer.set_coeff(value)
        except SurgeryError as error:
            raise ExportError(f"the coefficient of {path!r}: {error}") from error


def _clip(path: str, value: Any) -> float | None:
    if value is None or (type(value) in (int, float) and 0.0 < value < math.inf):
        return None if value is None else float(value)
    raise ExportError(f"the reversal {path!r} clips to {str(value)[:40]!r}")


def same_tensors(first: nn.Module, second: nn.Module) -> str:
    """The name of the first parameter or buffer that differs in its bytes; empty where none does."""
    held = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (first, second)]
    for name in dict.fromkeys([*held[0], *held[1]]):
        if any(name not in tensors for tensors in held):
            return name
        if _bytes_hash(name, held[0][name]) != _bytes_hash(name, held[1][name]):
            return name
    return ""
