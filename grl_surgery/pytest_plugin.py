"""A pytest fixture that fails if a network's reversal is lost.

    def test_the_reversal_is_alive(assert_flips):
        assert_flips(network(), images)

pytest finds it by itself where grl_surgery is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

__all__ = ["assert_flips"]


@pytest.fixture
def assert_flips() -> Callable[..., None]:
    """``grl_surgery.assert_flips``: fails where a reversal is lost without an error."""

    def check(model: Any, example_inputs: Any = None, **options: Any) -> None:
        __tracebackhide__ = True
        from grl_surgery.doctor.diagnose import assert_flips

        assert_flips(model, example_inputs, **options)

    return check
