"""Gradient reversal: the identity forwards, minus coeff times the gradient backwards.

This is the only autograd code of the library. A reversal written as a plain `torch.autograd.Function`
vanishes without a word when a network is traced or exported, so `reverse_gradient` looks at who is calling:

1. something that intercepts torch functions (a `torch.fx` tracer, a tensor subclass): hand it the call whole;
2. something that records operators (`torch.compile`, `torch.export`, `torch.jit.trace`, `make_fx`): the
   operator `torch.ops.grl_surgery.reverse_gradient`, which stays in the graph and carries its gradient along;
3. plain execution, also under `torch.func` transforms: an autograd function that copies nothing.
"""

import contextlib
import math
import numbers
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, no_type_check

import torch
from torch import Tensor, nn
from torch._C import (
    DispatchKey,
    _are_functorch_transforms_active,
    _dispatch_tls_is_dispatch_key_included,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch._guards import CompileContext
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.onnx import register_custom_op_symbolic  # type: ignore[attr-defined]
from torch.overrides import handle_torch_function, has_torch_function

from grl_surgery.errors import ShapeError, SurgeryError
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
    _check_input(x)
    if isinstance(coeff, Tensor):
        coeff = _broadcastable(coeff, x)
    else:
        _check_number(coeff, signed)
    if clip is not None:
        _check_clip(clip, x)
    if _is_recording():
        return _with_operator(x, coeff, clip, normalize)
    rule = _PLAIN if clip is None and not normalize else _Rule(clip, normalize)
    function = _TransformedReversal if _are_functorch_transforms_active() else _Reversal
    output: Tensor = function.apply(x, coeff, _alias_kind(x), rule)
    return output


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
        _check_scalar(coeff, signed)
        if clip is not None:
            _check_clip(clip)
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
        _check_scalar(coeff, self.signed)
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


# --- Input validation and repr


def _check_input(x: object) -> None:
    if not isinstance(x, Tensor):
        raise ShapeError(
            f"a gradient reversal takes one tensor; its input is {_described(x)}; choose one item",
            example="after='encoder[0]'",
        )
    if not (x.is_floating_point() or x.is_complex()):
        raise ShapeError(
            f"a gradient reversal takes a tensor that can have a gradient; its input has dtype {x.dtype}; "
            "choose a point where the values are floating point"
        )


def _described(value: object) -> str:
    if isinstance(value, dict):
        return f"a {type(value).__name__} with keys {', '.join(map(repr, value)) or 'none'}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"of type {type(value).__name__}"


def _check_number(coeff: object, signed: bool = False) -> None:
    if not isinstance(coeff, (int, float, torch.SymFloat, numbers.Real)):
        raise SurgeryError(
            f"coeff is of type {type(coeff).__name__}; it must be a number or a tensor", example="coeff=0.5"
        )
    # Compared, so that a compiler may keep the number symbolic; nan fails every comparison.
    if not (-math.inf if signed else 0.0) <= cast(float, coeff) < math.inf or coeff == -math.inf:
        raise SurgeryError(
            f"coeff is {coeff}; it must be finite{'' if signed else ' and not negative'}: the gradient is "
            "multiplied by -coeff, so that a negative one un-reverses it, and infinity or nan destroys it",
            example="coeff=0.5" if signed else "coeff=0.5, or GradientReversal(-0.5, signed=True) on purpose",
        )


def _check_float32(coeff: float, signed: bool) -> None:
    _check_number(coeff, signed)
    if abs(coeff) > _LARGEST:
        raise SurgeryError(
            f"coeff is {str(coeff)[:40]}; a layer keeps it in float32, where it would be infinite",
            example="coeff=0.5",
        )


_LARGEST = torch.finfo(torch.float32).max


def _check_clip(clip: object, x: Tensor | None = None) -> None:
    if isinstance(clip, bool) or not isinstance(clip, numbers.Real) or not 0.0 < float(clip) < math.inf:
        raise SurgeryError(
            f"clip is {clip!r}; it must be a positive number: each entry of the gradient is clamped to "
            "[-clip, clip]",
            example="GradientReversal(clip=0.5)",
        )
    if x is not None and x.is_complex():
        raise ShapeError(
            f"clip={clip!r} clamps real numbers, and the input has dtype {x.dtype}",
            example="reverse_gradient(torch.view_as_real(x), clip=0.5)",
        )


def _check_scalar(coeff: float | Tensor, signed: bool) -> None:
    if not isinstance(coeff, Tensor):
        _check_float32(coeff, signed)
        return
    _check_coeff_dtype(coeff)
    if coeff.dim() != 0:
        raise ShapeError(
            f"a layer has one coefficient; this one has shape {tuple(coeff.shape)}; for one per sample, call "
            "the function",
            example="reverse_gradient(x, coeff)",
        )
    if coeff.device.type == "meta":
        raise SurgeryError("coeff is on the meta device, where it has no value", example="coeff=0.5")
    # Reading from another device would make the host wait for it; a subclass may hold no value at all.
    if type(coeff) is Tensor and coeff.device.type == "cpu" and not _is_recording():
        _check_float32(coeff.detach().item(), signed)


def _as_buffer(coeff: float) -> Tensor:
    """Returns `coeff` on the default device, or on the host where that is meta, which keeps no values."""
    device = torch.get_default_device()
    return torch.tensor(coeff, dtype=torch.float32, device="cpu" if device.type == "meta" else device)


def _check_coeff_dtype(coeff: Tensor) -> None:
    if not coeff.is_floating_point():
        raise SurgeryError(
            f"coeff has dtype {coeff.dtype}; it must be floating point", example="coeff.float()"
        )


def _broadcastable(coeff: Tensor, x: Tensor) -> Tensor:
    """Returns `coeff` in a shape that broadcasts against `x`: (), (B, 1, ..., 1), or one for each place."""
    _check_coeff_dtype(coeff)
    if coeff.dim() == 0:
        return coeff
    if coeff.dim() == x.dim() and _fits(coeff, x):
        return coeff
    if coeff.dim() != 1 or x.dim() == 0 or not _same_length(coeff, x):
        raise ShapeError(
            f"coeff has shape {tuple(coeff.shape)} and the input {tuple(x.shape)}; a coefficient is a "
            "number, a 0-d tensor, a tensor with one number for each sample along the first dimension, or one"
            " that broadcasts against the input",
            example="reverse_gradient(x, torch.ones(x.shape[0]))",
        )
    return coeff.reshape(-1, *[1] * (x.dim() - 1))


def _fits(coeff: Tensor, x: Tensor) -> bool:
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return coeff.dim() > 1
    if coeff.dim() == 1:  # one number for all samples would be a number
        return coeff.shape[0] == x.shape[0]
    return all(a in (1, b) for a, b in zip(coeff.shape, x.shape, strict=True))


def _same_length(coeff: Tensor, x: Tensor) -> bool:
    # torch.jit.trace would warn that it cannot record a comparison.
    return torch.jit.is_tracing() or coeff.shape[0] == x.shape[0]  # type: ignore[attr-defined, no-untyped-call]


def _check_reversals_are_layers(model: nn.Module) -> None:
    targets = (reverse_gradient, _operator, _operator.overloadpacket)
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
    if _is_recording():  # in which reading a value would be recorded as well
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


# --- Plain execution

_AliasKind = Literal["detached", "view", "copied"]


@dataclass(frozen=True)
class _Rule:
    """What becomes of a gradient: clipped, normalised, multiplied by minus the coefficient.

    Of the first `vmapped` dimensions each entry is normalised on its own.
    """

    clip: float | None = None
    normalize: bool = False
    vmapped: int = 0

    def __call__(self, grad: Tensor, factor: float | Tensor) -> Tensor:
        limited = grad if self.clip is None else grad.clamp(-self.clip, self.clip)
        if self.normalize:
            wide = torch.promote_types(grad.dtype, torch.float32)
            dims = list(range(self.vmapped, grad.dim()))
            norm = (
                torch.linalg.vector_norm(limited.to(wide), dim=dims, keepdim=True) if dims else limited.abs()
            )
            limited = (limited / norm.clamp_min(torch.finfo(wide).tiny)).to(grad.dtype)
        # One coefficient per sample promotes a gradient of half precision; a 0-d tensor or a number does not.
        scaled = limited * factor
        return scaled if scaled.dtype == grad.dtype else scaled.to(grad.dtype)


_PLAIN = _Rule()


class _Reversal(torch.autograd.Function):
    """The gradient rule, and a forward that copies nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coeff: float | Tensor, alias_kind: _AliasKind, rule: _Rule) -> Tensor:
        # Negated now, so that a new value in the buffer neither changes nor invalidates a backward to come.
        ctx.factor = -coeff
        ctx.rule = rule
        return x.detach() if alias_kind == "detached" else _alias(x, alias_kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.rule(grad, ctx.factor), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return cast(Tensor, ctx.rule(tangents[0], ctx.factor))


class _TransformedReversal(torch.autograd.Function):
    """The same for `torch.func` transforms, which ask for this form; it takes five times as long to call."""

    @staticmethod
    def forward(x: Tensor, coeff: float | Tensor, alias_kind: _AliasKind, rule: _Rule) -> Tensor:
        return _alias(x, alias_kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        factor, ctx.rule = -inputs[1], inputs[-1]
        if isinstance(factor, Tensor):
            ctx.save_for_backward(factor)
            ctx.save_for_forward(factor)
        else:
            ctx.factor = factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.rule(grads[0], _factor(ctx)), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return cast(Tensor, ctx.rule(tangents[0], _factor(ctx)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        x, coeff = _batch_first(info.batch_size, in_dims, *inputs[:2])
        return cast(Tensor, _TransformedReversal.apply(x, coeff, inputs[2], _vmapped(inputs[3]))), 0


def _alias(x: Tensor, kind: _AliasKind) -> Tensor:
    # Autograd does not take a detached alias for a view, so that an in-place operation may follow. Where that
    # would overwrite a leaf behind its back, it gets the view, and refuses the operation.
    if kind == "detached":
        return x.detach()
    return x.view_as(x) if kind == "view" else x.clone()


def _factor(ctx: Any) -> float | Tensor:
    saved = ctx.saved_tensors  # Read once: a checkpointed forward gives them out only once.
    return cast(float | Tensor, saved[0] if saved else ctx.factor)


def _vmapped(rule: _Rule) -> _Rule:
    """Returns the rule for one dimension more in front."""
    return _Rule(rule.clip, rule.normalize, rule.vmapped + 1) if rule.normalize else rule


def _batch_first(
    batch_size: int, in_dims: tuple[int | None, ...], x: Tensor, coeff: float | Tensor
) -> tuple[Tensor, float | Tensor]:
    """Returns both with the vmapped dimension first, still broadcastable against each other."""
    x_dim, coeff_dim = in_dims[:2]
    # Each of the batch has memory of its own, which an operation behind the reversal may overwrite.
    x = x.expand(batch_size, *x.shape).contiguous() if x_dim is None else x.movedim(x_dim, 0)
    if isinstance(coeff, Tensor) and coeff_dim is not None:
        coeff = coeff.movedim(coeff_dim, 0)
        coeff = coeff.reshape(batch_size, *[1] * (x.dim() - coeff.dim()), *coeff.shape[1:])
    return x, coeff


def _alias_kind(x: Tensor) -> _AliasKind:
    """Returns how the output may share the memory of `x` with no in-place operation going unnoticed."""
    base = x if x._base is None else x._base
    if not (base.is_leaf and base.requires_grad and torch.is_grad_enabled()):
        return "detached"
    # What a transform wraps forgets that it is a view, and in forward mode a view needs a view for a tangent.
    if _are_functorch_transforms_active() or _has_tangent(x):
        return "copied"
    return "view"


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


# --- The operator that stays in recorded graphs
#
# What is private in torch, or may change there, and the test that would notice:
#   _are_functorch_transforms_active            test_a_transform_never_overwrites_the_input_of_a_reversal
#   torch._C._AutoDispatchBelowAutograd         test_the_operator_reverses_for_the_autograd_engine
#   "FuncTorchDynamicLayerFrontMode"            test_the_operator_reverses_under_function_transforms
#   CompileContext, _get_dispatch_mode          test_inductor_generates_no_code_for_the_forward_of_a_reversal
#   its attribute export                        test_the_gradient_is_reversed_in, of a backend that decomposes
#   torch._inductor.virtualized                 test_a_package_of_aot_inductor_runs_without_this_library
#   _is_tracing                                 test_the_gradient_is_reversed_in[jit_trace]
#   _len_torch_dispatch_stack, get_proxy_mode   test_make_fx_keeps_the_reversal
#   _dispatch_tls_is_dispatch_key_included, DispatchKey.PreDispatch: the same


class _OperatorReversal(_TransformedReversal):
    """The same gradient rule around the operator, for what records operators below autograd.

    `torch.library.register_autograd` would do, if what it registers worked under `torch.func` transforms.
    """

    @staticmethod
    def forward(x: Tensor, coeff: Tensor, rule: _Rule) -> Tensor:  # type: ignore[override]
        # Whoever records from here on gets the operator, unless it has taken the gradient already.
        if get_proxy_mode() is None or _compiler_has_the_gradient():
            return x.clone()
        with torch._C._AutoDispatchBelowAutograd():
            return _call_operator(x, coeff, rule.clip, rule.normalize)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.rule(grads[0], _factor(ctx)), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        x, coeff = _batch_first(info.batch_size, in_dims, *inputs[:2])
        return cast(Tensor, _OperatorReversal.apply(x, coeff, _vmapped(inputs[2]))), 0


def _is_recording() -> bool:
    # torch.compile reads this code as well: it knows the first answer, and never meets the others.
    if torch.compiler.is_compiling() or _is_tracing():
        return True
    # Where no mode is active at all, which is quick to tell, there is no need to look for this one.
    may_be = _len_torch_dispatch_stack() or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    return bool(may_be) and get_proxy_mode() is not None


_PRE_DISPATCH = DispatchKey.PreDispatch


def _with_operator(x: Tensor, coeff: float | Tensor, clip: float | None, normalize: bool) -> Tensor:
    return _call_operator(x, coeff if isinstance(coeff, Tensor) else _as_tensor(coeff, x), clip, normalize)


def _call_operator(x: Tensor, coeff: Tensor, clip: float | None, normalize: bool) -> Tensor:
    # A graph shows the options where there are any, and programs without them load in older versions.
    options = (clip, normalize) if clip is not None or normalize else ()
    return cast(Tensor, _operator(x, coeff, *options))


def _as_tensor(coeff: float, x: Tensor) -> Tensor:
    """Returns `coeff` as precisely as a number would take part in a multiplication with `x`."""
    double = x.dtype in (torch.float64, torch.complex128)
    # torch.compile can keep a number symbolic through a product, but not through torch.full: it would compile
    # again for every new coefficient.
    return torch.ones((), dtype=torch.float64 if double else torch.float32, device=x.device) * coeff


def _with_gradient(
    x: Tensor, coeff: float | Tensor, clip: float | None = None, normalize: bool = False
) -> Tensor:
    return cast(Tensor, _OperatorReversal.apply(x, coeff, _Rule(clip, normalize)))


def _compiler_has_the_gradient() -> bool:
    """Whether a compiler records what autograd has gone through, so that a copy is all that is left.

    It then sees a copy, which costs nothing, where the operator would be a call that it cannot look into.
    A backend that records the forward alone, or exports and decomposes, runs inside a compilation too. Its
    recording is differentiated later, and needs the operator.
    """
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)
    if mode is None:
        return False
    is_exporting = mode.export or torch.compiler.is_exporting()
    return _is_aot_inductor() or (CompileContext.current_compile_id() is not None and not is_exporting)


def _is_aot_inductor() -> bool:
    # Only looked at: Inductor takes seconds to import.
    inductor: Any = sys.modules.get("torch._inductor.virtualized")
    return inductor is not None and inductor.V.aot_compilation is True


def _copied(x: Tensor, coeff: Tensor, clip: float | None = None, normalize: bool = False) -> Tensor:
    # The schema declares no alias, so the output must not be one.
    return x.clone()


def _without_values(x: Tensor, coeff: Tensor, clip: float | None = None, normalize: bool = False) -> Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("grl_surgery", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "reverse_gradient(Tensor x, Tensor coeff, float? clip=None, bool normalize=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator: Any = torch.ops.grl_surgery.reverse_gradient.default

for _key, _kernel in {
    "CompositeExplicitAutograd": _copied,
    "Autograd": _with_gradient,
    "FuncTorchDynamicLayerFrontMode": _with_gradient,
}.items():
    _library.impl("reverse_gradient", _kernel, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("grl_surgery::reverse_gradient", _without_values, lib=_library)
# The exporter of ONNX that goes by torch.jit.trace; the other one goes by torch.export, and sees a copy.
register_custom_op_symbolic(
    "grl_surgery::reverse_gradient", lambda graph, x, *_: graph.op("Identity", x).setType(x.type()), 1
)
