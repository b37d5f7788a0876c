"""export and load: a network to a file and back, the format chosen by the name's ending."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from grl_surgery.errors import ExportError
from grl_surgery.files import programs
from grl_surgery.files.atomic_files import write_file, write_folder
from grl_surgery.files.code_folder import WEIGHTS, check_folder, is_ours, write_code
from grl_surgery.files.programs import Purpose
from grl_surgery.files.safetensors_file import check_checkpoint, read_checkpoint, write_checkpoint
from grl_surgery.generators import random_state_kept
from grl_surgery.splicing import check_model, head_names

__all__ = ["export", "load"]

_FORMATS = (".safetensors", ".pt2", ".onnx")


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    purpose: Purpose = "training",
    heads: Sequence[str] | None = None,
    dynamic: bool = True,
    source: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write a network to a file, in the format that its name asks for.

    The file is written beside its place, read back and compared with the network, and only then renamed: a
    failure at any moment leaves what was there before.

    Example:
        >>> import tempfile, timm
        >>> from grl_surgery.splicing import insert_grl, reversals
        >>> m = insert_grl(timm.create_model("test_resnet"), after="layer2", coeff=0.5)
        >>> path = export(m, Path(tempfile.mkdtemp(), "m.safetensors"))
        >>> reversals(load(path))
        {'grl_layer2': GradientReversal(coeff=0.5)}

    Args:
        model: A network, spliced or not; it is not changed.
        path: ``.safetensors``: weights and the recipe of the surgery. ``.pt2``: a ``torch.export`` program.
            ``.onnx``: for ONNX Runtime, always without reversals. A name without an ending: a folder with
            readable Python code, the weights and a model card.
        example_inputs: Arguments of forward, for programs and folders; by default those that timm or
            torchvision declare.
        purpose: Whether a ``.pt2`` program keeps reversals and heads, in the network's present mode, or is
            the plain network in eval mode, which loads where this package is not installed.
        heads: Heads whose logits a program for inference also returns; none by default.
        dynamic: Whether a program takes any batch size, or that of the example inputs only.
        source: What the network was made from, as for :func:`load_model`; found for timm and torchvision.
        options: What its maker was given besides, such as ``{"num_classes": 10}``; found with the source.

    Returns:
        The path.

    Raises:
        ExportError: The format is not known, the network cannot be written in it, or what was written does
            not come back as it was.
    """
    check_model(model, "export")
    file = Path(path)
    if file.suffix not in (*_FORMATS, ""):
        raise ExportError(
            f"{file.name!r} has an ending that is no format; formats are {', '.join(_FORMATS)}, and a folder "
            "of code for a name without an ending",
            example=f"export(m, {str(file.with_suffix('.safetensors'))!r})",
        )
    if heads is not None and (file.suffix not in (".pt2", ".onnx") or _is_training(file, purpose)):
        raise ExportError(
            "heads= chooses outputs of a program for inference; this format keeps all heads as they are",
            example="export(m, 'm.onnx', heads=['domain'])",
        )
    with random_state_kept():
        if file.suffix == ".safetensors":
            write = functools.partial(write_checkpoint, model, source=source, options=options)
            write_file(file, write, functools.partial(check_checkpoint, model))
        elif file.suffix:
            _export_program(model, file, example_inputs, purpose, heads or (), dynamic)
        else:
            _export_folder(model, file, programs.inputs_for(model, example_inputs), source, options)
    return file


def _export_folder(
    model: nn.Module,
    file: Path,
    inputs: programs.Inputs,
    source: str | None,
    options: Mapping[str, Any] | None,
) -> None:
    write = functools.partial(write_code, model, inputs=inputs, source=source, options=options)
    write_folder(file, write, functools.partial(check_folder, model, inputs=inputs), is_ours)


def _is_training(file: Path, purpose: Purpose) -> bool:
    return purpose == "training" and file.suffix != ".onnx"


def _export_program(
    model: nn.Module, file: Path, example_inputs: Any, purpose: Purpose, heads: Sequence[str], dynamic: bool
) -> None:
    if purpose not in ("training", "inference"):
        raise ExportError(f"purpose={purpose!r} is not known", choices=["training", "inference"])
    training = _is_training(file, purpose)
    # In the order attached, which is the order of the outputs.
    ordered = [name for name in head_names(model) if name in heads] if not training else []
    unknown = [name for name in heads if name not in head_names(model)]
    network = model if training else programs.for_inference(model, unknown or ordered)
    inputs = programs.inputs_for(network, example_inputs)
    if file.suffix == ".pt2":
        kind: Purpose = "training" if training else "inference"

        def write(path: Path) -> None:
            programs.write_program(network, path, inputs, kind, dynamic)

        check = functools.partial(programs.check_program, network, inputs=inputs)
    else:

        def write(path: Path) -> None:
            programs.write_onnx(network, path, inputs, ordered, dynamic)

        check = functools.partial(programs.check_onnx, network, inputs=inputs)
    write_file(file, write, check)


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    heads: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """Read a network that :func:`export` has written; no code in the file is run.

    Args:
        path: A ``.safetensors`` or ``.pt2`` file, or a folder, of which only the weights and the recipe are
            read.
        model: For a checkpoint of a network of your own: the network, or what makes it. It is not changed.
        heads: For a checkpoint with heads of your own classes: those heads, by name.

    Returns:
        The network, on the CPU. From a checkpoint, what was exported, bit for bit; from a program, a
        ``GraphModule`` in the mode that it was exported in.

    Raises:
        ExportError: The file is damaged, not one that export writes, asks for something that is not allowed,
            or describes another network than the installed libraries build.
    """
    file = Path(path)
    if file.is_dir():
        file = file / WEIGHTS
    if not file.is_file():
        raise ExportError(f"there is no file {os.fspath(file)!r}")
    if file.suffix == ".safetensors":
        with random_state_kept():
            return read_checkpoint(file, model, heads)
    if file.suffix == ".onnx":
        raise ExportError(
            f"{file} is for ONNX Runtime, and has nothing to train",
            example=f"onnxruntime.InferenceSession({os.fspath(file)!r})",
        )
    if file.suffix != ".pt2":
        raise ExportError(f"{file} has an ending that is no format", choices=_FORMATS[:2])
    if model is not None or heads is not None:
        raise ExportError("a program is complete: load(path) takes no model and no heads for it")
    return programs.read_program(file)
