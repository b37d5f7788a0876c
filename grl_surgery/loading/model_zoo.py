"""``"timm/resnet50"``, ``"torchvision/resnet50"``, ``"package.module:factory"`` -> module, example inputs."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from grl_surgery.errors import SurgeryError, one_line
from grl_surgery.loading.checkpoints import load_checkpoint
from grl_surgery.loading.downloads import downloading
from grl_surgery.loading.factories import from_factory, no_factory_named
from grl_surgery.loading.inputs import Inputs, example_inputs
from grl_surgery.loading.libraries import from_library, is_library, library_names
from grl_surgery.points import near_names

__all__ = ["LoadedModel", "available", "example_inputs", "load_model"]

Library = Literal[
    "timm",
    "torchvision",
    "transformers",
    "monai",
    "segmentation_models_pytorch",
    "torchaudio",
    "speechbrain",
    "torch_geometric",
    "diffusers",
    "open_clip",
    "ultralytics",
]
_IMAGES: tuple[Library, ...] = ("timm", "torchvision")
_FORMS = (
    "timm/resnet50, torchvision/resnet50, transformers/BertModel, package.module:factory or file.py:factory"
)


@dataclass(frozen=True)
class LoadedModel:
    """A network, where it came from, and what to call it with.

    Example:
        >>> loaded = load_model("timm/test_vit")
        >>> loaded.module(*loaded.example_inputs).shape
        torch.Size([2, 1000])

    Args:
        module: The network, in the mode its maker left it in.
        source: The name it was loaded by.
        example_inputs: Arguments that it accepts, in a tuple, or by name in a dict; None where nothing says
            which.
    """

    module: nn.Module
    source: str
    example_inputs: Inputs | None


def load_model(
    source: str, *, pretrained: bool = False, checkpoint: str | os.PathLike[str] | None = None
) -> LoadedModel:
    """The network that ``source`` names, with random, pretrained or your own weights.

    Example:
        >>> load_model("torchvision/squeezenet1_1").example_inputs[0].shape
        torch.Size([2, 3, 224, 224])

    Args:
        source: ``timm/NAME``, ``torchvision/NAME``, ``package.module:factory`` or ``file.py:factory``. A
            factory takes no arguments and returns a module, or a module and its example inputs. A class of
            another library, ``transformers/BertModel`` or ``monai/UNet?spatial_dims=3&in_channels=1``, is
            made small where no argument says otherwise;
            ``transformers/bert-base-uncased`` is a model on the hub.
        pretrained: Download the library's weights, or take them from its cache; a factory is called with
            ``pretrained=True``.
        checkpoint: A file of weights, loaded strictly. Not together with ``pretrained``.

    Returns:
        The module with its example inputs.

    Raises:
        SurgeryError: There is no such model, a package it needs is missing, its weights cannot be
            downloaded, or the checkpoint does not fit.
    """
    if pretrained and checkpoint is not None:
        raise SurgeryError(
            "pretrained weights and a checkpoint cannot both be loaded: the one would overwrite the other",
            example="leave out pretrained=True (--pretrained)",
        )
    if not isinstance(source, str):
        raise SurgeryError(f"a network is loaded by its name, got {type(source).__name__}", example=_FORMS)
    module, inputs = _build(source, pretrained)
    if checkpoint is not None:
        load_checkpoint(module, checkpoint)
    return LoadedModel(module, source, example_inputs(module) if inputs is None else inputs)


def available(library: Library) -> list[str]:
    """Every source of one library, as ``load_model`` takes it.

    Example:
        >>> available("torchvision")[:2]
        ['torchvision/alexnet', 'torchvision/convnext_base']

    Raises:
        SurgeryError: The library is not installed.
    """
    listed = library_names(library) if is_library(library) else _names(library)
    return [f"{library}/{name}" for name in listed]


def _build(source: str, pretrained: bool) -> tuple[nn.Module, Inputs | None]:
    library, slash, name = source.partition("/")
    if slash and library == "timm":
        return _from_timm(name, pretrained), None
    if slash and library == "torchvision":
        return _from_torchvision(name, pretrained), None
    if slash and is_library(library):
        return from_library(library, name, pretrained)
    if ":" in source:
        return from_factory(source, pretrained)
    if source.endswith(".py"):
        raise no_factory_named(source)
    raise SurgeryError(
        f"{source!r} does not say where the model comes from", choices=_sources_like(source), example=_FORMS
    )


def _names(library: Library) -> list[str]:
    listed = (
        _library(library).list_models() if library == "timm" else _library("torchvision").models.list_models()
    )
    return list(listed)


def _sources_like(source: str) -> list[str]:
    """The installed libraries' models of that name, or of a name like it."""
    installed = [library for library in _IMAGES if importlib.util.find_spec(library)]
    sources = [name for library in installed for name in available(library)]
    name = source.rpartition("/")[2]
    exact = [choice for choice in sources if choice.partition("/")[2] == name]
    return exact or near_names(f"timm/{name}", sources)


