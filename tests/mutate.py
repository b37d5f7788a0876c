"""Break the library in small ways, one at a time, and see whether the tests notice: ``make mutate``.

Each mutant is a copy of the package in a temporary folder with one text replaced. It is *killed* if a test
fails, and it *survives* if none does. The library itself is never touched. With ``--write`` the result goes
into docs/robustness.md.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch  # imported once, before the forks

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "robustness.md"
BEGIN, END = "<!-- mutants: begin -->", "<!-- mutants: end -->"

SURGERY = (
    "capture/test_aliasing.py",
    "surgery/test_insert.py",
    "isolation/test_shared_copy.py",
    "test_points.py",
    "capture/test_capture.py",
)
CALLS = (
    "surgery/test_submodule_surgery.py",
    "surgery/test_untraceable_networks.py",
    "surgery/test_attach_head.py",
    "surgery/test_transformers_networks.py",
)
STATE = ("capture/test_python_state.py",)
HEADS = ("surgery/test_attach_head.py",)
SHARING = (
    "isolation/test_shared_copy.py",
    "surgery/test_submodule_surgery.py",
    "surgery/test_spliced_module.py",
)
PROOF = ("verify/test_verify_flip.py", "verify/test_broken_surgeries.py")
COST = ("verify/test_cost.py",)
WAYS = ("verify/test_forty_ways.py",)
REVERSAL = ("nn/test_reversal.py",)
CONTEXTS = ("nn/test_reversal_contexts.py",)
FILES = ("test_bad_input.py", "io/test_export_hostile.py")


@dataclass(frozen=True)
class Mutant:
    """One breakage: in ``file``, the first ``before`` becomes ``after``; ``tests`` should notice."""

    file: str
    before: str
    after: str
    tests: tuple[str, ...] = SURGERY


MUTANTS = [
    Mutant(
        "surgery/call_record.py",
        "hidden = self.spliced if self.record.is_open() else ()",
        "hidden = ()",
        SHARING,
    ),
    Mutant(
        "surgery/call_record.py",
        "from_before = _whole(self.before).grad_fn is not self.made_before",
        "from_before = False",
        SHARING,
    ),
    Mutant(
        "surgery/call_record.py",
        "from_after = self.is_held and self.after.grad_fn is not self.made_after",
        "from_after = False",
        SHARING,
    ),
    Mutant("surgery/insert.py", "[cut for cut in cuts if cut.has_items]", "[]", SHARING),
    Mutant("surgery/call_hooks.py", "        if not found:\n", "        if False:\n"),
    Mutant(
        "surgery/call_record.py",
        "kept = value.clone() if isinstance(value, torch.Tensor) else value",
        "kept = value",
        CALLS,
    ),
    Mutant(
        "surgery/call_hooks.py",
        "return found[0] if len(found) == 1 else tuple(found) or None",
        "return found[0]",
        CALLS,
    ),
    Mutant("surgery/call_hooks.py", "twin.record = self.record.of_copy(made)", "pass", CALLS),
    Mutant("surgery/operations.py", "        self.seen[name] += 1\n", "", CALLS),
    Mutant("surgery/operations.py", "mode.depth += 1", "mode.depth += 0", CALLS),
    Mutant(
        "surgery/submodule_surgery.py",
        "        refuse_ways_past(base, cut, paths)\n",
        "        pass\n",
        SHARING,
    ),
    Mutant(
        "surgery/submodule_surgery.py",
        'if not hasattr(type(base.get_submodule(path)), "__iter__")',
        "",
        SHARING,
    ),
    Mutant("surgery/head_outputs.py", "extended = _copied(output)", "extended = output", CALLS),
    Mutant(
        "capture/tracer.py",
        "            refuse_narrowing(forward, parameters)\n",
        "            pass\n",
        SURGERY,
    ),
    Mutant(
        "nn/reversal_autograd.py",
        "factor, ctx.rule = -inputs[1], ",
        "factor, ctx.rule = inputs[1], ",
        REVERSAL,
    ),
    Mutant(
        "nn/reversal_autograd.py",
        "return scaled if scaled.dtype == grad.dtype else scaled.to(grad.dtype)",
        "return scaled",
        REVERSAL,
    ),
    Mutant("nn/reversal_autograd.py", "scaled = limited * factor", "scaled = limited / factor", REVERSAL),
    Mutant("nn/reversal_autograd.py", 'return "view"', 'return "detached"', REVERSAL),
    Mutant("nn/reversal_checks.py", "coeff.dim() != 1 or x.dim() == 0 or ", "", REVERSAL),
    Mutant("nn/reversal_checks.py", "if not coeff.is_floating_point():", "if False:", REVERSAL),
    Mutant("nn/reversal_operator.py", "    return x.clone()\n", "    return x\n", CONTEXTS),
    Mutant("surgery/graph_rewrite.py", "for user in users:", "for user in users[1:]:"),
    Mutant("surgery/graph_rewrite.py", "for user in users:", "for user in users[:1]:"),
    Mutant("surgery/graph_rewrite.py", "return len(users)", "return 1"),
    Mutant("surgery/graph_rewrite.py", "return len(slots)", "return 1"),
    Mutant("surgery/graph_rewrite.py", "if place != arg:", "if False:"),
    Mutant("surgery/graph_rewrite.py", "if source not in made:", "if True:"),
    Mutant("surgery/graph_rewrite.py", "if len(found) > 1:", "if False:"),
    Mutant("surgery/graph_rewrite.py", "if nodes and not found:", "if False:"),
    Mutant("surgery/graph_rewrite.py", "if missing is not None and not changed:", "if missing is not None:"),
    Mutant("surgery/graph_rewrite.py", "if is_size(node):", "if False:"),
    Mutant("surgery/graph_rewrite.py", "        refuse_lost_writes(model, graph, reversals, once)\n", ""),
    Mutant("surgery/graph_rewrite.py", "        _erase_boundaries(graph)\n", ""),
    Mutant("surgery/graph_rewrite.py", "if user.target is operator.getitem and user.args[0] is node]", "]"),
    Mutant(
        "surgery/graph_rewrite.py",
        'while node.op == "placeholder" and node.next.op == "placeholder":',
        "while False:",
    ),
    Mutant("capture/aliasing.py", "if places[user] > places[node]:", "if True:"),
    Mutant("capture/aliasing.py", "if places[user] > places[node]:", "if places[user] > places[node] + 1:"),
    Mutant("capture/aliasing.py", 'name in IN_PLACE or name == "setitem"', 'name == "setitem"'),
    Mutant("capture/aliasing.py", 'node.kwargs.get("inplace") is True', "False"),
    Mutant("capture/aliasing.py", 'getattr(held, "inplace", False) is True', "False"),
    Mutant("capture/aliasing.py", "(value in side) != (read in side)", "False"),
    Mutant("capture/aliasing.py", " flatten from_dlpack", " from_dlpack"),
    Mutant("capture/node_names.py", "return name[1:]", "return name"),
    Mutant(
        "capture/tracer.py",
        '            raise RuntimeError(f"part of it runs',
        '            print(f"part of it runs',
    ),
    Mutant("capture/tracer.py", "        refuse_hooks(self.twins.original_of(m), path)\n", ""),
    Mutant("capture/tracer.py", "self.mode_dependent.add(value.path)", "pass"),
    Mutant(
        "capture/tracer.py", "        self.refuse_randomness()\n        self.inside", "        self.inside"
    ),
    Mutant("capture/tracer.py", "            self.refuse_changes()\n", "", STATE),
    Mutant("capture/tracer.py", 'boundary="out" if arg is None else "in"', 'boundary="in"'),
    Mutant("capture/capture.py", "        redirect_in_place_uses(model, graph)\n", ""),
    Mutant(
        "capture/capture.py", "for mode in (True, False, None) if mode in variants", "for mode in variants"
    ),
    Mutant(
        "capture/capture.py", "for mode in (True, False) if read else ():", "for mode in () if read else ():"
    ),
    Mutant(
        "capture/tracer.py", "                raise OpaqueValueInspected(", "                print(", CALLS
    ),
    Mutant(
        "capture/capture.py",
        "                traced_modules |= hidden\n                continue\n",
        "",
        CALLS,
    ),
    Mutant("capture/capture.py", "        waiting += around - found\n        found |= around\n", ""),
    Mutant("surgery/graph_rewrite.py", "            if not deeper:\n", "            if True:\n"),
    Mutant("capture/aliasing.py", "same is not value and same in node.all_input_nodes", "False"),
    Mutant("capture/aliasing.py", "node.all_input_nodes if effects(module).returns else []", "[]"),
    Mutant("capture/aliasing.py", "if _is_unknown(node) or name", "if name"),
    Mutant("capture/aliasing.py", "last_read[shared[value]] > place or together", "together"),
    Mutant("capture/aliasing.py", " or together[shared[value]] > 1", ""),
    Mutant("capture/module_effects.py", "any_argument(returned)", "False"),
    Mutant("capture/module_effects.py", "any_argument(written)", "False"),
    Mutant(
        "surgery/graph_rewrite.py",
        "                refuse_unseen_reads(model, graph, str(cut.at), effects)\n",
        "                pass\n",
    ),
    Mutant("capture/capture.py", "sorted(calls.values(), key=_stored)", "list(calls.values())"),
    Mutant("capture/node_names.py", "_MACHINERY = (TORCH, ", '_MACHINERY = (f"{TORCH}fx", '),
    Mutant("nn/nested_reversal.py", "        if proxy is None:\n", "        if True:\n", CALLS),
    Mutant("points.py", "seen[base] += 1", "seen[base] += 2"),
    Mutant("points.py", "total[base] == 1", "total[base] >= 1"),
    Mutant("points.py", 'return path.replace("#", "##")', "return path"),
    Mutant("points.py", "int(alias[2]) + 1", "int(alias[2])"),
    Mutant("points.py", '"*": r"[^.]*"', '"*": r".*"'),
    Mutant("points.py", "fullmatch(name) or", "match(name) or"),
    Mutant(
        "capture/traceable_copy.py", "self.twins[id(child)] if id(child) in self.twins else child", "child"
    ),
    Mutant("capture/traceable_copy.py", "flag if self.mode is None else self.mode", "flag"),
    Mutant(
        "capture/traceable_copy.py",
        "return self.read(super().__getitem__(name))",
        "return super().__getitem__(name)",
    ),
    Mutant("capture/tracer.py", "if frame.f_code is _RUN and", "if False and"),
    Mutant(
        "capture/recorded_functions.py", "        if is_wrapped_for_fx(held, name):\n", "        if False:\n"
    ),
    Mutant("capture/state_of_calls.py", "if both := written & read:", "if both := set():"),
    Mutant("isolation/rng_state.py", "        torch.random.set_rng_state(torch_state)\n", ""),
    Mutant("isolation/rng_state.py", "        random.setstate(python_state)\n", ""),
    Mutant(
        "isolation/shared_copy.py", "redirection.hooks(value) if value else OrderedDict()", "value", SHARING
    ),
    Mutant(
        "isolation/shared_copy.py",
        "copied = self.made[id(value)] = value.copy()",
        "copied = value.copy()",
        SHARING,
    ),
    Mutant(
        "isolation/shared_copy.py",
        "self.twins.get(id(hook.module()), hook.module())",
        "hook.module()",
        SHARING,
    ),
    Mutant("surgery/spliced_module.py", "        self.grl_original.train(mode)\n", ""),
    Mutant("surgery/spliced_module.py", "persistent=False", "persistent=True"),
    Mutant(
        "surgery/spliced_module.py",
        "            variants[flags] = kind.forward\n",
        "            variants[flags] = kind.forward\n            break\n",
    ),
    Mutant("surgery/selectors.py", "if isinstance(part, str) and part:", "if isinstance(part, str):", FILES),
    Mutant(
        "verify/reference_model.py", "{-sign if spliced else sign for sign in signs}", "set(signs)", PROOF
    ),
    Mutant("verify/reference_model.py", "y.register_hook(torch.neg)", "y.register_hook(lambda g: g)", PROOF),
    Mutant("verify/experiment.py", "torch.ones_like(buffers[name])", "buffers[name]", PROOF),
    Mutant("verify/experiment.py", "if fills_zeros and _is_all_zero(value):", "if False:", PROOF),
    Mutant("verify/experiment.py", "gradient, leaf.grad = leaf.grad, None", "gradient = leaf.grad", COST),
    Mutant("verify/experiment.py", "if len(set(arrived)) < len(arrived):", "if False:", WAYS),
    Mutant(
        "verify/shared_weights.py", "leaf, storage = value.data, ", "leaf, storage = clone(value), ", COST
    ),
    Mutant("verify/shared_weights.py", "self._watched[address].copy_(values)", "pass", COST),
    Mutant("verify/fingerprint.py", "add_(units, alpha=factor)", "add_(units)", COST),
    Mutant("verify/fingerprint.py", "torch.rsub(block, 0.0) if negated else ", "", COST),
    Mutant("verify/verify_flip.py", "after.negates(before)", "after.equals(before)", PROOF),
    Mutant("verify/verify_flip.py", "ok = measured in (words, *_SILENT)", "ok = True", PROOF),
    Mutant("verify/verify_flip.py", "frozenset({1} if head == objective else ())", "None", WAYS),
    Mutant("doctor/foreign_reversals.py", "self.detached.add(kind)", "pass", WAYS),
    Mutant(
        "doctor/foreign_reversals.py", '_buffers["coeff"] = torch.tensor(-1.0)', '_buffers["coeff"]', WAYS
    ),
    Mutant("verify/layer_checks.py", "_ANOTHER_COEFF = 0.375", "_ANOTHER_COEFF = 1.0", PROOF),
    Mutant(
        "io/atomic_write.py",
        "        os.replace(draft, place)\n",
        "        shutil.copy(draft, place)\n",
        FILES,
    ),
    Mutant("capture/forward_constants.py", "self.overwritten.add(storage.data_ptr())", "pass", STATE),
    Mutant(
        "capture/forward_constants.py",
        "                self.refuse_own(first)\n",
        "                pass\n",
        STATE,
    ),
    Mutant("capture/forward_constants.py", "_version(made.tensor) != made.version", "False", STATE),
    Mutant("capture/capture.py", "            node.replace_all_uses_with(copy)\n", "", STATE),
    Mutant("capture/tracer.py", "if self.refusal is not None:", "if False:", STATE),
    Mutant(
        "capture/python_state.py",
        "                _put_back(value, content)\n",
        "                pass\n",
        STATE,
    ),
    Mutant(
        "capture/python_state.py",
        "_differs(value, content) and not _is_memo(value, content)",
        "False",
        STATE,
    ),
    Mutant("capture/python_state.py", "not _is_from_inputs(item.node)", "True", STATE),
    Mutant("capture/aliasing.py", "elif node.target is reverse_nested:", "elif False:"),
    Mutant("surgery/submodule_surgery.py", "    if way is not None:\n", "    if False:\n", SHARING),
    Mutant("isolation/shared_copy.py", "    attributes.pop(COMPILED, None)\n", "", SHARING),
    Mutant("capture/traceable_copy.py", "if path and overrides_call(twin):", "if False:", SHARING),
    Mutant(
        "verify/verify_flip.py",
        'elif all(row.ok and row.measured in ("unchanged", *_SILENT) for row in rows):',
        "elif False:",
        PROOF,
    ),
    Mutant("verify/compare.py", "_kind(wanted) is not _kind(found) or ", "", PROOF),
    Mutant("verify/shared_weights.py", "if not same_bits(leaf.detach(), before):", "if False:", COST),
    Mutant("io/atomic_write.py", "        check(draft)\n", "", FILES),
    Mutant(
        "surgery/graph_rewrite.py",
        "    if not overwritten:\n        return node\n",
        "    return node\n",
        HEADS,
    ),
    Mutant("surgery/graph_rewrite.py", ' if "for_head" not in user.meta]', "]", HEADS),
    Mutant("capture/aliasing.py", "if held.overwrites or not held.known:", "if held.overwrites:", HEADS),
    Mutant(
        "surgery/describe.py",
        "    if failure and not shapes.keys() >= set(nodes):\n",
        "    if False:\n",
        HEADS,
    ),
    Mutant(
        "surgery/describe.py",
        "preserve_rng_state(), preserve_python_state(dict(model.named_modules())), ",
        "",
        STATE,
    ),
    Mutant("capture/python_state.py", "        value.cache_clear()\n", "        pass\n", STATE),
    Mutant("capture/aliasing.py", "if is_bypassed or (call in shared", "if (call in shared"),
    Mutant(
        "capture/aliasing.py", "    _refuse_lost_passes(graph, {call: name for call, _, name in calls})\n", ""
    ),
    Mutant(
        "verify/reference_model.py",
        "for path, cuts in by_part if cuts]",
        "for path, cuts in by_part if False]",
        ("doctor/test_adopt.py",),
    ),
    Mutant("io/pt2_archive.py", 'return node.attr == "size" and id(node) in called', "return True", FILES),
]


def run(mutant: Mutant, folder: Path, limit: int) -> tuple[str, float]:
    """Killed, survived, or that the text is not there; and the seconds that it took."""
    file = folder / "grl_surgery" / mutant.file
    text = file.read_text(encoding="utf-8")
    if mutant.before not in text:
        return "not found", 0.0
    file.write_text(text.replace(mutant.before, mutant.after, 1), encoding="utf-8")
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        _test(folder, mutant.tests, limit)
    _, status = os.waitpid(child, 0)
    outcome = "survived" if status == 0 else "timed out" if os.WIFSIGNALED(status) else "killed"
    return outcome, time.monotonic() - begun


def _test(folder: Path, tests: tuple[str, ...], limit: int) -> None:
    """In a child process: the tests against the package in ``folder``."""
    signal.alarm(limit)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    import pytest

    names = [str(folder / "tests" / name) for name in tests]
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *names])
    os._exit(int(status))


def fresh_copy(folder: Path) -> None:
    """The package and its tests, as they are."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for name in ("grl_surgery", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)


