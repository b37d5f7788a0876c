"""Copies a module tree without copying a tensor: new modules, the same parameters and buffers."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import fx, nn

from grl_surgery.isolation.object_graph import explore, remake, slots_of

__all__ = [
    "COMPILED",
    "ORIGINAL",
    "RedirectedHook",
    "ReferenceRemapper",
    "copy_attributes",
    "find_external_reference",
    "replace_submodule",
    "share_copy",
    "way_to_forward",
]

COMPILED = "_compiled_call_impl"
"""The attribute in which ``module.compile()`` keeps a call that is bound to the module itself."""
ORIGINAL = "_grl_original"
"""The attribute in which a spliced module keeps the network that it was made from."""


class RedirectedHook:
    """A hook that makes itself anew for a copy of the network."""

    def redirected(self, made: dict[int, Any]) -> RedirectedHook:
        """The same hook for a copy.

        Args:
            made: From the id of an object of the network to its copy; what is shared between hooks is added.
        """
        raise NotImplementedError


def share_copy(
    model: nn.Module, only: Iterable[nn.Module] | None = None, made: dict[int, Any] | None = None
) -> nn.Module:
    """Copy a module tree without copying a tensor.

    Every module of the copy is a new object of the same class with its own mode flag, hooks, containers and
    attributes, so that nothing done to its structure reaches the original. Parameters and buffers are the
    same tensors. What leads to a module of the tree (a container, a function, an object) leads to its copy.
    Scripted modules cannot be taken apart and stay shared, and no copy is compiled or disabled.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3))
        >>> twin = share_copy(model).eval()
        >>> twin[0].weight is model[0].weight, model[0].training
        (True, True)

    Args:
        model: Root of the tree.
        only: Copy only these modules and keep the others as they are; all of them by default.
        made: Is filled with what was copied: from the id of each module and container to its copy.

    Returns:
        The root of the new tree.
    """
    chosen = _whole(model) if only is None else only
    modules = [module for module in chosen if not isinstance(module, torch.jit.ScriptModule)]
    twins: dict[int, Any] = {id(module): object.__new__(type(module)) for module in modules}
    redirection = ReferenceRemapper(twins, modules)
    for module in modules:
        copy_attributes(module, twins[id(module)], redirection)
    if made is not None:
        made.update(redirection.made)
    return cast(nn.Module, twins.get(id(model), model))


def copy_attributes(module: nn.Module, twin: nn.Module, redirection: ReferenceRemapper) -> None:
    """Give a new object of a module's class what the module has, leading to the copies of modules.

    Args:
        module: What is copied.
        twin: An object of its class that has no attributes yet.
        redirection: Knows what stands in the place of each module.
    """
    attributes = twin.__dict__
    attributes.update(module.__dict__)
    attributes.pop(COMPILED, None)
    for key, value in attributes.items():
        if type(value) not in _ATOMS:
            if key in _HOOKS:  # most of a module's attributes, so they are worth the haste
                attributes[key] = redirection.hooks(value) if value else OrderedDict()
            else:
                attributes[key] = redirection.of(value)
    if type(module).__basicsize__ > _WITHOUT_SLOTS:
        for slot, value in slots_of(module):
            slot.__set__(twin, redirection.of(value))
    prepare: Any = getattr(type(twin), "_after_share_copy", None)
    if prepare is not None:
        prepare(twin)


def replace_submodule(tree: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module into another one's place, under every name and wherever else the tree refers to it.

    What ``new`` has copied of ``old`` takes the place of what it is a copy of.

    Args:
        tree: A tree of its own, as :func:`share_copy` makes it; it is changed.
        old: A module of it.
        new: What to call instead.
    """
    inside = dict(new.named_modules())
    pairs = [(module, inside.get(path)) for path, module in old.named_modules()]
    twins = {id(module): twin for module, twin in pairs if twin is not None and twin is not module}
    redirection = ReferenceRemapper(twins)
    for module in {id(m): m for root in (tree, new) for m in _whole(root) if m is not old}.values():
        for key, value in list(module.__dict__.items()):
            if type(value) in _ATOMS or key == ORIGINAL:
                continue
            if key in _HOOKS:  # in place: handles know this very dict
                value.update((number, redirection.hook(hook)) for number, hook in list(value.items()))
            elif redirection.leads(value):
                module.__dict__[key] = redirection.of(value)
        for slot, value in slots_of(module):
            if redirection.leads(value):
                slot.__set__(module, redirection.of(value))


