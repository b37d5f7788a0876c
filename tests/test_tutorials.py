"""The programs of the two tutorials that this project grew from, run and held to what they print.

The first is a chain of three linear layers with a reversal in front of the second; it prints gradient
tables. The second is a DANN with the reversal at the start of its domain head, a reversal that can be
switched off, and a coefficient that rises during training.
"""

import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import grl_surgery as gs

# --- The first tutorial: net1 -> reversal -> net2 -> net3

# What it prints, in its own order. The captions are swapped: its first table of net1, "without GRL", is
# what the program prints with the reversal, and its second, "with GRL", what it prints without.
NET1_UNDER_THE_CAPTION_WITHOUT = [
    [-0.0027, -0.0044, -0.0026],
    [-0.0420, -0.0675, -0.0400],
    [-0.0030, -0.0048, -0.0029],
    [0.0035, 0.0056, 0.0033],
    [-0.0336, -0.0540, -0.0320],
    [-0.0454, -0.0729, -0.0432],
]
NET1_UNDER_THE_CAPTION_WITH = [[-value for value in row] for row in NET1_UNDER_THE_CAPTION_WITHOUT]
NET2_UNDER_BOTH_CAPTIONS = [
    [0.0027, 0.0034, -0.0032, -0.0028, 0.0044, -0.0049],
    [0.0452, 0.0577, -0.0544, -0.0473, 0.0747, -0.0830],
    [-0.0897, -0.1146, 0.1081, 0.0939, -0.1483, 0.1647],
    [-0.0702, -0.0897, 0.0846, 0.0735, -0.1161, 0.1290],
    [0.0519, 0.0663, -0.0626, -0.0543, 0.0859, -0.0954],
    [0.0520, 0.0664, -0.0627, -0.0544, 0.0860, -0.0955],
    [-0.0967, -0.1235, 0.1166, 0.1012, -0.1599, 0.1776],
    [-0.0058, -0.0074, 0.0069, 0.0060, -0.0095, 0.0106],
    [-0.0124, -0.0158, 0.0149, 0.0129, -0.0204, 0.0227],
    [0.0830, 0.1060, -0.1000, -0.0869, 0.1373, -0.1525],
]
_NET3_ROW = [0.1127, -0.2764, -0.0864, -0.1450, 0.2694, -0.1738, -0.1415, 0.3108, 0.0458, -0.1464]
NET3_UNDER_BOTH_CAPTIONS = [_NET3_ROW, [-value for value in _NET3_ROW]]


class TimesOne(torch.autograd.Function):
    """The first tutorial's function: its forward multiplies by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coeff: float = 1.0) -> Tensor:
        ctx.coeff = coeff
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].neg() * ctx.coeff, None


class Cloned(TimesOne):
    """The second tutorial's function: its forward clones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coeff: float = 1.0) -> Tensor:
        ctx.coeff = coeff
        return x.clone()


