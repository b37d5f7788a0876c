"""export and load: the end of the file's name chooses the format."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from grl_surgery.errors import ExportError
from grl_surgery.io import programs
from grl_surgery.io.atomic_write import write_file, write_folder
from grl_surgery.io.programs import Purpose
from grl_surgery.io.safetensors import check_checkpoint, read_checkpoint, write_checkpoint
from grl_surgery.io.source_folder import WEIGHTS, check_folder, foreign, write_code
from grl_surgery.io.tensor_data import check_gradients
from grl_surgery.isolation.rng_state import preserve_rng_state
from grl_surgery.isolation.shared_copy import share_copy
from grl_surgery.surgery.exported_program import is_program
from grl_surgery.surgery.head_outputs import heads_that_keep
from grl_surgery.surgery.insert import check_model, head_names, reversals
from grl_surgery.validation import check_names

__all__ = ["export", "load"]

_FORMATS = (".safetensors", ".pt2", ".onnx")


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    purpose: Purpose | None = None,
    heads: str | Sequence[str] | None = None,
    dynamic: bool = True,
    source: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write a network to a file, in the format that its name asks for.

    The file is written beside its place, read back and compared with the network, and only then renamed: a
    failure at any moment leaves what was there before. A folder that holds anything that export did not
    write, or that was changed since, is not replaced.

    Example:
        >>> import tempfile, timm
        >>> from grl_surgery.surgery.insert import insert_grl, reversals
        >>> m = insert_grl(timm.create_model("test_resnet"), after="layer2", coeff=0.5)
        >>> path = export(m, Path(tempfile.mkdtemp(), "m.safetensors"))
        >>> reversals(load(path))
        {'grl_layer2': GradientReversal(coeff=0.5)}

    Args:
        model: A network, spliced or not; it is not changed.
        path: ``.safetensors``: weights and the recipe of the surgery. ``.pt2``: a ``torch.export`` program.
            ``.onnx``: for ONNX Runtime, always without reversals. A name without an ending: a folder with
            readable Python code, the weights and a model card.
        example_inputs: Arguments of forward, for programs and folders (a checkpoint needs none); by default
            those that timm or torchvision declare.
        purpose: ``"training"``: reversals and heads are kept, in a program in the network's present mode.
            ``"inference"``: the plain network in eval mode, as a program, which loads where this package is
            not installed. By default the only one that the format knows, and training for ``.pt2``.
        heads: Heads whose logits a program for inference also returns; none by default.
        dynamic: Whether a program takes any batch size, or that of the example inputs only.
        source: What a checkpoint's or a folder's network was made from, such as ``"timm/resnet18"``; found
            for timm and torchvision.
        options: What its maker was given besides, such as ``{"num_classes": 10}``; found with the source.

    Returns:
        The path.

    Raises:
        ExportError: The format is not known or has no such choice, the network cannot be written in it, what
            was written does not come back as it was, or a folder would be lost.
    """
    check_model(model, "export")
    _check_gathered(model)
    file = _checked_path(path, "export(m, 'm.safetensors')")
    if file.suffix not in (*_FORMATS, ""):
        raise ExportError(
            f"{file.name!r} has an unknown ending; formats are {', '.join(_FORMATS)}, and a folder "
            "of code for a name without an ending",
            example=f"export(m, {str(file.with_suffix('.safetensors'))!r})",
        )
    purpose = _purpose(file.suffix, purpose)
    kept = None if heads is None else check_names("heads", heads, example="heads=['domain']")
    _check_choices(file.suffix, purpose, kept, dynamic, source, options)
    _check_program(model, file.suffix, purpose)
    if purpose == "training":
        check_gradients(model)
    own, model = model, share_copy(model)  # in which no reversal is disabled
    with preserve_rng_state():
        if file.suffix == ".safetensors":
            write = functools.partial(write_checkpoint, model, source=source, options=options)
            write_file(file, write, functools.partial(check_checkpoint, model))
        elif file.suffix:
            _export_program(own, model, file, example_inputs, purpose, kept or (), dynamic)
        else:
            _export_folder(own, model, file, programs.inputs_for(model, example_inputs), source, options)
    return file


