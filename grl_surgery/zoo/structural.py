"""The structural tier: cuts in a network without values, proved by the paths that autograd has recorded.

Networks are built on the meta device, so that the largest need no memory and no arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import nn

from grl_surgery.errors import one_line
from grl_surgery.loading.model_zoo import load_model
from grl_surgery.points import Edge
from grl_surgery.surgery.insert import insert_grl, reversals, strip
from grl_surgery.surgery.spliced_module import SplicedModule
from grl_surgery.verify.experiment import tensors_in
from grl_surgery.verify.reference_model import (
    Factors,
    HookReversal,
    is_fully_traced,
    predict,
    sign_label,
    with_reversals,
)
from grl_surgery.zoo.building import without_values
from grl_surgery.zoo.inputs import declared_inputs
from grl_surgery.zoo.ledger import NotProved, Row
from grl_surgery.zoo.names import family
from grl_surgery.zoo.paths import recorded_nodes, signs_in_autograd
from grl_surgery.zoo.places import Place, Survey, survey
from grl_surgery.zoo.shapes import shapes_in_one_step

__all__ = ["check_structure"]

Signs = dict[int, Factors]


def check_structure(source: str) -> Row:
    """Try every cut in one network, in train and in eval mode.

    Each cut is made on its own and taken out again: the keys must stay, and the class must come back. Then
    all cuts are made together and the network runs. For each reversal, the signs of the paths from each
    parameter to the output must be those that its recipe predicts.

    Returns:
        The row of a network for which all of this holds.

    Raises:
        NotProved: Something does not hold.
        SurgeryError: A cut cannot be made.
    """
    start = time.process_time()
    with shapes_in_one_step():
        row = _check(source)
    return replace(row, seconds=round(time.process_time() - start, 2))


def _check(source: str) -> Row:
    model = without_values(source)
    found = survey(model)
    times, graphs = _each_cut(model, found.places)
    device, reason = "meta", ""
    try:
        _check_paths(model, found)
    except NotProved:
        raise
    except Exception as error:
        device, reason = "cpu", _without_values(model, error)
        _check_paths(load_model(source).module, found)
    return Row(
        source,
        family(source),
        "structural",
        "ok",
        reason,
        found.points,
        found.root,
        {place.role: str(place.at) for place in found.places},
        device=device,
        splice_ms=round(1e3 * median(times), 2),
        facts={
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "graph": graphs,
            "boundary": len(found.places) - graphs,
        },
    )


def _without_values(model: nn.Module, error: Exception) -> str:
    """That the network itself does not run on the meta device: otherwise the error is the surgery's."""
    try:
        model(*declared_inputs(model))
    except Exception as own:
        return f"forward does not run on the meta device ({one_line(own)}), so it ran on real tensors"
    raise NotProved(f"the spliced network fails where the original runs: {one_line(error)}") from error


# ------------------------------------------------------------------------------------------------- cuts


def _each_cut(model: nn.Module, places: Sequence[Place]) -> tuple[list[float], int]:
    """Make each cut on its own, and take it out again.

    Returns:
        How long each insert_grl took, and how many of the results are graphs of the whole network.
    """
    times, graphs = [], 0
    keys = list(model.state_dict())
    for place in places:
        start = time.process_time()
        spliced = insert_grl(model, **place.keyword)  # type: ignore[arg-type]
        times.append(time.process_time() - start)
        graphs += isinstance(spliced, SplicedModule) and not spliced.grl_surgery.hooked
        again = strip(spliced)
        _require(len(reversals(spliced)) == 1, place, "there is not one reversal")
        _require(list(spliced.state_dict()) == keys, place, "the state_dict has other keys")
        _require(list(again.state_dict()) == keys, place, "stripped, the state_dict has other keys")
        _require(type(again) is type(model), place, f"stripped, it is a {type(again).__name__}")
    return times, graphs


def _require(holds: bool, place: Place, otherwise: str) -> None:
    if not holds:
        raise NotProved(f"{place.role}, {place.at}: {otherwise}")


