"""The reasons for which a trace stops."""

from __future__ import annotations

__all__ = ["GlobalHookError", "OpaqueValueInspected", "TraceStopped"]


class TraceStopped(Exception):
    """Tracing came to an end inside the forward of the module at ``path``."""

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


class OpaqueValueInspected(TraceStopped):
    """The forward inspected the output of ``hidden``, a module that was not traced into."""

    def __init__(self, message: str, path: str, hidden: str) -> None:
        super().__init__(message, path)
        self.hidden = hidden


class GlobalHookError(TraceStopped):
    """Hooks that are registered for every module run around the module at ``path``."""