def attempt(job: tuple[Mutant, int]) -> tuple[Mutant, str]:
    """What becomes of one mutant, printed."""
    mutant, limit = job
    with tempfile.TemporaryDirectory(prefix="mutants-") as base:
        folder = Path(base, "copy")
        fresh_copy(folder)
        outcome, seconds = run(mutant, folder, limit)
    change = f"{mutant.before.strip()} -> {mutant.after.strip() or '(nothing)'}"
    print(f"{outcome:9}  {seconds:5.0f} s  {mutant.file}: {change}", flush=True)
    return mutant, outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutants of files whose name holds this")
    parser.add_argument("--limit", type=int, default=300, help="seconds for one mutant")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--write", action="store_true", help="write the table into docs/robustness.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    mutants = [mutant for mutant in MUTANTS if options.only in mutant.file]
    unbroken = [Mutant("__init__.py", "", "", tests) for tests in dict.fromkeys(m.tests for m in mutants)]
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        jobs = [(mutant, options.limit) for mutant in [*unbroken, *mutants]]
        rows = pool.map(attempt, jobs, chunksize=1)
    if any(outcome != "survived" for _, outcome in rows[: len(unbroken)]):
        print("the tests fail on the library as it is")
        return 2
    rows = rows[len(unbroken) :]
    killed = sum(outcome == "killed" for _, outcome in rows)
    print(f"{killed} of {len(rows)} killed")
    if options.write:
        _write(rows)
    return 0 if killed == len(rows) else 1


def _write(rows: list[tuple[Mutant, str]]) -> None:
    killed = sum(outcome == "killed" for _, outcome in rows)
    lines = [
        f"{killed} of {len(rows)} killed, on {datetime.date.today()} with Python {platform.python_version()} "
        f"and torch {torch.__version__.partition('+')[0]}.",
        "",
        "| file | from | to | outcome |",
        "|---|---|---|---|",
    ]
    for mutant, outcome in rows:
        texts = (" ".join(text.split()).replace("|", "\\|") for text in (mutant.before, mutant.after))
        before, after = (f"`{text}`" if text else "(nothing)" for text in texts)
        lines.append(f"| `{mutant.file}` | {before} | {after} | {outcome} |")
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    table = "\n".join(lines)
    PAGE.write_text(f"{head}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
