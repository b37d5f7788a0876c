"""Surgeries that went wrong, each in one way: what a verifier must reject, and what it must say.

A correct splice is made first and then tampered with: its reversal is exchanged for a layer that does
something else, its graph is edited, or one of its modules is changed.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import timm
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import grl_surgery as gs

# --- The networks


class Small(nn.Module):
    """Two branches use the value of `stem`; `spare` is used by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.stem = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Tanh())
        self.left = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.right = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.Tanh())
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.25)
        self.fc = nn.Linear(8, 4)
        self.spare = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        v = self.stem(self.conv(x))
        v = self.norm(self.left(v) + self.right(v))
        return self.fc(self.drop(v.mean((2, 3))))


@dataclass(frozen=True)
class Patient:
    """A network, the point after which a reversal belongs, and places where it does not belong.

    Args:
        make: Builds the network.
        pixels: Size of its images.
        after: The right point.
        earlier: The point before it; only `groups["at the point"]` lies between.
        later: A point behind it; only `groups["behind the point"]` lies between.
        groups: Names for parts of the network, each a tuple of module paths.
    """

    make: Callable[[], nn.Module]
    pixels: int
    after: str
    earlier: str
    later: str
    groups: dict[str, tuple[str, ...]]


PATIENTS = {
    "small": Patient(
        Small,
        pixels=8,
        after="stem",
        earlier="conv",
        later="norm",
        groups={
            "upstream": ("conv", "stem"),
            "at the point": ("stem",),
            "behind the point": ("left", "right", "norm"),
            "downstream": ("left", "right", "norm", "fc"),
            "one branch": ("right",),
            "unused": ("spare",),
            "head": ("domain",),
        },
    ),
    "resnet18": Patient(
        lambda: timm.create_model("resnet18", num_classes=10),
        pixels=32,
        after="layer2",
        earlier="layer1",
        later="layer3",
        groups={
            "upstream": ("conv1", "bn1", "layer1", "layer2"),
            "at the point": ("layer2",),
            "behind the point": ("layer3",),
            "downstream": ("layer3", "layer4", "fc"),
        },
    ),
}

Spliced = fx.GraphModule
Break = Callable[[Spliced, Patient], nn.Module]


@dataclass(frozen=True)
class BrokenSurgery:
    """One way to go wrong and what the report must say of it: that, and nothing else.

    Args:
        breaks: Tampers with a correct splice.
        reversal: What is wrong at the reversal (a pattern); empty where it does what it should.
        parameters: From group to what is wrong with the gradient of each parameter in it (a pattern);
            "domain: upstream" is the group upstream, under the objective of the head called domain. None
            where the forward is another one, so that gradients may differ anywhere.
        problem: What is wrong with the network as a whole (a pattern); empty where nothing is.
        forward_identical: Whether the outputs are still those of the reference.
        difference: How they differ (a pattern).
        coeff: Coefficient of the reversal.
        modes: In which modes it is wrong at all.
        patients: Networks in which it can be done.
    """

    breaks: Break
    reversal: str = ""
    parameters: dict[str, str] | None = field(default_factory=dict)
    problem: str = ""
    forward_identical: bool = True
    difference: str = ""
    coeff: float = 1.0
    modes: tuple[str, ...] = ("train", "eval")
    patients: tuple[str, ...] = ("small", "resnet18")


def node_called(m: Spliced, point: str) -> fx.Node:
    (node,) = (node for node in m.graph.nodes if node.meta.get("point") == point)
    return node


def reversal_node(m: Spliced) -> fx.Node:
    (name,) = gs.reversals(m)
    return node_called(m, name)


# --- A layer that does something else


def with_layer(kind: type[gs.GradientReversal]) -> Break:
    """Exchange the reversal for another layer with the same coefficient."""

    def breaks(m: Spliced, patient: Patient) -> Spliced:
        ((name, layer),) = gs.reversals(m).items()
        setattr(m, name, kind(layer.coeff))
        return m

    return breaks


class KeepsTheSign(gs.GradientReversal):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.coeff / self.coeff