def _library(name: Library) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        problem = f"models of {name} need the package {error.name or name}, which is not installed"
        raise SurgeryError(problem, example="pip install 'grl-surgery[models]'") from error
    except Exception as error:  # such as torchvision built for another torch
        raise SurgeryError(
            f"{name} is installed but cannot be imported: {one_line(error)}",
            example="pip install --upgrade torch torchvision timm, together, so that they fit",
        ) from error


def _from_timm(name: str, pretrained: bool) -> nn.Module:
    timm = _library("timm")
    on_hub = name.startswith(("hf-hub:", "hf_hub:"))
    if not on_hub and not timm.is_model(name):
        raise _no_such_model("timm", name, [*timm.list_models(), *timm.list_models(pretrained=True)])
    if pretrained and not on_hub:
        _require_weights(timm, name)
    if pretrained or on_hub:
        with downloading(f"timm/{name}"):
            return _as_module(timm.create_model(name, pretrained=pretrained))
    try:
        return _as_module(timm.create_model(name))
    except RuntimeError as error:
        raise _no_such_model("timm", name, timm.list_models(pretrained=True), str(error)) from error


def _require_weights(timm: Any, name: str) -> None:
    """Say at once what no download can mend: a tag that is not, or an architecture without weights."""
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise _no_such_model("timm", name, timm.list_models(pretrained=True), str(error)) from error
    if config is None or not config.has_weights:
        near = near_names(name, timm.list_models(pretrained=True))
        raise SurgeryError(
            f"timm has no pretrained weights for {name!r}: leave out --pretrained, or use --checkpoint FILE",
            choices=[f"timm/{choice}" for choice in near],
        )


def _from_torchvision(name: str, pretrained: bool) -> nn.Module:
    models = _library("torchvision").models
    if name not in models.list_models():
        raise _no_such_model("torchvision", name, models.list_models())
    if pretrained:
        with downloading(f"torchvision/{name}"):
            return _as_module(models.get_model(name, weights="DEFAULT"))
    return build_torchvision(name)


def build_torchvision(name: str, **options: Any) -> nn.Module:
    """A torchvision network with random weights; nothing is downloaded, not even for its backbone."""
    models = _library("torchvision").models
    options["weights"] = None
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # the default downloads
    if "googlenet" in name or "inception" in name:
        options["init_weights"] = True  # the default does the same, with a warning
    return _as_module(models.get_model(name, **options))


def _no_such_model(library: Library, name: str, names: list[str], reason: str = "") -> SurgeryError:
    near = [f"{library}/{choice}" for choice in near_names(name, names)]
    detail = f" ({reason})" if reason else ""
    return SurgeryError(
        f"{library} has no model {name!r}{detail}", choices=near, example=near[0] if near else _FORMS
    )


def _as_module(made: Any) -> nn.Module:
    assert isinstance(made, nn.Module)
    return made
