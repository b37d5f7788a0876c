"""Loads networks of other libraries by name: ``"monai/UNet"``."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from torch import nn

from grl_surgery.errors import SurgeryError, one_line
from grl_surgery.loading.constructors import built_and_run
from grl_surgery.loading.inputs import Inputs
from grl_surgery.points import near_names

__all__ = ["LIBRARIES", "from_library", "is_library", "library_names", "split_arguments"]


@dataclass(frozen=True)
class _Library:
    """The place in which a library keeps its networks.

    Args:
        package: What is imported.
        distribution: What is installed.
        places: Modules whose public classes and functions make networks.
        deep: Names are looked for in the modules inside those, too, as ``module.Name``.
        lower: Functions with a lower-case name are listed beside classes.
        also: What its networks import when the first one is made.
    """

    package: str
    distribution: str
    places: tuple[str, ...]
    deep: bool = False
    lower: bool = False
    also: tuple[str, ...] = ()

    @property
    def imports(self) -> tuple[str, ...]:
        """Every module that its networks need."""
        return (*self.places, *self.also)


LIBRARIES: dict[str, _Library] = {
    "transformers": _Library(
        "transformers",
        "transformers",
        ("transformers",),
        also=(
            "transformers.modeling_utils",
            "transformers.generation",
            "transformers.models.auto.modeling_auto",
            "transformers.loss.loss_utils",
        ),
    ),
    "monai": _Library("monai", "monai", ("monai.networks.nets",)),
    "segmentation_models_pytorch": _Library(
        "segmentation_models_pytorch", "segmentation-models-pytorch", ("segmentation_models_pytorch",)
    ),
    "torchaudio": _Library("torchaudio", "torchaudio", ("torchaudio.models",), lower=True),
    "speechbrain": _Library("speechbrain", "speechbrain", ("speechbrain.lobes.models",), deep=True),
    "torch_geometric": _Library("torch_geometric", "torch-geometric", ("torch_geometric.nn.models",)),
    "diffusers": _Library("diffusers", "diffusers", ("diffusers",)),
    "open_clip": _Library("open_clip", "open-clip-torch", ("open_clip",)),
    "ultralytics": _Library("ultralytics", "ultralytics", ("ultralytics.nn.tasks",)),
}
_SHORT = {"smp": "segmentation_models_pytorch", "pyg": "torch_geometric"}


def is_library(name: str) -> bool:
    """Whether networks of a library of that name are loaded here, besides those of timm and torchvision.

    Example:
        >>> is_library("monai"), is_library("smp"), is_library("numpy")
        (True, True, False)
    """
    return name in LIBRARIES or name in _SHORT


def split_arguments(name: str) -> tuple[str, dict[str, Any]]:
    """``"UNet?spatial_dims=3&strides=[2,2]"`` to the name and its arguments; a value is Python or text.

    Example:
        >>> split_arguments("UNet?spatial_dims=3&norm=batch&strides=[2,2]")
        ('UNet', {'spatial_dims': 3, 'norm': 'batch', 'strides': [2, 2]})

    Raises:
        SurgeryError: A part is no ``name=value``.
    """
    name, _, query = name.partition("?")
    arguments: dict[str, Any] = {}
    for part in query.split("&") if query else ():
        key, equals, text = part.partition("=")
        if not equals or not key.isidentifier():
            raise SurgeryError(
                f"{part!r} is no argument of {name}",
                example=f"'{name}?spatial_dims=3&in_channels=1' (in quotes)",
            )
        try:
            arguments[key] = ast.literal_eval(unquote(text))
        except (ValueError, SyntaxError):
            arguments[key] = unquote(text)
    return name, arguments


def from_library(library: str, name: str, pretrained: bool) -> tuple[nn.Module, Inputs | None]:
    """A network of a library with random weights, and inputs that it takes, where some that were tried run.

    Args:
        library: One of :data:`LIBRARIES`, or ``smp`` or ``pyg`` for short.
        name: Of a class or function there, and its arguments: ``"UNet?spatial_dims=3"``. What it asks for
            besides gets a small value.
        pretrained: Only models on transformers' hub have weights that are loaded here.

    Raises:
        SurgeryError: The library is not installed, there is no such name, or it cannot be made.
    """
    library = _SHORT.get(library, library)
    package = _imported(library)
    short, arguments = split_arguments(name)
    if library == "transformers":
        from grl_surgery.loading.transformers_models import from_transformers

        return from_transformers(short, arguments, pretrained)
    if pretrained:
        raise SurgeryError(
            f"weights of {library} are not loaded here",
            example="a factory of your own that loads them: package.module:factory",
        )
    if library == "ultralytics":
        return _ultralytics(short, arguments)
    if library == "open_clip":
        return _open_clip(package, short, arguments)
    make = _made_by(library, short)
    if "encoder_weights" in inspect.signature(make).parameters:
        arguments.setdefault("encoder_weights", None)  # the default downloads
    return built_and_run(make, f"{library}/{name}", arguments)


def library_names(library: str) -> list[str]:
    """The names of a library's networks, without arguments.

    Raises:
        SurgeryError: It is not installed.
    """
    library = _SHORT.get(library, library)
    package = _imported(library)
    if library == "transformers":
        from grl_surgery.loading.transformers_models import class_names

        return class_names()
    if library == "open_clip":
        return list(package.list_models())
    if library == "ultralytics":
        from pathlib import Path

        folder = Path(package.__file__).parent / "cfg/models"
        return sorted({file.stem for file in folder.rglob("*.yaml")})
    return sorted(_public(library))


def _imported(library: str) -> Any:
    found = LIBRARIES[library]
    try:
        return importlib.import_module(found.package)
    except ModuleNotFoundError as error:
        raise SurgeryError(
            f"networks of {library} need the package {error.name or library}, which is not installed",
            example=f"pip install {found.distribution}",
        ) from error
    except Exception as error:
        raise SurgeryError(f"{library} is installed but cannot be imported: {one_line(error)}") from error


def _public(library: str) -> dict[str, Any]:
    found = LIBRARIES[library]
    names: dict[str, Any] = {}
    for place in found.places:
        module = importlib.import_module(place)
        names.update(_makers(module, "", found.lower))
        if found.deep:
            for info in pkgutil.iter_modules(module.__path__):
                try:
                    inner = importlib.import_module(f"{place}.{info.name}")
                except Exception:  # it needs something that is not installed
                    continue
                own = _makers(inner, f"{info.name}.", found.lower)
                names.update({key: value for key, value in own.items() if value.__module__ == inner.__name__})
    return names


def _makers(module: Any, prefix: str, lower: bool) -> dict[str, Any]:
    """Public classes of networks in a module, one name of each, and functions if they count."""
    made: dict[str, Any] = {}
    for name in dir(module):
        if name.startswith("_"):
            continue
        try:
            value = getattr(module, name)
        except Exception:  # needs something that is not installed
            continue
        is_class = inspect.isclass(value) and issubclass(value, nn.Module)
        if (is_class and value.__name__ == name) or (lower and inspect.isfunction(value)):
            made[f"{prefix}{name}"] = value
    return made


def _made_by(library: str, name: str) -> Any:
    for place in LIBRARIES[library].places:
        module: Any = importlib.import_module(place)
        inner, _, last = name.rpartition(".")
        try:
            return getattr(importlib.import_module(f"{place}.{inner}") if inner else module, last)
        except (AttributeError, ImportError):
            continue
    near = near_names(name, _public(library))
    raise SurgeryError(
        f"{library} has no network {name!r}",
        choices=[f"{library}/{choice}" for choice in near],
        example=f"{library}/{near[0]}" if near else "",
    )


def _ultralytics(name: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, Inputs | None]:
    import torch

    tasks: Any = importlib.import_module("ultralytics.nn.tasks")
    near = near_names(name, library_names("ultralytics"))
    try:
        config = tasks.yaml_model_load(f"{name}.yaml")
        task = tasks.guess_model_task(config)
    except Exception as error:
        raise SurgeryError(
            f"ultralytics has no network {name!r}: {one_line(error)}",
            choices=[f"ultralytics/{choice}" for choice in near],
        ) from error
    by_task = {
        "detect": "DetectionModel",
        "segment": "SegmentationModel",
        "classify": "ClassificationModel",
        "pose": "PoseModel",
        "obb": "OBBModel",
    }
    head = str(config["head"][-1][2])
    kind = (
        "RTDETRDetectionModel"
        if "RTDETR" in head
        else "WorldModel"
        if "World" in head
        else by_task.get(task, "DetectionModel")
    )
    model = getattr(tasks, kind)(config, verbose=False, **arguments)
    return model, (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)),)


def _open_clip(package: Any, name: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, Inputs | None]:
    """A network of that configuration, an eighth as wide and two layers deep."""
    import torch

    config = package.get_model_config(name)
    if config is None:
        near = near_names(name, package.list_models())
        raise SurgeryError(
            f"open_clip has no network {name!r}", choices=[f"open_clip/{choice}" for choice in near]
        )
    problem = "it does not run"
    for own_size in (False, True):  # some take images of one size only
        small = _small_clip(config, own_size)
        small.update(arguments)
        try:
            model = package.create_model(name, pretrained=None, **small)
        except Exception as error:
            raise SurgeryError(f"open_clip/{name} cannot be made small: {one_line(error)}") from error
        size = getattr(model.visual, "image_size", 64)
        side = size if isinstance(size, int) else size[0]
        generator = torch.Generator().manual_seed(0)
        words = int(getattr(model, "context_length", None) or config["text_cfg"].get("context_length", 77))
        text = torch.randint(1, 40, (2, words), generator=generator)
        inputs = {"image": torch.rand(2, 3, side, side, generator=generator), "text": text}
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception as error:
            problem = one_line(error)
            continue
        return model, inputs
    raise SurgeryError(f"open_clip/{name} cannot be made small: {problem}")


def _small_clip(config: Mapping[str, Any], own_size: bool) -> dict[str, Any]:
    """The same configuration with everything wide divided by eight, and two layers."""
    small: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            small[key] = _small_clip(value, own_size)
        elif key == "layers":
            small[key] = min(value, 2) if isinstance(value, int) else [1 for _ in value]
        elif key in ("width", "embed_dim", "head_width") and isinstance(value, int):
            small[key] = max(value // 8, 8)
        elif key == "vocab_size":
            small[key] = 64
        elif key == "image_size" and isinstance(value, int) and not own_size:
            small[key] = 4 * config["patch_size"] if isinstance(config.get("patch_size"), int) else 64
        else:
            small[key] = value
    if "patch_size" in small and "width" in small:
        small.setdefault("head_width", 8)  # the default is wider than all of it
    small.pop("custom_text", None)
    return small