class Doubles(gs.GradientReversal):
    def forward(self, x: Tensor) -> Tensor:
        return gs.reverse_gradient(x, 2.0 * self.coeff)


class Halves(gs.GradientReversal):
    def forward(self, x: Tensor) -> Tensor:
        return gs.reverse_gradient(x, 0.5 * self.coeff)


class IgnoresItsCoefficient(gs.GradientReversal):
    def forward(self, x: Tensor) -> Tensor:
        return gs.reverse_gradient(x, 1.0)


class FreezesItsCoefficient(gs.GradientReversal):
    def __init__(self, coeff: float | Tensor = 1.0) -> None:
        super().__init__(coeff)
        self.frozen = float(coeff)

    def forward(self, x: Tensor) -> Tensor:
        return gs.reverse_gradient(x, self.frozen)


class Detaches(gs.GradientReversal):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class RunsWithoutGrad(gs.GradientReversal):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return gs.reverse_gradient(x, self.coeff)


class Zeroes(gs.GradientReversal):
    def forward(self, x: Tensor) -> Tensor:
        return gs.reverse_gradient(x, 0.0 * self.coeff)


class GivesNan(gs.GradientReversal):
    def forward(self, x: Tensor) -> Tensor:
        return gs.reverse_gradient(x, float("nan") * self.coeff)


class ReversesTwice(gs.GradientReversal):
    def forward(self, x: Tensor) -> Tensor:
        return gs.reverse_gradient(gs.reverse_gradient(x, 1.0), self.coeff)


class ReversesTheFirstSample(gs.GradientReversal):
    def forward(self, x: Tensor) -> Tensor:
        only_first = torch.zeros(len(x)).index_fill(0, torch.tensor([0]), 1.0)
        return gs.reverse_gradient(x, only_first * self.coeff)


class ReversesOneHalf(gs.GradientReversal):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([gs.reverse_gradient(x[:2], self.coeff), x[2:]])


class Nudges(gs.GradientReversal):
    def forward(self, x: Tensor) -> Tensor:
        return gs.reverse_gradient(x + 1e-7, self.coeff)


class DropsValues(gs.GradientReversal):
    def forward(self, x: Tensor) -> Tensor:
        return gs.reverse_gradient(functional.dropout(x, 0.1, self.training), self.coeff)


class DrawsANumber(gs.GradientReversal):
    """Its output is right, but everything random behind it comes out differently."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1)
        return gs.reverse_gradient(x, self.coeff)


class Negates(gs.GradientReversal):
    """Reverses the gradient by ordinary calculus, and the forward with it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * -self.coeff


# --- An edited graph


def lost_in_a_trace(m: Spliced, patient: Patient) -> Spliced:
    """What a tracer does to the usual autograd function; the recipe still says that it is there."""
    node = reversal_node(m)
    node.replace_all_uses_with(node.args[0])
    m.graph.erase_node(node)
    m.recompile()
    return m


def one_path_bypassed(m: Spliced, patient: Patient) -> Spliced:
    node = reversal_node(m)
    node_called(m, "right").replace_input_with(node, node.args[0])
    m.recompile()
    return m


def moved(m: Spliced, after: str) -> Spliced:
    """Take the reversal away and put it behind another node."""
    node, place = reversal_node(m), node_called(m, after)
    node.replace_all_uses_with(node.args[0])
    users = list(place.users)
    place.append(node)
    node.args = (place,)
    for user in users:
        if user is not node:
            user.replace_input_with(place, node)
    m.graph.lint()
    m.recompile()
    return m


def reversal_too_early(m: Spliced, patient: Patient) -> Spliced:
    return moved(m, patient.earlier)


def reversal_too_late(m: Spliced, patient: Patient) -> Spliced:
    return moved(m, patient.later)


def insert_behind(m: Spliced, point: str, function: Callable[..., Tensor], *args: object) -> Spliced:
    """Put a function between a node and all its users."""
    place = node_called(m, point)
    users = list(place.users)
    with m.graph.inserting_after(place):
        inserted = m.graph.call_function(function, (place, *args))
    for user in users:
        user.replace_input_with(place, inserted)
    m.recompile()
    return m


