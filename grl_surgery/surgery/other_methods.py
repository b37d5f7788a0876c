"""Runs methods of the original's class other than its forward where a graph took the network's place."""

from __future__ import annotations

import inspect
import random
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from grl_surgery.capture.capture import module_paths
from grl_surgery.errors import SurgeryError, TracingError
from grl_surgery.surgery.scope_checks import check_points, refuse_ways_past
from grl_surgery.surgery.scope_hooks import hook_cuts
from grl_surgery.surgery.spliced_module import SplicedModule, as_original, disassemble
from grl_surgery.surgery.submodule_surgery import is_at_call

__all__ = ["call_method"]


class _RunsModules(BaseException):
    """A method is about to call a module: no handler of the method's own may take it for an error."""


def call_method(network: SplicedModule, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a method of the original's class on a graph.

    The method runs on the original, whose parts and tensors are those of the graph. If it calls modules, it
    runs again on a network of the original's class in which each cut is made at the call of a module.

    Args:
        network: The graph.
        name: Of the method.
        args: For the method, by position.
        kwargs: For the method, by name.

    Returns:
        What the method returns, or the graph where that is the network itself.

    Raises:
        SurgeryError: It calls modules, and a cut is inside a forward.
    """
    thread = threading.get_ident()

    def stop(module: nn.Module, *_: Any) -> None:
        if threading.get_ident() == thread:
            raise _RunsModules

    parts = [part for part in network.grl_original.modules() if not isinstance(part, torch.jit.ScriptModule)]
    held = [(part, _plain_state(part)) for part in parts]
    generators = torch.random.get_rng_state(), random.getstate()
    handles = [part.register_forward_pre_hook(stop) for part in parts]
    started = False
    try:
        with as_original(network) as original:
            result = getattr(original, name)(*args, **kwargs)
        started = not _runs_later(result)
    except _RunsModules:
        torch.random.set_rng_state(generators[0])
        random.setstate(generators[1])
        for part, state in held:
            part.__dict__.update(state)
    finally:
        for handle in handles:
            handle.remove()
    if not started:
        hooked = _with_hooks(network, name)
        with as_original(network) as original:
            result = getattr(hooked, name)(*args, **kwargs)
            _copy_state(hooked, original)
        result = original if result is hooked else result
    network.training = original.training
    return network if result is original else result


def _runs_later(result: Any) -> bool:
    """Whether a method has only begun: what it calls is called when somebody asks for the next item."""
    return inspect.isgenerator(result) or inspect.iscoroutine(result) or inspect.isasyncgen(result)


_HOOKED: weakref.WeakKeyDictionary[nn.Module, tuple[list[int], nn.Module]] = weakref.WeakKeyDictionary()


def _with_hooks(network: SplicedModule, name: str) -> nn.Module:
    """The network with the cuts of a graph made at the calls of modules, over the same tensors.

    Raises:
        SurgeryError: A cut is inside a forward.
    """
    parts = [id(part) for part in network.grl_original.modules()]
    known, hooked = _HOOKED.get(network, ([], None))
    if hooked is None or known != parts:
        hooked = _made(network, name)
        _HOOKED[network] = parts, hooked
    for part, twin in _pairs(network.grl_original, hooked):
        twin.__dict__["_parameters"], twin.__dict__["_buffers"] = part._parameters, part._buffers
    _copy_state(network.grl_original, hooked)
    return hooked


def _made(network: SplicedModule, name: str) -> nn.Module:
    tree, cuts, _ = disassemble(network)
    modules = {cut.module: network._modules[cut.module] for cut in cuts}
    paths = module_paths(tree)
    try:
        for cut in cuts:
            if not is_at_call(tree, cut, paths):
                raise TracingError(f"{cut.at} is inside a forward")
            check_points(tree, cut, paths, TracingError(str(cut.at)))
            refuse_ways_past(tree, cut, paths)
        return hook_cuts(tree, cuts, cuts, modules)  # type: ignore[arg-type]
    except SurgeryError as error:
        raise SurgeryError(
            f"{name}() of {type(network).__name__} runs modules, past the graph that holds the reversals "
            f"({str(error).partition(chr(10))[0]})",
            example="m(x); or a cut at the output of a module, such as after='layer3'",
        ) from error


def _pairs(network: nn.Module, twin: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The modules of a network with those of another one that are their copies, scripted ones left out."""
    twins = dict(twin.named_modules())
    named = network.named_modules()
    pairs = [(part, twins[path]) for path, part in named if twins.get(path, part) is not part]
    return [pair for pair in pairs if not isinstance(pair[0], torch.jit.ScriptModule)]


def _copy_state(source: nn.Module, target: nn.Module) -> None:
    """Give the modules of a network the modes and the plain attributes that those of another one have."""
    for part, twin in _pairs(source, target):
        twin.__dict__.update(_plain_state(part))


def _plain_state(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in module.__dict__.items() if type(value) in _PLAIN}


_PLAIN = (bool, int, float, str, type(None), torch.Tensor)
