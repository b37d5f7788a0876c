"""attach_domain_head: a reversal and a domain classifier behind a point, their logits beside the output."""

from __future__ import annotations

import contextlib
import keyword
import math
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from grl_surgery.classifier_checks import prepare_classifier
from grl_surgery.errors import SurgeryError, TracingError
from grl_surgery.feature_layout import read_axes
from grl_surgery.generators import random_state_kept
from grl_surgery.heads import Condition, DomainHead, Norm, build_head
from grl_surgery.loaded_program import check_no_program
from grl_surgery.loading.inputs import example_inputs as known_inputs
from grl_surgery.model_graph import check_runs, shapes_at
from grl_surgery.pooling import Pool
from grl_surgery.scoped import shapes_by_running
from grl_surgery.selection import Selector, name_modules, select_points
from grl_surgery.spliced_module import Cut, disassemble, free_name
from grl_surgery.splicing import check_model, device_of, on_same_device, splice

__all__ = ["attach_domain_head"]


@torch.inference_mode(False)
def attach_domain_head(
    model: nn.Module,
    after: Selector,
    *,
    num_domains: int = 2,
    name: str = "domain",
    coeff: float = 1.0,
    signed: bool = False,
    classifier: nn.Module | Literal["global", "patch"] = "global",
    pool: Pool | nn.Module = "auto",
    mask: str | None = None,
    padding: str | None = None,
    condition_on: str | None = None,
    condition: nn.Module | Condition = "auto",
    hidden: int | None = None,
    depth: int = 2,
    norm: Norm = None,
    dropout: float = 0.5,
    binary: bool = False,
    example_inputs: Any = None,
) -> nn.Module:
    """Attach a domain discriminator behind a gradient reversal to a network (DANN, Ganin et al. 2016).

    The network's own computation and gradients are untouched; the domain loss reaches it reversed. The result
    shares parameters and buffers with ``model``, as that of :func:`insert_grl`: move or cast ``model`` before
    surgery, or the result, and not ``model`` afterwards.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> m = attach_domain_head(net, after="1", example_inputs=torch.randn(3, 4))
        >>> output, domain_logits = m(torch.randn(5, 4))
        >>> domain_logits.shape
        torch.Size([5, 2])

    Args:
        model: Any network whose forward can be traced; or the result of an earlier call.
        after: The one point whose value the head reads.
        num_domains: Number of domains, and of logits.
        name: Attribute of the head in the result; its parameters are ``name.classifier...``.
        coeff: Initial coefficient of the head's reversal, ``reversals(m)[f"{name}.reversal"]``.
        signed: Whether the coefficient may be negative, now or later.
        classifier: ``"global"``: one decision for each sample; ``"patch"``: one for each position; or a
            module of your own that returns logits.
        pool: How the feature becomes (B, C): by default the mean over positions, which axis is which being
            read off the network. ``"max"``, ``"statistics"`` (mean and deviation), ``"attention"``,
            ``"class_token"`` and ``"last"`` reduce otherwise; a layout such as ``"lnc"`` says what the axes
            are; a module of your own pools as it likes; ``"none"`` hands over the feature as it is.
        mask: Point, or argument of forward, that says which positions of a sequence count: (B, L), nonzero
            where one does, or lengths (B,). The pool leaves out the others.
        padding: The same with the opposite meaning, as torch's ``key_padding_mask``: nonzero where a position
            does not count.
        condition_on: Point of the class logits (B, classes) for a conditional head (CDAN, Long et al. 2018),
            or of another value (B, ...) with ``condition="concatenate"``.
        condition: How they are combined: ``"multilinear"``, ``"randomized"``, ``"concatenate"``, or a module
            of your own.
        hidden: Width of the hidden layers; 1,024 by default, 512 for a patch head.
        depth: Number of hidden layers.
        norm: Their norm.
        dropout: Their dropout.
        binary: One logit for two domains.
        example_inputs: Arguments of forward; by default those that timm or torchvision declare. The head is
            sized from the shape that they have at the point, and runs with more samples or of another size
            tell which axis is which; where possible they run on tensors without data.

    Returns:
        A GraphModule that returns ``(output, logits)``, with n heads ``(output, logits_1, ..., logits_n)``,
        in the order attached.

    Raises:
        SurgeryError: The name is taken, there is more than one point, or settings do not go together.
        ShapeError: The value at the point is not a tensor that a head can read, or its rows are not the
            samples of the batch.
        PointNotFoundError, AmbiguousPointError, TracingError: As for :func:`insert_grl`.
    """
    check_model(model, "attach_domain_head")
    check_no_program(model, "attach_domain_head")
    after = name_modules(model, after)
    base, cuts, modules = disassemble(model)
    _check_name(base, modules, name)
    inputs = known_inputs(base) if example_inputs is None else example_inputs
    second = _second_value(condition_on, mask, padding)
    points = _points(base, after, second, inputs)
    if inputs is None:
        raise SurgeryError(
            f"nothing says what inputs {type(base).__name__} takes, so the head cannot be sized",
            example="attach_domain_head(model, 'layer3', example_inputs=(torch.randn(2, 3, 224, 224),))",
        )
    shape, *others = _shapes(base, cuts, modules, points, inputs)
    axes = read_axes(base, points[0], inputs, shape)
    with _draws_of_its_own(name):
        head = build_head(
            shape,
            num_domains,
            classifier=classifier,
            pool=pool,
            num_features=getattr(base, "num_features", None),
            num_prefix_tokens=_prefix_tokens(base, shape) if pool in ("auto", "mean", "nlc") else 0,
            num_classes=_num_classes(condition_on, condition, others),
            axes=axes,
            masked="valid" if mask is not None else "padding" if padding is not None else None,
            condition=condition,
            hidden=hidden,
            depth=depth,
            norm=norm,
            dropout=dropout,
            binary=binary,
            coeff=coeff,
            signed=signed,
        )
        if isinstance(classifier, nn.Module):
            prepare_classifier(head, [shape, *others], points[0])
    _say_what_was_assumed(head, points[0])
    parameter = next(base.parameters(), None)
    if parameter is not None and parameter.is_floating_point():
        head.to(parameter.dtype)
    with device_of(head):
        check_runs(head, [shape, *others])
    modules[name] = on_same_device(head, base)
    return splice(
        base,
        [*cuts, Cut("head", points[0], name, points[1] if points[1:] else None)],
        modules,
        lambda: inputs,
    )


