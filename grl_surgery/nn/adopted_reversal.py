"""A reversal that answers to the attribute and the state_dict key of the layer that it replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grl_surgery.nn.reversal import GradientReversal, reverse_gradient

__all__ = ["AdoptedReversal"]


class AdoptedReversal(GradientReversal):
    """A :class:`GradientReversal` in place of another layer.

    Where the other layer's coefficient was its attribute ``alpha``, so it is here: it can be read and set
    under that name. Where it was saved with the network, the key of the state_dict and its shape are kept.

    Example:
        >>> layer = AdoptedReversal(0.5, alias="alpha", saved_as=torch.Size([1]))
        >>> layer.alpha = 0.25
        >>> layer, dict(layer.state_dict())
        (AdoptedReversal(coeff=0.25), {'alpha': tensor([0.2500])})

    Args:
        coeff: As for GradientReversal.
        alias: What the coefficient was called; empty for none.
        saved_as: Shape of the tensor that it was; None where it was a plain number.
        in_state: Whether that tensor was saved.
    """

    _alias = ""
    _obeys_argument = True  # a proof sets its copy's coefficient to 1, whatever it is called with

    def __init__(
        self,
        coeff: float | Tensor = 1.0,
        *,
        alias: str = "",
        saved_as: torch.Size | None = None,
        in_state: bool | None = None,
    ) -> None:
        super().__init__(coeff)
        self._saved_as = saved_as
        self._in_state = saved_as is not None if in_state is None else in_state
        self._alias = "" if alias == "coeff" and saved_as is None else alias
        if self._in_state:
            self.register_state_dict_post_hook(_write)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load the coefficient from its old key, if it has one."""
        if self._in_state:
            _read(self, *args)

    def forward(self, x: Tensor, coeff: float | Tensor | None = None) -> Tensor:
        """Returns `x`; a coefficient that is passed counts more than the layer's own, as it did before."""
        if coeff is None or self._suspended is not None or not self._obeys_argument:
            return reverse_gradient(x, self._held())
        return reverse_gradient(x, coeff)

    def __getattr__(self, name: str) -> Any:
        """The coefficient under its old name."""
        if name != self.__dict__.get("_alias"):
            return super().__getattr__(name)
        own = self._own_coeff()
        return float(own) if self._saved_as is None else own.view(self._saved_as)

    def __setattr__(self, name: str, value: Any) -> None:
        if name and name == self.__dict__.get("_alias"):
            self.set_coeff(value.reshape(()).float() if isinstance(value, Tensor) else value)
        else:
            super().__setattr__(name, value)


def _write(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Save the coefficient under its old key."""
    assert isinstance(module, AdoptedReversal)
    state[prefix + module._alias] = getattr(module, module._alias).detach()


def _read(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Load it from there; ``state`` is load_state_dict's own copy."""
    assert isinstance(module, AdoptedReversal)
    key = prefix + module._alias
    if key in state:
        setattr(module, module._alias, state.pop(key))
    elif strict:
        missing.append(key)