def reversed_again_behind_it(m: Spliced, patient: Patient) -> Spliced:
    (name,) = gs.reversals(m)
    return insert_behind(m, name, gs.reverse_gradient)


def detached_before_it(m: Spliced, patient: Patient) -> Spliced:
    return insert_behind(m, patient.after, Tensor.detach)


def detached_behind_it(m: Spliced, patient: Patient) -> Spliced:
    (name,) = gs.reversals(m)
    return insert_behind(m, name, Tensor.detach)


def branch_detached(m: Spliced, patient: Patient) -> Spliced:
    return insert_behind(m, "right", Tensor.detach)


def output_nudged(m: Spliced, patient: Patient) -> Spliced:
    return insert_behind(m, "fc", operator.add, 1e-7)


def dropout_added(m: Spliced, patient: Patient) -> Spliced:
    return insert_behind(m, patient.later, functional.dropout, 0.1)


def gradient_out_of_nowhere(m: Spliced, patient: Patient) -> Spliced:
    """A layer that nothing used gets a gradient, while the output stays the same."""

    end = node_called(m, "fc")
    (user,) = end.users
    with m.graph.inserting_before(user):
        constant = m.graph.call_method("detach", (end.args[0],))
        unused = m.graph.call_module("spare", (constant,))
        nothing = m.graph.call_function(operator.sub, (unused, m.graph.call_method("detach", (unused,))))
        user.replace_input_with(end, m.graph.call_function(operator.add, (end, nothing)))
    m.recompile()
    return m


def frozen_by_a_trace_in_eval(m: Spliced, patient: Patient) -> Spliced:
    """Tracing in eval mode leaves no dropout in the graph, and train() does not bring it back."""
    node = node_called(m, "drop")
    node.replace_all_uses_with(node.args[0])
    m.graph.erase_node(node)
    m.recompile()
    return m


def constant_kept_from_call_to_call(m: Spliced, patient: Patient) -> Spliced:
    """A tensor that the forward makes anew and changes: traced as a constant, it is made once."""
    m.register_buffer("made", torch.zeros(()), persistent=False)
    place = node_called(m, "fc")
    (user,) = place.users
    with m.graph.inserting_after(place):
        constant = m.graph.get_attr("made")
    with m.graph.inserting_after(constant):
        one = m.graph.call_method("add_", (constant, 1))
    with m.graph.inserting_after(one):
        user.replace_input_with(place, m.graph.call_function(operator.mul, (place, one)))
    m.recompile()
    return m


# --- A changed module


def stuck_in_eval(m: Spliced, patient: Patient) -> Spliced:
    """One block that train() does not reach."""
    block = m.get_submodule(patient.later).eval()
    block.train = lambda mode=True: block  # type: ignore[method-assign, assignment]
    return m


def statistics_not_kept(m: Spliced, patient: Patient) -> Spliced:
    """Batch norms that compute with the batch and forget it."""
    for layer in m.get_submodule(patient.later).modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0
    return m


def upstream_frozen(m: Spliced, patient: Patient) -> Spliced:
    for path in patient.groups["upstream"]:
        m.get_submodule(path).requires_grad_(False)
    return m


def run_without_grad(m: Spliced, patient: Patient) -> Spliced:
    forward = type(m).forward
    type(m).forward = torch.no_grad()(forward)  # type: ignore[method-assign]
    return m


def with_weight(value: Callable[[Tensor], Tensor]) -> Break:
    """A parameter that is not the original's any more."""

    def breaks(m: Spliced, patient: Patient) -> Spliced:
        m.fc.weight = nn.Parameter(value(m.fc.weight.detach()))
        return m

    return breaks


def with_statistics_of_its_own(m: Spliced, patient: Patient) -> Spliced:
    """A buffer that is not the original's any more."""
    layer = next(x for x in m.get_submodule(patient.later).modules() if isinstance(x, nn.BatchNorm2d))
    layer.running_mean = layer.running_mean + 1.0
    return m


