"""The site: public names have a place, links lead somewhere, and the translation runs the same code."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
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


@pytest.mark.parametrize(
    ("translation", "original"),
    [
        (DOCS / "zh" / "index.md", DOCS / "index.md"),
        (DOCS / "zh" / "quickstart.md", DOCS / "quickstart.md"),
        (ROOT / "README.zh.md", ROOT / "README.md"),
    ],
    ids=["index", "quickstart", "README"],
)
def test_the_translation_has_the_same_blocks(translation: Path, original: Path) -> None:
    assert fenced(translation) == fenced(original)


def outcomes(path: Path) -> dict[str, dict[str, str]]:
    """The first table of outcomes in a page: by context, by library (its name without "number", "tensor")."""
    lines = path.read_text("utf-8").splitlines()
    tables = itertools.groupby(lines, lambda line: line.startswith("|"))
    rows = next(part for is_table, part in ((k, [*v]) for k, v in tables) if is_table and "LOST" in str(part))
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    plain = lambda cell: re.sub(r"[🟢🔴🟡]|\*\*|: \w+$", "", cell).strip()  # noqa: E731
    names = [re.sub(r"pasted Function(, number)?$|粘贴的 Function$", "pasted", name) for name in cells[0]]
    return {row[0]: dict(zip(names[1:], map(plain, row[1:]), strict=True)) for row in cells[2:]}


@pytest.mark.parametrize(
    "page",
    [
        ROOT / "README.md",
        ROOT / "README.zh.md",
        DOCS / "index.md",
        DOCS / "zh" / "index.md",
        DOCS / "comparison.md",
    ],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_tables_that_compare_libraries_repeat_what_was_measured(page: Path) -> None:
    measured, shown = outcomes(DOCS / "why.md"), outcomes(page)
    for context, row in shown.items():
        assert row == {library: measured[context][library] for library in row}, context


def test_the_badges_say_what_the_project_and_the_ledger_say() -> None:
    command = [sys.executable, str(DOCS / "make_badges.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0
    shown = set(re.findall(r"badges/(\w+)\.svg", (ROOT / "README.md").read_text("utf-8")))
    assert shown == {path.stem for path in (DOCS / "images" / "badges").glob("*.svg")}


def test_outcomes_in_tables_have_a_colour_and_a_sign(hooks: ModuleType) -> None:
    row = '<tr><td>eager</td><td><strong>LOST</strong></td><td style="x">reversed</td><td>error: X</td></tr>'
    html = hooks.on_page_content(
        f"<table>{row}</table><table><tr><td>wrong</td></tr></table>", None, None, None
    )
    assert html == (
        '<div class="outcomes"><table><tr><td>eager</td>'
        '<td class="lost"><span aria-hidden="true">✗</span> <strong>LOST</strong></td>'
        '<td style="x" class="reversed"><span aria-hidden="true">✓</span> reversed</td>'
        '<td class="error"><span aria-hidden="true">!</span> error: X</td></tr></table></div>'
        "<table><tr><td>wrong</td></tr></table>"
    )


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("*.md"))], ids=lambda p: p.name)
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


def example_sections(text: str, *extensions: str) -> list[str]:
    """The kinds of sections that griffe finds in the docstring of one function, with these extensions."""
    griffe = pytest.importorskip("griffe")
    loaded = griffe.load_extensions(*extensions)
    code = {"__init__.py": f'def shown():\n    """{text}"""\n'}
    with griffe.temporary_visited_package("package", code, extensions=loaded) as package:
        return [section.kind.value for section in package["shown"].docstring.parse("google")]


def test_an_example_in_a_docstring_is_code_in_the_reference() -> None:
    text = "Add.\n\n    Example:\n        >>> 1 + 1\n        2\n    "
    assert example_sections(text) == ["text", "admonition"]  # what the extension is there for
    assert example_sections(text, str(DOCS / "griffe_examples.py")) == ["text", "examples"]


def test_the_site_reads_examples_with_the_extension() -> None:
    assert "extensions: [docs/griffe_examples.py]" in (ROOT / "mkdocs.yml").read_text("utf-8")
