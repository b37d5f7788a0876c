"""Finds the name from which a library made a network, and builds it again from untrusted files."""

from __future__ import annotations

import contextlib
import importlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from grl_surgery.errors import ExportError, SurgeryError
from grl_surgery.isolation.rng_state import preserve_rng_state
from grl_surgery.loading.model_zoo import build_torchvision, load_model

__all__ = ["build_source", "find_source", "module_lines", "within_memory"]

Options = dict[str, Any]

# What a recipe may say to a maker of networks. Nothing that names a file, a class or an address: those
# arguments load pickles, import modules and download.
_OPTIONS: Mapping[str, tuple[type, ...]] = {
    "num_classes": (int,),
    "in_chans": (int,),
    "img_size": (int, list),
    "global_pool": (str,),
    "drop_rate": (int, float),
    "drop_path_rate": (int, float),
}
_NAME = re.compile(r"(timm|torchvision)/[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")


def find_source(model: nn.Module) -> tuple[str | None, Options]:
    """The source of a timm or torchvision network, and how it differs from the library's default.

    Example:
        >>> import timm
        >>> find_source(timm.create_model("test_resnet", num_classes=10))
        ('timm/test_resnet', {'num_classes': 10})

    Returns:
        Source and options; ``(None, {})`` for any other network.
    """
    package = type(model).__module__.partition(".")[0]
    if package == "timm":
        return _find_timm(model)
    return _find_torchvision(model) if package == "torchvision" else (None, {})


def build_source(source: str, options: Mapping[str, Any], limit: int) -> nn.Module:
    """The network that a recipe names, if it is one that a recipe may name.

    Example:
        >>> type(build_source("timm/test_vit", {}, 2**28)).__name__
        'VisionTransformer'

    Args:
        source: ``timm/NAME`` or ``torchvision/NAME``.
        options: Some of ``num_classes``, ``in_chans``, ``img_size``, ``global_pool`` and the drop rates.
        limit: Bytes that building it may take.

    Raises:
        ExportError: Another source or option, no such model, or it takes more memory than that.
    """
    if not _NAME.fullmatch(source):
        raise ExportError(
            f"the recipe names {source[:80]!r} as its network; only timm/NAME and torchvision/NAME are "
            "built from a file, since anything else would run code that the file chooses",
            example="load(path, model=MyNet()) with a network of your own",
        )
    _check_options(options)
    library, _, name = source.partition("/")
    try:
        with within_memory(limit), preserve_rng_state():
            return _create(library, name, options)
    except ExportError:
        raise
    except SurgeryError as error:
        raise ExportError(f"the network of the recipe cannot be built: {error}") from error
    except Exception as error:
        raise ExportError(
            f"the network of the recipe, {source} with {dict(options)}, cannot be built: "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        items = value if isinstance(value, list) else [value]
        known = _OPTIONS.get(name, ())
        if type(value) not in known or not all(type(item) in (int, float, str) for item in items):
            raise ExportError(
                f"the recipe has the option {name[:40]!r} = {repr(value)[:60]}, which is not allowed",
                choices=list(_OPTIONS),
            )


def _create(library: str, name: str, options: Mapping[str, Any]) -> nn.Module:
    if not options:
        return load_model(f"{library}/{name}").module
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    if library == "timm":
        timm = importlib.import_module("timm")
        if not timm.is_model(name):
            return load_model(f"timm/{name}").module  # says what is near
        built = timm.create_model(name, **given)
    else:
        built = build_torchvision(name, **given)
    assert isinstance(built, nn.Module)
    return built


def module_lines(model: nn.Module) -> list[str]:
    """One line for each module: path, class, settings. Two networks with the same lines are built alike.

    Example:
        >>> module_lines(nn.Sequential(nn.ReLU()))
        [' torch.nn.modules.container.Sequential()', '0 torch.nn.modules.activation.ReLU()']
    """
    return [
        f"{path} {type(m).__module__}.{type(m).__qualname__}({_settings(m)})"
        for path, m in model.named_modules(remove_duplicate=False)
    ]


def _settings(module: nn.Module) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", module.extra_repr())


# --------------------------------------------------------------------------------------------- finding


def _find_timm(model: nn.Module) -> tuple[str | None, Options]:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(name, str):
        return None, {}
    options: Options = {}
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int) and classes != config.get("num_classes"):
        options["num_classes"] = classes
    channels, *size = config.get("input_size") or (3, None, None)
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    found = getattr(model, "in_chans", None) or (first.in_channels if first is not None else channels)
    if found != channels:
        options["in_chans"] = found
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built_for is not None and list(built_for) != size:
        options["img_size"] = list(built_for)
    same = module_lines(model) in (_lines_of("timm", name, options, d) for d in ("meta", "cpu"))
    return (f"timm/{name}", options) if same else (None, {})


def _find_torchvision(model: nn.Module) -> tuple[str | None, Options]:
    """The builder of the same file that makes the same modules; torchvision's networks do not name it."""
    models = importlib.import_module("torchvision").models
    here = [
        name
        for name in models.list_models()
        if models.get_model_builder(name).__module__ == type(model).__module__
    ]
    wanted = module_lines(model)
    last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    classes = getattr(last[-1], "out_features", None) or getattr(last[-1], "out_channels", 0) if last else 0
    for options in ({}, {"num_classes": classes}):
        for name in here:
            if _lines_of("torchvision", name, options, "meta") == wanted:
                return f"torchvision/{name}", options
    return None, {}


def _lines_of(library: str, name: str, options: Options, device: str) -> list[str] | None:
    try:
        with torch.device(device), preserve_rng_state():
            return module_lines(_create(library, name, options))
    except Exception:  # some makers cannot work without values, as on the meta device; others want options
        return None


# ---------------------------------------------------------------------------------------------- memory


@contextlib.contextmanager
def within_memory(limit: int) -> Iterator[None]:
    """Refuse tensors whose sizes add up to more than ``limit`` bytes, before they are made.

    Raises:
        ExportError: With how much was asked for.
    """
    with _Budget(limit):
        yield


class _Budget(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit, self.left = limit, limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = _elements(args)
        kwargs = kwargs or {}
        if count and kwargs.get("device") != torch.device("meta"):
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            self.left -= count * dtype.itemsize
            if self.left < 0:
                raise ExportError(
                    f"the network of the recipe needs more than the {self.limit:,} bytes that the weights "
                    "in the file leave to expect"
                )
        return func(*args, **kwargs)


def _elements(args: tuple[Any, ...]) -> int:
    """Return how many elements an operation makes that has no tensor to start from."""
    if not args or isinstance(args[0], torch.Tensor):
        return 0
    sizes = args[0]
    if isinstance(sizes, (list, tuple)):
        return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else 0
    return int(max((abs(n) for n in args if isinstance(n, (int, float)) and math.isfinite(n)), default=0))
