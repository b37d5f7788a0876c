"""Translates error messages from Python calls to command lines."""

from __future__ import annotations

import ast
import re
import shlex

__all__ = ["NAME", "in_shell_words"]

NAME = "grl-surgery"

_NESTED = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
_STRING = r"r?(?:'[^']*'|\"[^\"]*\")"
# Searched from the left: a call that is not translated is passed over with its arguments.
_PYTHON = re.compile(
    rf"(?P<graph>print\(grl_surgery\.graph\(model\)\))"
    rf"|(?P<edge>edge=)?(?:grl_surgery\.)?\bEdge\((?P<parts>{_STRING}, {_STRING}, {_STRING})\)"
    rf"|\bedge=\((?P<pair>{_STRING}, {_STRING})\)"
    rf"|(?P<call>(?P<library>grl_surgery\.)?\b(?:export|load){_NESTED})"
    r"|insert_grl\(model, \.\.\., example_inputs=(?P<inputs>\.\.\.|\{\.\.\., '(?P<kept>\w+)': [^}]*\})\)"
    rf"|[\w.]+{_NESTED}"
    rf"|\b(?P<option>after|before|edge|name|depth|coeff)=(?P<value>\[[^\]]*\]|{_STRING}|[\d.]+)"
    r"|(?P<flag>\b(?:purpose='inference'|dynamic=False))"
    r"|(?P<classes>, (?:after|before)=torch\.[\w.]+)"
)
_OPTIONS = {"dynamic": "--static", "purpose": "--inference"}


def in_shell_words(message: str) -> str:
    """The message with ``after='layer3'`` written as the command line takes it: ``--after layer3``.

    Example:
        >>> in_shell_words("export(m, 'm.pt2', dynamic=False), or after='layer3'")
        'grl-surgery export MODEL -o m.pt2 --static, or --after layer3'
    """
    return _PYTHON.sub(_translated, message)


def _translated(match: re.Match[str]) -> str:
    if match["graph"]:
        return f"'{NAME} graph MODEL'"
    if match["parts"]:
        source, target, arg = _strings(match["parts"])
        return ("--edge " if match["edge"] else "") + shlex.quote(f"{source} -> {target} (argument {arg})")
    if match["pair"]:
        return "--edge " + shlex.quote(" -> ".join(_strings(match["pair"])))
    if match["call"]:
        return _call(match["call"], bool(match["library"]))
    if match["inputs"]:
        among = f", {match['kept']!r} among them," if match["kept"] else ""
        return f"'{NAME} insert' of a factory that returns (network, inputs){among}"
    if match["option"]:
        values = _strings(match["value"]) or [match["value"]]
        return " ".join(f"--{match['option']} {shlex.quote(value)}" for value in values)
    if match["flag"]:
        return _OPTIONS[match["flag"].partition("=")[0]]
    return "" if match["classes"] else match[0]


def _strings(text: str) -> list[str]:
    return [one or other for one, other in re.findall(r"'([^']*)'|\"([^\"]*)\"", text)]


def _call(text: str, is_whole_command: bool) -> str:
    """``export`` and ``load`` with the options that stand for their arguments, or as they are."""
    try:
        call = ast.parse(text.removeprefix("grl_surgery."), mode="eval").body
    except SyntaxError:  # prose, and no call
        return text
    assert isinstance(call, ast.Call)
    given = {word.arg: word.value for word in call.keywords}
    if text.startswith("load") and "model" in given:
        return "--model file.py:factory"
    if given.keys() - {*_OPTIONS, "heads", "example_inputs"}:
        return f"{text} in Python"
    match call.args:
        case [ast.Name(), ast.Constant(value=str(file))]:
            return _export("MODEL" if is_whole_command else "", file, given)
        case [ast.Call(args=[ast.Constant(value=str(source))]), ast.Constant(value=str(file))]:
            return _export(source, file, given)
    return f"{text} in Python" if given else text


def _export(source: str, file: str, given: dict[str | None, ast.expr]) -> str:
    """The whole command where a source is named, or an option that no other command has."""
    heads = getattr(given.get("heads"), "elts", ())
    options = [_OPTIONS[name] for name in given if name in _OPTIONS]
    options += [f"--head {head.value!s}" for head in heads if isinstance(head, ast.Constant)]
    sizes = ["--input-size 3x224x224"] if "example_inputs" in given else []
    command = [f"{NAME} export {source or 'MODEL'}"] if options or source else []
    return " ".join([*command, f"-o {shlex.quote(file)}", *options, *sizes])