# --- A head that is not what it should be


def head_without_its_reversal(m: Spliced, patient: Patient) -> Spliced:
    m.domain.reversal = nn.Identity()
    return m


def head_that_keeps_the_sign(m: Spliced, patient: Patient) -> Spliced:
    m.domain.reversal = KeepsTheSign()
    return m


def head_detached(m: Spliced, patient: Patient) -> Spliced:
    node = node_called(m, "domain")
    with m.graph.inserting_before(node):
        node.args = (m.graph.call_method("detach", node.args),)
    m.recompile()
    return m


def logits_detached(m: Spliced, patient: Patient) -> Spliced:
    return insert_behind(m, "domain", Tensor.detach)


def head_reversed_as_a_whole(m: Spliced, patient: Patient) -> Spliced:
    return insert_behind(m, "domain", gs.reverse_gradient)


def trunk_reversed_for_the_task_too(m: Spliced, patient: Patient) -> Spliced:
    """The reversal stands before the fork, so that the task's gradient crosses it as well."""
    return insert_behind(m, patient.after, gs.reverse_gradient)


def outputs_swapped(m: Spliced, patient: Patient) -> Spliced:
    (end,) = (node for node in m.graph.nodes if node.op == "output")
    end.args = (tuple(reversed(end.args[0])),)
    m.recompile()
    return m


NOT_REVERSED = "its gradient is not reversed"
REVERSED = "its gradient is reversed, and should not be"
NO_GRADIENT = "no gradient reaches it"
LOST = "its gradient is lost"

