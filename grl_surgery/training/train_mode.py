"""Train mode with frozen batch norms: statistics over a batch of two domains fit neither domain."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from grl_surgery.nn.heads import find_heads
from grl_surgery.training.optimization import is_inside
from grl_surgery.validation import check_network

__all__ = ["batch_norm_frozen", "set_train_mode"]


def set_train_mode(model: nn.Module, *, freeze_batch_norm: bool = False) -> None:
    """Put a network into train mode, but for its batch norms (not its heads') if ``freeze_batch_norm``.

    In a batch of two domains, the statistics of a batch norm fit neither domain. A frozen batch norm uses the
    statistics that the network was pretrained with. A later ``model.train()`` unfreezes it; use
    :func:`batch_norm_frozen` to prevent that.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> set_train_mode(model, freeze_batch_norm=True)
        >>> [module.training for module in model]
        [True, False]

    Args:
        model: A network, wrapped or not.
        freeze_batch_norm: Keep the statistics of its batch norms.

    Raises:
        SurgeryError: It is not a network.
    """
    check_network(model, "set_train_mode", example="set_train_mode(model, freeze_batch_norm=True)")
    model.train()
    for norm in _batch_norms(model) if freeze_batch_norm else ():
        norm.eval()


@contextlib.contextmanager
def batch_norm_frozen(model: nn.Module) -> Iterator[None]:
    """Keep a network's batch norms, but not its heads', in eval mode, whatever ``model.train()`` says inside.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> import torch
        >>> with batch_norm_frozen(model):
        ...     _ = model.train()(torch.randn(8, 4))
        >>> int(model[1].num_batches_tracked), model[1].training
        (0, True)

    Args:
        model: A network, wrapped or not. Afterwards each batch norm is in the mode that was set last.

    Raises:
        SurgeryError: It is not a network.
    """
    check_network(model, "batch_norm_frozen", example="with batch_norm_frozen(model): ...")
    modes: dict[nn.Module, bool] = {}

    def freeze(norm: nn.Module, args: Any) -> None:
        modes[norm] = norm.training
        norm.training = False

    def release(norm: nn.Module, args: Any, output: Any) -> None:
        norm.training = modes.pop(norm, norm.training)

    handles: list[Any] = []
    for norm in _batch_norms(model):
        handles.append(norm.register_forward_pre_hook(freeze))
        handles.append(norm.register_forward_hook(release, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batch_norms(model: nn.Module) -> Iterator[nn.Module]:
    """The batch norms that are not in a head."""
    heads = list(find_heads(model))
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not is_inside(path, heads):
            yield module
