"""The site: public names have a place, links lead somewhere, and the translation runs the same code."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import grl_surgery as gs

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """docs/hooks.py as a module."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fenced(path: Path) -> list[str]:
    return re.findall(r"^```.*?^```$", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_the_reference_describes_every_public_name_once_and_no_other(hooks: ModuleType) -> None:
    assert hooks.public_names() == list(gs.__all__)
    described = [name for name in hooks.described_names() if not name.startswith("integrations.")]
    assert max(Counter(described).values()) == 1
    assert set(described) <= set(gs.__all__)
    # What nobody has placed yet stands on a page of its own.
    assert set(described) | set(hooks.undescribed_names()) == set(gs.__all__)


def test_the_reference_describes_every_integration(hooks: ModuleType) -> None:
    modules = {path.stem for path in (ROOT / "grl_surgery" / "integrations").glob("[!_]*.py")}
    described = {name.split(".")[1] for name in hooks.described_names() if name.startswith("integrations.")}
    assert described == modules


@pytest.mark.parametrize("name", ["index.md", "quickstart.md"])
def test_the_translation_has_the_same_blocks(name: str) -> None:
    assert fenced(DOCS / "zh" / name) == fenced(DOCS / name)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    prose = re.sub(r"^(`{3,}).*?^\1$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", re.sub(r"`[^`\n]*`", "", prose))
    made = {"changelog.md", "contributing.md"}  # by docs/hooks.py
    assert [t for t in targets if not (page.parent / t).exists() and t not in made] == []


class Page:
    """What a hook is given of a page."""

    class file:
        src_uri, generated_by = "tutorials/x.md", None

    def __init__(self) -> None:
        self.meta: dict[str, Any] = {}


@pytest.mark.parametrize(("markdown", "hidden"), [("# A\n\n### B", {"hide": ["toc"]}), ("# A\n\n## B", {})])
def test_a_page_without_sections_gets_the_place_of_the_contents(
    hooks: ModuleType, markdown: str, hidden: dict[str, Any]
) -> None:
    page = Page()
    hooks.on_page_markdown(markdown, page, None, None)
    assert page.meta == hidden


def test_links_out_of_the_docs_lead_to_pages_or_become_text(hooks: ModuleType) -> None:
    lead = lambda text: hooks.on_page_markdown(text, Page(), None, None)  # noqa: E731
    assert lead("[a](../../examples/cnn.py)") == "[a](../examples/cnn.md)"
    assert lead("[a](../../CHANGELOG.md)") == "[a](../changelog.md)"
    assert lead("[a](../../tests/test_docs.py)") == "a"
    assert lead("[a](heads.md#b) ![c](../images/d.png)") == "[a](heads.md#b) ![c](../images/d.png)"
    assert lead("```python no-run\nx\n```") == "```python\nx\n```"
