"""Downloads weights from a hub, and turns every way of failing into one line."""

from __future__ import annotations

import importlib
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from grl_surgery.errors import SurgeryError, one_line

__all__ = ["downloading"]

# Seconds without an answer after which a hub counts as out of reach.
_PATIENCE = 5.0


@contextmanager
def downloading(source: str) -> Iterator[None]:
    """While the body downloads: no long waits, and every failure as one ``SurgeryError``.

    Example:
        >>> with downloading("timm/resnet18"):
        ...     raise OSError("disk full")
        Traceback (most recent call last):
            ...
        grl_surgery.errors.SurgeryError: the weights of timm/resnet18 are neither cached nor ...

    Args:
        source: What is being downloaded, for the message.

    Raises:
        SurgeryError: The body raised any exception.
    """
    unreachable = _unreachable_hub() if source.startswith(("timm/", "transformers/")) else None
    try:
        with _cache_only(unreachable is not None), _socket_timeout(_PATIENCE):
            yield
    except Exception as error:
        reason = unreachable or one_line(error)
        raise SurgeryError(
            f"the weights of {source} are neither cached nor to be had from the hub ({reason}): "
            "use your own weights (--checkpoint FILE, checkpoint=FILE), or leave out --pretrained"
        ) from error


def _unreachable_hub() -> str | None:
    """Why Hugging Face's hub cannot be reached; None where it can, or where that is not known."""
    constants = _hub_constants()
    if constants is None or constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return None
    parts = urlsplit(constants.ENDPOINT)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_PATIENCE).close()
    except OSError as error:
        return f"{parts.hostname}: {one_line(error)}"
    return None


@contextmanager
def _cache_only(wanted: bool) -> Iterator[None]:
    """Hugging Face's client without its retries, which last for almost a minute where there is no network."""
    constants = _hub_constants() if wanted else None
    if constants is None:
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_constants() -> Any:
    try:
        return importlib.import_module("huggingface_hub.constants")
    except ImportError:
        return None


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """A limit for torch.hub's downloads, which otherwise wait for as long as the system does."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds if before is None else before)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
