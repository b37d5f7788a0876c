"""What a trace touches while a forward runs: nothing that anybody else can see."""

from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from small_networks import image
from torch import fx, nn

import grl_surgery as gs
from grl_surgery.capture.capture import trace


@fx.wrap
def scaled(x: torch.Tensor, by: float) -> torch.Tensor:
    """A branch on a value, for which torch.fx has to keep the function whole."""
    return x * by if x.sum() > 0 else x / by


def through_a_helper(x: torch.Tensor) -> torch.Tensor:
    """Calls a function that is kept whole, and one of math."""
    return scaled(x, 2.0) / math.sqrt(x.shape[-1])


def everybodys() -> list[object]:
    """What a process-wide patch for a trace would replace."""
    here = vars(sys.modules[__name__])
    functions = [here["scaled"], here["through_a_helper"], vars(sys.modules["math"])["sqrt"]]
    classes = [nn.Module.__call__, nn.Module.__getattr__, nn.Conv2d.forward, torch.Tensor.__getitem__]
    return [*functions, *classes, fx._symbolic_trace.is_fx_tracing()]


class Watches(nn.Module):
    """Its forward compares what everybody's functions are with what they were."""

    before: list[object] = everybodys()

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert everybodys() == self.before, "patched"
        x = through_a_helper(self.conv(x))
        assert everybodys() == self.before, "patched"
        return self.fc(x.mean((2, 3)))


def test_nothing_of_anybodys_is_patched_while_a_forward_is_traced():
    model = Watches()
    spliced = gs.insert_grl(model, after="scaled")
    assert isinstance(spliced, fx.GraphModule)
    assert torch.equal(spliced(image()), model(image()))
    assert gs.verify_flip(spliced, model, image()).ok


def test_a_function_that_is_kept_whole_is_found_in_a_helper_and_in_a_method():
    class Calls(Watches):
        def scale(self, x):
            return through_a_helper(x)

        def forward(self, x):
            return self.fc(self.scale(self.conv(x)).mean((2, 3)))

    names = trace(Calls(), []).names()
    assert "scaled" in names
    assert "size_sqrt" in names


def test_another_thread_calls_its_modules_while_a_forward_is_traced():
    other = nn.Linear(4, 4)

    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(other, torch.ones(1, 4)).result().shape == (1, 4)
            return self.fc(x).relu()

    assert isinstance(gs.insert_grl(Waits(), after="relu"), fx.GraphModule)


class Flat(nn.Module):
    """Goes through a list of modules that lie deep in its tree."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), Drops()) for _ in range(2))
        self.flat = [part for block in self.blocks for part in block]

    def forward(self, x):
        for part in self.flat:
            x = part(x)
        return x


class Drops(nn.Module):
    """Leaves no operation behind in eval mode."""

    def forward(self, x):
        return F.dropout(x, 0.9, training=True) if self.training else x


def test_modules_that_a_forward_reaches_past_the_tree_are_the_networks_own():
    model = Flat().eval()
    spliced = gs.insert_grl(model, after="blocks.0.0")
    assert [name for name in trace(model, []).names() if "blocks" in name] == [
        *("blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1")
    ]
    x = torch.ones(64, 4)
    assert torch.equal(spliced(x), model(x))
    torch.manual_seed(0)
    expected = model.train()(x)
    torch.manual_seed(0)
    assert torch.equal(spliced.train()(x), expected)


STRAY = nn.BatchNorm1d(4)


def test_a_module_outside_the_network_is_refused_before_it_changes():
    class Strays(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return STRAY(self.fc(x)).relu()

    with pytest.raises(gs.TracingError, match="it calls a BatchNorm1d that is not a submodule"):
        trace(Strays(), [])
    assert STRAY.num_batches_tracked == 0
