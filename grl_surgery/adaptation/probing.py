"""Measures at each point of a network how far its features tell the domains apart, and the classes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grl_surgery.errors import PointNotFoundError, ShapeError, SurgeryError, one_line
from grl_surgery.isolation.rng_state import preserve_rng_state
from grl_surgery.nn.pooling import FeaturePool, infer_layout
from grl_surgery.points import escape, near_names
from grl_surgery.validation import check_count, check_names, check_network

__all__ = ["PointScore", "PointSuggestions", "recorded_points", "suggest_points"]

_CALL = "suggest_points(model, source_loader, target_loader)"
_MOST_POINTS = 40
_RIDGE = 0.1
"""Added to the variance, 1, of every standardised feature."""


@dataclass(frozen=True)
class PointScore:
    """What a linear probe reads from the features at one point.

    Args:
        point: The name, as ``after=`` takes it.
        type: The class of the module.
        channels: Number of features, after pooling.
        a_distance: Proxy A-distance of the domains on held-out batches, in [-2, 2].
        a_distance_error: Its standard error.
        class_accuracy: Share of held-out source samples whose class is read right; None without labels.
        class_accuracy_error: Its standard error.
        is_output: Whether the value is the network's output itself.
    """

    point: str
    type: str
    channels: int
    a_distance: float
    a_distance_error: float
    class_accuracy: float | None = None
    class_accuracy_error: float | None = None
    is_output: bool = False


@dataclass(frozen=True)
class PointSuggestions:
    """The points of a network in the order of execution, one of them recommended.

    Args:
        points: What was measured at each.
        recommended: Name of the point to attach a head to; None where there is nothing to adapt.
        reason: Why.
        samples: Number of samples seen from the source and from the target.
        skipped: Points at which nothing could be measured, and why.
    """

    points: tuple[PointScore, ...]
    recommended: str | None
    reason: str
    samples: tuple[int, int]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain Python types."""
        return {**asdict(self), "points": [asdict(score) for score in self.points]}

    def __str__(self) -> str:
        has_classes = any(score.class_accuracy is not None for score in self.points)
        rows = [["point", "type", "channels", "A-distance"] + ["class accuracy"] * has_classes]
        for score in self.points:
            row = [
                score.point + (" (output)" if score.is_output else ""),
                score.type,
                str(score.channels),
                f"{score.a_distance:6.3f} ± {score.a_distance_error:.3f}",
            ]
            if has_classes:
                row.append(f"{score.class_accuracy:.3f} ± {score.class_accuracy_error:.3f}")
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        marks = ["  ", *("* " if score.point == self.recommended else "  " for score in self.points)]
        lines = [
            mark + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for mark, row in zip(marks, rows, strict=True)
        ]
        skipped = [f"not measured: {name}: {why}" for name, why in self.skipped.items()]
        advice = f"after={self.recommended!r}: {self.reason}" if self.recommended else self.reason
        return "\n".join([*lines, "", *skipped, advice])

    def plot(self, path: str | Path) -> None:
        """Draw both numbers over the points, with their standard errors (needs matplotlib).

        Args:
            path: The picture to write, by its suffix (.png, .svg, .pdf).

        Raises:
            SurgeryError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise SurgeryError("plot needs matplotlib", example="pip install matplotlib") from error
        figure = Figure(figsize=(2.0 + 0.4 * len(self.points), 4.0), layout="constrained")
        axis = figure.subplots()
        places, names = range(len(self.points)), [score.point for score in self.points]
        distances = [score.a_distance for score in self.points]
        axis.errorbar(places, distances, [score.a_distance_error for score in self.points], fmt="o-")
        axis.set_ylabel("proxy A-distance of the domains", color="C0")
        axis.set_xticks([*places], names, rotation=90)
        if self.points[0].class_accuracy is not None:
            other = axis.twinx()
            accuracies = [score.class_accuracy or 0.0 for score in self.points]
            errors = [score.class_accuracy_error or 0.0 for score in self.points]
            other.errorbar(places, accuracies, errors, fmt="s--", color="C1")
            other.set_ylabel("class accuracy on the source", color="C1")
        if self.recommended in names:
            axis.axvline(names.index(self.recommended), color="grey", linestyle=":")
        figure.savefig(path)


def suggest_points(
    model: nn.Module,
    source: Iterable[Any] | Tensor,
    target: Iterable[Any] | Tensor,
    *,
    points: str | Sequence[str] | None = None,
    depth: int | None = None,
    max_samples: int = 2048,
) -> PointSuggestions:
    """Say at which point of the network to attach a domain head, from one pass over samples of both domains.

    Behind each module, the features are pooled to one vector per sample, and a linear probe (ridge regression
    of standardised features, in closed form) is fitted on every second batch and tested on the others: how
    well it tells the domains apart, as the proxy A-distance 2 (1 - 2 error) of Ben-David et al., "Analysis of
    Representations for Domain Adaptation", NeurIPS 2006; and, where the source's batches hold labels, its
    classes. Recommended is the last point, of those where the classes are read as well as anywhere (up to two
    standard errors), at which the domains are at least half as far apart as at any of them: the task's
    features are there already, there is something to remove,
    and the reversal reaches the most layers. This is a rule of thumb, which has not been measured against
    trained runs.

    The network runs in eval mode and without gradients; its modes, its buffers and the random generators of
    the host are afterwards as they were. Labels of the target are never looked at.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> generator = torch.Generator().manual_seed(0)
        >>> source = torch.randn(200, 4, generator=generator)
        >>> target = torch.randn(200, 4, generator=generator) + torch.tensor([3.0, 0.0, 0.0, 0.0])
        >>> found = suggest_points(model, source, target)
        >>> found.recommended in ("0", "1"), found.points[0].a_distance > 1.0
        (True, True)

    Args:
        model: The network, without a head as yet.
        source: Batches, as a DataLoader gives them: inputs; or (inputs, labels); or a mapping of arguments in
            which ``labels`` or ``label`` are taken for the labels, (B,), integers. Or one tensor of samples.
        target: The same of the other domain.
        points: Names of modules to look at; by default all down to ``depth``.
        depth: How many calls deep to look: 1 for the modules that the network's own forward calls. By default
            as deep as gives at most 40 points.
        max_samples: How many samples of each domain are looked at, at most.

    Returns:
        The points in the order of execution; ``print`` shows a table.

    Raises:
        SurgeryError: There are fewer than 8 samples of a domain, a batch does not run, or no point can be
            measured.
        PointNotFoundError: ``points`` names no module that is called.
    """
    check_network(model, "suggest_points", example=_CALL)
    most = check_count("max_samples", max_samples, least=8, example="max_samples=2048")
    if depth is not None:
        check_count("depth", depth, example="depth=2")
    recorder = _Recorder(model)
    wanted = None if points is None else check_names("points", points, example="points=['layer3', 'layer4']")
    sets = []
    with preserve_rng_state(), _eval_mode(model), torch.no_grad():
        for name, data in (("source", source), ("target", target)):
            sets.append(_Features(name))
            for batch in _batches(data, most, name):
                if recorder.names is None:
                    recorder.choose(batch, wanted, depth)
                sets[-1].add(batch, recorder.record(batch))
            sets[-1].check()
    return _judged(recorder, sets[0], sets[1])


def recorded_points(model: nn.Module, inputs: Any, depth: int = 1) -> list[tuple[str, tuple[int, ...], bool]]:
    """Names, shapes and whether it is the output itself, of what the modules down to ``depth`` return.

    Example:
        >>> recorded_points(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.zeros(2, 4))
        [('0', (2, 8), False), ('1', (2, 3), True)]

    Args:
        model: The network.
        inputs: A batch, as for :func:`suggest_points`.
        depth: How many calls deep.
    """
    recorder = _Recorder(model)
    with preserve_rng_state(), _eval_mode(model), torch.no_grad():
        batch = _as_batch(inputs)
        recorder.choose(batch, None, depth)
        recorder.record(batch)
    return [(name, recorder.shapes[name], name in recorder.outputs) for name in recorder.shapes]


# -------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class _Batch:
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    labels: Tensor | None
    size: int


_LABELS = ("labels", "label")


def _batches(data: Iterable[Any] | Tensor, most: int, name: str) -> Iterator[_Batch]:
    """Batches until ``most`` samples were seen; one tensor is cut into sixteen of them."""
    if isinstance(data, Tensor):
        data = list(torch.split(data, max(1, math.ceil(min(len(data), most) / 16))))
    if not isinstance(data, Iterable):
        raise SurgeryError(f"{name} is a {type(data).__name__}, which gives no batches", example=_CALL)
    seen = 0
    for item in data:
        batch = _as_batch(item)
        yield batch
        seen += batch.size
        if seen >= most:
            return


def _as_batch(item: Any) -> _Batch:
    if isinstance(item, Mapping):
        labels = next((item[name] for name in _LABELS if name in item), None)
        kwargs = {name: value for name, value in item.items() if name not in _LABELS}
        return _sized((), kwargs, labels)
    if isinstance(item, (tuple, list)) and len(item) > 1:
        return _sized((item[0],), {}, item[1])
    return _sized((item[0],) if isinstance(item, (tuple, list)) and item else (item,), {}, None)


def _sized(args: tuple[Any, ...], kwargs: Mapping[str, Any], labels: Any) -> _Batch:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
    if not tensors:
        kinds = ", ".join(type(value).__name__ for value in (*args, *kwargs.values())) or "nothing"
        raise SurgeryError(f"a batch holds {kinds}, and no tensor of inputs", example=_CALL)
    size = len(tensors[0])
    are_labels = isinstance(labels, Tensor) and labels.shape == (size,) and not labels.is_floating_point()
    return _Batch(args, kwargs, labels if are_labels else None, size)


# ------------------------------------------------------------------------------------------- one forward


class _Recorder:
    """Pooled features behind each module, by hooks that are there during one forward only."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: set[str] | None = None
        self.types: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.skipped: dict[str, str] = {}
        self.outputs: set[str] = set()

    def choose(self, batch: _Batch, wanted: Sequence[str] | None, depth: int | None) -> None:
        """Run once to see what is called, how deep, and how often; then keep the points to look at."""
        calls = self._calls(batch)
        if wanted is not None:
            missing = [name for name in wanted if name not in calls]
            if missing:
                near = near_names(missing[0], calls) or [*calls][:5]
                raise PointNotFoundError(
                    f"no module that is called has the name {missing[0]!r}",
                    choices=near,
                    example=f"points={near[:1]!r}",
                )
            self.names = set(wanted)
            return
        levels = range(1, 1 + max(calls.values(), default=1))
        counts = {level: sum(found <= level for found in calls.values()) for level in levels}
        level = depth or max((level for level in levels if counts[level] <= _MOST_POINTS), default=1)
        self.names = {name for name, found in calls.items() if found <= level}

    def _calls(self, batch: _Batch) -> dict[str, int]:
        """Every call's name, and how many calls it lies inside."""
        found: list[tuple[str, int]] = []
        inside: list[str] = []

        def enter(path: str) -> None:
            inside.append(path)

        def leave(path: str, value: Any) -> None:
            inside.pop()
            found.append((path, len(inside) + 1))

        self._run(batch, enter, leave)
        total = {path: sum(path == other for other, _ in found) for path, _ in found}
        times: dict[str, int] = {}
        calls = {}
        for path, level in found:
            times[path] = times.get(path, 0) + 1
            calls[_name(path, times[path], total[path])] = level
        self._total = total
        return calls

    def record(self, batch: _Batch) -> dict[str, Tensor]:
        """Features (B, C) of one batch, by name."""
        features: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        times: dict[str, int] = {}

        def leave(path: str, value: Any) -> None:
            times[path] = times.get(path, 0) + 1
            name = _name(path, times[path], self._total.get(path, 1))
            if self.names is None or name not in self.names:
                return
            point, tensor = _first_tensor(name, value)
            self.types[point] = type(self.model.get_submodule(path)).__name__
            try:
                features[point] = _pooled(tensor, batch.size, self.model)
                values[point] = tensor
                self.shapes[point] = tuple(tensor.shape)
            except SurgeryError as error:
                self.skipped[point] = str(error).splitlines()[0]

        output = self._run(batch, lambda path: None, leave)
        _, result = _first_tensor("", output)
        self.outputs |= {name for name, value in values.items() if value is result}
        return features

    def _run(self, batch: _Batch, enter: Any, leave: Any) -> Any:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        args, kwargs = _moved(batch.args, device), _moved(dict(batch.kwargs), device)
        handles = []
        for path, module in self.model.named_modules():
            if path:
                handles.append(module.register_forward_pre_hook(lambda m, i, path=path: enter(path)))
                handles.append(module.register_forward_hook(lambda m, i, o, path=path: leave(path, o)))
        try:
            return self.model(*args, **kwargs)
        except SurgeryError:
            raise
        except Exception as error:  # the network is the user's: anything can come out of it
            sizes = [tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            raise SurgeryError(
                f"{type(self.model).__name__} does not run on inputs of {sizes}: {one_line(error)}",
                example="batches of inputs, (inputs, labels), or mappings of forward's arguments",
            ) from error
        finally:
            for handle in handles:
                handle.remove()


def _name(path: str, time: int, total: int) -> str:
    return escape(path) if total == 1 else f"{escape(path)}#{time}"


def _first_tensor(name: str, value: Any) -> tuple[str, Any]:
    """The value, or the first item of a tuple or of an output object, and its name."""
    if isinstance(value, Mapping) and value:
        key, first = next(iter(value.items()))
        return f"{name}[{key}]", first
    if isinstance(value, (tuple, list)) and value:
        return f"{name}[0]", value[0]
    return name, value


def _pooled(value: Any, size: int, model: nn.Module) -> Tensor:
    """(B, C), float32, on the CPU."""
    if not isinstance(value, Tensor):
        raise ShapeError(f"its value is a {type(value).__name__}, no tensor")
    if not value.is_floating_point():
        raise ShapeError(f"its value is of {value.dtype}, not floating point")
    if value.dim() == 3 and value.shape[0] != size and value.shape[1] == size:
        value = value.movedim(1, 0)  # a sequence whose batch is its second axis
    if value.dim() == 0 or value.shape[0] != size:
        raise ShapeError(f"its value of shape {tuple(value.shape)} has no axis of the {size} samples")
    if value.dim() == 1:
        value = value[:, None]
    width = getattr(model, "num_features", None)
    layout = infer_layout(tuple(value.shape), width if isinstance(width, int) else None)
    pooled: Tensor = FeaturePool(layout.name)(value.detach())
    return pooled.float().cpu()


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    return value


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, then each module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# -------------------------------------------------------------------------------------------- the probe


class _Features:
    """Features of one domain by point, and which samples are held out."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.parts: dict[str, list[Tensor]] = {}
        self.labels: list[Tensor] | None = []
        self.held_out: list[Tensor] = []

    def add(self, batch: _Batch, features: Mapping[str, Tensor]) -> None:
        for point, values in features.items():
            self.parts.setdefault(point, []).append(values)
        # A label of the target is never looked at.
        if batch.labels is None or self.name == "target":
            self.labels = None
        elif self.labels is not None:
            self.labels.append(batch.labels.cpu().long())
        self.held_out.append(torch.full((batch.size,), len(self.held_out) % 2 == 1))

    def check(self) -> None:
        count = sum(map(len, self.held_out))
        if count < 8:
            raise SurgeryError(
                f"the {self.name} gave {count} samples, and a probe needs at least 8", example=_CALL
            )
        if len(self.held_out) == 1:  # one batch: every second sample of it is held out
            self.held_out = [torch.arange(count) % 2 == 1]

    @property
    def is_held_out(self) -> Tensor:
        return torch.cat(self.held_out)


def _judged(recorder: _Recorder, source: _Features, target: _Features) -> PointSuggestions:
    held_out = torch.cat([source.is_held_out, target.is_held_out])
    counts = (len(source.is_held_out), len(target.is_held_out))
    domains = torch.arange(sum(counts)).ge(counts[0]).long()
    labels = torch.cat(source.labels) if source.labels else None
    scores, skipped = [], dict(recorder.skipped)
    for point in recorder.shapes:
        values = [torch.cat(part.parts[point]) if point in part.parts else None for part in (source, target)]
        if any(v is None or len(v) != n for v, n in zip(values, counts, strict=True)):
            skipped.setdefault(point, "it was not called for every batch")
            continue
        features = torch.cat([v for v in values if v is not None]).double()
        if not features.isfinite().all():
            skipped[point] = "a feature is infinite or nan"
            continue
        errors = _rates_of_error(features, domains, held_out)
        distance = 2.0 * (1.0 - sum(rate for rate, _ in errors))
        accuracy = error = None
        if labels is not None:
            of_source = features[: counts[0]]
            accuracy, error = _class_accuracy(of_source, labels, source.is_held_out)
        scores.append(
            PointScore(
                point,
                recorder.types[point],
                features.shape[1],
                distance,
                2.0 * math.sqrt(sum(_variance(rate, count) for rate, count in errors)),
                accuracy,
                error,
                point in recorder.outputs,
            )
        )
    if not scores:
        raise SurgeryError(
            "at no point of this network can a domain head read the features: "
            + "; ".join(f"{name}: {why}" for name, why in [*skipped.items()][:5]),
            example="points=[...], with the name of a module that returns one tensor",
        )
    return PointSuggestions(tuple(scores), *_recommend(scores), counts, skipped)


def _variance(rate: float, count: int) -> float:
    """Of a share among ``count``, with one right and one wrong added: none seen does not mean none there."""
    smoothed = (rate * count + 1.0) / (count + 2.0)
    return smoothed * (1.0 - smoothed) / count


def _rates_of_error(features: Tensor, classes: Tensor, held_out: Tensor) -> list[tuple[float, int]]:
    """Share of each class's held-out samples that the probe gets wrong, and their number."""
    predicted = _predict(features, classes, held_out)
    truth = classes[held_out]
    wrong = [(predicted[truth == k] != k).double() for k in range(int(classes.max()) + 1)]
    return [(each.mean().item(), len(each)) for each in wrong]


def _class_accuracy(features: Tensor, labels: Tensor, held_out: Tensor) -> tuple[float, float]:
    _, classes = labels.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    right = (_predict(features, classes, held_out) == classes[held_out]).double()
    accuracy = right.mean().item()
    return accuracy, math.sqrt(_variance(accuracy, len(right)))


def _predict(features: Tensor, classes: Tensor, held_out: Tensor) -> Tensor:
    """Classes of the held-out rows by ridge regression of one column per class, each class counting alike."""
    train, test = features[~held_out], features[held_out]
    mean, scale = train.mean(dim=0), train.std(dim=0)
    scale = scale.where(scale > 1e-12, 1.0)
    train, test = (train - mean) / scale, (test - mean) / scale
    wanted = nn.functional.one_hot(classes, int(classes.max()) + 1).double()[~held_out]
    weights = (1.0 / wanted.sum(dim=0).clamp_min(1.0)) @ wanted.T / wanted.shape[1]
    centre = weights @ train
    roots = weights.sqrt()[:, None]
    rows, columns = roots * (train - centre), roots * (wanted - weights @ wanted)
    if rows.shape[0] < rows.shape[1]:
        kernel = rows @ rows.T + _RIDGE * torch.eye(len(rows), dtype=rows.dtype)
        solution = rows.T @ torch.linalg.solve(kernel, columns)
    else:
        normal = rows.T @ rows + _RIDGE * torch.eye(rows.shape[1], dtype=rows.dtype)
        solution = torch.linalg.solve(normal, rows.T @ columns)
    scores: Tensor = (test - centre) @ solution + weights @ wanted
    return scores.argmax(dim=1)


def _recommend(scores: Sequence[PointScore]) -> tuple[str | None, str]:
    """A point and the reason."""
    inner = [score for score in scores if not score.is_output] or list(scores)
    apart = [score for score in inner if score.a_distance > 2.0 * score.a_distance_error]
    if not apart:
        return None, (
            "at no point does a linear probe tell the domains apart by more than its noise (two standard "
            "errors): there is nothing that a domain head could remove"
        )
    good, why = apart, ""
    if all(score.class_accuracy is not None for score in apart):
        best = max(apart, key=lambda score: score.class_accuracy or 0.0)
        margin = 2.0 * (best.class_accuracy_error or 0.0)
        good = [s for s in apart if (s.class_accuracy or 0.0) >= (best.class_accuracy or 0.0) - margin]
    furthest = max(score.a_distance for score in good)
    chosen = [score for score in good if score.a_distance >= _CLEARLY_APART * furthest][-1]
    if chosen.class_accuracy is not None:
        why = f"the classes are read as well as anywhere ({chosen.class_accuracy:.3f}), and "
    return chosen.point, (
        f"{why}the domains are told apart (A-distance {chosen.a_distance:.2f} ± "
        f"{chosen.a_distance_error:.2f}; at most {furthest:.2f}); it is the last "
        "such point, so that the reversal reaches the most layers"
    )


_CLEARLY_APART = 0.5
"""How far apart the domains must be at the recommended point, as a share of the furthest."""