BROKEN = {
    "sign kept": BrokenSurgery(with_layer(KeepsTheSign), " 1 times", {"upstream": NOT_REVERSED}),
    "twice the scale": BrokenSurgery(with_layer(Doubles), " -2 times", {"upstream": " -2 times"}),
    "half the scale": BrokenSurgery(with_layer(Halves), r" -0\.5 times", {"upstream": r" -0\.5 times"}),
    "coefficient ignored": BrokenSurgery(
        with_layer(IgnoresItsCoefficient), r"it does not multiply by -0\.3", coeff=0.3
    ),
    "coefficient of one ignored": BrokenSurgery(
        with_layer(IgnoresItsCoefficient), r"it does not multiply by -"
    ),
    "coefficient frozen": BrokenSurgery(
        with_layer(FreezesItsCoefficient), r" -0\.5 times", {"upstream": r" -0\.5 times"}, coeff=0.5
    ),
    "layer detaches": BrokenSurgery(with_layer(Detaches), NO_GRADIENT, {"upstream": LOST}),
    "layer without grad": BrokenSurgery(with_layer(RunsWithoutGrad), NO_GRADIENT, {"upstream": LOST}),
    "gradient zeroed": BrokenSurgery(with_layer(Zeroes), " -?0 times", {"upstream": LOST}),
    "gradient nan": BrokenSurgery(with_layer(GivesNan), "it is not finite", {"upstream": "it is not finite"}),
    "reversed twice in the layer": BrokenSurgery(
        with_layer(ReversesTwice),
        "not -1 times the one that enters",
        {"upstream": NOT_REVERSED},
    ),
    "one sample only": BrokenSurgery(
        with_layer(ReversesTheFirstSample), r" -0\.\d+ times", {"upstream": " .* times"}
    ),
    "half the batch only": BrokenSurgery(
        with_layer(ReversesOneHalf), "not -1 times", {"upstream": " .* times"}
    ),
    "forward nudged in the layer": BrokenSurgery(
        with_layer(Nudges), parameters=None, forward_identical=False
    ),
    "dropout in the layer": BrokenSurgery(
        with_layer(DropsValues),
        "not -1 times the one that enters",
        None,
        forward_identical=False,
        modes=("train",),
    ),
    "random numbers shifted": BrokenSurgery(
        with_layer(DrawsANumber),
        parameters=None,
        forward_identical=False,
        modes=("train",),
        patients=("small",),
    ),
    "forward negated": BrokenSurgery(with_layer(Negates), parameters=None, forward_identical=False),
    "lost in a trace": BrokenSurgery(lost_in_a_trace, NO_GRADIENT, {"upstream": NOT_REVERSED}),
    "one path bypassed": BrokenSurgery(
        one_path_bypassed, parameters={"upstream": " .* times"}, patients=("small",)
    ),
    "too early": BrokenSurgery(reversal_too_early, parameters={"at the point": NOT_REVERSED}),
    "too late": BrokenSurgery(
        reversal_too_late,
        parameters={"behind the point": REVERSED},
    ),
    "reversed twice in the graph": BrokenSurgery(
        reversed_again_behind_it, parameters={"upstream": NOT_REVERSED}
    ),
    "detached before the reversal": BrokenSurgery(detached_before_it, NO_GRADIENT, {"upstream": LOST}),
    "detached behind the reversal": BrokenSurgery(detached_behind_it, NO_GRADIENT, {"upstream": LOST}),
    "branch detached": BrokenSurgery(
        branch_detached,
        parameters={"one branch": LOST, "upstream": " .* times"},
        patients=("small",),
    ),
    "output nudged": BrokenSurgery(
        output_nudged, forward_identical=False, difference="output has other values than in the reference"
    ),
    "constant kept from call to call": BrokenSurgery(
        constant_kept_from_call_to_call,
        forward_identical=False,
        difference="in a second call, output has other values than in the reference",
    ),
    "dropout in the graph": BrokenSurgery(dropout_added, parameters=None, forward_identical=False),
    "gradient out of nowhere": BrokenSurgery(
        gradient_out_of_nowhere,
        parameters={"unused": "it has a gradient where the reference has none"},
        patients=("small",),
    ),
    "mode frozen by a trace": BrokenSurgery(
        frozen_by_a_trace_in_eval,
        parameters=None,
        forward_identical=False,
        modes=("train",),
        patients=("small",),
    ),
    "block stuck in eval": BrokenSurgery(
        stuck_in_eval, parameters=None, forward_identical=False, modes=("train",)
    ),
    "statistics not kept": BrokenSurgery(
        statistics_not_kept,
        forward_identical=False,
        difference=r"it leaves other values in the buffer '.*running_mean'",
        modes=("train",),
    ),
    "upstream frozen": BrokenSurgery(
        upstream_frozen, NO_GRADIENT, problem="no parameter upstream of a reversal receives a gradient"
    ),
    "network without grad": BrokenSurgery(
        run_without_grad, NO_GRADIENT, {"upstream": LOST, "downstream": LOST}
    ),
    "parameter changed": BrokenSurgery(
        with_weight(lambda weight: weight + 0.25),
        problem="'fc.weight' has other values than in the reference",
    ),
    "buffer changed": BrokenSurgery(
        with_statistics_of_its_own,
        parameters=None,
        problem=r"running_mean' has other values than in the reference",
        forward_identical=False,
    ),
}

BROKEN_HEADS = {
    "without its reversal": BrokenSurgery(
        head_without_its_reversal,
        parameters={"domain: upstream": NOT_REVERSED},
        problem="there is no reversal in this network",
    ),
    "sign kept": BrokenSurgery(
        head_that_keeps_the_sign, " 1 times", parameters={"domain: upstream": NOT_REVERSED}
    ),
    "detached": BrokenSurgery(head_detached, NO_GRADIENT, {"domain: upstream": LOST}),
    "logits detached": BrokenSurgery(
        logits_detached, NO_GRADIENT, {"domain: upstream": LOST, "domain: head": LOST}
    ),
    "reversed as a whole": BrokenSurgery(
        head_reversed_as_a_whole, parameters={"domain: upstream": NOT_REVERSED, "domain: head": REVERSED}
    ),
    "trunk reversed for the task too": BrokenSurgery(
        trunk_reversed_for_the_task_too,
        parameters={"upstream": REVERSED, "domain: upstream": NOT_REVERSED},
    ),
    "outputs swapped": BrokenSurgery(outputs_swapped, parameters=None, forward_identical=False),
}