def _shapes(
    base: nn.Module,
    cuts: Sequence[Cut],
    modules: Mapping[str, nn.Module],
    points: Sequence[str],
    inputs: Any,
) -> list[tuple[int, ...]]:
    try:
        return shapes_at(base, cuts, modules, points, inputs)
    except TracingError as error:
        return shapes_by_running(base, points, inputs, error)


def _second_value(condition_on: str | None, mask: str | None, padding: str | None) -> tuple[str, str] | None:
    """The argument that names a second value for the head to read, and its name."""
    given = {"condition_on": condition_on, "mask": mask, "padding": padding}
    named = [(argument, name) for argument, name in given.items() if name is not None]
    if len(named) > 1:
        raise SurgeryError(
            f"a head reads one value beside the feature, and {named[0][0]}= and {named[1][0]}= are two",
            example=f"{named[0][0]}={named[0][1]!r}",
        )
    return named[0] if named else None


def _points(base: nn.Module, after: Selector, second: tuple[str, str] | None, inputs: Any) -> list[str]:
    points = [_point(base, after, "after", inputs)]
    return points if second is None else [*points, _point(base, second[1], second[0], inputs)]


def _point(base: nn.Module, selector: Selector, argument: str, inputs: Any) -> str:
    points = select_points(base, selector, argument, inputs)
    if len(points) != 1:
        raise SurgeryError(
            f"a head reads one point, and {argument}={selector!r} stands for {len(points)}",
            choices=points[:5],
            example=f"{argument}={points[0]!r}",
        )
    return points[0]


def _check_name(base: nn.Module, modules: Mapping[str, nn.Module], name: str) -> None:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise SurgeryError(f"name={name!r} cannot be an attribute of a module", example="name='domain'")
    if name.startswith("_"):
        raise SurgeryError(
            f"name={name!r} begins with an underscore, as the attributes that are no heads do",
            example="name='domain'",
        )
    free = free_name(name, modules, base)
    if free != name:
        raise SurgeryError(f"the network already has an attribute {name!r}", example=f"name={free!r}")


@contextlib.contextmanager
def _draws_of_its_own(name: str) -> Iterator[None]:
    """New weights follow the seed, differ between heads, and leave the generators as they were.

    They are drawn on the host, whatever the default device is: on meta they would have no values.
    """
    with random_state_kept(), torch.device("cpu"):
        torch.manual_seed(torch.initial_seed() + int(torch.randint(2**31, ())) + zlib.crc32(name.encode()))
        yield


def _prefix_tokens(base: nn.Module, shape: tuple[int, ...]) -> int:
    """Class and register tokens in front of the patch tokens, as timm counts them."""
    count = getattr(base, "num_prefix_tokens", 0)
    patches = getattr(getattr(base, "patch_embed", None), "num_patches", None)
    return count if len(shape) == 3 and patches is not None and shape[1] == patches + count else 0


def _num_classes(
    condition_on: str | None, condition: nn.Module | Condition, shapes: list[tuple[int, ...]]
) -> int | None:
    if condition_on is None:
        return None
    (shape,) = shapes
    if condition == "concatenate":
        return math.prod(shape[1:])
    if len(shape) != 2:
        raise SurgeryError(
            f"condition_on={condition_on!r} has the shape {shape}, not (B, classes)",
            example="condition_on='fc'",
        )
    return shape[1]


def _say_what_was_assumed(head: DomainHead, point: str) -> None:
    if head.layout is not None and head.layout.assumption:
        warnings.warn(
            f"at {point!r}, {head.layout.assumption}; pool= chooses another layout, and "
            f"pool={head.layout.name!r} says that this one is right",
            stacklevel=4,
        )
