"""Small networks with the traits that make surgery hard, one trait each."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    """A convolution, its activation, and a sum with the input."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)) + x)


class Net(nn.Module):
    """Stem, two residual stages, pooling, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 4
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stage1 = nn.Sequential(Residual(), Residual())
        self.stage2 = nn.Sequential(Residual(), Residual())
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stage2(self.stage1(F.relu(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class Repeated(nn.Module):
    """One activation module called three times, and a function called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))
        self.act = nn.Tanh()

    def forward(self, x):
        x = self.act(self.first(x))
        x = torch.relu(self.act(self.second(x)))
        return torch.relu(self.act(self.third(x)))


class Shared(nn.Module):
    """One layer registered under two names and called under both."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Colliding(nn.Module):
    """Modules called as an operation, with a number sign, and with torchvision's suffix."""

    def __init__(self) -> None:
        super().__init__()
        self.block_1 = nn.Linear(6, 6)
        self.block = nn.Linear(6, 6)
        self.add = nn.Linear(6, 6)
        self.register_module("odd#1", nn.Linear(6, 6))

    def forward(self, x):
        x = self.block_1(x) + self.block(x)
        return self.add(getattr(self, "odd#1")(x)) + x


class Containers(nn.Module):
    """Modules in a list and in a dict, called by the root."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.heads = nn.ModuleDict({"left": nn.Linear(6, 2), "right": nn.Linear(6, 2)})

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return {name: head(x) for name, head in self.heads.items()}


class Pair(NamedTuple):
    """What TwoOutputs returns."""

    value: torch.Tensor
    aux: torch.Tensor


class Encoder(nn.Module):
    """Returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.a(x)), torch.sigmoid(self.b(x))


class Decoder(nn.Module):
    """Takes the tuple whole."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 2)

    def forward(self, pair):
        return self.out(pair[0] * pair[1])


class Tuples(nn.Module):
    """A tuple handed from one module to the next, and one item of it used beside."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def forward(self, x):
        pair = self.encoder(x)
        return Pair(self.decoder(pair), pair[1].sum(1))


class Ordered(nn.Module):
    """Returns an OrderedDict."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        return OrderedDict(out=self.fc(x), features=x * 2)


class KeywordOnly(nn.Module):
    """Keyword-only arguments, a flag, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x, scale=2.0, *, shift, double=False, mask=None):
        x = torch.tanh(self.fc(x)) * scale + shift
        if double:
            x = x * 2
        return x if mask is None else x * mask


class Modes(nn.Module):
    """Another computation in train mode: an extra output, more calls, and dropout by function."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.relu(self.body(x))
        if self.training:
            x = x + torch.relu(self.aux(x))
        x = F.dropout(x, 0.5, self.training)
        return self.fc(torch.relu(x))


class InPlace(nn.Module):
    """An activation in place right behind the point, with the same value used again later."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.a(x)
        y = self.act(x)
        return self.b(y) + x


class Untraceable(nn.Module):
    """A root whose control flow depends on data, around a body that traces."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Net()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        if x.sum() > 0:
            x = x * self.scale
        return self.body(x)


class DrawsInPython(nn.Module):
    """Drops its layer at random, with Python's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(x) if random.random() < 0.5 else x


class Constants(nn.Module):
    """Makes a tensor from nothing, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.fc(x) * torch.arange(6.0)


class KeepsFrozen(nn.Module):
    """Its own train() leaves one part in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.fc = nn.BatchNorm1d(6), nn.Linear(6, 2)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x):
        return self.fc(self.frozen(x))


def image(batch: int = 2, size: int = 8) -> torch.Tensor:
    """Random pixels from a fixed seed."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def vector(batch: int = 4) -> torch.Tensor:
    """Random features from a fixed seed."""
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(1))


class PastedFunction(torch.autograd.Function):
    """A pasted reversal."""

    @staticmethod
    def forward(ctx, x, coeff):
        ctx.coeff = coeff
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.coeff * gradient, None


class Pasted(nn.Module):
    """A forward that calls a pasted autograd.Function."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(PastedFunction.apply(torch.tanh(self.features(x)), 0.5))
