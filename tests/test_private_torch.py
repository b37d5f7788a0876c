"""Which private names of torch the package uses, and where: no more than docs/architecture.md lists."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import torch
from torch import fx, nn

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grl_surgery"

# What every module and every graph has and torch gives no public way to: containers that are exchanged whole.
HOLDERS = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_flat_weights_names"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_of_torch() -> set[str]:
    """Underscored attributes of torch's modules, graphs, tracers, nodes and tensors."""
    graph = fx.Graph()
    instances = (
        nn.Module(),
        fx.GraphModule(nn.Module(), graph),
        graph,
        graph.placeholder("x"),
        torch.ones(1),
    )
    kinds = (torch, fx, nn, fx.Tracer, fx.Proxy, fx.Interpreter, nn.LSTM(1, 1))
    return {name for thing in (*instances, *kinds) for name in dir(thing) if is_private(name)}


def uses() -> dict[str, set[str]]:
    """From each private name of torch to the files of the package that use it."""
    known, found = private_of_torch(), defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                for part in filter(is_private, parts):
                    found[part].add(name)
            elif isinstance(node, ast.Attribute) and node.attr in known:
                found[node.attr].add(name)
    return found


def documented() -> str:
    """The section of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return text.partition("## Private torch")[2].partition("\n## ")[0]


def test_every_private_name_of_torch_is_listed_with_the_files_that_use_it():
    section = documented()
    rows = {line.split("|")[1].strip(" `"): line for line in section.splitlines() if line.startswith("| `")}
    found = uses()
    assert {name: rows.get(name, "") for name in found} == {
        name: rows[name] for name in found if name in rows
    }
    missing = [
        f"{name} in {file}"
        for name, files in found.items()
        for file in files
        if name not in HOLDERS and file not in rows[name]
    ]
    assert not missing


def test_torch_still_has_what_is_listed():
    module, graph = nn.Module(), fx.Graph()
    assert all(hasattr(module, name) for name in HOLDERS - {"_flat_weights_names"})
    assert hasattr(nn.LSTM(1, 1), "_flat_weights_names")
    assert hasattr(graph, "_codegen")
    assert hasattr(fx.GraphModule(nn.Module(), graph), "_graph")
    assert hasattr(torch.ones(1), "_base")
