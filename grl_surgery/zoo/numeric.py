"""The numeric tier: the same cuts on real tensors, where every bit is compared."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import nn

from grl_surgery.errors import SurgeryError, one_line
from grl_surgery.io.export import export, load
from grl_surgery.surgery.insert import insert_grl, reversals, strip
from grl_surgery.verify.experiment import private_copy, tensors_in
from grl_surgery.verify.verify_flip import verify_flip
from grl_surgery.zoo.building import without_values
from grl_surgery.zoo.inputs import on_smallest_inputs
from grl_surgery.zoo.ledger import NotProved, Row
from grl_surgery.zoo.names import family
from grl_surgery.zoo.places import Place, survey

__all__ = ["check_numbers", "smallest"]

Mode = Literal["train", "eval"]
_MODES: tuple[Mode, ...] = ("train", "eval")


def smallest(names: Sequence[str]) -> str:
    """The network with the fewest parameters.

    Example:
        >>> smallest(["torchvision/resnet34", "torchvision/resnet18"])
        'torchvision/resnet18'
    """
    return min(names, key=_parameters) if len(names) > 1 else names[0]


def _parameters(source: str) -> int:
    return sum(parameter.numel() for parameter in without_values(source).parameters())


def check_numbers(source: str) -> Row:
    """Prove every cut in one network on real tensors, in train and in eval mode.

    Of each cut: the forward is equal bit for bit, exactly the right gradients flip, keys stay, and what is
    stripped computes the same bits. The cut at the middle stage is exported as a program and read back.

    Returns:
        The row of a network for which all of this holds.

    Raises:
        NotProved: Something does not hold.
        SurgeryError: A cut cannot be made.
    """
    start = time.process_time()
    torch.manual_seed(0)
    model, inputs = on_smallest_inputs(source)
    found = survey(model)
    keys = list(model.state_dict())
    times, flipped, silent = [], 0, []
    for place in found.places:
        before = time.process_time()
        spliced = insert_grl(model, **place.keyword)  # type: ignore[arg-type]
        times.append(time.process_time() - before)
        stripped = strip(spliced)
        if list(spliced.state_dict()) != keys or list(stripped.state_dict()) != keys:
            raise NotProved(f"{place.role}, {place.at}: the state_dict has other keys")
        counts = [_prove(model, spliced, inputs, mode, place) for mode in _MODES]
        for mode, count in zip(_MODES, counts, strict=True):
            _compare(model, stripped, inputs, mode, place)
            silent += [] if count else [f"{place.role} in {mode} mode"]
        if not any(counts):
            raise NotProved(f"{place.role}, {place.at}: no gradient reaches it in either mode")
        flipped += sum(counts)
    return Row(
        source,
        family(source),
        "numeric",
        "ok",
        "",
        found.points,
        found.root,
        {place.role: str(place.at) for place in found.places},
        device="cpu",
        splice_ms=round(1e3 * median(times), 2),
        seconds=round(time.process_time() - start, 2),
        facts={
            "flipped": flipped,
            "no gradient": silent,
            "input": "x".join(map(str, tensors_in(inputs)[0].shape)),
            "program": _program(model, found.places[1], inputs),
        },
    )


def _prove(model: nn.Module, spliced: nn.Module, inputs: Any, mode: Mode, place: Place) -> int:
    """How many gradients are proved to flip; 0 where the network itself sends none to the reversal."""
    report = verify_flip(spliced, model, inputs, mode=mode)
    if not report.ok:
        agreed = report.forward_identical and all(row.ok for row in report.parameters)
        if agreed and all(row.note == "no gradient reaches it" for row in report.reversals):
            return 0
        raise NotProved(f"{place.role}, {place.at} in {mode} mode: {'; '.join(report.failures)}")
    return sum(row.measured in ("flipped", "mixed") for row in report.parameters)


def _compare(model: nn.Module, stripped: nn.Module, inputs: Any, mode: Mode, place: Place) -> None:
    """Run the network and what stripping gave, each on a copy of its own, from the same random state."""
    first, second = (_outputs(network, inputs, mode) for network in (model, stripped))
    same = len(first) == len(second) and all(map(_same_bits, first, second))
    if type(stripped) is not type(model) or not same:
        raise NotProved(f"{place.role}, {place.at}: stripped, it computes something else in {mode} mode")


def _outputs(network: nn.Module, inputs: Any, mode: Mode) -> list[torch.Tensor]:
    copied = private_copy(network, {}).train(mode == "train")
    for module in copied.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors_in(copied(*inputs))


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.equal(torch.nan_to_num(first), torch.nan_to_num(second))


# ------------------------------------------------------------------------------------------------- export


def _program(model: nn.Module, place: Place, inputs: Any) -> str:
    """Write the network with one cut as a program for training and read it back.

    Returns:
        ``equal``: written, read back, same bits and reversals. Otherwise why torch.export cannot record the
        unspliced network either.

    Raises:
        NotProved: It can, or the program differs.
    """
    spliced = insert_grl(model, **place.keyword).eval()  # type: ignore[arg-type]
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "network.pt2")
            export(spliced, file, inputs, dynamic=False)
            again = load(file)
    except SurgeryError as error:
        reason = _not_exportable(model, inputs)
        if reason is None:
            raise NotProved(f"{place.role}, {place.at}: not exported: {error}") from error
        return f"torch.export cannot record the network itself: {reason}"[:200]
    if len(reversals(again)) != 1 or not _alike(spliced, again, inputs):
        raise NotProved(f"{place.role}, {place.at}: the program read back computes something else")
    return "equal"


def _alike(spliced: nn.Module, program: nn.Module, inputs: Any) -> bool:
    with torch.no_grad():
        pairs = zip(tensors_in(spliced(*inputs)), tensors_in(program(*inputs)), strict=True)
        return all(_same_bits(first, second) for first, second in pairs)


def _not_exportable(model: nn.Module, inputs: Any) -> str | None:
    """Why torch.export cannot record the unspliced network; None if it can."""
    try:
        torch.export.export(private_copy(model, {}).eval(), inputs)
    except Exception as error:
        return one_line(error)
    return None
