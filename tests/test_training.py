"""Losses, parameter groups and metrics against references written out here, and what they refuse."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import grl_surgery as gs
from grl_surgery.errors import PointNotFoundError, ShapeError, SurgeryError
from grl_surgery.heads import DomainClassifier, DomainHead, build_head
from grl_surgery.metrics import AdversarialMetrics, AdversarialReport, proxy_a_distance
from grl_surgery.reversal import GradientReversal, reversal_disabled
from grl_surgery.training import (
    check_partition,
    dann_lr,
    domain_loss,
    entropy_weights,
    param_groups,
)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


def softmax_loss_by_hand(logits: Tensor, domain: int) -> float:
    """Cross-entropy of one row, in plain Python."""
    rows = [value.item() for value in logits]
    return math.log(sum(math.exp(value) for value in rows)) - rows[domain]


# --------------------------------------------------------------------------------------------- domain loss


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 6), domains=st.integers(2, 5), seed=st.integers(0, 1000))
def test_the_loss_is_the_mean_cross_entropy(batch: int, domains: int, seed: int) -> None:
    torch.manual_seed(seed)
    logits, labels = torch.randn(batch, domains), torch.randint(domains, (batch,))
    each = [softmax_loss_by_hand(row, label) for row, label in zip(logits, labels.tolist(), strict=True)]
    assert domain_loss(logits, labels).item() == pytest.approx(sum(each) / batch, rel=1e-5)
    torch.testing.assert_close(domain_loss(logits, labels), F.cross_entropy(logits, labels))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_single_logit_is_a_binary_loss(shape: tuple[int, ...]) -> None:
    logits, labels = torch.randn(shape), torch.tensor([0, 1, 1, 0, 1, 0])
    signs = (2 * labels - 1) * logits.flatten()
    by_hand = sum(math.log(1 + math.exp(-value)) for value in signs.tolist()) / 6
    assert domain_loss(logits, labels).item() == pytest.approx(by_hand, rel=1e-5)
    assert domain_loss(logits, labels, binary=True).item() == domain_loss(logits, labels).item()


def test_one_logit_is_the_difference_of_two() -> None:
    logits, labels = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    single = logits[:, 1] - logits[:, 0]
    torch.testing.assert_close(domain_loss(single, labels), domain_loss(logits, labels))


@pytest.mark.parametrize("columns", [1, 3])
def test_a_map_is_the_mean_of_the_losses_at_its_positions(columns: int) -> None:
    logits, labels = torch.randn(4, columns, 2, 3), torch.tensor([0, 1, 1, 0])
    positions = [
        domain_loss(logits[:, :, row, column], labels)
        for row, column in itertools.product(range(2), range(3))
    ]
    torch.testing.assert_close(domain_loss(logits, labels), torch.stack(positions).mean())


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3), (4, 3, 2, 2)])
def test_one_integer_labels_the_whole_batch(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape)
    assert torch.equal(domain_loss(logits, 1), domain_loss(logits, torch.ones(4, dtype=torch.long)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_labels_may_be_any_kind_of_integer(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    assert torch.equal(domain_loss(logits, labels.to(dtype)), domain_loss(logits, labels))


@pytest.mark.parametrize("balance", [True, False])
def test_weights_make_a_weighted_mean_whatever_their_scale(balance: bool) -> None:
    logits, labels, weights = torch.randn(5, 3), torch.tensor([0, 0, 0, 1, 2]), torch.rand(5)
    each = torch.tensor([softmax_loss_by_hand(row, int(d)) for row, d in zip(logits, labels, strict=True)])
    if balance:
        means = [(weights * each)[labels == d].sum() / weights[labels == d].sum() for d in range(3)]
        expected = sum(means) / 3
    else:
        expected = (weights * each).sum() / weights.sum()
    for scale in (1.0, 10.0):
        loss = domain_loss(logits, labels, weights=scale * weights, balance=balance)
        torch.testing.assert_close(loss, expected)


def test_balance_counts_each_domain_the_same() -> None:
    logits, labels = torch.randn(9, 4), torch.tensor([0] * 6 + [1] * 2 + [3])
    expected = sum(F.cross_entropy(logits[labels == d], labels[labels == d]) for d in (0, 1, 3)) / 3
    torch.testing.assert_close(domain_loss(logits, labels, balance=True), expected)
    assert not torch.isclose(domain_loss(logits, labels), expected)


def test_a_sample_without_weight_does_not_count() -> None:
    logits, labels = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    weights = torch.tensor([1.0, 1.0, 0.0, 0.0])
    for balance in (True, False):
        loss = domain_loss(logits, labels, weights=weights, balance=balance)
        torch.testing.assert_close(loss, domain_loss(logits[:2], labels[:2]))


def test_the_gradient_of_every_kind_of_loss_is_right() -> None:
    labels, weights = torch.tensor([0, 1, 1]), torch.rand(3, dtype=torch.float64)
    for shape, balance in itertools.product([(3,), (3, 1), (3, 2), (3, 2, 1, 2)], [True, False]):
        logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x, b=balance: domain_loss(x, labels, weights=weights, balance=b), logits
        )


def test_weights_receive_no_gradient() -> None:
    weights = torch.rand(4, requires_grad=True)
    logits = torch.randn(4, 2, requires_grad=True)
    domain_loss(logits, torch.tensor([0, 1, 1, 0]), weights=weights).backward()
    assert weights.grad is None


def test_half_precision_logits_give_a_float32_loss() -> None:
    logits, labels = torch.randn(4, 2).bfloat16(), torch.tensor([0, 1, 1, 0])
    loss = domain_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, domain_loss(logits.float(), labels))


def test_the_loss_compiles_in_one_graph() -> None:
    logits, labels, weights = torch.randn(4, 2), torch.tensor([0, 1, 1, 0]), torch.rand(4)
    compiled = torch.compile(domain_loss, backend="eager", fullgraph=True)
    expected = domain_loss(logits, labels, weights=weights, balance=True)
    torch.testing.assert_close(compiled(logits, labels, weights=weights, balance=True), expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 5, 7]), r"domains\[2\] is 5, but the logits are of the domains 0 to 1"),
        (torch.tensor([0, 1, 1, -1]), r"domains\[3\] is -1"),
        (torch.tensor([0, 255, 1, 1], dtype=torch.uint8), r"domains\[1\] is 255"),
        (2, "the label of the batch is 2, but the logits are of the domains 0 to 1"),
        (-1, "the label of the batch is -1"),
        (torch.tensor([0.0, 1.0, 1.0, 0.0]), "domain labels are integers 0 to 1, got torch.float32"),
        ([0, 1, 1, 0], "domain labels are integers 0 to 1, got list"),
        (
            torch.tensor([0, 1, 1]),
            r"labels of shape \(3,\) for logits of shape \(4, 2\): expected one .* \(4,\)",
        ),
        (torch.tensor([[0], [1], [1], [0]]), r"labels of shape \(4, 1\)"),
    ],
)
def test_an_invalid_label_is_refused_by_its_value_and_place(labels: Any, message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        domain_loss(torch.randn(4, 2), labels)


def test_trusted_labels_are_not_looked_at() -> None:
    logits = torch.randn(4, 2, device="meta")  # reading a value from this device is an error
    labels = torch.zeros(4, dtype=torch.long, device="meta")
    assert domain_loss(logits, labels, balance=True, validate=False).shape == ()
    with pytest.raises(Exception, match=r"meta"):
        domain_loss(logits, labels)


@pytest.mark.parametrize("labels", [1, torch.tensor([0, 1, 1, 0])])
def test_labels_on_the_cpu_are_checked_without_touching_the_device(labels: Any) -> None:
    logits = torch.randn(4, 2, device="meta")
    assert domain_loss(logits, labels, balance=True).device.type == "meta"
    with pytest.raises(SurgeryError, match=r"but the logits are of the domains 0 to 1"):
        domain_loss(logits, labels + 1)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.tensor(1.0), ShapeError, r"domain logits of shape \(\), torch.float32: expected \(B, K\)"),
        (torch.ones(0, 2), ShapeError, r"domain logits of shape \(0, 2\).*not empty"),
        (torch.ones(4, 2, dtype=torch.long), ShapeError, "torch.int64: expected .* floating point"),
        (None, ShapeError, "domain_loss works on a tensor, got NoneType"),
        ((torch.ones(4, 2),), ShapeError, "domain_loss works on a tensor, got tuple"),
    ],
)
def test_what_are_no_logits_is_refused(logits: Any, error: type[SurgeryError], message: str) -> None:
    with pytest.raises(error, match=message):
        domain_loss(logits, 0)


def test_binary_and_softmax_are_not_confused() -> None:
    with pytest.raises(ShapeError, match=r"binary=True needs one logit per sample, .* got \(4, 2\)"):
        domain_loss(torch.randn(4, 2), 0, binary=True)
    with pytest.raises(SurgeryError, match=r"a softmax over the single logit of \(4, 1\) is constant"):
        domain_loss(torch.randn(4, 1), 0, binary=False)
    assert domain_loss(torch.randn(4, 2), 0, binary=False) > 0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"weights of shape \(3,\) for a batch of 4"),
        (torch.ones(4, 1), r"weights of shape \(4, 1\)"),
        (torch.tensor([1.0, 1.0, -0.5, 1.0]), r"weights must not be negative.*the least is -0\.5"),
        (torch.zeros(4), r"not all zero; .* their sum 0\.0"),
        (torch.tensor([1.0, 1.0, math.nan, 1.0]), "or nan"),
        (torch.tensor([1.0, 1.0, math.inf, 1.0]), "negative, infinite or nan.* their sum inf"),
        ([1.0] * 4, "for its weights, works on a tensor, got list"),
    ],
)
def test_impossible_weights_are_refused(weights: Any, message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        domain_loss(torch.randn(4, 2), 0, weights=weights)


# ------------------------------------------------------------------------------------------ entropy weights


def test_entropy_weights_are_those_of_the_authors_code_but_for_its_epsilon() -> None:
    logits, domains = torch.randn(10, 5), torch.tensor([0] * 6 + [1] * 4)
    p = logits.double().softmax(1).numpy()
    weight = 1.0 + np.exp(-(-p * np.log(p + 1e-5)).sum(axis=1))
    theirs = np.where(domains == 0, weight / weight[:6].sum(), weight / weight[6:].sum())
    # Theirs sum to 1 in each domain, ours to its number of samples.
    ours = entropy_weights(logits, domains).double().numpy() / np.where(domains == 0, 6, 4)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_entropy_weights_in_a_balanced_loss_are_the_loss_of_cdan_e() -> None:
    class_logits, logits, domains = torch.randn(6, 5), torch.randn(6, 2), torch.tensor([0, 0, 0, 1, 1, 1])
    p = class_logits.softmax(1)
    weight = 1.0 + torch.exp((p * p.log()).sum(1))
    source, target = weight * (domains == 0), weight * (domains == 1)
    weight = source / source.sum() + target / target.sum()
    theirs = (weight * F.cross_entropy(logits, domains, reduction="none")).sum() / weight.sum()
    for balance in (True, False):  # the same where the domains are equally large
        ours = domain_loss(logits, domains, weights=entropy_weights(class_logits, domains), balance=balance)
        torch.testing.assert_close(ours, theirs)


def test_entropy_weights_have_mean_one_in_each_domain_or_in_the_batch() -> None:
    logits, domains = torch.randn(10, 5), torch.tensor([0] * 6 + [3] * 4)
    per_domain, whole = entropy_weights(logits, domains), entropy_weights(logits)
    for mean in (per_domain[:6].mean(), per_domain[6:].mean(), whole.mean()):
        torch.testing.assert_close(mean, torch.tensor(1.0))
    ratio = entropy_weights(torch.tensor([[1000.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(ratio[0] / ratio[1], torch.tensor(2.0 / 1.5))


def test_entropy_weights_survive_a_class_that_is_ruled_out() -> None:
    weights = entropy_weights(torch.tensor([[0.0, -math.inf], [0.0, 0.0]]))
    torch.testing.assert_close(weights[0] / weights[1], torch.tensor(2.0 / 1.5))


def test_entropy_weights_carry_no_gradient_and_are_float32_for_half_precision() -> None:
    logits = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    weights = entropy_weights(logits)
    assert not weights.requires_grad
    assert weights.dtype == torch.float32


def test_entropy_weights_refuse_other_shapes() -> None:
    with pytest.raises(
        ShapeError, match=r"class logits of shape \(4,\), torch.float32: expected \(B, classes\)"
    ):
        entropy_weights(torch.randn(4))
    with pytest.raises(ShapeError, match=r"domain labels of shape \(4, 1\): expected one per sample, \(4,\)"):
        entropy_weights(torch.randn(4, 3), torch.zeros(4, 1, dtype=torch.long))


# ---------------------------------------------------------------------------------------- parameter groups


def model_with_heads() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "stem": nn.Linear(4, 4),
            "fc": nn.Linear(4, 3),
            "shallow": DomainHead(DomainClassifier(4, hidden=8, depth=1)),
            "deep": build_head((2, 4), num_classes=3, condition="randomized", hidden=8),
        }
    )


def named(groups: list[dict[str, Any]], model: nn.Module) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def test_heads_are_new_and_the_rest_is_backbone() -> None:
    model = model_with_heads()
    groups = param_groups(model, lr=0.01)
    found = named(groups, model)
    assert found["backbone"] == {"stem.weight", "stem.bias", "fc.weight", "fc.bias"}
    assert found["new"] == {name for name, _ in model.named_parameters()} - found["backbone"]
    assert [group["lr"] for group in groups] == [0.01, 0.1]
    assert param_groups(model, lr=0.01, new_multiplier=2.0)[1]["lr"] == 0.02


@pytest.mark.parametrize("new", ["fc", ["fc"], ["fc.weight", "fc.bias"], ["fc", "fc.weight"]])
def test_named_layers_are_new_as_well(new: str | list[str]) -> None:
    model = model_with_heads()
    found = named(param_groups(model, lr=0.01, new=new), model)
    assert found["backbone"] == {"stem.weight", "stem.bias"}


def test_a_name_does_not_stand_for_another_that_begins_alike() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)})
    assert named(param_groups(model, lr=1.0, new="fc"), model)["new"] == {"fc.weight", "fc.bias"}


def test_the_groups_train_with_an_optimizer() -> None:
    model = model_with_heads()
    optimizer = torch.optim.SGD(param_groups(model, lr=0.5), momentum=0.9)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    moved = {
        name: (old - new).mean().item()
        for old, (name, new) in zip(before, model.named_parameters(), strict=True)
    }
    for name, step in moved.items():
        assert step == pytest.approx(5.0 if name.startswith(("shallow", "deep")) else 0.5, rel=1e-5)


def test_frozen_parameters_are_left_out_and_an_empty_group_too() -> None:
    model = model_with_heads()
    model["stem"].requires_grad_(False)
    assert named(param_groups(model, lr=0.01), model)["backbone"] == {"fc.weight", "fc.bias"}
    model["fc"].requires_grad_(False)
    assert [group["name"] for group in param_groups(model, lr=0.01)] == ["new"]


def test_a_shared_parameter_is_there_once_and_the_backbones_unless_named() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 2)})
    model["tied"] = nn.ModuleList([model["fc"]])
    model["domain"] = DomainHead(model["fc"])
    model["other"] = DomainHead(nn.Linear(4, 2))
    groups = param_groups(model, lr=0.01)
    assert [len(group["params"]) for group in groups] == [2, 2]
    assert named(groups, model)["backbone"] == {"fc.weight", "fc.bias"}
    assert len(param_groups(model, lr=0.01, new="tied")[0]["params"]) == 4


def test_a_spliced_reversal_alone_makes_nothing_new() -> None:
    model = nn.ModuleDict({"reversal": GradientReversal(), "stem": nn.Linear(4, 4)})
    with pytest.raises(SurgeryError, match=r"there is no domain head in this ModuleDict and no new= layer"):
        param_groups(model, lr=0.01)


def test_an_unknown_new_layer_is_refused_with_near_names() -> None:
    with pytest.raises(PointNotFoundError, match=r"(?s)new='fcc' names no module.*nearest: fc"):
        param_groups(model_with_heads(), lr=0.01, new="fcc")
    with pytest.raises(PointNotFoundError, match=r"new='' names no module"):
        param_groups(model_with_heads(), lr=0.01, new="")


@pytest.mark.parametrize("lr", [0.0, -0.1, math.nan, math.inf])
def test_an_impossible_learning_rate_is_refused(lr: float) -> None:
    with pytest.raises(SurgeryError, match=r"lr is .* must be a positive finite number"):
        param_groups(model_with_heads(), lr=lr)
    with pytest.raises(SurgeryError, match=r"new_multiplier is"):
        param_groups(model_with_heads(), lr=0.1, new_multiplier=lr)


def test_a_model_that_is_frozen_altogether_is_refused() -> None:
    with pytest.raises(SurgeryError, match=r"none is trainable"):
        param_groups(model_with_heads().requires_grad_(False), lr=0.01)


def test_groups_that_are_no_partition_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    weight, bias, frozen, _ = model.parameters()
    check_partition([[weight], [bias]], model)
    with pytest.raises(SurgeryError, match=r"0.bias is in 0 groups"):
        check_partition([[weight]], model)
    with pytest.raises(SurgeryError, match=r"0.weight is in 2 groups"):
        check_partition([[weight, bias], [weight]], model)
    for stranger in (frozen, nn.Parameter(torch.ones(1))):
        with pytest.raises(SurgeryError, match=r"frozen or not the model's"):
            check_partition([[weight, bias, stranger]], model)


# ------------------------------------------------------------------------------------------- learning rate


@given(p=st.floats(0.0, 1.0))
def test_dann_lr_is_the_formula_of_the_paper(p: float) -> None:
    assert dann_lr(p) == pytest.approx(math.exp(math.log(0.01) - 0.75 * math.log1p(10.0 * p)), rel=1e-12)
    assert dann_lr(p, 0.1, 5.0, 0.5) == pytest.approx(0.1 / math.sqrt(1.0 + 5.0 * p), rel=1e-12)


def test_dann_lr_refuses_progress_outside_its_range() -> None:
    with pytest.raises(SurgeryError, match=r"training progress is 1\.5, which is outside \[0, 1\]"):
        dann_lr(1.5)


# -------------------------------------------------------------------------------------------------- metrics


def features_and_domains(apart: float, each: int = 100) -> tuple[Tensor, Tensor]:
    domains = torch.arange(2).repeat_interleave(each)
    return torch.randn(2 * each, 4) + apart * domains[:, None], domains


def linear_head(weight: float = 0.0, coeff: float = 1.0) -> DomainHead:
    head = DomainHead(DomainClassifier(4, depth=0), coeff=coeff)
    with torch.no_grad():
        head.classifier.logits.weight.copy_(weight * torch.tensor([[-1.0], [1.0]]))
        head.classifier.logits.bias.zero_()
    return head


def one_step(metrics: AdversarialMetrics, head: nn.Module, features: Tensor, domains: Tensor) -> Tensor:
    head.zero_grad()
    features = features.detach().requires_grad_()
    logits = head(features)
    domain_loss(logits, domains).backward()
    metrics.update(logits, domains)
    return features.grad


def test_the_report_has_the_numbers_worked_out_by_hand() -> None:
    head = DomainHead(DomainClassifier(4, 3, hidden=8), coeff=0.5).eval()
    features, domains = torch.randn(10, 4), torch.tensor([0] * 6 + [2] * 4)
    with AdversarialMetrics(head) as metrics:
        leaving = one_step(metrics, head, features, domains)
        report = metrics.report()
    logits = head(features)
    right = logits.argmax(1) == domains
    means = [F.cross_entropy(logits[domains == d], domains[domains == d]).item() for d in (0, 2)]
    gradient = torch.cat([p.grad.flatten() for p in head.parameters()])
    assert report.samples == {0: 6, 2: 4}
    assert report.num_domains == 3
    assert report.coeff == 0.5
    assert report.accuracy == pytest.approx({d: right[domains == d].float().mean().item() for d in (0, 2)})
    assert report.loss == pytest.approx(sum(means) / 2, rel=1e-5)
    assert report.chance_loss == math.log(3)
    assert report.head_gradient == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert report.splice_gradient == pytest.approx(leaving.norm().item(), rel=1e-5)
    assert report.balanced_accuracy == pytest.approx(sum(report.accuracy.values()) / 2)


def test_updates_add_up_and_norms_are_means_over_the_steps() -> None:
    head = DomainHead(DomainClassifier(4, hidden=8)).eval()
    with AdversarialMetrics(head) as metrics:
        parts = []
        for size in (3, 5):
            x, domains = torch.randn(2 * size, 4), torch.tensor([0, 1] * size)
            norm = one_step(metrics, head, x, domains).norm().item()
            parts.append(
                (x, domains, norm, torch.cat([p.grad.flatten() for p in head.parameters()]).norm().item())
            )
        report = metrics.report()
    x, domains = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    assert report.samples == {0: 8, 1: 8}
    assert report.loss == pytest.approx(F.cross_entropy(head(x), domains).item(), rel=1e-5)
    assert report.splice_gradient == pytest.approx((parts[0][2] + parts[1][2]) / 2, rel=1e-5)
    assert report.head_gradient == pytest.approx((parts[0][3] + parts[1][3]) / 2, rel=1e-5)


def test_the_gradient_at_the_splice_point_is_that_of_the_domain_loss_alone() -> None:
    head = linear_head(0.3)
    features, domains = features_and_domains(1.0)
    features.requires_grad_()
    with AdversarialMetrics(head) as metrics:
        logits = head(features)
        (domain_loss(logits, domains) + 5.0 * features.sum()).backward()
        metrics.update(logits, domains)
        report = metrics.report()
    domain_only = torch.autograd.grad(domain_loss(head(features), domains), features)[0]
    assert report.splice_gradient == pytest.approx(domain_only.norm().item(), rel=1e-5)


def test_a_coefficient_set_after_the_forward_does_not_count_yet() -> None:
    head = linear_head(0.3, coeff=0.5)
    features, domains = features_and_domains(1.0)
    with AdversarialMetrics(head) as metrics:
        logits = head(features.requires_grad_())
        head.reversal.set_coeff(0.0)
        domain_loss(logits, domains).backward()
        metrics.update(logits, domains)
        report = metrics.report()
    assert report.splice_gradient == pytest.approx(features.grad.norm().item(), rel=1e-5)
    assert report.coeff == 0.0


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 2, 2), (4, 2, 2, 2)])
def test_binary_logits_and_maps_are_counted_by_their_positions(shape: tuple[int, ...]) -> None:
    logits, domains = torch.randn(shape), torch.tensor([0, 1, 1, 0])
    metrics = AdversarialMetrics(DomainHead(nn.Linear(4, 2)))
    metrics.update(logits, domains)
    report = metrics.report()
    said = logits.argmax(1) if logits.dim() > 1 and shape[1] == 2 else (logits > 0).long()
    for domain in (0, 1):
        right = (said[domains == domain] == domain).float().mean().item()
        assert report.accuracy[domain] == pytest.approx(right)
    assert report.loss == pytest.approx(domain_loss(logits, domains, balance=True).item(), rel=1e-5)


def verdict_of(
    head: DomainHead, features: Tensor, domains: Tensor, a_distance: float | None = None
) -> AdversarialReport:
    with AdversarialMetrics(head) as metrics:
        one_step(metrics, head, features, domains)
        return metrics.report(a_distance)


def test_verdict_separable_where_the_head_tells_the_domains_apart() -> None:
    features, domains = features_and_domains(3.0)
    report = verdict_of(linear_head(1.0), features - 1.5, domains)
    assert report.verdict == "separable"
    assert report.balanced_accuracy > 0.9
    late = verdict_of(linear_head(1.0, coeff=0.0), features - 1.5, domains)
    assert late.verdict == "separable"
    assert "coefficient at 0 as yet" in late.explanation


def test_verdict_confused_where_the_head_was_above_chance_before() -> None:
    head = linear_head(1.0)
    apart, domains = features_and_domains(3.0)
    alike, _ = features_and_domains(0.0)
    with AdversarialMetrics(head) as metrics:
        one_step(metrics, head, apart - 1.5, domains)
        metrics.reset()
        one_step(metrics, head, 0.1 * alike, domains)
        report = metrics.report()
    assert report.verdict == "confused"
    assert "was above chance before" in report.explanation
    assert sum(report.samples.values()) == 200


def test_verdict_undecided_where_the_head_never_was_above_chance() -> None:
    features, domains = features_and_domains(0.0)
    report = verdict_of(linear_head(0.1), features, domains)
    assert report.verdict == "undecided"
    assert "proxy_a_distance" in report.explanation


def test_the_proxy_distance_settles_what_a_head_at_chance_cannot() -> None:
    apart, domains = features_and_domains(3.0)
    head = linear_head(0.0)
    with torch.no_grad():  # sees only directions in which the domains do not differ
        head.classifier.logits.weight.copy_(0.1 * torch.tensor([[1.0, -1, 1, -1], [-1, 1, -1, 1]]))
    distance = proxy_a_distance(apart[domains == 0], apart[domains == 1])
    assert verdict_of(head, apart, domains).verdict == "undecided"
    assert verdict_of(head, apart, domains, distance).verdict == "weak head"
    alike = torch.randn(2000, 4)
    distance = proxy_a_distance(alike[:1000], alike[1000:])
    assert verdict_of(head, apart, domains, distance).verdict == "confused"


def test_verdict_dead_head_for_a_softmax_over_one_logit() -> None:
    features, domains = features_and_domains(3.0)
    peer = DomainHead(nn.Sequential(nn.Linear(4, 1), nn.Softmax(dim=1)))
    report = verdict_of(peer, features, domains)
    assert report.verdict == "dead head"
    assert report.head_gradient == 0.0


def test_verdict_dead_head_where_its_parameters_are_frozen() -> None:
    features, domains = features_and_domains(3.0)
    assert verdict_of(linear_head(0.5).requires_grad_(False), features, domains).verdict == "dead head"


def test_verdict_cut_off_where_the_head_learns_and_sends_nothing_back() -> None:
    features, domains = features_and_domains(3.0)
    report = verdict_of(linear_head(0.0), features, domains)  # weights of zero send zero back
    assert report.verdict == "cut off"
    assert report.splice_gradient == 0.0


def test_verdict_fooled_for_a_head_that_is_confidently_wrong() -> None:
    features, domains = features_and_domains(3.0)
    assert verdict_of(linear_head(-1.0), features - 1.5, domains).verdict == "fooled"


def test_verdict_diverged_for_a_loss_that_is_no_number() -> None:
    features, domains = features_and_domains(3.0)
    assert verdict_of(linear_head(math.nan), features, domains).verdict == "diverged"


def test_one_domain_alone_or_a_disabled_reversal_leave_it_undecided() -> None:
    features, _ = features_and_domains(3.0)
    report = verdict_of(linear_head(0.5), features, torch.zeros(200, dtype=torch.long))
    assert report.verdict == "undecided"
    assert "only domain 0 was seen" in report.explanation
    head = linear_head(0.5)
    with reversal_disabled(head):
        report = verdict_of(head, *features_and_domains(3.0))
    assert "the reversal is disabled" in report.explanation


def test_an_adversarial_run_that_confuses_the_features_is_told_from_one_that_does_not_train() -> None:
    features, domains = features_and_domains(2.0)
    shift = nn.Parameter(torch.zeros(4))
    head = DomainHead(DomainClassifier(4, depth=0))
    # The decay damps the circling of two players; without it both turn around the solution for long.
    player = {"params": list(head.parameters()), "lr": 1.0, "weight_decay": 0.1}
    optimizer = torch.optim.SGD([{"params": [shift], "lr": 0.5}, player])
    verdicts = []
    with AdversarialMetrics(head) as metrics:
        for step in range(200):
            head.reversal.set_coeff(0.0 if step < 50 else 1.0)
            logits = head(features + shift * domains[:, None])
            loss = domain_loss(logits, domains)
            optimizer.zero_grad()
            loss.backward()
            metrics.update(logits, domains)
            optimizer.step()
            if step % 50 == 49:
                verdicts.append(metrics.report().verdict)
                metrics.reset()
    assert verdicts[0] == "separable"
    assert verdicts[-1] == "confused"


def test_the_hook_changes_no_gradient_and_is_gone_afterwards() -> None:
    head = DomainHead(DomainClassifier(4, hidden=8)).eval()
    features, domains = features_and_domains(1.0)

    def gradient() -> list[Tensor]:
        x = features.clone().requires_grad_()
        return list(torch.autograd.grad(domain_loss(head(x), domains), [x, *head.parameters()]))

    without = gradient()
    with AdversarialMetrics(head):
        assert head.reversal._forward_hooks
        watched = gradient()
    assert not head.reversal._forward_hooks
    assert all(torch.equal(one, other) for one, other in zip(without, watched, strict=True))


def test_a_compiled_head_is_measured_except_at_its_splice_point() -> None:
    head = DomainHead(DomainClassifier(4, hidden=8))
    features, domains = features_and_domains(1.0)
    with AdversarialMetrics(head) as metrics:
        compiled = torch.compile(head, backend="eager", fullgraph=True)
        one_step(metrics, compiled, features, domains)
        report = metrics.report()
    assert report.splice_gradient is None
    assert report.head_gradient > 0
    assert "at the splice point not seen" in str(report)


def test_a_report_reads_as_text_and_as_plain_types() -> None:
    features, domains = features_and_domains(3.0)
    report = verdict_of(linear_head(1.0), features - 1.5, domains, a_distance=1.5)
    text = str(report)
    assert text.startswith("verdict           separable: the head tells the domains apart")
    assert "(chance ln 2 = 0.6931)" in text
    assert "proxy A-distance  1.500" in text
    assert report.to_dict()["samples"] == {0: 100, 1: 100}


def test_a_head_is_chosen_by_name() -> None:
    model = model_with_heads()
    with pytest.raises(
        SurgeryError, match=r"(?s)there are 2 domain heads: say which.*nearest: shallow, deep"
    ):
        AdversarialMetrics(model)
    with pytest.raises(PointNotFoundError, match=r"(?s)no domain head 'sallow'.*nearest: shallow"):
        AdversarialMetrics(model, head="sallow")
    with pytest.raises(SurgeryError, match=r"no domain head in this Linear"):
        AdversarialMetrics(nn.Linear(2, 2))
    AdversarialMetrics(model, head="deep").close()


def test_metrics_refuse_what_they_cannot_report() -> None:
    metrics = AdversarialMetrics(DomainHead(nn.Linear(4, 2)))
    with pytest.raises(SurgeryError, match=r"update\(\) was not called since the start"):
        metrics.report()
    metrics.update(torch.randn(4, 2), 0)
    with pytest.raises(SurgeryError, match=r"logits of 3 domains after logits of 2"):
        metrics.update(torch.randn(4, 3), 0)
    with pytest.raises(SurgeryError, match=r"domains\[0\] is 2"):
        metrics.update(torch.randn(1, 2), torch.tensor([2]))
    assert metrics.report().samples == {0: 4}


# ---------------------------------------------------------------------------------------- proxy A-distance


def normal_cdf(x: float) -> float:
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 2.0, 8.0])
def test_the_distance_of_two_shifted_normal_clouds_is_that_of_the_bayes_classifier(shift: float) -> None:
    one, other = torch.randn(4000, 3), torch.randn(4000, 3) + torch.tensor([shift, 0.0, 0.0])
    error = normal_cdf(-shift / 2)
    assert proxy_a_distance(one, other) == pytest.approx(2.0 * (1.0 - 2.0 * error), abs=0.12)


def test_the_distance_is_measured_on_features_that_were_not_trained_on() -> None:
    # 20 samples in 200 dimensions are always separable, so on the training half it would be 2.
    distances = [proxy_a_distance(torch.randn(20, 200), torch.randn(20, 200), seed=s) for s in range(20)]
    assert abs(sum(distances) / 20) < 0.4


def test_unequal_numbers_do_not_change_the_distance() -> None:
    one, other = torch.randn(6000, 3), torch.randn(600, 3) + torch.tensor([1.0, 0.0, 0.0])
    assert proxy_a_distance(one, other) == pytest.approx(2.0 - 4.0 * normal_cdf(-0.5), abs=0.15)


def test_the_error_is_the_mean_of_both_domains_errors() -> None:
    # Half of the few target samples lie where all of the source does: error 0 and 1/2, in the mean 1/4.
    source, target = torch.zeros(3000, 1), 10.0 * (torch.arange(300) % 2).float()[:, None]
    assert proxy_a_distance(source, target) == pytest.approx(1.0, abs=0.15)


def test_the_distance_does_not_depend_on_scale_offset_or_a_constant_feature() -> None:
    one, other = torch.randn(400, 3), torch.randn(400, 3) + 0.7
    expected = proxy_a_distance(one, other)
    scale = torch.tensor([1.0, 1000.0, 1e-3])
    assert proxy_a_distance(one * scale + 50.0, other * scale + 50.0) == pytest.approx(expected, abs=0.03)
    padded = (F.pad(x, (0, 1), value=3.0) for x in (one, other))
    assert proxy_a_distance(*padded) == pytest.approx(expected, abs=0.03)


def test_the_same_seed_gives_the_same_distance_and_leaves_the_global_generator_alone() -> None:
    one, other = torch.randn(50, 3), torch.randn(50, 3) + 0.5
    state = torch.get_rng_state()
    assert proxy_a_distance(one, other, seed=3) == proxy_a_distance(one, other, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({proxy_a_distance(one, other, seed=s) for s in range(6)}) > 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_distance_can_be_measured_in_any_mode(context: Callable[[], Any]) -> None:
    with context():
        one, other = torch.randn(50, 3).double(), torch.randn(50, 3).double() + 10.0
        assert proxy_a_distance(one, other) == 2.0
    assert proxy_a_distance(one, other) == 2.0


@pytest.mark.parametrize(
    ("source", "target", "error", "message"),
    [
        (
            torch.ones(3, 2),
            torch.ones(9, 2),
            ShapeError,
            r"shapes \(3, 2\) and \(9, 2\): expected .* at least 4",
        ),
        (torch.ones(9, 2), torch.ones(9, 3), ShapeError, r"\(9, 2\) and \(9, 3\)"),
        (torch.ones(9, 2, 1, 1), torch.ones(9, 2, 1, 1), ShapeError, r"\(9, 2, 1, 1\)"),
        (None, torch.ones(9, 2), ShapeError, "works on a tensor, got NoneType"),
        (
            torch.ones(9, 2),
            torch.full((9, 2), math.inf),
            SurgeryError,
            "the target features contain inf or nan",
        ),
    ],
)
def test_features_that_cannot_be_compared_are_refused(
    source: Any, target: Any, error: type[SurgeryError], message: str
) -> None:
    with pytest.raises(error, match=message):
        proxy_a_distance(source, target)


# ------------------------------------------------------------------------------------- labels at places


@pytest.mark.parametrize("places", [(), (7,), (4, 3), (2, 4, 3)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_labels_at_every_place_give_torchs_cross_entropy(
    places: tuple[int, ...], smoothing: float, weighted: bool, ignored: bool
) -> None:
    logits = torch.randn(5, 3, *places, requires_grad=True)
    labels = torch.randint(3, (5, *places))
    if ignored:
        labels[torch.rand(labels.shape) < 0.3] = -100
        labels[0] = -100
        labels[1] = 2
    options = {"label_smoothing": smoothing, "ignore_index": -100 if ignored else None}
    factors = torch.tensor([0.5, 2.0, 1.0]) if weighted else None
    loss = domain_loss(logits, labels, class_weights=factors, **options)
    expected = F.cross_entropy(logits, labels, factors, label_smoothing=smoothing, ignore_index=-100)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("places", [(), (7,), (4, 3)])
def test_one_logit_at_every_place_gives_torchs_binary_loss(places: tuple[int, ...]) -> None:
    logits = torch.randn(5, 1, *places)
    labels = torch.randint(2, (5, *places))
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
    torch.testing.assert_close(domain_loss(logits, labels), expected)
    smooth = F.binary_cross_entropy_with_logits(logits[:, 0], labels * 0.8 + 0.1)
    torch.testing.assert_close(domain_loss(logits, labels, label_smoothing=0.2), smooth)
    soft = torch.rand(5, 1, *places)
    expected = F.binary_cross_entropy_with_logits(logits, soft)
    torch.testing.assert_close(domain_loss(logits, soft), expected)


@pytest.mark.parametrize("places", [(), (7,), (4, 3)])
def test_soft_labels_give_torchs_cross_entropy(places: tuple[int, ...]) -> None:
    logits, soft = torch.randn(5, 3, *places), torch.randn(5, 3, *places).softmax(1)
    torch.testing.assert_close(domain_loss(logits, soft), F.cross_entropy(logits, soft))
    each = F.cross_entropy(logits, soft, reduction="none").reshape(5, -1).mean(1)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.5])
    torch.testing.assert_close(domain_loss(logits, soft, weights=weights), (weights * each).sum() / 4)


def test_a_balanced_loss_at_places_is_the_mean_of_the_domains_means_over_their_places() -> None:
    logits, labels = (
        torch.randn(3, 2, 6),
        torch.tensor([[0, 0, 0, 0, 1, -1], [0, 0, 0, 0, 0, 0], [1, 1, -1, 0, 0, 0]]),
    )
    each = F.cross_entropy(logits, labels.clamp_min(0), reduction="none")
    expected = (each[labels == 0].mean() + each[labels == 1].mean()) / 2
    torch.testing.assert_close(domain_loss(logits, labels, balance=True, ignore_index=-1), expected)


def test_where_no_place_counts_the_loss_is_zero_and_so_is_the_gradient() -> None:
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss = domain_loss(logits, torch.full((2, 4), -1), ignore_index=-1)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (
            torch.tensor([[0, 1, 5], [0, 0, 0]]),
            {},
            r"domains\[0, 2\] is 5, but the logits are of the domains 0 to 1",
        ),
        (
            torch.zeros(2, 4).long(),
            {},
            r"expected one label per sample, \(2,\), or one for each place, \(2, 3\)",
        ),
        (
            torch.zeros(2, 3),
            {},
            "domain labels are integers 0 to 1, got torch.float32",
        ),
        (
            torch.ones(2, 3, 3),
            {},
            r"probabilities have the shape of the logits, \(2, 2, 3\), not \(2, 3, 3\)",
        ),
        (torch.full((2, 2, 3), 1.5), {}, "soft labels are probabilities, got values from 1.5 to 1.5"),
        (torch.ones(2, 2, 3), {"balance": True}, "which soft labels do not say"),
        (torch.zeros(2).long(), {"label_smoothing": 1.0}, r"label_smoothing is 1.0, but must be in \[0, 1\)"),
        (
            torch.zeros(2).long(),
            {"class_weights": torch.ones(3)},
            r"class_weights of shape \(3,\): expected .* \(2,\)",
        ),
    ],
)
def test_labels_at_places_that_do_not_fit_are_refused(
    labels: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SurgeryError, match=message):
        domain_loss(torch.randn(2, 2, 3), labels, **options)


# ------------------------------------------------------------------------------------------- train mode


def with_norms() -> nn.Module:
    network = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    return gs.attach_domain_head(network, "2", norm="batch", hidden=8, example_inputs=torch.randn(8, 6))


def counts(m: nn.Module) -> tuple[int, int]:
    """Batches seen by the network's own batch norm, and by the first one of the head."""
    return int(m.get_buffer("1.num_batches_tracked")), int(
        m.get_buffer("domain.classifier.hidden.0.norm.num_batches_tracked")
    )


