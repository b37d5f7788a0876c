"""Loads, cuts, runs and writes the network that a command names."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from grl_surgery import points
from grl_surgery.cli.console import stdout, working
from grl_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import nn

    from grl_surgery.loading.model_zoo import LoadedModel

__all__ = [
    "INPUTS",
    "check_can_be_cut",
    "check_output",
    "check_places",
    "is_exported",
    "load",
    "parse_edge",
    "run",
    "splice",
    "spliced_or_as_it_is",
    "write",
]


def load(
    source: str,
    pretrained: bool,
    checkpoint: str | None,
    input_size: str | None = None,
    batch: int = 2,
    seed: int = 0,
    made_from: str | None = None,
) -> LoadedModel:
    """The network, made from the same random numbers in every run, with the inputs asked for."""
    size = None if input_size is None else _parse_size(input_size)
    _check_options(source, made_from, seed)
    with working("" if pretrained else f"Creating {source}"):  # a download draws its own progress
        import torch

        from grl_surgery.loading.model_zoo import load_model

        torch.manual_seed(seed)
        if is_exported(source):
            loaded = _from_file(source, made_from, pretrained or checkpoint is not None)
        else:
            with _arguments_of(source):
                loaded = load_model(source, pretrained=pretrained, checkpoint=checkpoint)
    if size is None:
        return loaded
    weight = next((p for p in loaded.module.parameters() if p.is_floating_point()), torch.empty(0))
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed))
    return replace(loaded, example_inputs=(images.to(weight.device, weight.dtype),))


@contextlib.contextmanager
def _arguments_of(source: str) -> Iterator[None]:
    """While a script is imported, ``sys.argv`` is its own: scripts parse it at their top."""
    before = sys.argv
    sys.argv = [source.rpartition(":")[0] or source]
    try:
        yield
    finally:
        sys.argv = before


def _check_options(source: str, made_from: str | None, seed: int) -> None:
    """Refuse a --model that would do nothing, and a seed that torch does not take."""
    if made_from is not None and not is_exported(source):
        raise SurgeryError(
            f"--model says what made the network in a FILE, and {source!r} is none",
            example=f"--model {source}",
        )
    if not -(2**63) <= seed < 2**64:
        raise SurgeryError(f"--seed {seed} has more than 64 bits", example="--seed 0")


def check_places(
    source: str,
    after: list[str] | None,
    before: list[str] | None,
    edge: list[str] | None,
    coeff: float | None = None,
    *,
    signed: bool = False,
    may_have_reversals: bool = False,
) -> None:
    """Refuse what no network could make right, before torch and the network's library are imported.

    Args:
        source: What the network is made from.
        after: Points named with --after.
        before: Points named with --before.
        edge: Edges named with --edge.
        coeff: The coefficient asked for, if one was.
        signed: Whether it may be negative.
        may_have_reversals: Whether the command also takes a network that has reversals, without a place.

    Raises:
        SurgeryError: No place is named, an edge is none, or the coefficient is negative or not finite.
    """
    from_a_library = re.match(r"(timm|torchvision)/", source) is not None
    if not (after or before or edge) and (from_a_library or not may_have_reversals):
        raise _no_place()
    for line in edge or ():
        parse_edge(line)
    if coeff is not None and not 0 <= (abs(coeff) if signed else coeff) < float("inf"):
        raise SurgeryError(
            f"coeff is {coeff}; it must be finite{'' if signed else ' and not negative'}: the gradient is "
            "multiplied by -coeff, so that a negative one un-reverses it, and infinity or nan destroys it",
            example="--coeff 0.5" if signed else "--coeff 0.5, or --coeff=-0.5 --signed on purpose",
        )


def _no_place() -> SurgeryError:
    return SurgeryError(
        "no point is named: give --after, --before or --edge",
        example="--after layer3 ('grl-surgery graph MODEL' lists the points)",
    )


def is_exported(source: str) -> bool:
    """Whether this is a file or a folder, and no name of a model."""
    return os.path.isdir(source) or os.path.splitext(source)[1] in (".safetensors", ".pt2", ".onnx")


def _from_file(path: str, made_from: str | None, has_weights: bool) -> LoadedModel:
    """The network in a file that export wrote, with example inputs for what was cut."""
    from grl_surgery.io.export import load as read
    from grl_surgery.loading.model_zoo import LoadedModel, example_inputs, load_model
    from grl_surgery.surgery.insert import reversals
    from grl_surgery.surgery.insert import strip as take_out
    from grl_surgery.surgery.spliced_module import SplicedModule

    if has_weights:
        raise SurgeryError(
            f"{path} has weights of its own", example="leave out --pretrained and --checkpoint"
        )
    made = load_model(made_from) if made_from else None
    module = read(path, model=None if made is None else made.module)
    inputs = example_inputs(module) if made is None else made.example_inputs
    if inputs is None and reversals(module) and isinstance(module, SplicedModule):
        inputs = example_inputs(take_out(module))
    return LoadedModel(module, path, inputs)


def check_output(output: str | None) -> None:
    """Refuse what is no name of a file."""
    if output in ("", "-"):
        raise SurgeryError(f"--output {output!r} is no name of a file", example="-o m.safetensors")


def write(model: nn.Module, output: str, loaded: LoadedModel, **options: Any) -> None:
    """Export, and say what was written."""
    from pathlib import Path

    from grl_surgery.io.export import export

    is_program = output.endswith((".pt2", ".onnx"))
    if not is_program and re.fullmatch(r"(timm|torchvision)/[\w.]+", loaded.source):
        options["source"] = loaded.source
    with working(f"Writing {output}"):
        path = export(model, output, loaded.example_inputs, **options)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    size = sum(Path(file).stat().st_size for file in files)
    stdout().out(f"\nwrote {path}, {size:,} bytes, read back and compared", highlight=False)


def _parse_size(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise SurgeryError(
            f"--input-size {text!r} is no size of an input, without its batch", example="--input-size 3x64x64"
        )
    return tuple(int(part) for part in text.split("x"))


def splice(
    loaded: LoadedModel,
    after: list[str] | None,
    before: list[str] | None,
    edge: list[str] | None,
    coeff: float,
    signed: bool = False,
) -> nn.Module:
    """The network with a reversal at every place named; insert_grl takes one kind of place at a time."""
    from grl_surgery.surgery.insert import insert_grl

    if not (after or before or edge):
        raise _no_place()
    insert = functools.partial(insert_grl, coeff=coeff, signed=signed, example_inputs=loaded.example_inputs)
    model = loaded.module
    if after:
        model = insert(model, after=after)
    if before:
        model = insert(model, before=before)
    if edge:
        model = insert(model, edge=[parse_edge(line) for line in edge])
    return model


def spliced_or_as_it_is(
    loaded: LoadedModel,
    after: list[str] | None,
    before: list[str] | None,
    edge: list[str] | None,
    coeff: float | None,
    signed: bool = False,
) -> nn.Module:
    """As ``splice``, but a network that has reversals of its own needs no place named."""
    from grl_surgery.surgery.insert import reversals

    if not (after or before or edge) and reversals(loaded.module):
        if coeff is not None:
            raise SurgeryError(
                "--coeff is of a reversal to be spliced in, and those that are here have their own: "
                "name a place, or leave out --coeff",
                example=f"--after layer3 --coeff {coeff:g}",
            )
        return loaded.module
    return splice(loaded, after, before, edge, 1.0 if coeff is None else coeff, signed)


INPUTS = "--input-size 3x64x64; or a factory that returns (network, (torch.randn(2, 3, 64, 64),))"


def run(loaded: LoadedModel, model: nn.Module) -> Any:
    """Outputs of one forward in the model's present mode, from the same random numbers every time."""
    import torch

    from grl_surgery.loading.inputs import as_arguments, does_not_run

    if loaded.example_inputs is None:
        raise SurgeryError(f"it is not known what inputs {loaded.source} takes", example=INPUTS)
    args, kwargs = as_arguments(loaded.example_inputs)
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except SurgeryError:  # it says itself what would run
        raise
    except Exception as error:  # the network is the user's: anything can come out of it
        what = does_not_run(str(loaded.source), loaded.example_inputs, error)
        raise SurgeryError(what, example=INPUTS) from error


def check_can_be_cut(loaded: LoadedModel) -> None:
    """Refuse a program, before a point that it does not have is looked for.

    Raises:
        SurgeryError: With the file to take instead.
    """
    from grl_surgery.surgery.exported_program import is_program

    if is_program(loaded.module):
        raise SurgeryError(
            f"{loaded.source}: a program is complete, and cannot be cut or stripped",
            example="the .safetensors of the same network",
        )


def parse_edge(line: str) -> points.Edge:
    """An edge as ``graph --edges`` prints it."""
    match = re.fullmatch(r"(.+) \(argument (.+)\)", line.strip())
    pair = points.parse_edge(match[1] if match else line)
    return replace(pair, arg=match[2]) if match else pair
