"""Domain losses against references written out here, and what they refuse."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from grl_surgery.errors import ShapeError, SurgeryError
from grl_surgery.training.losses import domain_loss, entropy_weights


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