def _all_cuts(model: nn.Module, places: Sequence[Place], root: str) -> tuple[nn.Module, list[str]]:
    """The network with all cuts, and the name of the reversal at each."""
    if root == "traced":  # all at once is three times as fast
        points = [place.at for place in places if not isinstance(place.at, Edge)]
        edges = [place.at for place in places if isinstance(place.at, Edge)]
        spliced = insert_grl(model, after=points)
        spliced = insert_grl(spliced, edge=edges) if edges else spliced
        if isinstance(spliced, SplicedModule) and not spliced.grl_surgery.hooked:
            own = [cut.module for cut in spliced.grl_surgery.cuts]
            if len(own) == len(places):  # the others are in a graph of a module inside it
                return spliced, own
    coefficients = []
    for place in places:
        before = {id(layer.coeff) for layer in reversals(model).values()}
        model = insert_grl(model, **place.keyword)  # type: ignore[arg-type]
        coefficients += [layer.coeff for layer in reversals(model).values() if id(layer.coeff) not in before]
    names = {id(layer.coeff): name for name, layer in reversals(model).items()}
    return model, [names[id(coefficient)] for coefficient in coefficients]


# ------------------------------------------------------------------------------------------------- paths


def _check_paths(model: nn.Module, found: Survey) -> None:
    """Run the network with all cuts in both modes; compare prediction and record, each reversal alone."""
    places = found.places
    inputs = declared_inputs(model)
    spliced, names = _all_cuts(model, places, found.root)
    oracle = with_reversals(spliced, model, HookReversal)
    predicted: dict[int, dict[Place, Signs]] = {}
    effective: set[Place] = set()
    for mode in ("train", "eval"):
        for network in (spliced, oracle):
            network.train(mode == "train")
        measured = dict(zip(places, _recorded(spliced, inputs, names, _REVERSAL), strict=True))
        graph = id(getattr(oracle, "graph", None))
        expected = predicted.setdefault(graph, {}) or _predicted(oracle, places)
        predicted[graph] = expected
        if not _agree(model, expected, measured):
            # A graph takes modules whole, and sees into no opaque one: what hooks record has the last word.
            hooked = dict(zip(places, _recorded(oracle, inputs, names, _HOOKED), strict=True))
            _compare(model, hooked, measured, mode)
        effective |= {place for place, signs in measured.items() if any(-1 in s for s in signs.values())}
    for place in places:
        _require(place in effective, place, "no gradient passes the reversal, so nothing is proved")


def _predicted(oracle: nn.Module, places: Sequence[Place]) -> dict[Place, Signs]:
    """What the graph says of each reversal alone; nothing where the root is no graph."""
    if not is_fully_traced(oracle):
        return {place: {} for place in places}
    done = oracle.grl_surgery
    found = {}
    for place, cut in zip(places, done.cuts, strict=True):
        oracle.grl_surgery = replace(done, cuts=(cut,))
        found[place] = predict(oracle)
    oracle.grl_surgery = done
    return found


def _recorded(network: nn.Module, inputs: tuple[Any, ...], names: Sequence[str], kind: str) -> list[Signs]:
    """Run a network and walk what autograd has recorded, for each of its reversals.

    Only autograd nodes of this kind reverse: what else a layer makes does not, whatever it is called.
    """
    layers = {name: network.get_submodule(name) for name in names}
    with recorded_nodes(layers) as nodes, torch.enable_grad():
        outputs = tensors_in(network(*inputs))
    genuine = [[node for node in made if node.name() == kind] for made in nodes.values()]
    return signs_in_autograd(outputs, genuine)


# What a reversal of ours leaves in autograd's graph, and what a tensor hook of the oracle stands at.
_REVERSAL, _HOOKED = "_ReversalBackward", "CloneBackward0"


def _agree(model: nn.Module, predicted: Mapping[Place, Signs], recorded: Mapping[Place, Signs]) -> bool:
    return all(
        signs.get(id(parameter), frozenset()) == predicted[place].get(id(parameter))
        for place, signs in recorded.items()
        for parameter in model.parameters()
    )


def _compare(
    model: nn.Module, wanted: Mapping[Place, Signs], recorded: Mapping[Place, Signs], mode: str
) -> None:
    for place, signs in recorded.items():
        for name, parameter in model.named_parameters():
            found, right = (each.get(id(parameter), frozenset()) for each in (signs, wanted[place]))
            problem = f"in {mode} mode {name} is {sign_label(found)}, not {sign_label(right)}"
            _require(found == right, place, problem)
