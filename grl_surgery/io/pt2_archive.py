"""Checks a .pt2 archive before torch reads it.

``torch.export.load`` trusts its file: it unpickles, it looks functions up by the names in the file, and it
evaluates sizes as Python. An archive that needs any of this is refused here; what export writes needs none.
"""

from __future__ import annotations

import ast
import io
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from grl_surgery.errors import ExportError
from grl_surgery.io.json_schema import parse_object

__all__ = ["EXTRA", "check_archive"]

EXTRA = "grl_surgery.json"

_MEMBERS = re.compile(
    r"data/(weights/(weight_\d+|model_weights_config\.json)|constants/(tensor_\d+|model_constants_config\.json)"
    r"|sample_inputs/model\.pt)|models/model\.json|extra/grl_surgery\.json|archive_(format|version)"
    r"|\.data/(version|serialization_id)|\.format_version|\.storage_alignment|byteorder"
)
_TARGETS = re.compile(
    r"torch\.ops\.(aten|grl_surgery|prims)\.\w+\.\w+|_operator\.[a-z]+|math\.[a-z]+"
    r"|torch\.(sym_\w+|_C\._set_grad_enabled)|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
)
# What sizes are written with; no function that evaluates a string.
_SIZE_WORDS = frozenset(
    [
        *("Symbol", "Integer", "Rational", "Float", "true", "false"),
        *(
            "Add",
            "Mul",
            "Mod",
            "Max",
            "Min",
            "FloorDiv",
            "CleanDiv",
            "CeilDiv",
            "PythonMod",
            "ModularIndexing",
        ),
        *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality"),
        *("StrictGreaterThan", "StrictLessThan", "GreaterThan", "LessThan"),
    ]
)


def check_archive(path: Path) -> dict[str, Any]:
    """Refuse an archive that is damaged or could run code when it is read.

    Returns:
        What export has written beside the program.

    Raises:
        ExportError: With what is wrong.
    """
    members = _members(path)
    root = next(iter(members)).partition("/")[0]
    inside = {name.removeprefix(f"{root}/"): data for name, data in members.items()}
    for name in (f"extra/{EXTRA}", "models/model.json"):
        if name not in inside:
            raise ExportError(
                f"{path} has no {name}, so export did not write it", example="grl_surgery.export(m, 'm.pt2')"
            )
    for folder in ("weights", "constants"):
        _check_payloads(path, inside, folder)
    _check_inputs(path, inside.get("data/sample_inputs/model.pt", b""))
    _check_program(path, parse_object(inside["models/model.json"], f"the program in {path}"))
    return parse_object(inside[f"extra/{EXTRA}"], f"the recipe in {path}")


def _members(path: Path) -> dict[str, bytes]:
    """The small members with their content, the weights without, all of them named as export names them."""
    try:
        with zipfile.ZipFile(path) as archive:
            rows = archive.infolist()
            _check_rows(path, rows)
            broken = archive.testzip()
            if broken:
                raise ExportError(f"{path} is damaged: {broken} has another checksum")
            return {
                row.filename: b"" if re.search(r"/(weight|tensor)_\d+$", row.filename) else archive.read(row)
                for row in rows
            }
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(
            f"{path} is damaged or no .pt2 archive: {type(error).__name__}: {str(error)[:200]}"
        ) from error


def _check_rows(path: Path, rows: list[zipfile.ZipInfo]) -> None:
    names = [row.filename for row in rows]
    roots = {name.partition("/")[0] for name in names}
    odd = [name for name in names if not _MEMBERS.fullmatch(name.partition("/")[2])]
    if odd or len(roots) != 1 or roots & {"", ".", ".."} or len(set(names)) != len(names):
        raise ExportError(
            f"{path} holds {(odd or names or ['nothing'])[0][:80]!r}, which export never writes"
        )
    if any(row.compress_type != zipfile.ZIP_STORED or row.file_size != row.compress_size for row in rows):
        raise ExportError(f"{path} is compressed, which export never does: it could unpack to any size")
    if sum(row.file_size for row in rows) > path.stat().st_size:
        raise ExportError(f"{path} claims to hold more than its own {path.stat().st_size:,} bytes")


def _check_payloads(path: Path, inside: dict[str, bytes], folder: str) -> None:
    name = f"data/{folder}/model_{folder}_config.json"
    config = parse_object(inside.get(name, b"{}"), f"{name} in {path}").get("config", {})
    for key, payload in config.items() if isinstance(config, dict) else ():
        plain = isinstance(payload, dict) and payload.get("use_pickle") is False
        if not plain or not re.fullmatch(r"(weight|tensor)_\d+", str(payload.get("path_name"))):
            raise ExportError(f"{path} holds {key[:80]!r} as a pickle, which could run any code")


def _check_inputs(path: Path, content: bytes) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ExportError(
            f"the example inputs in {path} are pickled Python objects, which could run any code"
        ) from error


def _check_program(path: Path, program: dict[str, Any]) -> None:
    for key, value in _strings(program):
        if key == "target" and not _TARGETS.fullmatch(value):
            raise ExportError(f"the program in {path} calls {value[:80]!r}, which is no operation on tensors")
        if key == "expr_str" and not _is_size(value):
            raise ExportError(f"the program in {path} has the size {value[:80]!r}")
    guards = program.get("guards_code") or []
    odd = [guard for guard in guards if not _is_guard(guard)] if isinstance(guards, list) else [guards]
    if odd:
        raise ExportError(f"the program in {path} has the guard {str(odd[0])[:80]!r}, which is not run")


_COMPARISON = (
    *(ast.Expression, ast.Load, ast.Subscript, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.And, ast.Or, ast.Not, ast.USub),
    *(ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod),
)


def _is_guard(text: Any) -> bool:
    """Whether a guard, which torch runs, compares sizes: ``L['x'].size()[0] == L['y'].size()[0]``."""
    tree = None if re.search(r"[#\\\n]", str(text)) else _parsed(text)
    if tree is None:
        return False
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and not node.args}
    return all(_is_guard_part(node, called) for node in ast.walk(tree))


def _is_guard_part(node: ast.AST, called: set[int]) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "size" and id(node) in called
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and not (node.args or node.keywords)
    if isinstance(node, ast.Name):
        return node.id == "L"
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, str, bool)
    return isinstance(node, _COMPARISON)


def _strings(value: Any) -> Iterator[tuple[str, str]]:
    """Every string in nested data, with the key that it stands under."""
    stack = [("", value)]
    while stack:
        key, item = stack.pop()
        if isinstance(item, str):
            yield key, item
        elif isinstance(item, dict):
            stack.extend(item.items())
        elif isinstance(item, list):
            stack.extend((key, inner) for inner in item)


def _is_size(text: str) -> bool:
    """Whether an expression is arithmetic on symbols and nothing else."""
    tree = _parsed(text)
    return tree is not None and all(_is_size_part(node) for node in ast.walk(tree))


def _parsed(text: Any) -> ast.AST | None:
    if not isinstance(text, str) or len(text) > 10_000:
        return None
    try:
        return ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_size_part(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _SIZE_WORDS
    if isinstance(node, ast.Name):
        return node.id in _SIZE_WORDS or re.fullmatch(r"[su]\d+", node.id) is not None
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) or bool(re.fullmatch(r"[su]\d+", str(node.value)))
    return isinstance(node, (ast.Expression, ast.keyword, ast.Load, ast.UnaryOp, ast.USub))
