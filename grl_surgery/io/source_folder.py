"""Writes a folder that a person can read: the network as Python code, its weights, a model card."""

from __future__ import annotations

import hashlib
import importlib
import json
import keyword
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

from grl_surgery.errors import ExportError, one_line
from grl_surgery.io import programs
from grl_surgery.io.forward_source import forward_lines
from grl_surgery.io.recipe import Recipe, describe, reversal_options, same_tensors
from grl_surgery.io.safetensors import check_checkpoint, write_checkpoint
from grl_surgery.io.tensor_data import plain_tensor, read_tensors
from grl_surgery.nn import classifiers, conditions, heads
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.surgery.insert import reversals
from grl_surgery.surgery.spliced_module import SplicedModule, surgery_of
from grl_surgery.verify.verify_flip import verify_flip

__all__ = ["WEIGHTS", "check_folder", "foreign", "write_code"]

WEIGHTS = "model.safetensors"
_CODE, _CONFIG, _CARD = "model.py", "config.json", "README.md"
_LIBRARY = "grl_surgery"
_LARGEST_LITERAL = 64
_MADE_BY_OTHERS = frozenset(["__pycache__", ".DS_Store"])  # by importing model.py, by looking at the folder


def write_code(
    model: nn.Module,
    folder: Path,
    inputs: programs.Inputs,
    source: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Write ``model.py``, ``model.safetensors``, ``config.json`` and ``README.md`` into a folder.

    Raises:
        ExportError: The forward calls something that no other file can import.
    """
    recipe = describe(model, source, options)
    write_checkpoint(model, folder / WEIGHTS, source, options)
    proof = _proof(model, inputs)
    (folder / _CODE).write_text(_Code(model, recipe).text(), encoding="utf-8")
    (folder / _CARD).write_text(_card(model, recipe, proof), encoding="utf-8")
    files = {name: _hash((folder / name).read_bytes()) for name in (_CODE, WEIGHTS, _CARD)}
    config = {**_config(recipe, proof), "files": files}
    config["sha256"] = _hash_of_config(config)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def foreign(folder: Path) -> list[str]:
    """The names in a folder that export did not write, or that were changed since: all, if it wrote none."""
    written = _written(folder)
    return [
        entry.name
        for entry in sorted(folder.iterdir())
        if entry.name not in _MADE_BY_OTHERS
        and not (entry.is_file() and written.get(entry.name) == _hash(entry.read_bytes()))
    ]


def _written(folder: Path) -> dict[str, str]:
    """The hashes of the files as export wrote them."""
    try:
        content = (folder / _CONFIG).read_bytes()
        config = json.loads(content)
        own = {_CONFIG: _hash(content)} if config.pop("sha256") == _hash_of_config(config) else {}
        return {**config["files"], **own}
    except (OSError, ValueError, TypeError, LookupError, AttributeError):  # no file of ours
        return {}


def _hash_of_config(config: Mapping[str, Any]) -> str:
    return _hash(json.dumps(config).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def check_folder(
    model: nn.Module, expected: Sequence[torch.Tensor], folder: Path, inputs: programs.Inputs
) -> None:
    """Load the weights, run the code, and compare its outputs with those that are expected.

    Raises:
        ExportError: It does not load, or computes something else.
    """
    check_checkpoint(model, folder / WEIGHTS)
    file = folder / _CODE
    module = ModuleType("model")
    module.__file__ = str(file)
    try:
        exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), vars(module))  # written just now
        given = () if "def load() " in file.read_text(encoding="utf-8") else (programs.plain(model),)
        again = module.load(*given)
    except Exception as error:
        raise ExportError(f"{_CODE} does not run: {type(error).__name__}: {str(error)[:200]}") from error
    name = same_tensors(model, again)
    if name:
        raise ExportError(
            f"{_CODE} makes {name!r} with other values than the network's", example="export(m, 'm.pt2')"
        )
    programs.compare_outputs(folder, expected, again, inputs)


def _proof(model: nn.Module, inputs: programs.Inputs) -> dict[str, Any] | None:
    """Return the report of verify_flip; None where there is nothing to verify."""
    if not reversals(model):
        return None
    try:
        report = verify_flip(model, example_inputs=inputs[1] or inputs[0])
    except Exception as error:  # of the network too: the card says what became of it
        return {"ok": False, "verdict": one_line(error), "mode": "none"}
    return {"ok": report.ok, "verdict": report.verdict, "mode": report.mode}


# -------------------------------------------------------------------------------------------------- code


class _Code:
    """Writes ``model.py``: a class for each spliced graph, and a function that loads it all."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.imports = {"from pathlib import Path", "from safetensors.torch import load_file"}
        self.imports |= {"from torch import nn"}
        cut = {path: m for path, m in model.named_modules() if surgery_of(m)}
        self.parts = {path: m for path, m in cut.items() if isinstance(m, SplicedModule)}
        if not cut:
            raise ExportError(
                f"this {type(model).__name__} is not spliced, so there is no code to write",
                example="export(m, 'm.safetensors')",
            )

        opaque = [
            path or "the root"
            for path, m in cut.items()
            if not isinstance(m, SplicedModule) or m.grl_surgery.hooked
        ]
        if opaque:
            raise ExportError(
                f"the forward of {opaque[0]} runs as it is, so there is no graph to write as code",
                example="export(m, 'm.safetensors')",
            )

    def text(self) -> str:
        """The whole file."""
        classes = [self._class(path, part) for path, part in self.parts.items()]
        loading = self._load()
        head = "\n\n".join("\n".join(lines) for lines in _import_groups(self.imports))
        title = (
            f'"""{_title(self.model, self.recipe)}\n\nWritten by grl_surgery; load() makes the network.\n"""'
        )
        return "\n\n".join([title, head]) + "\n\n\n" + "\n\n\n".join([*classes, loading]) + "\n"

    def _name(self, path: str) -> str:
        kind = type(self.parts[path]).__name__
        number = list(self.parts).index(path)
        return f"Spliced{kind}{number + 1 if number else ''}"

    def _class(self, path: str, part: SplicedModule) -> str:
        places = "; ".join(_in_words(part, cut) for cut in part.grl_surgery.cuts)
        body = [
            f"class {self._name(path)}(nn.Module):",
            f'    """{places[:1].upper()}{places[1:]}."""',
            "",
            "    def __init__(self, network: nn.Module) -> None:",
            "        super().__init__()",
            *(f"        {line}" for line in self._attributes(part)),
            "",
            *self._forwards(part),
        ]
        return "\n".join(body)

    def _attributes(self, part: SplicedModule) -> list[str]:
        """What __init__ takes over from the network, and what is new."""
        new = {cut.module for cut in part.grl_surgery.cuts}
        constants = set(part.grl_traced.constants)
        names = [name for it in (part._parameters, part._buffers, part._modules) for name in it]
        lines = []
        for name in names:
            if name in new or name in constants:
                continue
            plain = name.isidentifier() and not keyword.iskeyword(name)
            held = f"network.{name}" if plain else f"getattr(network, {name!r})"
            if name in part._buffers:
                persistent = name not in part._non_persistent_buffers_set
                extra = "" if persistent else ", persistent=False"
                lines.append(f'self.register_buffer("{name}", {held}{extra})')
            else:
                lines.append(f"self.{name} = {held}" if plain else f"setattr(self, {name!r}, {held})")
        for name in sorted(constants):
            literal = self._literal(name, part.get_buffer(name))
            lines.append(f'self.register_buffer("{name}", {literal}, persistent=False)')
        for path, tensor in _attributes_read(part).items():
            owner, _, name = path.rpartition(".")
            holder = f'self.get_submodule("{owner}")' if owner else "self"
            lines.append(f"{holder}.{name} = {self._literal(path, tensor)}")
        return [
            *lines,
            *(f"self.{cut.module} = {self._made(part, cut.module)}" for cut in part.grl_surgery.cuts),
        ]

    def _literal(self, name: str, tensor: torch.Tensor) -> str:
        if tensor.numel() > _LARGEST_LITERAL:
            raise ExportError(
                f"the forward reads {name!r}, a tensor of shape {tuple(tensor.shape)} that is no buffer and "
                "too large for code",
                example=f"self.register_buffer({name.rpartition('.')[2]!r}, ...), or export(m, 'm.pt2')",
            )
        self.imports.add("import torch")
        if not tensor.numel():
            return f"torch.empty({tuple(tensor.shape)}, dtype={tensor.dtype})"
        values = str(plain_tensor(name, tensor).tolist())
        self.imports |= {f"from math import {word}" for word in ("inf", "nan") if word in values}
        return f"torch.tensor({values}, dtype={tensor.dtype})"

    def _made(self, part: SplicedModule, name: str) -> str:
        module = part.get_submodule(name)
        if isinstance(module, GradientReversal):
            self.imports.add("from grl_surgery.nn.reversal import GradientReversal")
            words = [repr(float(module.coeff)), *_words(reversal_options(module))]
            return f"GradientReversal({', '.join(words)})"
        data = next(rows["heads"][name] for rows in self.recipe["parts"] if name in rows["heads"])
        if data["settings"] is None:
            raise ExportError(
                f"the head {name!r} has parts of your own classes, which no code of ours can make",
                example="export(m, 'm.pt2')",
            )
        rows = self.recipe["reversals"]
        row = next(row for path, row in rows.items() if f"{name}.reversal" in path)
        return self._head_code(data["settings"], row)

    def _head_code(self, settings: Mapping[str, Any], reversal: Mapping[str, Any]) -> str:
        classifier, logits = settings["classifier"], settings["num_logits"]
        kind = {"global": "DomainClassifier", "patch": "PatchDomainClassifier"}[classifier["kind"]]
        binary = classifier["logits"] == 1
        values = [classifier["width"], 2 if binary else classifier["logits"]]
        rest = {
            key: classifier[key]
            for key in ("hidden", "depth", "norm", "dropout", "dims")
            if key in classifier
        }
        made = (
            f"{kind}({values[0]}, {values[1]}, {_keywords({**rest, **({'binary': True} if binary else {})})})"
        )
        words = [made]
        names = {kind, "DomainHead"}
        if settings["pool"]:
            self.imports.add("from grl_surgery.nn.pooling import FeaturePool")
            pool = dict(settings["pool"])
            layout = pool.pop("layout")
            words.append(f"pool=FeaturePool({layout!r}, {_keywords(pool)})")
        if settings["condition"]:
            condition = dict(settings["condition"])
            kind = _CONDITIONS[condition.pop("kind")]
            names.add(kind)
            made = f"{kind}({_keywords(condition)})"
            words.append(f"condition={made}")
        words.append(f"num_domains={2 if logits == 1 else logits}")
        words += ["binary=True"] if logits == 1 else []
        words.append(f"coeff={float.fromhex(reversal['coeff'])!r}")
        words += _words({name: value for name, value in reversal.items() if name not in ("coeff", "dtype")})
        self.imports |= {f"from {_HOMES[name]} import {name}" for name in names}
        inside = "".join(f"            {word},\n" for word in words)
        return f"DomainHead(\n{inside}        )"

    # -- forward

    def _forwards(self, part: SplicedModule) -> list[str]:
        if not part.grl_traced.mode_dependent:
            return self._forward(part, part.graph, "forward")
        lines = ["    def forward(self, *args, **kwargs):"]
        lines.append('        """Another computation in another mode."""')
        flags = ", ".join(
            f"self.{path}.training" if path else "self.training" for path in part.grl_traced.mode_dependent
        )
        lines.append(f"        mode = ({flags},)")
        for number, known in enumerate(part.grl_traced.graphs, start=1):
            lines.append(f"        if mode == {known}:")
            lines.append(f"            return self.forward_{number}(*args, **kwargs)")
        lines.append('        raise RuntimeError(f"no forward was recorded for the mode {mode}")')
        for number, graph in enumerate(part.grl_traced.graphs.values(), start=1):
            lines += ["", *self._forward(part, graph, f"forward_{number}")]
        return lines

    def _forward(self, part: SplicedModule, graph: fx.Graph, name: str) -> list[str]:
        lines, used = forward_lines(part, graph, name)
        for key, value in used.items():
            self._import(key, value)
        return [f"    {line}" if line else "" for line in lines]

    def _import(self, key: str, value: Any) -> None:
        """Import what the code calls ``key``."""
        if isinstance(value, ModuleType):
            as_name = "" if value.__name__ == key else f" as {key}"
            self.imports.add(f"import {value.__name__}{as_name}")
            return
        home, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
        if home == "builtins" or (key in ("inf", "nan") and isinstance(value, float)):
            self.imports |= {f"from math import {key}"} if key in ("inf", "nan") else set()
            return
        if (
            not home
            or not name.isidentifier()
            or getattr(importlib.import_module(home), name, None) is not value
        ):
            raise ExportError(
                f"the forward calls {key!r}, which cannot be imported by name", example="export(m, 'm.pt2')"
            )
        self.imports.add(f"from {home} import {name}" + ("" if key == name else f" as {key}"))

    # -- loading

    def _load(self) -> str:
        source, options = self.recipe["source"], self.recipe["options"]
        argument, make = (
            ("", f"    network = {self._maker(source, options)}") if source else ("network: nn.Module", "")
        )
        summary = (
            "The network with the weights that lie beside this file."
            if source
            else "The network with the weights that lie beside this file; ``network`` is one of its class."
        )
        lines = [f"def load({argument}) -> nn.Module:", f'    """{summary}"""', *([make] if make else [])]
        for path in sorted(self.parts, key=lambda path: -len(path)):
            parent, _, name = path.rpartition(".")
            if not path:
                lines.append(f"    network = {self._name(path)}(network)")
            else:
                holder = f"network.get_submodule({parent!r})" if parent else "network"
                lines.append(f"    part = {self._name(path)}({holder}.get_submodule({name!r}))")
                lines.append(f"    {holder}.add_module({name!r}, part)")
        dtype = self.recipe["dtype"]
        if dtype not in (None, "float32"):
            self.imports.add("import torch")
            lines.append(f"    network.to(torch.{dtype})")
        lines.append(f'    weights = load_file(str(Path(__file__).with_name("{WEIGHTS}")))')
        for written, *others in self.recipe["tied"]:
            lines.extend(f'    weights["{name}"] = weights["{written}"]' for name in others)
        lines.append("    network.load_state_dict(weights)")
        if self.recipe["frozen"]:
            lines.append(f"    for name in {self.recipe['frozen']}:")
            lines.append("        network.get_parameter(name).requires_grad_(False)")
        lines.append("    return network.train()" if self.model.training else "    return network.eval()")
        return "\n".join(lines)

    def _maker(self, source: str, options: Mapping[str, Any]) -> str:
        library, _, name = source.partition("/")
        words = "".join(f", {key}={value!r}" for key, value in options.items())
        if library == "timm":
            self.imports.add("import timm")
            return f"timm.create_model({name!r}{words})"
        self.imports.add("from torchvision import models")
        return f"models.get_model({name!r}, weights=None{words})"


def _attributes_read(part: SplicedModule) -> dict[str, torch.Tensor]:
    """The tensors that the forward reads and that are plain attributes: the network given may hold others."""
    buffers = dict(part.named_buffers(remove_duplicate=False))
    return {path: tensor for path, tensor in read_tensors(part).items() if path not in buffers}


_HOMES = {name: module.__name__ for module in (heads, classifiers, conditions) for name in module.__all__}
_CONDITIONS = {
    "multilinear": "MultilinearMap",
    "randomized": "RandomizedMultilinearMap",
    "concatenate": "ConcatenationMap",
}


def _keywords(values: Mapping[str, Any]) -> str:
    return ", ".join(_words(values))


def _words(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value!r}" for key, value in values.items()]


def _import_groups(lines: Iterable[str]) -> Iterator[list[str]]:
    """The standard library first; names out of one module in one line."""
    homes: dict[str, set[str]] = {}
    for line in lines:
        if line.startswith("from "):
            homes.setdefault(line.split()[1], set()).add(line.partition(" import ")[2])
    written = [line for line in lines if line.startswith("import ")]
    written += [f"from {home} import {', '.join(sorted(names))}" for home, names in homes.items()]
    for standard in (True, False):
        group = [line for line in written if (line.split()[1].partition(".")[0] in _STANDARD) is standard]
        if group:
            yield sorted(group, key=lambda line: (line.startswith("from "), line))


_STANDARD = frozenset(sys.stdlib_module_names)


def _in_words(part: SplicedModule, cut: Any) -> str:
    what = "a domain head" if cut.is_head else "a gradient reversal"
    return f"{what} {str(cut).replace(chr(34), '').replace(chr(92), '')}"


def _title(model: nn.Module, recipe: Recipe) -> str:
    kind = recipe["class"].rpartition(".")[2]
    count = sum(len(part["cuts"]) for part in recipe["parts"])
    return f"{recipe['source'] or kind} with {count} gradient reversal{'s' if count > 1 else ''} spliced in."


# -------------------------------------------------------------------------------------------- what it says


def _config(recipe: Recipe, proof: dict[str, Any] | None) -> dict[str, Any]:
    kept = ("source", "options", "class", "versions", "graph", "reversals")
    cuts = [{"path": part["path"], "cuts": part["cuts"]} for part in recipe["parts"]]
    return {
        "library_name": _LIBRARY,
        **{key: recipe[key] for key in kept},
        "surgery": cuts,
        "verification": proof,
    }


def _card(model: nn.Module, recipe: Recipe, proof: dict[str, Any] | None) -> str:
    parts = {path: m for path, m in model.named_modules() if isinstance(m, SplicedModule)}
    rows = [
        f"| `{f'{path}.' if path else ''}{cut.module}` | {_in_words(part, cut)} |"
        for path, part in parts.items()
        for cut in part.grl_surgery.cuts
    ]
    coefficients = [
        f"- `{path}`: {float.fromhex(row['coeff']):g}" for path, row in recipe["reversals"].items()
    ]
    verdict = "Not verified." if proof is None else f"{'OK' if proof['ok'] else 'FAILED'}: {proof['verdict']}"
    mode = f" (in {proof['mode']} mode)" if proof else ""
    return "\n".join(
        [
            "---",
            f"library_name: {_LIBRARY}",
            "tags: [gradient-reversal, domain-adaptation]",
            "---",
            "",
            f"# {_title(model, recipe)}",
            "",
            "| module | what was spliced in |",
            "|---|---|",
            *rows,
            "",
            "Coefficients:",
            "",
            *coefficients,
            "",
            "## Verification",
            "",
            f"{verdict}{mode}",
            "",
            "## Use",
            "",
            "```python",
            "import grl_surgery as gs",
            'm = gs.load("THIS FOLDER")' if recipe["source"] else 'm = gs.load("THIS FOLDER", model=MyNet())',
            "```",
            "",
            "`model.py` is the same network as readable code.",
            "",
        ]
    )
