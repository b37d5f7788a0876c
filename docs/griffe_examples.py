"""Read the docstring section ``Example:`` as griffe reads ``Examples:``.

Without this, griffe takes ``Example:`` for the title of a note, and Markdown draws each ``>>>`` as three
nested quotations. mkdocs.yml names this file among the extensions of mkdocstrings.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_TITLE = re.compile(r"^(\s*)Example:[ \t]*$", re.MULTILINE)


class ExampleSections(griffe.Extension):
    """Rename the section before the docstring is parsed; the source files keep what they say."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the sections of one module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _TITLE.sub(r"\1Examples:", obj.docstring.value)