class PastedLayer(nn.Module):
    """The function wrapped in a module, as both tutorials offer it."""

    def __init__(self, function: type[TimesOne]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class Stage(nn.Module):
    """A linear layer, with something in front of it that may be a module or a function."""

    def __init__(self, inputs: int, outputs: int, first: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x if self.first is None else self.first(x))


PASTED = {
    "function times one": TimesOne.apply,
    "module times one": PastedLayer(TimesOne),
    "function cloned": Cloned.apply,
    "module cloned": PastedLayer(Cloned),
}
OURS = {"function": gs.reverse_gradient, "module": gs.GradientReversal()}

Program = tuple[nn.Module, Tensor, Tensor]


def program(first: Callable[[Tensor], Tensor] | None = None) -> Program:
    """The chain, the data and the labels, drawn from the seeds in the tutorial's order."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    chain = nn.Sequential(
        OrderedDict(net1=Stage(3, 6), net2=Stage(6, 10, first), net3=Stage(10, 2)),
    )
    return chain, torch.rand((4, 3)), torch.ones(4, dtype=torch.long)


def gradients(chain: nn.Module, data: Tensor, label: Tensor) -> dict[str, Tensor]:
    loss = functional.cross_entropy(chain(data), label)
    names, parameters = zip(*chain.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def printed(gradient: Tensor) -> list[list[float]]:
    """The numbers as the tutorial's print shows them."""
    return [[round(value, 4) for value in row] for row in gradient.tolist()]


def assert_only_net1_is_flipped(found: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        expected = -gradient if name.startswith("net1.") else gradient
        assert torch.equal(found[name], expected), name


def test_without_a_reversal_the_program_prints_the_table_captioned_with() -> None:
    found = gradients(*program())

    assert printed(found["net1.linear.weight"]) == NET1_UNDER_THE_CAPTION_WITH
    assert printed(found["net2.linear.weight"]) == NET2_UNDER_BOTH_CAPTIONS
    assert printed(found["net3.linear.weight"]) == NET3_UNDER_BOTH_CAPTIONS


@pytest.mark.parametrize("reversal", [*PASTED.values(), *OURS.values()], ids=[*PASTED, *OURS])
def test_with_a_reversal_the_program_prints_the_table_captioned_without(
    reversal: Callable[[Tensor], Tensor],
) -> None:
    found = gradients(*program(reversal))

    assert printed(found["net1.linear.weight"]) == NET1_UNDER_THE_CAPTION_WITHOUT
    assert printed(found["net2.linear.weight"]) == NET2_UNDER_BOTH_CAPTIONS
    assert printed(found["net3.linear.weight"]) == NET3_UNDER_BOTH_CAPTIONS
    assert_only_net1_is_flipped(found, gradients(*program()))


def test_the_tutorials_three_prints_show_one_table_three_times() -> None:
    # Each of its three print calls names another network and reads net1.linear.weight.grad; the three
    # tables that it shows have three shapes, so that another program printed them.
    chain, data, label = program()
    functional.cross_entropy(chain(data), label).backward()

    shown = [printed(chain.net1.linear.weight.grad) for _ in ("net1", "net2", "net3")]

    assert shown == [NET1_UNDER_THE_CAPTION_WITH] * 3
    assert shown != [NET1_UNDER_THE_CAPTION_WITH, NET2_UNDER_BOTH_CAPTIONS, NET3_UNDER_BOTH_CAPTIONS]


@pytest.mark.parametrize(
    "where",
    [{"after": "net1"}, {"before": "net2"}, {"edge": "net1 -> net2"}, {"before": "net2.linear"}],
    ids=str,
)
def test_a_spliced_chain_prints_what_the_pasted_one_prints(where: dict[str, str]) -> None:
    chain, data, label = program()
    spliced = gs.insert_grl(chain, **where)

    found = gradients(spliced, data, label)

    assert printed(found["net1.linear.weight"]) == NET1_UNDER_THE_CAPTION_WITHOUT
    assert_only_net1_is_flipped(found, gradients(chain, data, label))
    assert gs.verify_flip(spliced, chain, data).raise_if_failed().verdict == (
        "2 of 2 upstream parameters flipped, bit for bit; 4 downstream unchanged; forward identical"
    )
    assert_only_net1_is_flipped(found, gradients(gs.strip(spliced), data, label))


@pytest.mark.parametrize(
    "reference",
    [
        pytest.param(None, id="alone"),
        pytest.param(nn.Identity(), id="against the chain with an identity in its place"),
        pytest.param("nothing", id="against the chain with nothing in its place"),
    ],
)
def test_a_layer_of_ours_that_the_user_wrote_into_the_chain_is_verified(reference: Any) -> None:
    chain, data, _ = program(gs.GradientReversal())
    plain = reference and program(None if reference == "nothing" else reference)[0]

    report = gs.verify_flip(chain, plain, data).raise_if_failed()

    assert [row.name for row in report.reversals] == ["net2.first"]
    assert {row.name: row.measured for row in report.parameters} == {
        "net1.linear.weight": "flipped",
        "net1.linear.bias": "flipped",
        "net2.linear.weight": "unchanged",
        "net2.linear.bias": "unchanged",
        "net3.linear.weight": "unchanged",
        "net3.linear.bias": "unchanged",
    }


@pytest.mark.parametrize("reversal", PASTED.values(), ids=PASTED)
def test_a_pasted_reversal_is_not_taken_for_one_of_ours(reversal: Callable[[Tensor], Tensor]) -> None:
    chain, data, _ = program(reversal)
    report = gs.verify_flip(chain, program()[0], data)
    assert gs.reversals(chain) == {}
    assert all(row.name not in gs.reversals(chain) for row in report.reversals)
    assert report.ok or "there is no reversal in this network" in str(report)


@pytest.mark.parametrize("reversal", PASTED.values(), ids=PASTED)
def test_splicing_beside_a_pasted_reversal_reverses_twice(reversal: Callable[[Tensor], Tensor]) -> None:
    chain, data, label = program(reversal)
    found = gradients(gs.insert_grl(chain, after="net1"), data, label)
    assert printed(found["net1.linear.weight"]) == NET1_UNDER_THE_CAPTION_WITH


@pytest.mark.parametrize(
    "reversal",
    [
        pytest.param(lambda x: TimesOne.apply(x), id="times one"),
        pytest.param(lambda x: Cloned.apply(x), id="cloned"),
        pytest.param(TimesOne.apply, id="apply kept under another name"),
    ],
)
def test_a_pasted_function_keeps_its_backward_where_its_forward_is_traced(
    reversal: Callable[[Tensor], Tensor],
) -> None:
    chain, data, label = program(reversal)
    spliced = gs.insert_grl(chain, after="net2.linear")
    with pytest.raises(gs.FlipError, match="grl_net2_linear cancel"):
        gs.verify_flip(spliced, chain, data).raise_if_failed()

    found, before = gradients(spliced, data, label), gradients(chain, data, label)

    for name in ("net1.linear.weight", "net1.linear.bias", "net2.linear.weight", "net2.linear.bias"):
        assert torch.equal(found[name], -before[name]), name


# --- The second tutorial: a DANN


class DANN(nn.Module):
    """A feature extractor, a label classifier, and a domain head whose first layer is the reversal."""

    def __init__(self, features: nn.Module, width: int, classes: int, reversal: nn.Module) -> None:
        super().__init__()
        self.feature_extractor = features
        self.classifier = nn.Linear(width, classes)
        self.domain_clf = nn.Sequential(reversal, nn.Linear(width, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.feature_extractor(x)
        return self.classifier(features), self.domain_clf(features)


def dann(reversal: nn.Module) -> DANN:
    """The same weights whatever the reversal."""
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.ReLU(),
    )
    return DANN(backbone, 8, 5, reversal)


IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1, 2, 3, 4, 0])
DOMAINS = torch.tensor([[0.0], [0.0], [0.0], [1.0], [1.0], [1.0]])


def task_loss(model: DANN) -> Tensor:
    return functional.cross_entropy(model(IMAGES)[0], CLASSES)


def domain_loss(model: DANN) -> Tensor:
    return functional.binary_cross_entropy_with_logits(model(IMAGES)[1], DOMAINS)


def gradients_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor | None]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def test_the_domain_loss_reaches_the_backbone_exactly_reversed() -> None:
    found = gradients_of(domain_loss(model := dann(gs.GradientReversal())), model)
    plain = gradients_of(domain_loss(model := dann(nn.Identity())), model)

    for name in (n for n in plain if n.startswith("feature_extractor.")):
        assert torch.equal(found[name], -plain[name]), name
        assert found[name].any(), name
    for name in ("domain_clf.1.weight", "domain_clf.1.bias"):
        assert torch.equal(found[name], plain[name]), name
    assert found["classifier.weight"] is None


