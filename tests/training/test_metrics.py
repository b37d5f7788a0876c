"""Metrics of an adversarial run against numbers worked out by hand, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grl_surgery.errors import PointNotFoundError, ShapeError, SurgeryError
from grl_surgery.nn.classifiers import DomainClassifier
from grl_surgery.nn.heads import DomainHead
from grl_surgery.nn.reversal import reversal_disabled
from grl_surgery.training.losses import domain_loss
from grl_surgery.training.metrics import AdversarialMetrics, AdversarialReport, proxy_a_distance


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


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
    model = nn.ModuleDict(
        {name: DomainHead(DomainClassifier(4, hidden=8, depth=1)) for name in ("shallow", "deep")}
    )
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
