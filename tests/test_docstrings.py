"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import grl_surgery

MODULES = [
    module.name
    for module in pkgutil.walk_packages(grl_surgery.__path__, "grl_surgery.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_are_true(name: str) -> None:
    module = importlib.import_module(name)
    options = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    assert doctest.testmod(module, optionflags=options).failed == 0


def test_all_public_names_but_errors_have_examples() -> None:
    silent = [
        name
        for name in grl_surgery.__all__
        if callable(thing := getattr(grl_surgery, name))
        and not (isinstance(thing, type) and issubclass(thing, Exception))
        and ">>>" not in (thing.__doc__ or "")
    ]
    assert silent == []