def test_the_task_loss_reaches_the_backbone_untouched() -> None:
    found = gradients_of(task_loss(model := dann(gs.GradientReversal())), model)
    plain = gradients_of(task_loss(model := dann(nn.Identity())), model)

    for name, gradient in plain.items():
        if name.startswith("domain_clf."):
            assert gradient is None
            assert found[name] is None
        else:
            assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("coeff", [0.0, 0.1, 0.25, 1.0, 3.0])
def test_the_coefficient_scales_what_the_domain_loss_sends_back(coeff: float) -> None:
    model = dann(layer := gs.GradientReversal())
    layer.set_coeff(coeff)
    features = model.feature_extractor(IMAGES)
    loss = functional.binary_cross_entropy_with_logits(model.domain_clf(features), DOMAINS)
    plain = functional.binary_cross_entropy_with_logits(model.domain_clf[1](features), DOMAINS)

    (found,) = torch.autograd.grad(loss, features, retain_graph=True)
    (expected,) = torch.autograd.grad(plain, features)

    assert torch.equal(found, expected * -torch.tensor(coeff))


def test_the_layer_gives_the_gradients_of_the_tutorials_layer() -> None:
    ours = gradients_of(domain_loss(model := dann(gs.GradientReversal())), model)
    theirs = gradients_of(domain_loss(model := dann(PastedLayer(Cloned))), model)
    assert all(gradient is theirs[n] or torch.equal(gradient, theirs[n]) for n, gradient in ours.items())


