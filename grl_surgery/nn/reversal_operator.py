"""Registers the operator that stays in recorded graphs, and tells who gets it."""

import sys
from typing import Any, cast

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    _dispatch_tls_is_dispatch_key_included,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch._guards import CompileContext
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.onnx import register_custom_op_symbolic  # type: ignore[attr-defined]

from grl_surgery.nn.reversal_autograd import (
    GradientRule,
    TransformedReversal,
    batch_first,
    factor_of,
    vmapped,
)

__all__ = ["OPERATOR", "is_recording", "with_operator"]


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


class _OperatorReversal(TransformedReversal):
    """The same gradient rule around the operator, for what records operators below autograd.

    `torch.library.register_autograd` would do, if what it registers worked under `torch.func` transforms.
    """

    @staticmethod
    def forward(x: Tensor, coeff: Tensor, rule: GradientRule) -> Tensor:  # type: ignore[override]
        # Whoever records from here on gets the operator, unless it has taken the gradient already.
        if get_proxy_mode() is None or _compiler_has_the_gradient():
            return x.clone()
        with torch._C._AutoDispatchBelowAutograd():
            return _call_operator(x, coeff, rule.clip, rule.normalize)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.rule(grads[0], factor_of(ctx)), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        x, coeff = batch_first(info.batch_size, in_dims, *inputs[:2])
        return cast(Tensor, _OperatorReversal.apply(x, coeff, vmapped(inputs[2]))), 0


def is_recording() -> bool:
    """Returns whether something records operators: a compiler, an exporter, a tracer."""
    # torch.compile reads this code as well: it knows the first answer, and never meets the others.
    if torch.compiler.is_compiling() or _is_tracing():
        return True
    # Where no mode is active at all, which is quick to tell, there is no need to look for this one.
    may_be = _len_torch_dispatch_stack() or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    return bool(may_be) and get_proxy_mode() is not None


_PRE_DISPATCH = DispatchKey.PreDispatch


def with_operator(x: Tensor, coeff: float | Tensor, clip: float | None, normalize: bool) -> Tensor:
    """Calls the operator, for whoever records it."""
    return _call_operator(x, coeff if isinstance(coeff, Tensor) else _as_tensor(coeff, x), clip, normalize)


def _call_operator(x: Tensor, coeff: Tensor, clip: float | None, normalize: bool) -> Tensor:
    # A graph shows the options where there are any, and programs without them load in older versions.
    options = (clip, normalize) if clip is not None or normalize else ()
    return cast(Tensor, OPERATOR(x, coeff, *options))


def _as_tensor(coeff: float, x: Tensor) -> Tensor:
    """Returns `coeff` as precisely as a number would take part in a multiplication with `x`."""
    double = x.dtype in (torch.float64, torch.complex128)
    # torch.compile can keep a number symbolic through a product, but not through torch.full: it would compile
    # again for every new coefficient.
    return torch.ones((), dtype=torch.float64 if double else torch.float32, device=x.device) * coeff


def _with_gradient(
    x: Tensor, coeff: float | Tensor, clip: float | None = None, normalize: bool = False
) -> Tensor:
    return cast(Tensor, _OperatorReversal.apply(x, coeff, GradientRule(clip, normalize)))


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
OPERATOR: Any = torch.ops.grl_surgery.reverse_gradient.default

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
