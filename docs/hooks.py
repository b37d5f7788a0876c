"""What mkdocs adds to the pages while it builds the site.

- Files of the repository that are pages as well: CHANGELOG.md, CONTRIBUTING.md, and every example's code.
- Links from a page to a file outside of docs/ lead to that file's page, or become plain text.
- A page that nobody has put into the navigation stands under "More".
- A public name that no page of the reference describes stands under "More names".
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "README.zh.md": "zh/index.md",
    "SECURITY.md": "security.md",
}
"""Files outside of docs/, and the pages that show them."""

_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_OUTCOME = re.compile(r"<td( [^>]*)?>(<strong>LOST</strong>|reversed\b|error\b|wrong\b)")
_TABLE_OF_OUTCOMES = re.compile(r"<table>(?:(?!</table>).)*<strong>LOST</strong>.*?</table>", re.DOTALL)
_FENCE = re.compile(r"^(\s*`{3,}\w+) no-run$", re.MULTILINE)


def public_names() -> list[str]:
    """``grl_surgery.__all__``, without importing it."""
    tree = ast.parse((ROOT / "grl_surgery" / "__init__.py").read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return list(ast.literal_eval(statement.value))
    raise LookupError("grl_surgery/__init__.py assigns no __all__")


def described_names() -> list[str]:
    """What the pages of the reference describe, as ``::: grl_surgery.NAME``, in their order."""
    pages = sorted((DOCS / "reference").glob("*.md"))
    return [
        name
        for page in pages
        for name in re.findall(r"^::: grl_surgery\.([\w.]+)$", page.read_text("utf-8"), re.M)
    ]


def undescribed_names() -> list[str]:
    """Public names that no page of the reference describes."""
    return sorted(set(public_names()) - set(described_names()))


def example_pages() -> dict[str, str]:
    """The page of each example, by the example's path."""
    return {
        f"examples/{path.name}": f"examples/{path.stem}.md" for path in sorted(ROOT.glob("examples/*.py"))
    }


def on_config(config: Any) -> Any:
    """Leave out of the navigation what is not written yet, and put into it what nobody has put there."""
    config.nav = _existing(config.nav)
    placed = set(_leaves(config.nav))
    found = (path.relative_to(DOCS).as_posix() for path in sorted(DOCS.rglob("*.md")))
    more = [page for page in found if page not in placed]
    _section(config.nav, "Examples").extend(example_pages().values())
    _section(config.nav, "Guides").extend([{"More": more}] if more else [])
    if undescribed_names():
        _section(config.nav, "Reference").append({"More names": "reference/more.md"})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made of other files."""
    for source, page in PAGES.items():
        if not (DOCS / page).exists():
            files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for source, page in example_pages().items():
        code = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_example_page(source, code)))
    if names := undescribed_names():
        content = "# More names\n\n" + "\n\n".join(f"::: grl_surgery.{name}" for name in names)
        files.append(File.generated(config, "reference/more.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links out of docs/ to pages, and hide the words that only docs/run_blocks.py reads.

    A page without sections has no table of contents, and gets its place.
    """
    if not re.search(r"^(## |::: )", markdown, re.MULTILINE):
        page.meta.setdefault("hide", []).append("toc")
    # What is generated from a file in the root has that file's links.
    folder = "." if page.file.src_uri in PAGES.values() and page.file.generated_by else "docs"
    at = posixpath.join(folder, posixpath.dirname(page.file.src_uri) if folder == "docs" else "")
    generated = {**PAGES, **example_pages()}

    def lead(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(at, target))
        uri = generated.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if uri is None:
            return text
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return _FENCE.sub(r"\1", _LINK.sub(lead, markdown))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Keep the name of what a docstring refers to (``:func:`insert_grl```), and colour tables of outcomes.

    The table itself gets no class, because the theme lets only tables without a class scroll on a phone.
    """
    html = re.sub(r":(?:func|class|meth|data|mod):(?=<code>)", "", html).replace("<code>~", "<code>")
    html = _TABLE_OF_OUTCOMES.sub(_outcomes, html)
    if page is not None and page.file.src_uri == "errors.md":
        html = f'<div class="messages">{html}</div>'
    return html


def _outcomes(table: re.Match[str]) -> str:
    return f'<div class="outcomes">{_OUTCOME.sub(_outcome, table[0])}</div>'


def _outcome(cell: re.Match[str]) -> str:
    """A cell of a table of outcomes, with a class for its colour; the sign says the same without colour."""
    kind = "lost" if "LOST" in cell[2] else cell[2]
    sign = {"lost": "✗", "reversed": "✓", "error": "!", "wrong": "✗"}[kind]
    return f'<td{cell[1] or ""} class="{kind}"><span aria-hidden="true">{sign}</span> {cell[2]}'


def _example_page(source: str, code: str) -> str:
    fence = "````"
    return f'# {source.removeprefix("examples/")}\n\n{fence}python title="{source}"\n{code}\n{fence}\n'


def _existing(nav: Iterable[Any]) -> list[Any]:
    made = {*PAGES.values(), *example_pages().values()}
    kept: list[Any] = []
    for item in nav:
        if isinstance(item, dict):
            kept.append(
                {
                    title: value if isinstance(value, str) else _existing(value)
                    for title, value in item.items()
                }
            )
        elif item in made or (DOCS / item).exists():
            kept.append(item)
    return kept


def _section(nav: list[Any], title: str) -> list[Any]:
    """The pages of one tab."""
    return next(
        pages for item in nav if isinstance(item, dict) for name, pages in item.items() if name == title
    )


def _leaves(nav: Iterable[Any]) -> Iterator[str]:
    for item in nav:
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            for value in item.values():
                yield from [value] if isinstance(value, str) else _leaves(value)
