"""Gradient reversal: the identity forwards, minus coeff times the gradient backwards.

A reversal written as a plain `torch.autograd.Function`
vanishes without a word when a network is traced or exported, so `reverse_gradient` looks at who is calling:

1. something that intercepts torch functions (a `torch.fx` tracer, a tensor subclass): hand it the call whole;
2. something that records operators (`torch.compile`, `torch.export`, `torch.jit.trace`, `make_fx`): the
   operator `torch.ops.grl_surgery.reverse_gradient`, which stays in the graph and carries its gradient along;
3. plain execution, also under `torch.func` transforms: an autograd function that copies nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, no_type_check

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from grl_surgery.errors import SurgeryError
from grl_surgery.nn.reversal_autograd import PLAIN, GradientRule, reversed_alias
from grl_surgery.nn.reversal_checks import broadcastable, check_clip, check_input, check_number, check_scalar
from grl_surgery.nn.reversal_operator import OPERATOR, is_recording, with_operator
from grl_surgery.validation import check_network

__all__ = ["GradientReversal", "reversal_disabled", "reverse_gradient"]


def reverse_gradient(
    x: Tensor,
    coeff: float | Tensor = 1.0,
    *,
    signed: bool = False,
    clip: float | None = None,
    normalize: bool = False,
) -> Tensor:
    """Returns `x` unchanged and multiplies the gradient that flows back through it by `-coeff`.

    The result shares the memory of `x`: nothing is copied, and an in-place operation on the result is also
    seen through `x`. Where nothing else reads `x` that is harmless (`ReLU(inplace=True)` may follow). Where
    something else does, such as another branch of the network, clone first. Where `x` is a leaf that requires
    grad, or a view of one, an in-place operation on the result raises an error, as it does on the leaf. In a
    compiled or exported graph, and for such a leaf under a `torch.func` transform or forward-mode
    differentiation, the result has memory of its own.

    The gradient that leaves is `(grad * -coeff).to(grad.dtype)`, with the value that `coeff` had in the
    forward. The coefficient itself receives no gradient.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> reverse_gradient(x * 3.0, coeff=0.5).sum().backward()
        >>> x.grad
        tensor([-1.5000, -1.5000])

    Args:
        x: Any floating point or complex tensor.
        coeff: The lambda of Ganin et al., "Domain-Adversarial Training of Neural Networks" (JMLR 2016): a
            finite number that is not negative, a 0-d tensor, a `(B,)` tensor with one coefficient for each
            of the `B` samples along the first dimension of `x`, as the importance weights of Zhang et al.
            (IWAN, CVPR 2018), or a tensor with as many dimensions as `x` that broadcasts against it: one
            coefficient for each place, as the local weights of Luo et al. (CLAN, CVPR 2019). The values of a
            tensor are not checked, since reading them would make the host wait for the device.
        signed: Whether a number may be negative, which does not reverse the gradient.
        clip: Clamp each entry of the gradient to [-clip, clip] before it is multiplied: -coeff clamp(g),
            as the speaker classifier of Nekvinda & Dušek ("One Model, Many Languages", Interspeech 2020).
        normalize: Divide the gradient by its Euclidean norm before it is multiplied: -coeff g / ||g||, the
            block-normalised gradient of Yu et al. (arXiv 1707.04822, 2017) with the cut as the only block.
            It then has the norm `coeff`, however good the domain classifier is. Clipping comes first.

    Returns:
        A tensor equal to `x` bit for bit.

    Raises:
        ShapeError: `x` is not a tensor or cannot have a gradient, or `coeff` has none of the shapes above.
        SurgeryError: `coeff` is a number that is negative where `signed` is not set, infinite or nan, or is
            not a real number at all; or `clip` is not a positive number.
    """
    if has_torch_function((x, coeff)):
        words: dict[str, Any] = {"signed": True} if signed else {}
        if clip is not None or normalize:
            words.update(clip=clip, normalize=normalize)
        return handle_torch_function(reverse_gradient, (x, coeff), x, coeff=coeff, **words)
    check_input(x)
    if x.is_nested and x.layout is torch.strided and not normalize:  # no autograd Function takes one
        parts = [reverse_gradient(part, coeff, signed=signed, clip=clip) for part in x.unbind()]
        return torch.nested.as_nested_tensor(parts)
    if isinstance(coeff, Tensor):
        coeff = broadcastable(coeff, x)
    else:
        check_number(coeff, signed)
    if clip is not None:
        check_clip(clip, x)
    if is_recording():
        return with_operator(x, coeff, clip, normalize)
    rule = PLAIN if clip is None and not normalize else GradientRule(clip, normalize)
    return reversed_alias(x, coeff, rule)


class GradientReversal(nn.Module):
    """The identity whose gradient is multiplied by `-coeff`, as a layer.

    `layer.coeff` is a 0-d float32 buffer and the only place where the coefficient lives. It is not part of
    the state_dict, so that a network has the same checkpoints with and without the layer. Its value survives
    whatever happens to the module: it stays float32 when that is cast, outlives `to_empty`, and stays on the
    host where the module goes to the meta device; to every other device it follows. Changing the value never
    recompiles anything.

    Example:
        >>> layer = GradientReversal(coeff=0.5)
        >>> layer.set_coeff(0.25)
        >>> layer
        GradientReversal(coeff=0.25)

    Args:
        coeff: A number from 0 to the largest of float32, to which it is rounded, or a 0-d tensor holding one.
            The value of a tensor is checked where it lies in the memory of the host.
        signed: Whether the coefficient may be negative, now or later. A negative one does not reverse the
            gradient; a schedule may go from -1 to 1 on purpose.
        clip: As for `reverse_gradient`.
        normalize: As for `reverse_gradient`.

    Raises:
        SurgeryError: `coeff` is negative where `signed` is not set, infinite, nan, or not a real number; or
            `clip` is not a positive number.
        ShapeError: `coeff` is a tensor with dimensions.
    """

    coeff: Tensor
    signed: bool = False
    clip: float | None = None
    normalize: bool = False

    # The coefficient itself while `reversal_disabled` has put a stand-in into its place; in a tuple, since
    # whoever looks for numbers among the attributes of a layer would take it for one.
    _suspended: tuple[Tensor] | None = None

    def __init__(
        self,
        coeff: float | Tensor = 1.0,
        *,
        signed: bool = False,
        clip: float | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        check_scalar(coeff, signed)
        if clip is not None:
            check_clip(clip)
        self.signed = signed
        self.clip = None if clip is None else float(clip)
        self.normalize = bool(normalize)
        value = coeff.detach() if isinstance(coeff, Tensor) else _as_buffer(coeff)
        # Not by register_buffer: loaders replace it to put new buffers on the meta device, and fill those
        # that it calls non-persistent with whatever lies in memory. The state_dict leaves this one out below.
        with torch.inference_mode(False):  # in which autograd could not save the coefficient for a backward
            self._buffers["coeff"] = value.to(torch.float32, copy=True)

    @no_type_check  # torch.jit.script reads this code, and takes a comment for mypy for one of its own
    def forward(self, x: Tensor) -> Tensor:
        """Returns `x`; see `reverse_gradient`."""
        if torch.jit.is_scripting():
            return torch.ops.grl_surgery.reverse_gradient(x, self.coeff, self.clip, self.normalize)
        coeff = self._buffers["coeff"]  # self.coeff is a slow call
        if (self.clip is None and not self.normalize) or self._suspended is not None:
            return reverse_gradient(x, coeff)
        return reverse_gradient(x, coeff, clip=self.clip, normalize=self.normalize)

    def set_coeff(self, coeff: float | Tensor) -> None:
        """Writes a new coefficient into the buffer, with no recompilation and no wait for a device.

        Set it before a forward. A backward still to come from an earlier forward keeps the old coefficient;
        where that forward was compiled, the backward raises autograd's error about a modified tensor instead,
        and where it ran under reentrant checkpointing, it runs again with the new one.
        Inside `reversal_disabled` the new coefficient takes effect when the context ends.

        Example:
            >>> layer = GradientReversal()
            >>> layer.set_coeff(0.3)
            >>> layer
            GradientReversal(coeff=0.3)

        Args:
            coeff: As for the layer.

        Raises:
            SurgeryError: `coeff` is negative where the layer is not signed, infinite, nan, or not a real
                number.
            ShapeError: `coeff` is a tensor with dimensions.
        """
        check_scalar(coeff, self.signed)
        own = self._own_coeff()
        if torch.compiler.is_compiling():  # which can keep a number symbolic through a product, not fill_
            coeff = torch.ones_like(own) * coeff
        with torch.no_grad():
            own.copy_(coeff) if isinstance(coeff, Tensor) else own.fill_(coeff)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GradientReversal":
        # half() would round the coefficient for good, to_empty() forget it, and meta has no values.
        before = self._held()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self._held()
        if type(moved) is type(before):  # otherwise it became a fake or a distributed tensor
            self._hold(before if moved.device.type == "meta" else before.to(moved.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Saves nothing: a network has the same checkpoints with and without the layer."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """Loads nothing, and misses nothing."""

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields the coefficient, but not to those who ask each module for what it has to load or offload."""
        return super().named_buffers(prefix, recurse, remove_duplicate) if recurse else iter(())

    def extra_repr(self) -> str:
        """Returns the argument that rebuilds the layer; `?` where it has no value, as inside a tracer."""
        words = [f"coeff={_shown(self._own_coeff())}"]
        words += [f"clip={self.clip!r}"] * (self.clip is not None) + ["normalize=True"] * self.normalize
        words += ["signed=True"] * self.signed + ["disabled"] * (self._suspended is not None)
        return ", ".join(words)

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside `reversal_disabled` has no context that would ever enable it again, and a shallow
        # copy that shared its dict of buffers would be disabled together with this layer.
        buffers = {**self._buffers, "coeff": self._own_coeff()}
        state = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_buffers": buffers, "_suspended": None}

    def _own_coeff(self) -> Tensor:
        return self._held() if self._suspended is None else self._suspended[0]

    def _suspend(self) -> None:
        # Another tensor, not another value: a compiled graph that waits for its backward holds the tensor.
        self._suspended = (self._held(),)
        self._hold(torch.full_like(self._held(), -1.0))

    def _after_share_copy(self) -> None:
        self._resume()  # the context that disabled the original does not know the copy

    def _resume(self) -> None:
        if self._suspended is not None:
            # Only what is in the buffer moves along when the module is moved.
            self._hold(self._own_coeff().to(self._held().device))
            self._suspended = None

    # A subclass may give the attribute `coeff` another meaning.

    def _held(self) -> Tensor:
        return self._buffers["coeff"]  # type: ignore[return-value]

    def _hold(self, coeff: Tensor) -> None:
        self._buffers["coeff"] = coeff