def _check_gathered(model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    # By name, since importing torch's distributed modules takes seconds.
    found = [name for name, tensor in tensors if type(tensor.data).__name__ == "DTensor"]
    found += [
        f"{path or 'the root'} ({kind.__name__})"
        for path, module in model.named_modules()
        for kind in type(module).__mro__
        if kind.__name__ == "FullyShardedDataParallel"
    ]
    if found:
        raise ExportError(
            f"the network is sharded, and this process holds a part of it: {', '.join(found[:3])}"
            f"{' ...' if found[3:] else ''}; gather the weights, and export a network that is not sharded",
            example="state = get_model_state_dict(m, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict, in every process; then plain.load_state_dict(state) "
            "and export(plain, ...), where plain was spliced as m was",
        )


def _checked_path(path: Any, example: str) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise ExportError(f"a path is text or a pathlib.Path, got {type(path).__name__}", example=example)
    return Path(path)


_PURPOSES: Mapping[str, tuple[Purpose, ...]] = {
    ".safetensors": ("training",),
    ".pt2": ("training", "inference"),
    ".onnx": ("inference",),
    "": ("training",),
}


def _purpose(suffix: str, purpose: Purpose | None) -> Purpose:
    """The purpose asked for, or the format's own."""
    possible = _PURPOSES[suffix]
    if purpose is None:
        return possible[0]
    if purpose not in ("training", "inference"):
        raise ExportError(f"purpose={purpose!r} is not known", choices=["training", "inference"])
    if purpose not in possible:
        what = "has no reversals" if suffix == ".onnx" else "keeps reversals and heads"
        raise ExportError(
            f"purpose={purpose!r} is not what {suffix or 'a folder'} is for: it always {what}",
            example=f"export(m, 'm.pt2', purpose={purpose!r})",
        )
    return purpose


def _check_choices(
    suffix: str, purpose: Purpose, heads: Sequence[str] | None, dynamic: bool, source: Any, options: Any
) -> None:
    """Refuse what the format does not know, where it would do nothing."""
    is_program = suffix in (".pt2", ".onnx")
    if heads is not None and not (is_program and purpose == "inference"):
        raise ExportError(
            "heads= chooses outputs of a program for inference; this format keeps all heads as they are",
            example="export(m, 'm.onnx', heads=['domain'])",
        )
    if not dynamic and not is_program:
        raise ExportError(
            f"dynamic=False records one batch size in a program, and {suffix or 'a folder'} is none",
            example="export(m, 'm.pt2', dynamic=False)",
        )
    if is_program and (source is not None or options is not None):
        raise ExportError(
            f"source= and options= say how to build the network again, and {suffix} is complete without",
            example=f"export(m, 'm{suffix}')",
        )
    if options is not None and not isinstance(options, Mapping):
        raise ExportError(
            f"options= are names and values, got {type(options).__name__}",
            example="options={'num_classes': 10}",
        )


def _check_program(model: nn.Module, suffix: str, purpose: Purpose) -> None:
    """A program that was read has no recipe any more, by which its surgery could be undone or described."""
    described = suffix not in (".pt2", ".onnx")
    if is_program(model) and (described or (purpose == "inference" and reversals(model))):
        missing = "the network's own classes" if described else "a way to take its reversals and heads out"
        raise ExportError(
            f"this network was loaded from a .pt2: a program is complete, and does not have {missing}",
            example=f"export(load('m.safetensors'), 'm{suffix}'), from the checkpoint of the same network",
        )


def _export_folder(
    own: nn.Module,
    model: nn.Module,
    file: Path,
    inputs: programs.Inputs,
    source: str | None,
    options: Mapping[str, Any] | None,
) -> None:
    write = functools.partial(write_code, model, inputs=inputs, source=source, options=options)
    check = functools.partial(check_folder, model, programs.outputs_of(own, inputs), inputs=inputs)
    write_folder(file, write, check, foreign)


def _export_program(
    own: nn.Module,
    model: nn.Module,
    file: Path,
    example_inputs: Any,
    purpose: Purpose,
    heads: Sequence[str],
    dynamic: bool,
) -> None:
    training = purpose == "training"
    # In the order attached, which is the order of the outputs.
    ordered = [name for name in head_names(model) if name in heads] if not training else []
    unknown = [name for name in heads if name not in head_names(model)]
    keeping = [
        f"{path}.{name}".lstrip(".") for path, m in model.named_modules() for name in heads_that_keep(m)
    ]
    if lost := [name for name in keeping if training or name in heads]:
        raise ExportError(
            f"the head {lost[0]!r} keeps its logits (outputs='original'), for which a program has no place",
            example="export(m, 'm.safetensors'), or attach_domain_head(..., outputs='with_logits')",
        )
    network = model if training else programs.for_inference(model, unknown or ordered)
    inputs = programs.inputs_for(network, example_inputs)
    if training:
        expected = programs.outputs_of(own, inputs)
    else:
        expected = programs.outputs_for_inference(own, inputs, ordered)
    if file.suffix == ".pt2":

        def write(path: Path) -> None:
            programs.write_program(network, path, inputs, purpose, dynamic)

        check = functools.partial(programs.check_program, expected, inputs=inputs)
    else:

        def write(path: Path) -> None:
            programs.write_onnx(network, path, inputs, ordered, dynamic, len(expected))

        check = functools.partial(programs.check_onnx, expected, inputs=inputs)
    write_file(file, write, check)


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    heads: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """Read a network that :func:`export` has written; no code in the file is run.

    Example:
        >>> import tempfile
        >>> path = export(nn.Linear(4, 2), Path(tempfile.mkdtemp(), "m.safetensors"))
        >>> load(path, model=nn.Linear(4, 2))
        Linear(in_features=4, out_features=2, bias=True)

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
    file = _checked_path(path, "load('m.safetensors')")
    _check_given(model, heads)
    if file.is_dir():
        file = file / WEIGHTS
    if not file.is_file():
        raise ExportError(f"there is no file {os.fspath(file)!r}")
    if file.suffix == ".safetensors":
        with preserve_rng_state():
            return read_checkpoint(file, model, heads)
    if file.suffix == ".onnx":
        raise ExportError(
            f"{file} is for ONNX Runtime, and has nothing to train",
            example=f"onnxruntime.InferenceSession({os.fspath(file)!r})",
        )
    if file.suffix != ".pt2":
        raise ExportError(f"{file} has an unknown ending", choices=_FORMATS[:2])
    if model is not None or heads is not None:
        raise ExportError("a program is complete: load(path) takes no model and no heads for it")
    return programs.read_program(file)


def _check_given(model: Any, heads: Any) -> None:
    """Refuse what is neither a network nor makes one, before the file is read."""
    if not (model is None or isinstance(model, nn.Module) or callable(model)):
        raise ExportError(
            f"model= is the network that was cut, or what makes it; got {type(model).__name__}: "
            f"{str(model)[:60]!r}",
            example="load(path, model=MyNet())",
        )
    if heads is not None and not (
        isinstance(heads, Mapping) and all(isinstance(head, nn.Module) for head in heads.values())
    ):
        raise ExportError(
            f"heads= are modules by name, got {type(heads).__name__}",
            example="load(path, heads={'domain': MyHead()})",
        )
