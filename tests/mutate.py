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

SURGERY = ("test_in_place.py", "test_splicing.py", "test_sharing.py", "test_points.py", "test_tracing.py")
CALLS = ("test_scoped.py", "test_opaque.py", "test_attaching.py", "test_transformers_networks.py")
STATE = ("test_python_state.py",)
HEADS = ("test_attaching.py",)
SHARING = ("test_sharing.py", "test_scoped.py", "test_spliced_module.py")
PROOF = ("test_verification.py", "test_broken_surgeries.py")
REVERSAL = ("test_reversal.py",)
CONTEXTS = ("test_reversal_contexts.py",)
FILES = ("test_bad_input.py", "test_exporting_hostile.py")


@dataclass(frozen=True)
class Mutant:
    """One breakage: in ``file``, the first ``before`` becomes ``after``; ``tests`` should notice."""

    file: str
    before: str
    after: str
    tests: tuple[str, ...] = SURGERY


MUTANTS = [
    Mutant("call_hooks.py", "        if not found:\n", "        if False:\n"),
    Mutant(
        "call_hooks.py",
        "kept = value.clone() if isinstance(value, torch.Tensor) else value",
        "kept = value",
        CALLS,
    ),
    Mutant(
        "call_hooks.py",
        "return found[0] if len(found) == 1 else tuple(found) or None",
        "return found[0]",
        CALLS,
    ),
    Mutant("call_hooks.py", "twin.record = self.record.of_copy(made)", "pass", CALLS),
    Mutant("operations.py", "        self.seen[name] += 1\n", "", CALLS),
    Mutant("operations.py", "mode.depth += 1", "mode.depth += 0", CALLS),
    Mutant("scoped.py", "        _refuse_ways_past(base, cut, paths)\n", "        pass\n", SHARING),
    Mutant("scoped.py", 'if not hasattr(type(base.get_submodule(path)), "__iter__")', "", SHARING),
    Mutant("head_outputs.py", "extended = _copied(output)", "extended = output", CALLS),
    Mutant(
        "tracer.py", "            _refuse_narrowing(root_fn, parameters)\n", "            pass\n", SURGERY
    ),
    Mutant("reversal.py", "factor = -inputs[1]", "factor = inputs[1]", REVERSAL),
    Mutant(
        "reversal.py",
        "return scaled if scaled.dtype == grad.dtype else scaled.to(grad.dtype)",
        "return scaled",
        REVERSAL,
    ),
    Mutant("reversal.py", "scaled = grad * factor", "scaled = grad / factor", REVERSAL),
    Mutant("reversal.py", 'return "view"', 'return "detached"', REVERSAL),
    Mutant("reversal.py", "coeff.dim() != 1 or x.dim() == 0 or ", "", REVERSAL),
    Mutant("reversal.py", "if not coeff.is_floating_point():", "if False:", REVERSAL),
    Mutant("reversal.py", "    return x.clone()\n", "    return x\n", CONTEXTS),
    Mutant("cutting.py", "for user in users:", "for user in users[1:]:"),
    Mutant("cutting.py", "for user in users:", "for user in users[:1]:"),
    Mutant("cutting.py", "return len(users)", "return 1"),
    Mutant("cutting.py", "return len(slots)", "return 1"),
    Mutant("cutting.py", "if place != arg:", "if False:"),
    Mutant("cutting.py", "if source not in made:", "if True:"),
    Mutant("cutting.py", "if len(found) > 1:", "if False:"),
    Mutant("cutting.py", "if nodes and not found:", "if False:"),
    Mutant("cutting.py", "if missing is not None and not changed:", "if missing is not None:"),
    Mutant("cutting.py", "if is_size(node):", "if False:"),
    Mutant("cutting.py", "        refuse_lost_writes(model, graph, reversals, once)\n", ""),
    Mutant("cutting.py", "        _erase_boundaries(graph)\n", ""),
    Mutant("cutting.py", "if user.target is operator.getitem and user.args[0] is node]", "]"),
    Mutant("cutting.py", 'while node.op == "placeholder" and node.next.op == "placeholder":', "while False:"),
    Mutant("in_place.py", "if places[user] > places[node]:", "if True:"),
    Mutant("in_place.py", "if places[user] > places[node]:", "if places[user] > places[node] + 1:"),
    Mutant("in_place.py", 'name in IN_PLACE or name == "setitem"', 'name == "setitem"'),
    Mutant("in_place.py", 'node.kwargs.get("inplace") is True', "False"),
    Mutant("in_place.py", 'getattr(held, "inplace", False) is True', "False"),
    Mutant("in_place.py", "(value in side) != (read in side)", "False"),
    Mutant("in_place.py", " flatten from_dlpack", " from_dlpack"),
    Mutant("tracer.py", "return name[1:]", "return name"),
    Mutant(
        "tracer.py", '            raise RuntimeError(f"part of it runs', '            print(f"part of it runs'
    ),
    Mutant("tracer.py", "        _refuse_hooks(m, path)\n", ""),
    Mutant("tracer.py", "self.steering.add(attr_val.path)", "pass"),
    Mutant("tracer.py", "        self.refuse_randomness()\n        self.inside", "        self.inside"),
    Mutant("tracer.py", "            self.refuse_changes()\n", "", STATE),
    Mutant("tracer.py", 'boundary="out" if arg is None else "in"', 'boundary="in"'),
    Mutant("tracing.py", "            follow(model, graph)\n", ""),
    Mutant("tracing.py", "for mode in (True, False, None) if mode in variants", "for mode in variants"),
    Mutant("tracing.py", "for mode in (True, False) if read else ():", "for mode in () if read else ():"),
    Mutant("tracer.py", "                raise Unseen(", "                print(", CALLS),
    Mutant("tracing.py", "                opened |= hidden\n                continue\n", "", CALLS),
    Mutant("tracing.py", "        waiting += around - found\n        found |= around\n", ""),
    Mutant("cutting.py", "            if not deeper:\n", "            if True:\n"),
    Mutant("in_place.py", "same is not value and same in node.all_input_nodes", "False"),
    Mutant("in_place.py", "node.all_input_nodes if effects(module).returns else []", "[]"),
    Mutant("in_place.py", "if _is_unknown(node) or name", "if name"),
    Mutant("in_place.py", "last_read[shared[value]] > place or together", "together"),
    Mutant("in_place.py", " or together[shared[value]] > 1", ""),
    Mutant("effects.py", "any_argument(returned)", "False"),
    Mutant("effects.py", "any_argument(written)", "False"),
    Mutant(
        "cutting.py",
        "                refuse_unseen_reads(model, graph, str(cut.at), effects)\n",
        "                pass\n",
    ),
    Mutant("tracing.py", "sorted(calls.values(), key=_stored)", "list(calls.values())"),
    Mutant("tracer.py", "_MACHINERY = (TORCH, ", '_MACHINERY = (f"{TORCH}fx", '),
    Mutant("opaque.py", "        if proxy is None:\n", "        if True:\n", CALLS),
    Mutant("points.py", "seen[base] += 1", "seen[base] += 2"),
    Mutant("points.py", "total[base] == 1", "total[base] >= 1"),
    Mutant("points.py", 'return path.replace("#", "##")', "return path"),
    Mutant("points.py", "int(alias[2]) + 1", "int(alias[2])"),
    Mutant("points.py", '"*": r"[^.]*"', '"*": r".*"'),
    Mutant("points.py", "fullmatch(name) or", "match(name) or"),
    Mutant("trace_copy.py", " and id(module) not in listed", ""),
    Mutant("trace_copy.py", "flag if mode is None else mode", "flag"),
    Mutant("generators.py", "        torch.random.set_rng_state(torch_state)\n", ""),
    Mutant("generators.py", "        random.setstate(python_state)\n", ""),
    Mutant("sharing.py", "redirection.hooks(value) if value else OrderedDict()", "value", SHARING),
    Mutant("sharing.py", "copied = self.made[id(value)] = value.copy()", "copied = value.copy()", SHARING),
    Mutant("sharing.py", "self.twins.get(id(hook.module()), hook.module())", "hook.module()", SHARING),
    Mutant("spliced_module.py", "        self.grl_original.train(mode)\n", ""),
    Mutant("spliced_module.py", "persistent=False", "persistent=True"),
    Mutant(
        "spliced_module.py",
        "            variants[flags] = kind.forward\n",
        "            variants[flags] = kind.forward\n            break\n",
    ),
    Mutant("selection.py", "if isinstance(part, str) and part:", "if isinstance(part, str):", FILES),
    Mutant("oracle.py", "{-sign if spliced else sign for sign in signs}", "set(signs)", PROOF),
    Mutant("oracle.py", "y.register_hook(torch.neg)", "y.register_hook(lambda g: g)", PROOF),
    Mutant("measurement.py", "torch.ones_like(buffers[name])", "buffers[name]", PROOF),
    Mutant("measurement.py", "if value.numel() and not value.any():", "if False:", PROOF),
    Mutant("verification.py", "torch.equal(after, -before)", "torch.equal(after, before)", PROOF),
    Mutant("verification.py", 'ok = measured in (words, "no signal")', "ok = True", PROOF),
    Mutant("verification.py", "_ANOTHER_COEFF = 0.375", "_ANOTHER_COEFF = 1.0", PROOF),
    Mutant(
        "files/atomic_files.py",
        "        os.replace(draft, place)\n",
        "        shutil.copy(draft, place)\n",
        FILES,
    ),
    Mutant("made_tensors.py", "self.overwritten.add(storage.data_ptr())", "pass", STATE),
    Mutant("made_tensors.py", "                self.refuse_own(first)\n", "                pass\n", STATE),
    Mutant("made_tensors.py", "_version(made.tensor) != made.version", "False", STATE),
    Mutant("tracing.py", "            node.replace_all_uses_with(copy)\n", "", STATE),
    Mutant("tracer.py", "if self.refusal is not None:", "if False:", STATE),
    Mutant("python_state.py", "                _put_back(value, content)\n", "                pass\n", STATE),
    Mutant("python_state.py", "_differs(value, content) and not _is_memo(value, content)", "False", STATE),
    Mutant("python_state.py", "not _is_from_inputs(item.node)", "True", STATE),
    Mutant("in_place.py", "elif node.target is reverse_each:", "elif False:"),
    Mutant("scoped.py", "    if way is not None:\n", "    if False:\n", SHARING),
    Mutant("sharing.py", "            elif key != COMPILED:\n", "            else:\n", SHARING),
    Mutant("trace_copy.py", "if path and overrides_call(module):", "if False:", SHARING),
    Mutant(
        "verification.py",
        'elif all(row.ok and row.measured in ("unchanged", "no signal") for row in rows):',
        "elif False:",
        PROOF,
    ),
    Mutant("comparison.py", "_kind(wanted) is not _kind(found) or ", "", PROOF),
    Mutant("measurement.py", "if same_bits(leaf.detach(), self.values[name].detach())", "if True", PROOF),
    Mutant("files/atomic_files.py", "        check(draft)\n", "", FILES),
    Mutant("cutting.py", "    if not overwritten:\n        return node\n", "    return node\n", HEADS),
    Mutant("cutting.py", ' if "for_head" not in user.meta]', "]", HEADS),
    Mutant("in_place.py", "if held.overwrites or not held.known:", "if held.overwrites:", HEADS),
    Mutant(
        "model_graph.py",
        "    if failure and not shapes.keys() >= set(nodes):\n",
        "    if False:\n",
        HEADS,
    ),
    Mutant(
        "model_graph.py", "random_state_kept(), python_state_kept(dict(model.named_modules())), ", "", STATE
    ),
    Mutant("python_state.py", "        value.cache_clear()\n", "        pass\n", STATE),
    Mutant("in_place.py", "if is_bypassed or (call in shared", "if (call in shared"),
    Mutant("in_place.py", "    _refuse_lost_passes(graph, {call: name for call, _, name in calls})\n", ""),
    Mutant(
        "oracle.py",
        "for path, cuts in by_part if cuts]",
        "for path, cuts in by_part if False]",
        ("test_diagnosis_adopting.py",),
    ),
    Mutant(
        "files/program_archive.py", 'return node.attr == "size" and id(node) in called', "return True", FILES
    ),
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