@contextlib.contextmanager
def reversal_disabled(model: nn.Module) -> Iterator[None]:
    """Makes every `GradientReversal` in `model` the identity for the gradient too, until the context ends.

    What counts is where the forward runs: the backward of a forward inside is not reversed, wherever it runs;
    reentrant checkpointing runs the forward again in the backward. Nothing is recompiled but for reversals
    that clip or normalise; contexts nest, and an exception ends one like any other exit. Reversals written as
    calls of `reverse_gradient` are not affected.

    Inside, `layer.coeff` reads -1, the coefficient of an identity, and `repr(layer)` shows the coefficient to
    come back and the word disabled. `layer.set_coeff` sets the one to come back; writing into `layer.coeff`
    itself is lost at the end. Copies, pickles and results of surgery made inside are not disabled.

    Example:
        >>> model = nn.Sequential(GradientReversal(coeff=0.5))
        >>> x = torch.ones(1, requires_grad=True)
        >>> with reversal_disabled(model):
        ...     torch.autograd.grad(model(x), x)
        (tensor([1.]),)
        >>> torch.autograd.grad(model(x), x)
        (tensor([-0.5000]),)

    Args:
        model: A network, compiled or not, whose reversals are layers.

    Yields:
        Nothing.

    Raises:
        SurgeryError: It is not a network, or a reversal in it is a layer no more, because a tracer went
            through it.
    """
    check_network(model, "reversal_disabled", example="with reversal_disabled(model): ...")
    _check_reversals_are_layers(model)
    layers = [m for m in model.modules() if isinstance(m, GradientReversal) and m._suspended is None]
    with contextlib.ExitStack() as at_exit:
        for layer in layers:
            layer._suspend()
            at_exit.callback(layer._resume)
        yield


def _check_reversals_are_layers(model: nn.Module) -> None:
    targets = (reverse_gradient, OPERATOR, OPERATOR.overloadpacket)
    for path, module in model.named_modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        names = [node.name for node in module.graph.nodes if node.target in targets]
        if names:
            raise SurgeryError(
                f"cannot disable {', '.join(map(repr, names))} in {path or 'the model'!r}: a tracer went "
                "through the layer and left a function; disable the reversals of the model that was traced"
            )


def _shown(coeff: Tensor) -> str:
    """Returns the shortest decimal that gives the same coefficient back."""
    if is_recording():  # in which reading a value would be recorded as well
        return "?"
    try:
        value = coeff.item()
    except RuntimeError:  # The fake tensors of a tracer have no value.
        return "?"
    for digits in range(1, 17):
        short = float(f"{value:.{digits}g}")
        if torch.tensor(short, dtype=coeff.dtype, device="cpu").item() == value:
            return repr(short)
    return repr(value)


def _as_buffer(coeff: float) -> Tensor:
    """Returns `coeff` on the default device, or on the host where that is meta, which keeps no values."""
    device = torch.get_default_device()
    return torch.tensor(coeff, dtype=torch.float32, device="cpu" if device.type == "meta" else device)
