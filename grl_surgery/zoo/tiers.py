"""Tries one network in one tier, and returns a row whatever happens."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from typing import Literal

import torch

from grl_surgery.errors import one_line
from grl_surgery.zoo.ledger import NotProved, Row
from grl_surgery.zoo.names import family
from grl_surgery.zoo.numeric import check_numbers
from grl_surgery.zoo.structural import check_structure

__all__ = ["Tier", "check", "failure", "numeric", "structural", "versions"]

Tier = Literal["structural", "numeric"]


def structural(source: str) -> Row:
    """The structural tier of one network; see :func:`check_structure`."""
    return check(source, "structural")


def numeric(source: str) -> Row:
    """The numeric tier of one network; see :func:`check_numbers`."""
    return check(source, "numeric")


def check(source: str, tier: Tier) -> Row:
    """Try one network.

    Raises:
        MemoryError: There is not enough memory.
    """
    start = time.process_time()
    try:
        with _undisturbed():
            row = check_structure(source) if tier == "structural" else check_numbers(source)
            return replace(row, versions=versions(source))
    except MemoryError:
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise MemoryError from error
        reason = str(error) if isinstance(error, NotProved) else one_line(error)
        return failure(source, tier, reason, time.process_time() - start)


def failure(source: str, tier: Tier, reason: str, seconds: float) -> Row:
    """The row of a network that cannot be done."""
    return Row(
        source,
        family(source),
        tier,
        "failed",
        reason[:300],
        seconds=round(seconds, 2),
        versions=versions(source),
    )


def versions(source: str) -> str:
    """By which torch and which library a network is measured.

    Example:
        >>> versions("timm/resnet18").split()[::2]
        ['torch', 'timm']
    """
    library = source.partition("/")[0]
    return f"torch {metadata.version('torch').partition('+')[0]}, {library} {metadata.version(library)}"


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """One thread, and nothing of what networks say while they are built."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
