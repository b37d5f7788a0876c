"""Attaches a reversal and a domain classifier behind a point; their logits join the network's output."""

from __future__ import annotations

import contextlib
import copy
import keyword
import math
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from grl_surgery.capture.python_state import preserve_python_state
from grl_surgery.errors import ShapeError, SurgeryError, TracingError
from grl_surgery.isolation.rng_state import preserve_rng_state
from grl_surgery.loading.inputs import RUNNING_INPUTS, as_arguments, does_not_run
from grl_surgery.loading.inputs import example_inputs as known_inputs
from grl_surgery.nn.classifier_checks import prepare_classifier
from grl_surgery.nn.classifiers import Norm, NumDomains
from grl_surgery.nn.head_building import Condition, Kind, build_head
from grl_surgery.nn.heads import DomainHead
from grl_surgery.nn.pooling import Pool
from grl_surgery.surgery.describe import check_runs, shapes_at
from grl_surgery.surgery.exported_program import check_no_program
from grl_surgery.surgery.feature_layout import read_axes
from grl_surgery.surgery.insert import check_model, device_of, on_same_device, splice
from grl_surgery.surgery.selectors import Selector, name_modules, select_points
from grl_surgery.surgery.spliced_module import Cut, disassemble, free_name
from grl_surgery.surgery.submodule_surgery import shapes_by_running

__all__ = ["attach_domain_head"]