def find_external_reference(tree: nn.Module, wanted: Callable[[nn.Module], bool]) -> str | None:
    """The attribute, if there is one, through which a tree reaches a module that is none of its own.

    Args:
        tree: Root of the tree. What its hooks refer to is not looked at.
        wanted: Whether a module is one of those to look for.

    Returns:
        The attribute's path, as in ``"backbone.stages"``.
    """
    own = {id(module) for module in tree.modules()}
    seen: dict[int, Any] = {}
    for path, module in tree.named_modules():
        held = [(key, value) for key, value in module.__dict__.items() if key not in {*_HOOKS, ORIGINAL}]
        for key, value in (*held, *((slot.__name__, value) for slot, value in slots_of(module))):
            if any(isinstance(item, nn.Module) and wanted(item) for item in _reached(value, own, seen)):
                return f"{path}.{key}" if path else key
    return None


def way_to_forward(tree: nn.Module, module: nn.Module) -> str | None:
    """The attribute, if there is one, through which a tree reaches the bound ``forward`` of a module.

    Whoever calls that goes past the module's hooks. What the module itself holds does not count: a forward
    that was set on it, and the one that this one calls, run inside its own call.
    """
    seen: dict[int, Any] = {}
    own = {id(part) for part in tree.modules()}
    for path, part in tree.named_modules():
        if part is module:
            continue
        for key, value in part.__dict__.items():
            if key in _HOOKS or type(value) in _ATOMS:
                continue
            for item in _reached(value, own, seen):
                if (
                    type(item) is types.MethodType
                    and item.__self__ is module
                    and item.__name__ in ("forward", "_call_impl")
                ):
                    return f"{path}.{key}" if path else key
    return None


def _whole(model: nn.Module) -> list[nn.Module]:
    """Every module of the tree, and the original trees that spliced modules keep beside themselves."""
    found: dict[int, nn.Module] = {}
    rest: list[nn.Module | None] = [model]
    while rest:
        module = rest.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            rest += module._modules.values()
            rest.append(module.__dict__.get(ORIGINAL))
    return list(found.values())


_WITHOUT_SLOTS = nn.Module.__basicsize__
_HOOKS = frozenset(key for key, value in nn.Module().__dict__.items() if "hooks" in key and value == {})


# ------------------------------------------------------------------------------- what leads to a module


def _held(value: Any) -> Iterable[Any]:
    """List what a value refers to; for a function without the globals, for a weak reference its target."""
    kind = type(value)
    if kind is types.FunctionType:
        return value.__closure__ or (), value.__defaults__, value.__kwdefaults__, value.__dict__
    if kind in _WEAK:
        return (_target(value),)
    return gc.get_referents(value)


def _parts(value: Any) -> list[Any]:
    return [part for part in _held(value) if type(part) not in _ATOMS]


def _is_followed(part: Any, user: Any) -> bool:
    return type(user) not in _WEAK and not issubclass(type(part), _ENDS)


def _target(weak: Any) -> Any:
    """Return the target of a weak reference; for a method, its object."""
    with contextlib.suppress(ReferenceError, AttributeError):  # there is nothing left
        target = weak.__repr__ if type(weak) in weakref.ProxyTypes else weak()
        return target if type(weak) is weakref.ref else target.__self__
    return None