def test_train_mode_can_leave_the_statistics_of_the_network_alone_and_not_those_of_the_head() -> None:
    m = with_norms().eval()
    gs.set_train_mode(m, freeze_batch_norm=True)
    assert m.training
    m(torch.randn(8, 6))
    assert counts(m) == (0, 1)
    gs.set_train_mode(m)
    m(torch.randn(8, 6))
    assert counts(m) == (1, 2)


def test_frozen_batch_norms_stay_so_whatever_a_trainer_calls() -> None:
    m = with_norms()
    with gs.batch_norm_frozen(m):
        for _ in range(2):
            m.train()
            m(torch.randn(8, 6))
    assert counts(m) == (0, 2)
    assert m.get_submodule("1").training
    m(torch.randn(8, 6))
    assert counts(m) == (1, 3)


def test_the_learning_rate_of_dann_goes_straight_into_lambda_lr() -> None:
    slow, fast = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [slow], "lr": 0.01}, {"params": [fast], "lr": 0.1}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, dann_lr(total_steps=4))
    for step in range(6):  # two steps beyond the last
        factor = (1 + 10 * min(step / 4, 1.0)) ** -0.75
        assert scheduler.get_last_lr() == pytest.approx([0.01 * factor, 0.1 * factor])
        optimizer.step()
        scheduler.step()
    resumed = torch.optim.lr_scheduler.LambdaLR(optimizer, dann_lr(total_steps=4))
    resumed.load_state_dict(pickle.loads(pickle.dumps(scheduler.state_dict())))


@pytest.mark.parametrize("arguments", [{}, {"p": 0.5, "total_steps": 4}, {"lr0": 0.1, "total_steps": 4}])
def test_dann_lr_takes_either_progress_or_a_number_of_steps(arguments: dict[str, Any]) -> None:
    with pytest.raises(SurgeryError, match="takes the progress p, or total_steps"):
        dann_lr(**arguments)
