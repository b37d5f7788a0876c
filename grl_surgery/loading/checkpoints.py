"""Reads a file of weights without running code in it, and loads it strictly or not at all."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grl_surgery.errors import SurgeryError
from grl_surgery.points import near_names

__all__ = ["load_checkpoint", "read_state_dict"]

# Where training programs keep the weights inside their checkpoints, and what wrappers put before each name.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 3


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the weights in ``path`` into ``model``; where they do not fit exactly, raise and change nothing.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "weights.pt")
        >>> model = nn.Linear(2, 1)
        >>> weights = {"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)}
        >>> torch.save({"state_dict": weights, "epoch": 3}, file)
        >>> load_checkpoint(model, file)
        >>> model.weight.tolist()
        [[1.0, 1.0]]

    Args:
        model: The network that the weights are for.
        path: A ``.safetensors`` file, or one written by ``torch.save``: a state_dict, alone or under
            ``"state_dict"``, ``"model_state_dict"`` or ``"model"``. The prefixes that
            DistributedDataParallel and torch.compile put before every name are taken off.

    Raises:
        SurgeryError: The file cannot be read, or its names and shapes are not those of the model.
    """
    wanted = model.state_dict()
    given = _without_prefixes(read_state_dict(path), wanted)
    differences = _differences(given, wanted)
    if differences:
        raise SurgeryError("\n  ".join([f"{os.fspath(path)} does not fit this network:", *differences]))
    model.load_state_dict(given, strict=True)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state_dict in a file, taken out of the wrappers that ``load_checkpoint`` knows.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "weights.pt")
        >>> torch.save({"model": {"bias": torch.zeros(1)}, "epoch": 3}, file)
        >>> list(read_state_dict(file))
        ['bias']

    Raises:
        SurgeryError: There is no such file, it is damaged, it contains code, or it holds something else.
    """
    file = Path(path)
    _require_file(file)
    content = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise SurgeryError(
            f"{file} holds {_describe(content)}, not a state_dict",
            example="torch.save(model.state_dict(), FILE) writes one",
        )
    return dict(content)


def _require_file(file: Path) -> None:
    if file.is_file():
        return
    beside = [str(entry) for entry in file.parent.iterdir()] if file.parent.is_dir() else []
    problem = "is a folder, not a checkpoint file" if file.is_dir() else "does not exist"
    raise SurgeryError(f"{file} {problem}", choices=near_names(str(file), beside))


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise SurgeryError(
            f"{file} needs the package safetensors, which is not installed", example="pip install safetensors"
        ) from error
    try:
        return load_file(file)
    except Exception as error:
        raise _unreadable(file, error) from error


def _read_torch(file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of is the error below
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _is_pickle(file) or "truncated" in str(error):
            raise _unreadable(file, error) from error
        raise SurgeryError(
            f"{file} contains pickled Python objects, which could run any code, so it is not loaded",
            example="if you trust it: torch.save(torch.load(FILE, weights_only=False).state_dict(), NEW)",
        ) from error
    except Exception as error:
        raise _unreadable(file, error) from error


def _is_pickle(file: Path) -> bool:
    """Whether it begins as a whole file of torch.save or of pickle does."""
    with file.open("rb") as opened:
        return zipfile.is_zipfile(opened) or (opened.seek(0) == 0 and opened.read(1) == pickle.PROTO)


def _unreadable(file: Path, error: Exception) -> SurgeryError:
    return SurgeryError(
        f"{file} is damaged or not a checkpoint ({file.stat().st_size:,} bytes; "
        f"{type(error).__name__}: {_first_line(error)})",
        example="a checkpoint is a .safetensors file, or one written by torch.save(model.state_dict(), FILE)",
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no further message"


def _describe(content: object) -> str:
    if isinstance(content, Mapping):
        keys = [str(key) for key in content]
        return f"a dict with the keys {', '.join(keys[:8])}" if keys else "an empty dict"
    return f"a {type(content).__name__}"


def _without_prefixes(given: dict[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Take a wrapper's prefix off only where every name has it and no name of the model does."""
    for _ in _PREFIXES:
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in given) and not _any_starts(wanted, prefix):
                given = {name.removeprefix(prefix): value for name, value in given.items()}
    return given


def _any_starts(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _differences(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    shapes = [
        f"{name} ({_shape(given[name])} in the file, {_shape(wanted[name])} in the network)"
        for name in wanted
        if name in given and _shape(given[name]) != _shape(wanted[name])
    ]
    found = {"missing": missing, "unexpected": unexpected, "shapes that differ": shapes}
    return [f"{what}: {len(names)}: {_some(names)}" for what, names in found.items() if names]


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else "no tensor"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