def _reached(value: Any, own: Collection[int], seen: dict[int, Any]) -> Iterator[Any]:
    """Everything, once, that can be reached from a value without going through a module of one's own."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        is_end = type(item) in _ATOMS or id(item) in own or id(item) in seen
        if not is_end and not issubclass(type(item), _LEAVES):
            seen[id(item)] = item
            yield item
            waiting += _held(item)


class ReferenceRemapper:
    """Makes values anew that lead to modules, so that they lead to the modules' twins instead.

    Args:
        twins: From the id of each module to what stands in its place.
        modules: Those of them whose hooks are copied as well, so that handles lead to the copies.
    """

    def __init__(self, twins: Mapping[int, Any], modules: Iterable[nn.Module] = ()) -> None:
        self.twins = twins
        self.made: dict[int, Any] = dict(twins)
        self.modules = modules
        self.known: dict[int, bool] = {}
        self.alive: list[Any] = []  # what is known by its id

    @functools.cached_property
    def owned(self) -> set[int]:
        """The dicts of hooks that are copied."""
        return {id(module.__dict__[key]) for module in self.modules for key in _HOOKS if module.__dict__[key]}

    def leads(self, value: Any) -> bool:
        """Whether a value is one of the modules or refers to one, over however many others."""
        if id(value) in self.twins:
            return True
        if id(value) not in self.known:
            self.explore(value)
        return self.known[id(value)]

    def explore(self, value: Any) -> None:
        """Find out for a value, and for everything that it refers to, whether it leads to a module."""
        if issubclass(type(value), _ENDS):
            self.known[id(value)] = False
            self.alive.append(value)
        else:
            self.alive.append(explore(value, _parts, self.is_target, _is_followed, self.known))

    def is_target(self, part: Any, user: Any) -> bool:
        """Whether it is one of the modules, or the hooks of one that a handle knows."""
        if id(part) in self.twins:
            return True
        return type(user) is weakref.ref and type(part) is OrderedDict and id(part) in self.owned

    # -- the same value, leading to the twins

    def of(self, value: Any) -> Any:
        """``value`` with its containers copied, each once, and every module in it replaced by its twin.

        What is no plain container is made anew only where it leads to one of the modules; where it cannot be
        made anew, it stays as it is.
        """
        kind = type(value)
        if id(value) in self.made:
            return self.made[id(value)]
        if id(value) in self.twins:
            return self.twins[id(value)]
        if kind in _DICTS:
            return self.mapping(value)
        if kind in _ATOMS:
            return value
        if kind is list:
            copied = self.made[id(value)] = []
            copied.extend(item if type(item) in _ATOMS else self.of(item) for item in value)
            return copied
        if kind is tuple:
            plain = _ATOMS.issuperset(map(type, value))
            return value if plain else tuple([self.of(item) for item in value])
        if kind is set:
            plain = _ATOMS.issuperset(map(type, value))
            return self.made.setdefault(id(value), value.copy() if plain else set(map(self.of, value)))
        return self.anew(value) if self.leads(value) else value

    def mapping(self, value: Any) -> Any:
        """A copied dict; its keys may be modules as well."""
        copied = self.made[id(value)] = value.copy()
        has_plain_keys = _ATOMS.issuperset(map(type, value))
        if has_plain_keys and _ATOMS.issuperset(map(type, value.values())):
            return copied
        if not has_plain_keys:
            copied.clear()
        for key, item in value.items():
            if not has_plain_keys or type(item) not in _ATOMS:
                copied[key if has_plain_keys else self.of(key)] = self.of(item)
        return copied

    def anew(self, value: Any) -> Any:
        """Make anew what leads to a module and is no plain container."""
        kind = type(value)
        if kind is types.FunctionType:
            return self.function(value, self.leads, self.of)
        if kind is types.MethodType:
            return self.method(value)
        if kind is functools.partial:
            return self.partial(value, self.of)
        if kind in _WEAK:
            return self.weak(value)
        if kind in (types.BuiltinMethodType, types.MethodWrapperType):
            return getattr(self.of(value.__self__), value.__name__)
        return self.object(value)

    def function(self, value: Any, leads: Callable[[Any], bool], of: Callable[[Any], Any]) -> Any:
        """The same code with cells and defaults of its own, where these lead to a module."""
        cells: dict[int, Any] = {id(c): c for c in value.__closure__ or () if leads(c)}
        new = {key: self.made.setdefault(key, types.CellType()) for key in cells}
        closure = tuple(new.get(id(cell), cell) for cell in value.__closure__ or ()) or None
        twin: Any = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, closure)
        self.made[id(value)] = twin
        for name in functools.WRAPPER_ASSIGNMENTS:
            setattr(twin, name, getattr(value, name))
        for key, cell in cells.items():
            new[key].cell_contents = of(cell.cell_contents)
        twin.__defaults__, twin.__kwdefaults__ = of(value.__defaults__), of(value.__kwdefaults__)
        twin.__dict__.update((key, of(item)) for key, item in value.__dict__.items())
        return twin

    def method(self, value: Any) -> Any:
        """The method of what stands in its object's place, which may be of another class."""
        owner = self.of(value.__self__)
        if type(owner) is type(value.__self__):
            return types.MethodType(self.of(value.__func__), owner)
        is_its_own = getattr(type(value.__self__), value.__name__, None) is value.__func__
        return getattr(owner, value.__name__, value) if is_its_own else value

    def partial(self, value: Any, of: Callable[[Any], Any]) -> Any:
        """A partial call of what stands in the function's place."""
        keywords = {name: of(item) for name, item in value.keywords.items()}
        twin = functools.partial(of(value.func), *map(of, value.args), **keywords)
        twin.__dict__.update((key, of(item)) for key, item in value.__dict__.items())
        return twin

    def weak(self, value: Any) -> Any:
        """A weak reference to a module, to a method of one, or to the hooks of one."""
        target = _target(value)
        if type(value) in weakref.ProxyTypes:
            return weakref.proxy(self.of(target))
        if type(value) is weakref.WeakMethod:
            return weakref.WeakMethod(self.method(value()))
        new = self.hooks(target) if id(target) in self.owned else self.of(target)
        return weakref.ref(new, value.__callback__)

    def object(self, value: Any) -> Any:
        """An object of the same class with its content redirected."""
        return remake(value, self.of, lambda twin: self.made.setdefault(id(value), twin), self.of)

    # -- hooks

    def hooks(self, hooks: Any) -> Any:
        """A module's hooks, copied."""
        if id(hooks) not in self.made:
            self.made[id(hooks)] = OrderedDict((number, self.hook(hook)) for number, hook in hooks.items())
        return self.made[id(hooks)]

    def hook(self, hook: Any) -> Any:
        """A hook that knows a module knows its twin; what else it refers to stays the user's."""
        kind = type(hook)
        if id(hook) in self.twins:
            return self.twins[id(hook)]
        if isinstance(hook, RedirectedHook):
            return hook.redirected(self.made)
        if self.is_state(hook):
            return self.of(hook)
        if kind is types.MethodType and (id(hook.__self__) in self.twins or self.is_state(hook.__self__)):
            return self.method(hook)
        if kind is types.FunctionType and any(map(self.holds, hook.__closure__ or ())):
            return self.function(hook, self.holds, self.hook)
        if kind is functools.partial:
            return self.partial(hook, self.hook)
        if getattr(hook, "with_module", None) is True:  # torch keeps some behind a weak reference
            twin = copy.copy(hook)
            twin.module = weakref.ref(self.twins.get(id(hook.module()), hook.module()))
            return twin
        return hook

    def holds(self, cell: Any) -> bool:
        """Whether a cell of a function holds one of the modules itself, or what one keeps in an attribute."""
        return any(id(item) in self.twins or self.is_state(item) for item in gc.get_referents(cell))

    def is_state(self, value: Any) -> bool:
        """Whether a module that is copied has a value in an attribute, directly or inside another value."""
        return type(value) not in _ATOMS and not issubclass(type(value), _ENDS) and id(value) in self.state

    @functools.cached_property
    def state(self) -> dict[int, Any]:
        """What the copied modules keep in attributes of their own."""
        seen: dict[int, Any] = {}
        for module in self.modules:
            for key, value in module.__dict__.items():
                if key not in _HOOKS and key not in _STRUCTURE:
                    for _ in _reached(value, self.twins, seen):
                        pass
        return seen


_STRUCTURE = frozenset({"_parameters", "_buffers", "_modules", ORIGINAL, COMPILED})
_DICTS = frozenset({dict, OrderedDict, defaultdict})
_ATOMS = frozenset(
    {bool, int, float, str, type(None), torch.Size, torch.Tensor, nn.Parameter, torch.dtype, torch.device}
)
# It is followed to a module and no further: nothing else would keep a copy alive.
_WEAK = frozenset({weakref.ref, weakref.WeakMethod, *weakref.ProxyTypes})
# What refers to no module of a tree, or not in order to call it.
_LEAVES = (torch.Tensor, type, types.ModuleType, fx.Graph, fx.Node)
_ENDS = (*_LEAVES, nn.Module)
