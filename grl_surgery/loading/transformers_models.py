"""``"transformers/BertModel"``, small and random; ``"transformers/bert-base-uncased"``, as the hub has it."""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from grl_surgery.errors import SurgeryError, one_line
from grl_surgery.loading.downloads import downloading
from grl_surgery.loading.inputs import Inputs
from grl_surgery.loading.small_configs import small_configs
from grl_surgery.loading.trial_inputs import inputs_for_config
from grl_surgery.points import near_names

__all__ = ["class_names", "from_transformers"]

# Parameters of the largest network that is made of a class alone.
_LARGEST = 30e6


def from_transformers(
    name: str, arguments: Mapping[str, Any], pretrained: bool
) -> tuple[nn.Module, Inputs | None]:
    """A network of transformers, and inputs that it takes.

    Args:
        name: A class, which is made small and gets random weights; or the name of a model on the hub, of
            which the configuration is downloaded, and with ``pretrained`` the weights.
        arguments: Attributes of the configuration.
        pretrained: Of a model on the hub, load the weights.

    Raises:
        SurgeryError: There is no such class, the hub cannot be reached, or no configuration tried runs.
    """
    transformers: Any = importlib.import_module("transformers")
    kind = getattr(transformers, name, None) if name.isidentifier() else None
    if not inspect.isclass(kind) or not issubclass(kind, nn.Module):
        return _from_hub(transformers, name, arguments, pretrained)
    if pretrained:
        raise SurgeryError(
            f"transformers/{name} is a class, and a class has no weights of its own",
            example="transformers/bert-base-uncased, the name of a model on the hub",
        )
    config_class = getattr(kind, "config_class", None)
    if config_class is None:
        raise SurgeryError(
            f"transformers/{name} belongs to no configuration", example="transformers/BertModel"
        )
    return _small(kind, config_class, name, arguments)


def _small(kind: Any, config_class: Any, name: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, Inputs]:
    problem, limit = "", 60
    try:
        default = config_class()
        configs = list(small_configs(default))
    except Exception as error:
        raise SurgeryError(
            f"transformers/{name} has no configuration without arguments: {one_line(error)}"
        ) from error
    for config in configs:
        _set_all(config, name, arguments)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with torch.device("meta"):
                    count = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
                if count > _LARGEST:
                    problem = problem or f"it has {count:,} parameters, small as it is"
                    continue
                model = kind(config)
            inputs = inputs_for_config(model, config, limit=limit)
        except MemoryError:
            raise
        except Exception as error:
            problem = problem or one_line(error)
            continue
        if inputs is not None:
            return model, inputs
        problem = problem or "no inputs that were tried run"
        limit = 12  # what no input suits in one size, few suit in another
    raise SurgeryError(
        f"transformers/{name} cannot be made small and random: {problem}",
        example="package.module:factory, a function that returns the network and its inputs",
    )


def _set_all(config: Any, name: str, arguments: Mapping[str, Any]) -> None:
    for key, value in arguments.items():
        if not hasattr(config, key):
            raise SurgeryError(
                f"the configuration of transformers/{name} has no {key!r}",
                choices=near_names(key, vars(config)),
            )
        setattr(config, key, value)


def _from_hub(
    transformers: Any, name: str, arguments: Mapping[str, Any], pretrained: bool
) -> tuple[nn.Module, Inputs | None]:
    if name.isidentifier() and name[:1].isupper():
        near = near_names(name, class_names())
        raise SurgeryError(
            f"transformers has no class {name!r}",
            choices=[f"transformers/{choice}" for choice in near],
            example=f"transformers/{near[0]}" if near else "transformers/BertModel",
        )
    try:
        with downloading(f"transformers/{name}"):
            config = transformers.AutoConfig.from_pretrained(name)
    except SurgeryError as error:
        reason = one_line(error.__cause__ or error)
        raise SurgeryError(
            f"the configuration of {name!r} is neither cached nor to be had from the hub ({reason})",
            example="transformers/BertModel, a class, which is made small and random without the hub",
        ) from error
    _set_all(config, name, arguments)
    if pretrained:
        with downloading(f"transformers/{name}"):
            model = transformers.AutoModel.from_pretrained(name, config=config)
    else:
        model = transformers.AutoModel.from_config(config)
    return model, inputs_for_config(model, config)


def class_names(tasks: bool = True) -> list[str]:
    """The base class of every configuration, and with ``tasks`` each class for a task.

    Example:
        >>> {"BertModel", "BertForTokenClassification"} <= set(class_names())
        True
    """
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    tables = [auto.MODEL_MAPPING_NAMES]
    if tasks:
        tables += [
            value
            for key, value in sorted(vars(auto).items())
            if key.startswith("MODEL_FOR_") and key.endswith("_MAPPING_NAMES")
        ]
    names: list[str] = []
    for table in tables:
        for value in table.values():
            names += [value] if isinstance(value, str) else list(value)
    return list(dict.fromkeys(names))