def test_splicing_the_plain_network_gives_the_gradients_of_the_written_one() -> None:
    written = dann(gs.GradientReversal())
    spliced = gs.insert_grl(dann(nn.Identity()), edge="feature_extractor -> domain_clf")

    for loss in (task_loss, domain_loss):
        ours, theirs = gradients_of(loss(spliced), spliced), gradients_of(loss(written), written)
        assert ours.keys() == theirs.keys()
        assert all(gradient is theirs[n] or torch.equal(gradient, theirs[n]) for n, gradient in ours.items())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("reference", [None, dann(nn.Identity())], ids=["alone", "against the plain one"])
def test_the_dann_is_verified(mode: str, reference: nn.Module | None) -> None:
    report = gs.verify_flip(dann(gs.GradientReversal()), reference, IMAGES, mode=mode).raise_if_failed()

    measured = {row.name: row.measured for row in report.parameters if row.measured != "no signal"}
    assert [row.name for row in report.reversals] == ["domain_clf.0"]
    assert {kind for name, kind in measured.items() if name.startswith("feature_extractor.")} == {"mixed"}
    assert {kind for name, kind in measured.items() if "clf" in name or "classifier" in name} == {"unchanged"}


def test_the_conditional_reversal_is_a_context_and_changes_no_signature() -> None:
    model, plain = dann(gs.GradientReversal(coeff=0.5)), dann(nn.Identity())
    expected = gradients_of(domain_loss(plain), plain)
    reversed_before = gradients_of(domain_loss(model), model)

    with gs.reversal_disabled(model):
        found = gradients_of(domain_loss(model), model)

    for name in (n for n in expected if n.startswith("feature_extractor.")):
        assert torch.equal(found[name], expected[name]), name
        assert torch.equal(reversed_before[name], -0.5 * expected[name]), name
    reversed_after = gradients_of(domain_loss(model), model)
    assert torch.equal(
        reversed_after["feature_extractor.0.weight"], reversed_before["feature_extractor.0.weight"]
    )


STEPS = 8
TUTORIALS_COEFFICIENTS = [2.0 * step / STEPS - 1.0 for step in range(STEPS + 1)]  # from -1 to 1


