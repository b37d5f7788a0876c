"""Lists the networks of timm and torchvision, with the file that each comes from."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from grl_surgery.errors import SurgeryError
from grl_surgery.loading.model_zoo import available
from grl_surgery.points import near_names

__all__ = ["by_family", "every_name", "family", "matching"]


def every_name() -> list[str]:
    """All names of timm, then all of torchvision, as ``load_model`` takes them."""
    return [*available("timm"), *available("torchvision")]


def matching(pattern: str) -> list[str]:
    """The names that fit a shell pattern such as ``timm/vit_*``.

    Example:
        >>> matching("torchvision/squeezenet*")
        ['torchvision/squeezenet1_0', 'torchvision/squeezenet1_1']

    Raises:
        SurgeryError: None fits.
    """
    names = every_name()
    found = fnmatch.filter(names, pattern)
    if not found:
        raise SurgeryError(
            f"{pattern!r} matches none of the {len(names):,} networks",
            choices=near_names(pattern, names),
            example="'timm/vit_*'",
        )
    return found


def family(source: str) -> str:
    """The file that defines a network.

    Example:
        >>> family("timm/resnet18"), family("torchvision/ssdlite320_mobilenet_v3_large")
        ('timm/resnet', 'torchvision/detection.ssdlite')
    """
    library, _, name = source.partition("/")
    if library == "timm":
        import timm

        return f"timm/{_file(timm.model_entrypoint(name))}"
    from torchvision.models import get_model_builder

    return f"torchvision/{_file(get_model_builder(name))}"


def _file(builder: Any) -> str:
    return str(builder.__module__).partition(".models.")[2]


def by_family(names: Iterable[str]) -> dict[str, list[str]]:
    """The names under their families, both in the order given."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(family(name), []).append(name)
    return families
