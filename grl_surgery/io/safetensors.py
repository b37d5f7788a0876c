"""The .safetensors checkpoint: weights, with the recipe in the metadata and a checksum over both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grl_surgery.errors import ExportError, one_line
from grl_surgery.io.deepcopy import deep_copy
from grl_surgery.io.json_schema import parse_object
from grl_surgery.io.recipe import Recipe, describe, rebuild, same_tensors, tied
from grl_surgery.io.tensor_data import plain_tensor
from grl_surgery.surgery.insert import head_names, strip

__all__ = ["check_checkpoint", "read_checkpoint", "read_recipe", "write_checkpoint"]

_KEY, _CHECKSUM = "grl_surgery", "grl_surgery_sha256"
_LARGEST_HEADER = 100_000_000  # what the format allows


def write_checkpoint(
    model: nn.Module, path: Path, source: str | None = None, options: Mapping[str, Any] | None = None
) -> None:
    """Write weights and recipe; a tensor with several names is written once."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    recipe = describe(model, source, options)
    repeated = {name for names in tied(model) for name in names[1:]}
    # Clones: the format refuses tensors that share memory, as a view does with what it is a view of.
    tensors = {
        name: plain_tensor(name, tensor).clone()
        for name, tensor in model.state_dict().items()
        if name not in repeated
    }
    text = json.dumps(recipe)
    try:
        save_file(tensors, path, {"format": "pt", _KEY: text, _CHECKSUM: _checksum(text, tensors)})
    except (KeyError, ValueError, SafetensorError) as error:  # a dtype that the format does not have
        raise ExportError(
            f"safetensors does not hold these tensors: {one_line(error)}", example="export(m, 'm.pt2')"
        ) from error


def read_checkpoint(
    path: Path,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    heads: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """The network in a checkpoint; nothing in the file is run.

    Raises:
        ExportError: The file is damaged, or describes another network than is built here.
    """
    recipe, tensors = _read(path)
    try:
        return rebuild(recipe, tensors, model, heads)
    except ExportError as error:
        raise ExportError(f"{path} is not loaded: {error}") from error


def read_recipe(path: Path) -> Recipe:
    """The recipe in a checkpoint, after the checksum over the whole file was compared."""
    return _read(path)[0]


def check_checkpoint(model: nn.Module, path: Path) -> None:
    """Load what was written for ``model``, and compare every tensor.

    Raises:
        ExportError: It does not come back as it was.
    """
    recipe, tensors = _read(path)
    plain = strip(model) if recipe["parts"] else model
    base = None if recipe["source"] else deep_copy(plain)
    try:
        heads = {name: model.get_submodule(name) for name in head_names(model)}
        own = {name: head for name, head in heads.items() if _is_own(recipe, name)}
        again = rebuild(recipe, tensors, base, own)
    except ExportError as error:
        raise ExportError(
            f"what was written does not load again: {error}",
            example=_WITH_SOURCE if recipe["source"] else None,
        ) from error
    name = same_tensors(model, again)
    if name:
        raise ExportError(
            f"{name!r} is not in the state_dict, and {recipe['source'] or 'the network'} builds it with "
            "other values, so a checkpoint would lose them",
            example="export(m, 'm.pt2')",
        )


_WITH_SOURCE = "export(m, path, source='timm/resnet18', options={'num_classes': 10})"


def _is_own(recipe: Recipe, name: str) -> bool:
    data = next((part["heads"][name] for part in recipe["parts"] if name in part["heads"]), None)
    return data is not None and data["settings"] is None


def _read(path: Path) -> tuple[Recipe, dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    _check_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        raise ExportError(f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}") from error
    if _KEY not in metadata:
        raise ExportError(
            f"{path} holds weights and no recipe, so export did not write it",
            example="grl_surgery.export(m, 'm.safetensors')",
        )
    if metadata.get(_CHECKSUM) != _checksum(metadata[_KEY], tensors):
        raise ExportError(f"{path} is damaged: its checksum is not that of its content")
    return parse_object(metadata[_KEY], f"the recipe in {path}"), tensors


def _check_header(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
    claimed = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{" or claimed > min(size - 8, _LARGEST_HEADER):
        what = "a zip archive" if start[:2] == b"PK" else "a pickle" if start[:1] == b"\x80" else "damaged"
        raise ExportError(
            f"{path} is no safetensors file, but {what}: it has {size:,} bytes, and its first eight announce "
            f"a header of {claimed:,}"
        )


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensors[name].shape)}".encode())
        if tensor.numel():
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
