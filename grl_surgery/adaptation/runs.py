"""Saves and loads a whole training run as one file, written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grl_surgery.errors import ExportError, SurgeryError, one_line
from grl_surgery.io.atomic_write import write_file
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.points import near_names
from grl_surgery.validation import check_network

__all__ = ["load_run", "save_run"]

_FORMAT = "grl_surgery run 1"
_PLAIN = (bool, int, float, str, bytes, type(None), Tensor)
_CALL = "save_run('run.pt', model, optimizer, schedule=schedule, pairs=pairs, step=step)"


def save_run(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    **parts: Any,
) -> Path:
    """Write the network with its heads, the optimizer, all other parts and the random states into one file.

    A part with a ``state_dict()`` (a schedule, :func:`paired` batches, a gradient scaler,
    ``validators.Best``) is stored by its state; numbers, text, tensors, and lists and dicts of them are
    stored as they are. Stored besides: the coefficient of every reversal, and the states of the random
    generators of torch, of its devices, of Python and of numpy where it is imported. The file is read back
    before it takes its name. So ``path`` is always either the whole previous run or this one.
    ``torch.load(path, weights_only=True)`` reads it.

    In a distributed run every process calls it: the first one writes its network and optimizer, and what each
    process has of its own besides.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> path = save_run(Path(tempfile.mkdtemp(), "run.pt"), model, optimizer, step=7)
        >>> following = torch.rand(3)
        >>> load_run(path, model, optimizer)
        {'step': 7}
        >>> torch.equal(torch.rand(3), following)
        True

    Args:
        path: The file to write, or to replace.
        model: The network, wrapped by DistributedDataParallel or ``torch.compile`` or not.
        optimizer: The optimizer.
        **parts: Everything else, by name.

    Returns:
        The path.

    Raises:
        SurgeryError: A part cannot be stored; the message names it. Or the network is sharded (FSDP2).
        ExportError: The file cannot be written; what was there before is as it was.
    """
    check_network(model, "save_run", example=_CALL)
    shared = {"model": _unwrapped(model).state_dict(), "coefficients": _coefficients(model)}
    if optimizer is not None:
        shared["optimizer"] = optimizer.state_dict()
    _check_whole(shared)
    own = {"parts": {name: _state(name, part) for name, part in parts.items()}, "random": _random_states()}
    everyone = _gathered(own)
    run = {"format": _FORMAT, **shared, "processes": everyone}
    if _rank() == 0:
        _write(Path(path), run)
    if _world_size() > 1:
        dist.barrier()
    return Path(path)


def load_run(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    **parts: Any,
) -> dict[str, Any]:
    """Restore a run that :func:`save_run` wrote, random generators included.

    Pass the same objects under the same names, made as in that run. Plain values are returned and need not be
    passed. If something does not fit, nothing is changed.

    Example:
        >>> import tempfile
        >>> from grl_surgery.adaptation.pairing import paired
        >>> model, pairs = nn.Linear(2, 2), paired(["s1", "s2"], ["t1", "t2"])
        >>> next(pairs)
        ('s1', 't1')
        >>> path = save_run(Path(tempfile.mkdtemp(), "run.pt"), model, pairs=pairs, step=1)
        >>> resumed = paired(["s1", "s2"], ["t1", "t2"])
        >>> load_run(path, model, pairs=resumed)["step"]
        1
        >>> next(resumed)
        ('s2', 't2')

    Args:
        path: The file.
        model: The network; its state must fit exactly.
        optimizer: The optimizer, where one was saved.
        **parts: Everything else that has a state, by the name it was saved under.

    Returns:
        The plain values, by name.

    Raises:
        SurgeryError: There is no such file, it is no run, it has other parts than given, a state does not
            fit, or another number of processes wrote it.
    """
    check_network(model, "load_run", example=_CALL.replace("save", "load").replace(", step=step", ""))
    run = _read(Path(path))
    own = _own_share(run, Path(path))
    _check_parts(own["parts"], run, optimizer, parts)
    _check_model(_unwrapped(model).state_dict(), run["model"])
    loading: list[tuple[str, Any, Any]] = [
        (name, part, own["parts"][name]["state"]) for name, part in parts.items()
    ]
    if optimizer is not None:
        loading.insert(0, ("optimizer", optimizer, run["optimizer"]))
    _load_all(loading)
    _unwrapped(model).load_state_dict(run["model"])
    for name, reversal in _reversals(model).items():
        reversal.set_coeff(run["coefficients"][name])
    _set_random_states(own["random"])
    return {name: stored["value"] for name, stored in own["parts"].items() if "value" in stored}


# ------------------------------------------------------------------------------------------- what is stored


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel or torch.compile, whose names have no prefix."""
    inner = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
    while type(model).__name__ in inner and hasattr(model, inner[type(model).__name__]):
        model = getattr(model, inner[type(model).__name__])
    return model


def _reversals(model: nn.Module) -> dict[str, GradientReversal]:
    return {n: m for n, m in _unwrapped(model).named_modules() if isinstance(m, GradientReversal)}


def _coefficients(model: nn.Module) -> dict[str, float]:
    return {name: reversal.coeff.item() for name, reversal in _reversals(model).items()}


def _check_whole(shared: Mapping[str, Any]) -> None:
    for name, value in shared["model"].items():
        if isinstance(value, DTensor):
            raise SurgeryError(
                f"{name} is sharded over processes, and a run in one file holds whole tensors",
                example="torch.distributed.checkpoint.save(model.state_dict(), checkpoint_id='run')",
            )


