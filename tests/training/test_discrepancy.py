"""Margin disparity and Wasserstein heads: the losses by their formulas, and what reaches whom."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_networks import Net, image
from torch import Tensor, nn
from torch.nn import functional as F

import grl_surgery as gs


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


DOMAINS = torch.tensor([0, 1, 0, 1, 1])


def four() -> Tensor:
    return torch.cat([image(), image() * 0.5 + 1.0])


HALF = torch.tensor([0, 0, 1, 1])


# --------------------------------------------------------------------------------------- margin disparity


def test_the_margin_disparity_is_the_formula_of_the_paper() -> None:
    logits, classes = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    probability = logits.softmax(1)
    predicted = classes.argmax(1)
    agree = [-probability[n, predicted[n]].log() for n in range(5) if DOMAINS[n] == 0]
    disagree = [-(1 - probability[n, predicted[n]]).log() for n in range(5) if DOMAINS[n] == 1]
    expected = 3.0 * sum(agree) / 2 + sum(disagree) / 3
    loss = gs.mdd_loss(logits, classes, DOMAINS, margin=3.0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits, retain_graph=True)[0], torch.autograd.grad(expected, logits)[0]
    )
    assert torch.autograd.grad(loss, classes, allow_unused=True) == (None,)


def test_batches_of_one_domain_each_add_up_to_the_loss_of_both() -> None:
    logits, classes, scores = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 1)
    split = gs.mdd_loss(logits[:2], classes[:2], 0) + gs.mdd_loss(logits[2:], classes[2:], 1)
    torch.testing.assert_close(split, gs.mdd_loss(logits, classes, HALF))
    split = gs.wasserstein_loss(scores[:2], 0) + gs.wasserstein_loss(scores[2:], 1)
    torch.testing.assert_close(split, gs.wasserstein_loss(scores, HALF))


def test_the_margin_disparity_keeps_its_digits_where_the_head_is_sure() -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    loss = gs.mdd_loss(logits, torch.eye(1, 3), 1)
    exact = -(
        torch.tensor(2.0, dtype=torch.float64) / (torch.tensor(60.0, dtype=torch.float64).exp() + 2)
    ).log()
    torch.testing.assert_close(loss.double(), exact)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_a_margin_head_has_the_classes_of_the_task_and_is_proved_and_saved(tmp_path) -> None:
    model = Net().eval()
    m = gs.attach_domain_head(
        model, "mean", kind="mdd", num_classes=3, hidden=8, dropout=0.0, example_inputs=image()
    ).eval()
    output, logits = m(four())
    assert logits.shape == output.shape == (4, 3)
    assert gs.verify_flip(m, model, four()).ok
    path = gs.export(m, tmp_path / "m.safetensors", image())
    assert torch.equal(gs.load(path, model=Net)(four())[1], logits)

    weight = model.stem.weight
    (found,) = torch.autograd.grad(gs.mdd_loss(logits, output, HALF), weight)
    feature = model.stage2(model.stage1(F.relu(model.stem(four())))).mean((2, 3))
    plain = gs.mdd_loss(m.domain.classifier(feature), output, HALF)
    torch.testing.assert_close(found, -torch.autograd.grad(plain, weight)[0])


# ------------------------------------------------------------------------------------------------- critic


def critic() -> tuple[nn.Module, nn.Module]:
    model = Net()
    m = gs.attach_domain_head(model, "mean", kind="wdgrl", hidden=8, example_inputs=image())
    return model, m


def test_a_critic_has_one_score_no_dropout_and_is_proved_and_saved(tmp_path) -> None:
    model, m = critic()
    scores = m(four())[1]
    assert scores.shape == (4, 1)
    assert {part.p for part in m.domain.modules() if isinstance(part, nn.Dropout)} == {0.0}
    assert gs.verify_flip(m, model, four()).ok
    path = gs.export(m, tmp_path / "m.safetensors", image())
    assert torch.equal(gs.load(path, model=Net)(four())[1], scores)
    expected = scores[2:].mean() - scores[:2].mean()
    torch.testing.assert_close(gs.wasserstein_loss(scores, HALF), expected)


def test_the_penalty_is_the_formula_of_the_paper_at_the_features_and_between_them() -> None:
    _, m = critic()
    with torch.no_grad():  # slopes that differ from place to place
        for parameter in m.domain.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    penalty = gs.GradientPenalty(m.domain)
    features = []
    m.domain.classifier.register_forward_hook(lambda _, args, __: features.append(args[0].detach()))
    m(four())
    torch.manual_seed(3)
    found = penalty(HALF)
    points = features[-1]  # those of the penalty's own call of the critic
    assert torch.equal(points[:4], features[0])
    for place in (4, 5):  # each of the others is on the line between one of the source and one of the target
        sides = [
            (points[place] - features[0][s]).norm()
            + (points[place] - features[0][t]).norm()
            - (features[0][s] - features[0][t]).norm()
            for s in (0, 1)
            for t in (2, 3)
        ]
        assert min(sides) < 1e-4
    slopes = [
        torch.func.grad(lambda point: m.domain.classifier(point[None]).sum())(point).norm()
        for point in points
    ]
    torch.testing.assert_close(found, sum((slope - 1) ** 2 for slope in slopes) / 6)


def test_the_penalty_trains_the_critic_and_not_the_network() -> None:
    model, m = critic()
    penalty = gs.GradientPenalty(m.domain)
    m(four())
    penalty(HALF).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert m.domain.classifier.logits.weight.grad.abs().sum() > 0


def test_a_critic_under_penalty_measures_the_distance_of_the_domains() -> None:
    head = gs.DomainHead(gs.DomainClassifier(2, hidden=32, dropout=0.0, binary=True), binary=True)
    x = torch.randn(128, 2) * 0.1
    domains = torch.arange(128) % 2
    x[domains == 1] += torch.tensor([3.0, 4.0])  # the domains are 5 apart
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    penalty = gs.GradientPenalty(head)
    for _ in range(300):
        loss = gs.wasserstein_loss(head(x), domains) + 10.0 * penalty(domains)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # A slope s everywhere gives the objective 5 s - 10 (s - 1)^2, which is largest at s = 1.25.
    assert -gs.wasserstein_loss(head(x), domains).item() == pytest.approx(5.0 * 1.25, abs=0.2)


def test_a_network_with_a_penalty_is_copied_pickled_proved_and_exported(tmp_path) -> None:
    model, m = critic()
    penalty = gs.GradientPenalty(m.domain)
    m(four())
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(twin(four())[1], m(four())[1])
    assert gs.verify_flip(m, model, four()).ok
    for file in ("m.safetensors", "m.pt2", "m.onnx"):
        gs.export(m, tmp_path / file, image())
    penalty.remove()
    with pytest.raises(gs.SurgeryError, match="has not run"):
        penalty(HALF)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mdd"}, r"needs its number of classes\n.*num_classes=10"),
        ({"kind": "mdd", "num_classes": 1}, "num_classes"),
        ({"kind": "mdd", "num_classes": 3, "num_domains": 3}, "num_domains=3 is for kind='dann'"),
        ({"kind": "mdd", "num_classes": 3, "condition_on": "fc"}, "conditioned on nothing"),
        ({"kind": "wdgrl", "binary": True}, "binary=True is for kind='dann'"),
        ({"kind": "wdgrl", "norm": "batch"}, "norm='batch' mixes the samples"),
        ({"kind": "wdgrl", "classifier": "patch"}, "one decision for each sample"),
        ({"kind": "wgan"}, "kind='wgan' is not known"),
        ({"num_classes": 3}, "num_classes=3 is for kind='mdd'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options, message) -> None:
    with pytest.raises(gs.SurgeryError, match=message):
        gs.attach_domain_head(Net(), "mean", example_inputs=image(), **options)


def test_losses_refuse_what_does_not_fit() -> None:
    with pytest.raises(gs.ShapeError, match=r"logits of shape \(4, 2\) with class logits of shape \(4, 3\)"):
        gs.mdd_loss(torch.randn(4, 2), torch.randn(4, 3), HALF)
    with pytest.raises(gs.SurgeryError, match=r"domains\[3\] is 2"):
        gs.mdd_loss(torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 0, 2]))
    with pytest.raises(gs.SurgeryError, match="margin"):
        gs.mdd_loss(torch.randn(4, 3), torch.randn(4, 3), HALF, margin=0.0)
    with pytest.raises(gs.ShapeError, match="one for each sample"):
        gs.wasserstein_loss(torch.randn(4, 2), HALF)
    with pytest.raises(gs.SurgeryError, match=r"got Linear\n.*GradientPenalty\(m.domain\)"):
        gs.GradientPenalty(nn.Linear(2, 2))