@pytest.mark.parametrize("coeff", [c for c in TUTORIALS_COEFFICIENTS if c < 0])
def test_the_negative_half_of_the_progressive_coefficient_is_refused(coeff: float) -> None:
    x = torch.ones(2, requires_grad=True)
    layer = gs.GradientReversal(coeff=0.125)
    # The pasted function takes it, and lets the gradient through unreversed.
    assert (torch.autograd.grad(Cloned.apply(x, coeff).sum(), x)[0] > 0).all()

    with pytest.raises(gs.SurgeryError, match=f"coeff is {coeff}; .* un-reverses it"):
        gs.reverse_gradient(x, coeff)
    with pytest.raises(gs.SurgeryError, match=f"coeff is {coeff}; .* un-reverses it"):
        layer.set_coeff(coeff)
    with pytest.raises(gs.SurgeryError, match=f"coeff is {coeff}; .* un-reverses it"):
        gs.GradientReversal(coeff)
    with pytest.raises(gs.SurgeryError, match=f"coeff is {coeff}; .* un-reverses it"):
        gs.insert_grl(program()[0], after="net1", coeff=coeff)

    assert layer.coeff.item() == 0.125


def test_the_other_half_of_the_progressive_coefficient_reverses_more_and_more() -> None:
    model, layer = dann(nn.Identity()), gs.GradientReversal()
    model.domain_clf[0] = layer
    sizes = []
    for coeff in [c for c in TUTORIALS_COEFFICIENTS if c >= 0]:
        layer.set_coeff(coeff)
        gradient = gradients_of(domain_loss(model), model)["feature_extractor.5.weight"]
        plain = gradients_of(domain_loss(plain_model := dann(nn.Identity())), plain_model)
        torch.testing.assert_close(gradient, -coeff * plain["feature_extractor.5.weight"])
        sizes.append(gradient.norm().item())
    assert sizes[0] == 0.0
    assert sizes == sorted(set(sizes))


class Progressive(nn.Module):
    """The second tutorial's layer: it counts its forwards, and its coefficient goes from -1 to 1."""

    def __init__(self, reverse: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.reverse, self.iteration = reverse, 0

    def forward(self, x: Tensor) -> Tensor:
        coeff = 2.0 * self.iteration / STEPS - 1.0
        self.iteration += 1
        return self.reverse(x, coeff)


def trained(model: DANN, before_each_step: Callable[[], None] = lambda: None) -> list[dict[str, Tensor]]:
    """The gradients of each step of a short run."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []
    for _ in range(STEPS + 1):
        before_each_step()
        optimizer.zero_grad()
        logits, domain_logits = model(IMAGES)
        domains = functional.binary_cross_entropy_with_logits(domain_logits, DOMAINS)
        (functional.cross_entropy(logits, CLASSES) + domains).backward()
        steps.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return steps


def test_the_program_whose_coefficient_goes_from_minus_one_to_one_trains_as_the_tutorials() -> None:
    printed = trained(dann(Progressive(Cloned.apply)))

    function = trained(dann(Progressive(lambda x, coeff: gs.reverse_gradient(x, coeff, signed=True))))

    layer = gs.GradientReversal(signed=True)
    coefficients = iter(TUTORIALS_COEFFICIENTS)
    by_hand = trained(dann(layer), lambda: layer.set_coeff(next(coefficients)))

    model = dann(gs.GradientReversal(signed=True))
    schedule = gs.schedules.linear(-1.0, 1.0, signed=True)
    scheduler = gs.CoefficientScheduler(model, schedule, total_steps=STEPS)
    started = iter([False] + [True] * STEPS)
    scheduled = trained(model, lambda: scheduler.step() if next(started) else None)

    for run in (function, by_hand, scheduled):
        for step, (found, expected) in enumerate(zip(run, printed, strict=True)):
            for name in expected:
                assert torch.equal(found[name], expected[name]), (step, name)