def _state(name: str, part: Any) -> dict[str, Any]:
    """What a part is stored as: the state that it gives, or itself where it is a plain value."""
    has_state = hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
    stored = {"state": part.state_dict()} if has_state else {"value": part}
    if not has_state and not _is_plain(part):
        raise SurgeryError(
            f"{name}= is a {type(part).__name__}, which has no state_dict() and load_state_dict() and is no "
            "plain value",
            example=_CALL,
        )
    try:
        buffer = io.BytesIO()
        torch.save(stored, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:  # whatever the user's state_dict returns
        raise SurgeryError(
            f"the state of {name}= cannot be stored so that weights_only reads it: {one_line(error)}",
            example="a state_dict() of numbers, text, tensors, and lists and dicts of them",
        ) from error
    return stored


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _random_states() -> dict[str, Any]:
    numpy: Any = sys.modules.get("numpy")
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.accelerator.is_available() and hasattr(_device_module(), "get_rng_state_all"):
        states["devices"] = _device_module().get_rng_state_all()
    if numpy:
        kind, keys, *rest = numpy.random.get_state()
        states["numpy"] = [str(kind), [int(key) for key in keys], *(item for item in rest)]
    return states


def _set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"].cpu())
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "devices" in states and torch.accelerator.is_available():
        _device_module().set_rng_state_all([state.cpu() for state in states["devices"]])
    numpy: Any = sys.modules.get("numpy")
    if numpy and "numpy" in states:
        kind, keys, *rest = states["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype="uint32"), *rest))


def _device_module() -> Any:
    return torch.get_device_module(torch.accelerator.current_accelerator())


# --------------------------------------------------------------------------------------------- processes


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world_size() > 1 else 0


def _gathered(own: dict[str, Any]) -> list[Any]:
    """What each process has of its own, in the order of the processes."""
    everyone: list[Any] = [None] * _world_size()
    if len(everyone) == 1:
        return [own]
    dist.all_gather_object(everyone, own)
    return everyone


def _own_share(run: Mapping[str, Any], path: Path) -> Any:
    processes = run["processes"]
    if len(processes) != _world_size():
        raise SurgeryError(
            f"{path} was written by {len(processes)} processes, and {_world_size()} would read it: each has "
            "its own place in the data and its own random state",
            example=f"torchrun --nproc-per-node {len(processes)}",
        )
    return processes[_rank()]


# ------------------------------------------------------------------------------------------------- files


def _write(path: Path, run: Mapping[str, Any]) -> None:
    def write(draft: Path) -> None:
        torch.save(run, draft)

    def check(draft: Path) -> None:
        if _read(draft)["model"].keys() != run["model"].keys():
            raise ExportError(f"{path} was not read back as it was written", example="another disk")

    write_file(path, write, check)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        near = near_names(path.name, [file.name for file in folder.iterdir() if file.is_file()])
        raise SurgeryError(f"there is no run {str(path)!r}", choices=near, example=_CALL)
    try:
        run = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise SurgeryError(f"{path} cannot be read as a run: {one_line(error)}", example=_CALL) from error
    if not isinstance(run, dict) or run.get("format") != _FORMAT:
        raise SurgeryError(f"{path} was not written by save_run", example=_CALL)
    return run


# ------------------------------------------------------------------------------------------------ loading


def _check_parts(
    stored: Mapping[str, Any], run: Mapping[str, Any], optimizer: object, given: Mapping[str, Any]
) -> None:
    """Every state has somebody to take it, and everybody gets a state."""
    theirs = {name for name, part in stored.items() if "state" in part} | ({"optimizer"} & run.keys())
    ours = set(given) | ({"optimizer"} if optimizer is not None else set())
    problems = [f"{name} is in the file and was not given" for name in sorted(theirs - ours)]
    for name in sorted(ours - theirs):
        is_value = name in stored
        problems.append(f"{name} was given, and is {'a plain value' if is_value else 'not'} in the file")
    if problems:
        raise SurgeryError(
            f"the parts do not fit: {'; '.join(problems)}",
            choices=sorted(theirs),
            example=f"load_run(path, model, {', '.join(f'{name}={name}' for name in sorted(theirs))})",
        )


def _check_model(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    problems = [f"{name} is only in the file" for name in theirs.keys() - ours.keys()]
    problems += [f"{name} is only in the network" for name in ours.keys() - theirs.keys()]
    for name in ours.keys() & theirs.keys():
        shapes = [tuple(getattr(state[name], "shape", ())) for state in (ours, theirs)]
        if shapes[0] != shapes[1]:
            problems.append(f"{name} is {shapes[1]} in the file and {shapes[0]} in the network")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise SurgeryError(
            f"the run is of another network: {'; '.join(sorted(problems)[:_SHOWN])}{more}",
            example="attach the same heads to the same network before load_run",
        )


_SHOWN = 5


def _load_all(loading: list[tuple[str, Any, Any]]) -> None:
    """Load each state; where one refuses, those before it get back what they had."""
    loaded: list[tuple[Any, Any]] = []
    for name, part, state in loading:
        loaded.append((part, part.state_dict()))
        try:
            part.load_state_dict(state)
        except Exception as error:
            for changed, before in reversed(loaded):
                with contextlib.suppress(Exception):
                    changed.load_state_dict(before)
            raise SurgeryError(
                f"the state of {name} does not fit: {one_line(error)}",
                example="make it as it was made in the run that is resumed",
            ) from error
