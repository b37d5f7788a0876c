"""Train mode that leaves the statistics of batch norms alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import grl_surgery as gs


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


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