@torch.inference_mode(False)
def attach_domain_head(
    model: nn.Module,
    after: Selector,
    *,
    num_domains: NumDomains = 2,
    kind: Kind = "dann",
    num_classes: int | None = None,
    name: str = "domain",
    coeff: float = 1.0,
    signed: bool = False,
    clip: float | None = None,
    normalize: bool = False,
    classifier: nn.Module | Literal["global", "patch"] = "global",
    pool: Pool | nn.Module = "auto",
    mask: str | None = None,
    padding: str | None = None,
    condition_on: str | None = None,
    condition: nn.Module | Condition = "auto",
    hidden: int | None = None,
    depth: int = 2,
    norm: Norm = None,
    dropout: float | None = None,
    binary: bool = False,
    outputs: Literal["with_logits", "original"] = "with_logits",
    example_inputs: Any = None,
) -> nn.Module:
    """Attach a domain discriminator behind a gradient reversal to a network (DANN, Ganin et al. 2016).

    The network's own output and its gradients stay as they are. The gradient of the domain loss reaches the
    network reversed. The result shares parameters and buffers with ``model``, which is not changed. Move or
    cast ``model`` before surgery, or the result afterwards, but not ``model`` afterwards.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> m = attach_domain_head(net, after="1", example_inputs=torch.randn(3, 4))
        >>> output, domain_logits = m(torch.randn(5, 4))
        >>> domain_logits.shape
        torch.Size([5, 2])

    Args:
        model: Any network; or the result of an earlier call.
        after: The point whose value the head reads; or several points, such as the calls of a shared
            extractor: ``["encoder#1", "encoder#2"]``. Then one head, with one set of weights, reads each of
            them, and its logits are a tuple.
        num_domains: Number of domains, and of logits. Or a number for each of several attributes, such as
            ``{"site": 3, "scanner": 2}``: they share the hidden layers, and the logits are a dict.
        kind: ``"dann"``: a classifier of domains, for :func:`domain_loss`. ``"mdd"``: a second classifier of
            the network's own classes, for :func:`mdd_loss` (Zhang et al., ICML 2019). ``"wdgrl"``: a critic
            with one score for each sample, for :func:`wasserstein_loss` and :class:`GradientPenalty` (Shen et
            al., AAAI 2018).
        num_classes: Number of classes of the task, for ``kind="mdd"``.
        name: Attribute of the head in the result; its parameters are ``name.classifier...``.
        coeff: Initial coefficient of the head's reversal, ``reversals(m)[f"{name}.reversal"]``.
        signed: Whether the coefficient may be negative, now or later.
        clip: Clamp each entry of the reversed gradient to [-clip, clip]; see :func:`reverse_gradient`.
        normalize: Divide the reversed gradient by its norm; see :func:`reverse_gradient`.
        classifier: ``"global"``: one decision for each sample; ``"patch"``: one for each position; or a
            module of your own that returns logits.
        pool: How the feature becomes (B, C): by default the mean over positions. The network's layers tell
            which axis is which. ``"max"``, ``"statistics"`` (mean and deviation), ``"attention"``,
            ``"class_token"`` and ``"last"`` reduce otherwise; a layout such as ``"lnc"`` says what the axes
            are; a module of your own pools as it likes; ``"none"`` hands over the feature as it is.
        mask: Point, or argument of forward, that says which positions of a sequence count: (B, L), nonzero
            where one does, or lengths (B,). The pool leaves out the others.
        padding: A mask with the opposite meaning, as torch's ``key_padding_mask``: nonzero where a position
            does not count.
        condition_on: Point, or argument of forward, with the class logits (B, classes) for a conditional head
            (CDAN, Long et al. 2018), or another value (B, ...): an embedding, a regression output.
        condition: How they are combined: ``"multilinear"``, ``"randomized"``, ``"concatenate"`` for what is
            no class logits, or a module of your own. By default as in the paper, and one number for each
            sample is concatenated.
        hidden: Width of the hidden layers; 1,024 by default, 512 for a patch head.
        depth: Number of hidden layers.
        norm: Their norm.
        dropout: Their dropout: 0.5 by default, none for a critic.
        binary: One logit for two domains.
        outputs: ``"original"`` for a training loop that cannot change: the network returns what it did
            without the head, and the logits of its last call are ``result.<name>.logits``.
        example_inputs: Arguments of forward; by default those that timm or torchvision declare. The head is
            sized from the shape that they have at the point, and runs with more samples or of another size
            tell which axis is which; where possible they run on tensors without data.

    Returns:
        A network that returns ``(output, logits)``, with n heads ``(output, logits_1, ..., logits_n)``, in
        the order attached; where the output is a mapping or an object, it carries ``<name>_logits``.

    Raises:
        SurgeryError: The name is taken, there is more than one point, or settings do not go together.
        ShapeError: The value at the point is not a tensor that a head can read, or its rows are not the
            samples of the batch.
        PointNotFoundError, AmbiguousPointError, TracingError: As for :func:`insert_grl`.
    """
    _check_kind(kind, num_classes, condition_on)
    check_model(model, "attach_domain_head")
    check_no_program(model, "attach_domain_head")
    after = name_modules(model, after)
    base, cuts, modules = disassemble(model)
    _check_name(base, modules, name)
    if outputs not in ("with_logits", "original"):
        raise SurgeryError(
            f"outputs={outputs!r} is not known",
            choices=["'with_logits'", "'original'"],
            example="outputs='original'",
        )
    inputs = known_inputs(base) if example_inputs is None else example_inputs
    seconds = _other_values(condition_on, mask, padding)
    features = _features(base, after, seconds, inputs)
    points = [features[0], *(_point(base, at, argument, inputs) for argument, at in seconds)]
    if inputs is None:
        raise SurgeryError(
            f"it is not known what inputs {type(base).__name__} takes, so the head cannot be sized",
            example="attach_domain_head(model, 'layer3', example_inputs=(torch.randn(2, 3, 224, 224),))",
        )
    sized = _materialized(base, inputs)
    shape, *others = _shapes(sized, cuts, modules, [*points, *features[1:]], inputs)
    others, further = others[: len(seconds)], others[len(seconds) :]
    _check_alike(features, [shape, *further])
    axes = read_axes(sized, points[0], inputs, shape)
    with _head_init_rng(name):
        head = build_head(
            shape,
            num_domains,
            classifier=classifier,
            pool=pool,
            num_features=getattr(base, "num_features", None),
            num_prefix_tokens=_prefix_tokens(base, shape) if pool in ("auto", "mean", "nlc") else 0,
            kind=kind,
            num_classes=num_classes
            if kind == "mdd"
            else _num_classes(condition_on, _condition_for(condition, others), others),
            axes=axes,
            masked="valid" if mask is not None else "padding" if padding is not None else None,
            condition=_condition_for(condition, others) if condition_on is not None else condition,
            hidden=hidden,
            depth=depth,
            norm=norm,
            dropout=dropout,
            binary=binary,
            coeff=coeff,
            signed=signed,
            clip=clip,
            normalize=normalize,
        )
        if isinstance(classifier, nn.Module):
            prepare_classifier(head, [shape, *others], points[0])
    _say_what_was_assumed(head, points[0])
    parameter = next(base.parameters(), None)
    if parameter is not None and parameter.is_floating_point():
        head.to(parameter.dtype)
    with device_of(head):
        for shapes in ([shape, *others], *([each] for each in further)):
            check_runs(head, shapes)
    modules[name] = on_same_device(head, base)
    return splice(
        base,
        [*cuts, _head_cut(name, points, features[1:], keeps_logits=outputs == "original")],
        modules,
        lambda: inputs,
    )


