"""Writes the forward of a graph as code that a person would write."""

from __future__ import annotations

import ast
import re
from typing import Any

from torch import fx, nn

__all__ = ["forward_lines"]


def forward_lines(module: nn.Module, graph: fx.Graph, name: str) -> tuple[list[str], dict[str, Any]]:
    """The lines of a method, and what they use that has to be imported, by name.

    Example:
        >>> net = nn.Sequential(nn.ReLU(), nn.ReLU())
        >>> graph = fx.symbolic_trace(net).graph
        >>> forward_lines(net, graph, "forward")[0][-2:]
        ['    _1 = self[1](_0)', '    return _1']

    Args:
        module: Whose attributes the graph calls.
        graph: Not changed.
        name: Of the method.
    """
    code = _copied(graph).python_code(root_module="self")
    source = re.sub(r";  \w+ = (\w+ = )*None", "", code.src[code.src.index("def forward") :])
    function = ast.parse(source.replace("def forward", f"def {name}", 1)).body[0]
    assert isinstance(function, ast.FunctionDef)
    function = _Tidy(module).visit(function)
    function.body = _folded([line for line in function.body if not isinstance(line, ast.Pass)])
    text = ast.unparse(ast.fix_missing_locations(function))
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return text.splitlines(), {key: value for key, value in code.globals.items() if key in names}


def _copied(graph: fx.Graph) -> fx.Graph:
    """A copy, which writes the same arguments and none of the annotations that surgery adds."""
    plain = fx.Graph()
    result = plain.graph_copy(graph, {})
    plain.set_codegen(graph._codegen)
    plain.output(result)
    return plain


class _Tidy(ast.NodeTransformer):
    """``getattr(self.layer3, "0")`` becomes ``self.layer3[0]``, ``x[slice(1, None)]`` becomes ``x[1:]``."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Indices of containers."""
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Name(id="getattr"), args=[holder, ast.Constant(value=str(key))]):
                if key.isdigit() and self._is_container(holder):
                    return ast.Subscript(holder, ast.Constant(int(key)), ast.Load())
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """Slices."""
        self.generic_visit(node)
        if isinstance(node.slice, ast.Tuple):
            node.slice = ast.Tuple([_as_slice(item) for item in node.slice.elts], ast.Load())
        else:
            node.slice = _as_slice(node.slice)
        return node

    def _is_container(self, node: ast.AST) -> bool:
        path = re.sub(r"\[(\d+)\]", r".\1", ast.unparse(node)).removeprefix("self").lstrip(".")
        try:
            held = self.module.get_submodule(path)
        except AttributeError:
            return False
        return isinstance(held, (nn.Sequential, nn.ModuleList))


def _as_slice(node: ast.expr) -> ast.expr:
    match node:
        case ast.Call(func=ast.Name(id="slice"), args=[lower, upper, step]):
            parts = [None if ast.unparse(part) == "None" else part for part in (lower, upper, step)]
            return ast.Slice(*parts)
    return node


def _folded(lines: list[ast.stmt]) -> list[ast.stmt]:
    """Names that are only read once, in the very next line, for what is no computation: written there."""
    uses: dict[str, int] = {}
    for line in lines:
        for node in ast.walk(line):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                uses[node.id] = uses.get(node.id, 0) + 1
    kept: list[ast.stmt] = []
    for line in lines:
        match kept[-1] if kept else None:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Attribute() | ast.Subscript() as value):
                if uses.get(name) == 1 and _reads(line, name):
                    kept[-1] = _Replace(name, value).visit(line)
                    continue
        kept.append(line)
    return kept


def _reads(line: ast.stmt, name: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(line))


class _Replace(ast.NodeTransformer):
    def __init__(self, name: str, value: ast.expr) -> None:
        self.name, self.value = name, value

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """The value instead of its name."""
        return self.value if node.id == self.name else node