def _check_kind(kind: str, num_classes: int | None, condition_on: str | None) -> None:
    if kind == "mdd" and condition_on is not None:
        raise SurgeryError(
            "kind='mdd' meets the logits of the task in its loss, and is conditioned on nothing",
            example="kind='mdd', num_classes=10; then mdd_loss(logits, class_logits, domains)",
        )
    if kind != "mdd" and num_classes is not None:
        raise SurgeryError(
            f"num_classes={num_classes!r} is for kind='mdd'; a conditional head counts them at condition_on",
            example="condition_on='fc'",
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


def _materialized(base: nn.Module, inputs: Any) -> nn.Module:
    """The network, or a copy that has run once where it has lazy layers, which get their sizes by that."""
    if not any(map(nn.parameter.is_lazy, base.parameters())):
        return base
    lazy = [buffer for buffer in base.buffers() if nn.parameter.is_lazy(buffer)]  # torch copies no such one
    make: Any = nn.parameter.UninitializedBuffer
    memo = {id(buffer): make(device=buffer.device, dtype=buffer.dtype) for buffer in lazy}
    copied = copy.deepcopy(base, memo)
    args, kwargs = as_arguments(inputs)
    try:
        with torch.no_grad(), preserve_rng_state(), preserve_python_state(dict(copied.named_modules())):
            copied.eval()(*args, **kwargs)
    except Exception as error:  # the network is the user's: anything can come out of it
        what = does_not_run(f"this {type(base).__name__}, which has lazy layers,", inputs, error)
        raise ShapeError(what, example=RUNNING_INPUTS) from error
    return copied


def _other_values(condition_on: str | None, mask: str | None, padding: str | None) -> list[tuple[str, str]]:
    """The arguments that name further values for the head to read, and their names."""
    if mask is not None and padding is not None:
        raise SurgeryError(
            f"mask={mask!r} and padding={padding!r} are one thing with opposite meanings",
            example=f"mask={mask!r}",
        )
    given = {"condition_on": condition_on, "mask": mask, "padding": padding}
    return [(argument, name) for argument, name in given.items() if name is not None]


def _features(base: nn.Module, after: Selector, others: Sequence[Any], inputs: Any) -> list[str]:
    """The points that the head reads, each in a call of its own."""
    if others or not isinstance(after, (list, tuple)):
        return [_point(base, after, "after", inputs)]
    return select_points(base, after, "after", inputs)


def _check_alike(points: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse points for one head whose values are not of one kind."""
    if len({len(shape) for shape in shapes}) > 1:
        found = ", ".join(f"{point!r} {shape}" for point, shape in zip(points, shapes, strict=True))
        raise SurgeryError(
            f"one head cannot read values with different axes: {found}",
            choices=list(points),
            example=f"after={points[0]!r}, and another head for the others",
        )


def _head_cut(name: str, points: Sequence[str], also: Sequence[str], *, keeps_logits: bool) -> Cut:
    at, condition, mask = (*points, None, None)[:3]
    return Cut("head", str(at), name, condition, mask=mask, also=tuple(also), keeps_logits=keeps_logits)


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
            f"name={name!r} begins with an underscore, which names of heads must not",
            example="name='domain'",
        )
    free = free_name(name, modules, base)
    if free != name:
        raise SurgeryError(f"the network already has an attribute {name!r}", example=f"name={free!r}")


@contextlib.contextmanager
def _head_init_rng(name: str) -> Iterator[None]:
    """New weights follow the seed, differ between heads, and leave the generators as they were.

    They are drawn on the host, whatever the default device is: on meta they would have no values.
    """
    with preserve_rng_state(), torch.device("cpu"):
        torch.manual_seed(torch.initial_seed() + int(torch.randint(2**31, ())) + zlib.crc32(name.encode()))
        yield


def _prefix_tokens(base: nn.Module, shape: tuple[int, ...]) -> int:
    """Class and register tokens in front of the patch tokens, as timm counts them."""
    count = getattr(base, "num_prefix_tokens", 0)
    patches = getattr(getattr(base, "patch_embed", None), "num_patches", None)
    return count if len(shape) == 3 and patches is not None and shape[1] == patches + count else 0


def _condition_for(
    condition: nn.Module | Condition, shapes: Sequence[tuple[int, ...]]
) -> nn.Module | Condition:
    """The condition; a softmax over one number for each sample would be constant, so that is concatenated."""
    one_number = bool(shapes) and math.prod(shapes[0][1:]) == 1
    return "concatenate" if condition == "auto" and one_number else condition


def _num_classes(
    condition_on: str | None, condition: nn.Module | Condition, shapes: list[tuple[int, ...]]
) -> int | None:
    if condition_on is None:
        return None
    shape = shapes[0]
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
