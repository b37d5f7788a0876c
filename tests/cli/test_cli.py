from __future__ import annotations

import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import grl_surgery
from grl_surgery.cli import graph as graph_command
from grl_surgery.cli import main as cli
from grl_surgery.cli import model_args as networks_of_commands
from grl_surgery.cli.cli_errors import in_shell_words
from grl_surgery.verify import verify_flip as verification

NETWORKS = '''
import torch
from torch import nn
import grl_surgery as gs

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.act = nn.ReLU()
    def forward(self, x):
        return self.act(self.fc(x)) + x

class Net(nn.Module):
    def __init__(self, middle=None):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.Sequential(Block(), Block())
        self.middle = middle or nn.Identity()
        self.last = nn.Linear(4, 2)
    def forward(self, x, flag=None):
        x = x.view(x.shape[0], -1)
        return self.last(self.middle(self.blocks(self.first(x))))

class Loops(nn.Module):
    """No graph: it looks at its input."""
    def __init__(self):
        super().__init__()
        self.net = Net()
    def forward(self, x):
        return self.net(x) if x.sum() > 0 else self.net(-x)

class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
    def forward(self, x):
        x = self.fc(x)
        return x + x

class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
    def forward(self, x, mask=None):
        x = self.fc(x)
        return self.last(x if mask is None else x * mask)

class Keeps(gs.GradientReversal):
    """A reversal that reverses nothing."""
    def forward(self, x):
        print("printed by the network")
        return x * 1

def net():
    return Net(), torch.randn(3, 4)

def without_inputs():
    return Net()

def broken():
    return Net(Keeps()), torch.randn(3, 4)

def loops():
    return Loops(), torch.randn(3, 4)

def doubled():
    return Doubled(), torch.randn(3, 4)

def masked():
    return Masked(), (torch.randn(3, 4), torch.tensor([1.0, 0.0, 2.0, 1.0]))

def unmasked():
    return Masked(), torch.randn(3, 4)

def interrupted():
    raise KeyboardInterrupt

print("printed by the file")
'''


@dataclass
class Done:
    """What a command left."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def networks(tmp_path: Path) -> str:
    file = tmp_path / f"networks_{abs(hash(str(tmp_path)))}.py"
    file.write_text(NETWORKS)
    return str(file)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command in this process; "{net}" in a word stands for the file of networks."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def command(*words: str) -> Done:
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        printed = capsys.readouterr()
        code = stopped.value.code
        assert code is None or isinstance(code, int)
        return Done(code or 0, printed.out, printed.err)

    return command


def _process(*words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grl_surgery", *words], capture_output=True, text=True, timeout=600, **settings
    )


# --- start ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["verify", "--help"], ["--version"], ["graph", "--dept"]])
def test_help_and_usage_errors_import_no_torch(words: list[str]) -> None:
    program = f"""
        import sys
        from grl_surgery.cli.main import main
        try:
            main({words!r})
        finally:
            print(sorted({{"torch", "numpy", "timm"}} & sys.modules.keys()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=600
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_command_and_the_forms_of_a_model(command: Command) -> None:
    done = command("--help")
    assert done.code == 0
    assert re.findall(r"^│ ([a-z]\w*) ", done.out, re.M) == [
        *("graph", "insert", "attach", "verify", "export", "strip", "doctor", "zoo", "probe", "new", "demo")
    ]
    assert "file.py:factory" in done.out


def test_the_version_is_printed(command: Command) -> None:
    assert re.fullmatch(r"grl-surgery \d+\.\d+\.\d+\S*\n", command("--version").out)


def test_a_misspelt_option_exits_with_2_and_the_near_one(command: Command) -> None:
    done = command("verify", "timm/resnet18", "--aftr", "layer3")
    assert (done.code, done.out) == (2, "")
    assert "--after" in done.err


def test_a_misspelt_command_exits_with_2(command: Command) -> None:
    assert command("verfy", "timm/resnet18").code == 2


# --- the package ------------------------------------------------------------------------------------


def _names_for_type_checkers() -> list[str]:
    tree = ast.parse(Path(grl_surgery.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    ours = [node for node in imports if (node.module or "").startswith("grl_surgery")]
    return [alias.asname or alias.name for node in ours for alias in node.names]


def test_the_three_lists_of_public_names_agree() -> None:
    assert sorted(grl_surgery.__all__) == sorted(grl_surgery._HOMES) == sorted(_names_for_type_checkers())


def test_every_public_name_is_found_listed_and_the_object_of_its_module() -> None:
    for name in grl_surgery.__all__:
        assert name in dir(grl_surgery)
        value = getattr(grl_surgery, name)
        assert getattr(value, "__module__", value.__name__).startswith("grl_surgery.")
    assert grl_surgery.graph is sys.modules["grl_surgery.surgery.describe"].describe


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'grl_surgery' has no attribute 'insert_gril'"):
        grl_surgery.insert_gril  # noqa: B018


# --- graph ------------------------------------------------------------------------------------------


def test_graph_prints_names_types_shapes_and_parameters(command: Command, networks: str) -> None:
    done = command("graph", f"{networks}:net")
    assert done.code == 0
    assert done.out.splitlines() == [
        f"{networks}:net: Net, 70 parameters, train mode",
        "",
        "point   type        output  parameters",
        "x       input       3x4",
        "view    view        3x4",
        "first   Linear      3x4             20",
        "blocks  Sequential  3x4             40",
        "middle  Identity    3x4",
        "last    Linear      3x2             10",
        "output  output      3x2",
        "",
        "3 more with --all: operations on sizes, unused arguments",
    ]


def test_graph_of_resnet50_fits_a_screen(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = command("graph", "timm/resnet50").out.splitlines()
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    assert "layer3       Sequential            2x1024x14x14   7,098,368" in lines


def test_all_shows_what_is_hidden(command: Command, networks: str) -> None:
    done = command("graph", f"{networks}:net", "--all")
    assert re.findall(r"^(flag|shape\S*) ", done.out, re.M) == ["flag", "shape", "shape[0]"]
    assert "--all" not in done.out


def test_depth_opens_modules_below_their_own_line(command: Command, networks: str) -> None:
    done = command("graph", f"{networks}:net", "--depth", "2")
    assert re.findall(r"^.*blocks.*$", done.out, re.M) == [
        "blocks      Sequential  3x4             40",
        "├ blocks.0  Block       3x4             20",
        "└ blocks.1  Block       3x4             20",
    ]


def test_under_shows_one_module_and_counts_depth_from_it(command: Command, networks: str) -> None:
    lines = command("graph", f"{networks}:net", "--under", "blocks").out.splitlines()[3:]
    assert [line.split()[-4] for line in lines] == ["blocks", "blocks.0", "blocks.1"]
    deeper = command("graph", f"{networks}:net", "--under", "blocks.1").out
    assert re.findall(r"blocks\S+", deeper) == [f"blocks.1{name}" for name in ("", ".fc", ".act", ".add")]


def test_a_wrong_module_under_is_answered_with_near_ones(command: Command, networks: str) -> None:
    done = command("graph", f"{networks}:net", "--under", "block.1")
    assert (done.code, done.out) == (2, "")
    assert re.search(r"no module 'block\.1'(.|\n)*for example: --under blocks\.1", done.err)


def test_edges_are_printed_as_edge_takes_them(command: Command, networks: str) -> None:
    done = command("graph", f"{networks}:net", "--edges", "--under", "blocks.1")
    edges = done.out.splitlines()
    assert edges == [
        "blocks.0.add -> blocks.1.fc" if "blocks.0.add" in done.out else "blocks.0 -> blocks.1.fc",
        "blocks.1.fc -> blocks.1.act",
        "blocks.1.act -> blocks.1.add",
        edges[3],
        "blocks.1.add -> middle",
    ]
    for edge in edges:
        assert command("insert", f"{networks}:net", "--edge", edge).code == 0


def test_the_two_arguments_of_one_operation_are_told_apart(command: Command, networks: str) -> None:
    edges = command("graph", f"{networks}:doubled", "--edges").out.splitlines()
    assert edges[1:3] == ["fc -> add (argument 0)", "fc -> add (argument 1)"]
    assert command("insert", f"{networks}:doubled", "--edge", edges[2]).code == 0
    refused = command("insert", f"{networks}:doubled", "--edge", "fc -> add")
    assert refused.code == 2
    assert "for example: --edge 'fc -> add (argument 0)'" in refused.err


def test_find_lists_matches_at_any_depth(command: Command, networks: str) -> None:
    def found(pattern: str) -> list[str]:
        return [
            line.split()[0]
            for line in command("graph", f"{networks}:net", "--find", pattern).out.splitlines()[3:]
        ]

    assert found("block") == [
        f"blocks{name}" for name in ("", *(f".{i}{n}" for i in (0, 1) for n in ("", ".fc", ".act", ".add")))
    ]
    assert found("glob:blocks.*.fc") == ["blocks.0.fc", "blocks.1.fc"]
    assert found("re:.*act") == ["blocks.0.act", "blocks.1.act"]
    assert found("linear") == ["first", "blocks.0.fc", "blocks.1.fc", "last"]


def test_an_edge_of_what_was_found_is_listed_once_under_its_deepest_names(
    command: Command, networks: str
) -> None:
    done = command("graph", f"{networks}:net", "--find", "middle", "--edges")
    assert done.out.splitlines() == ["blocks.1.add -> middle", "middle -> last"]


@pytest.mark.parametrize(
    ("wanted", "near"),
    [("blok", "blocks"), ("Liner", "Linear"), ("glob:blcks.*", "blocks"), ("re:.*akt$", "act")],
)
def test_find_without_a_hit_offers_names_that_are_found(
    command: Command, networks: str, wanted: str, near: str
) -> None:
    refused = command("graph", f"{networks}:net", "--find", wanted)
    assert near in re.findall(r"nearest: (.*)", refused.err)[0].split(", ")
    example = re.findall(r"for example: --find (\S+)", refused.err)[0]
    assert command("graph", f"{networks}:net", "--find", example).code == 0


def test_a_name_is_whole_however_narrow_the_terminal_is(
    command: Command, networks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    assert "blocks.1.act" in command("graph", f"{networks}:net", "--depth", "3").out


@pytest.mark.parametrize(
    "words",
    [
        ["insert", "timm/resnet18"],
        ["insert", "torchvision/resnet18", "--edge", "layer1"],
        ["insert", "timm/resnet18", "--after", "layer1", "--coeff=-1"],
        ["insert", "timm/resnet18", "--after", "layer1", "-o", ""],
        ["attach", "timm/resnet18", "--after", "global_pool", "--coeff", "nan"],
        ["verify", "timm/resnet18"],
        ["verify", "timm/resnet18", "--after", "layer1", "--coeff", "inf"],
        ["verify", "timm/resnet18", "--after", "layer1", "--input-size", "3x"],
        ["strip", "timm/resnet18"],
        ["export", "timm/resnet18", "-o", "-"],
        ["graph", "timm/resnet18", "--edge", "layer1"],
        ["graph", "timm/resnet18", "-o", "picture.jpeg"],
    ],
    ids=" ".join,
)
def test_what_no_network_can_make_right_is_refused_before_torch_is_imported(words: list[str]) -> None:
    script = (
        "import sys\nfrom grl_surgery.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    print(end.code, *sorted({'torch', 'timm', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("words", [["--help"], ["graph", "--help"], ["doctor", "--help"]])
def test_help_shows_no_type_for_a_flag(command: Command, words: list[str]) -> None:
    assert "bool" not in command(*words).out.lower()


def test_find_that_matches_nothing_is_refused_with_near_names(command: Command, networks: str) -> None:
    done = command("graph", f"{networks}:net", "--find", "middel")
    assert (done.code, done.out) == (2, "")
    assert "nearest: middle" in done.err


def test_eval_prints_the_graph_of_eval_mode(command: Command, networks: str) -> None:
    assert "eval mode" in command("graph", f"{networks}:net", "--eval").out
    assert "train mode" in command("graph", f"{networks}:net", "--train").out


def test_json_is_all_that_is_on_stdout(command: Command, networks: str) -> None:
    done = command("graph", f"{networks}:net", "--json", "--depth", "2")
    graph = json.loads(done.out)
    assert graph["name"] == "Net"
    assert {
        "name": "blocks.0",
        "op": "call_module",
        "type": "Block",
        "shape": [3, 4],
        "parameters": 20,
        "role": "",
        "coeff": None,
    } in graph["nodes"]
    assert "shape[0]" in [node["name"] for node in graph["nodes"]]
    assert {"source": "blocks.0", "target": "blocks.1", "arg": "0"} in graph["edges"]
    assert "printed by the file" in done.err


def test_the_modules_of_a_root_that_cannot_be_traced_are_listed(command: Command, networks: str) -> None:
    done = command("graph", f"{networks}:loops")
    assert done.code == 0
    assert re.search(r"^net +Net +3x2 +70$", done.out, re.M)
    inner = command("graph", f"{networks}:loops", "--under", "net")
    assert re.findall(r"net\.\S+", inner.out)[-4:] == ["net.first", "net.blocks", "net.middle", "net.last"]
    assert inner.out.splitlines()[0].endswith(": Loops, 70 parameters, train mode")


# --- insert -----------------------------------------------------------------------------------------


def test_insert_prints_every_reversal_and_the_edges_that_it_reverses(command: Command, networks: str) -> None:
    done = command(
        *("insert", f"{networks}:net", "--after", "first", "--after", "blocks.0.fc"),
        *("--before", "last", "--edge", "blocks.0.act -> blocks.0.add", "--coeff", "0.5"),
    )
    assert done.code == 0
    assert done.out.splitlines()[0] == f"{networks}:net: Net with 4 reversals"
    for block in (
        "grl_first  after first, coeff 0.5\n  first -> blocks.0.fc\n  first -> blocks.0.add\n",
        "grl_blocks_0_fc  after blocks.0.fc, coeff 0.5\n  blocks.0.fc -> blocks.0.act\n",
        "grl_last  before last, coeff 0.5\n  middle -> last\n",
        "grl_blocks_0_add  on blocks.0.act -> blocks.0.add, coeff 0.5\n  blocks.0.act -> blocks.0.add\n",
    ):
        assert block in done.out


def test_insert_inside_a_root_that_cannot_be_traced_prints_whole_names(
    command: Command, networks: str
) -> None:
    done = command("insert", f"{networks}:loops", "--after", "net.first")
    assert done.out.splitlines()[2:] == ["grl_net_first  after net.first, coeff 1"]


def test_dry_run_prints_the_lines_of_the_forward_that_change(command: Command, networks: str) -> None:
    done = command("insert", f"{networks}:net", "--after", "middle", "--dry-run")
    assert [line for line in done.out.splitlines() if line[0] in "+-"] == [
        "--- Net",
        "+++ Net, spliced",
        "-    last = self.last(middle)",
        "+    grl_middle = self.grl_middle(middle)",
        "+    last = self.last(grl_middle)",
    ]


@pytest.mark.parametrize("name", ["insert", "verify", "strip"])
def test_a_wrong_name_exits_with_2_near_names_and_an_option_that_works(
    name: str, command: Command, networks: str
) -> None:
    done = command(name, f"{networks}:net", "--after", "blocks.0.fcc")
    assert (done.code, done.out) == (2, "")
    assert re.search(
        r"error: there is no point 'blocks\.0\.fcc'(.|\n)*nearest: blocks\.0\.fc"
        r"(.|\n)*for example: --after blocks\.0\.fc\n",
        done.err,
    )
    assert "Traceback" not in done.err


@pytest.mark.parametrize("name", ["insert", "verify", "strip"])
def test_a_command_without_a_place_is_refused(name: str, command: Command, networks: str) -> None:
    done = command(name, f"{networks}:net")
    assert done.code == 2
    assert re.search(r"give --after, --before or --edge(.|\n)*--after layer3", done.err)


@pytest.mark.parametrize("coeff", ["-1", "nan", "inf"])
def test_a_coefficient_that_is_no_reversal_is_refused(coeff: str, command: Command, networks: str) -> None:
    done = command("insert", f"{networks}:net", "--after", "first", "--coeff", coeff)
    assert done.code == 2
    assert re.search(r"must be finite and not negative(.|\n)*for example: --coeff", done.err)


# --- verify -----------------------------------------------------------------------------------------


def test_verify_prints_the_report_and_exits_with_0(command: Command, networks: str) -> None:
    done = command("verify", f"{networks}:net", "--after", "blocks")
    assert done.code == 0
    assert done.out.startswith(
        "OK  6 of 6 upstream parameters flipped, bit for bit; 2 downstream unchanged; forward identical\n"
    )
    assert re.search(r"grl_blocks +after blocks +1 +exact", done.out)


def test_verify_of_resnet18_flips_what_lies_before_the_point(command: Command) -> None:
    done = command(
        "verify", "timm/resnet18", "--after", "layer3", "--input-size", "3x64x64", "--mode", "both"
    )
    assert done.code == 0, done
    assert (
        done.out.count("OK  45 of 45 upstream parameters flipped, bit for bit; 17 downstream unchanged") == 2
    )
    assert re.findall("In (train|eval) mode", done.out) == ["train", "eval"]


def test_a_flip_that_fails_exits_with_1(command: Command, networks: str) -> None:
    done = command("verify", f"{networks}:broken")
    assert done.code == 1
    assert done.out.startswith("FAILED")
    assert "printed by the network" not in done.out


def test_one_mode_that_fails_is_enough(
    command: Command, networks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proper = verification.verify_flip

    def fails_in_eval(model: Any, *args: Any, mode: str, **options: Any) -> Any:
        report = proper(model, *args, mode=mode, **options)  # type: ignore[arg-type]
        return report if mode == "train" else type(report)((), (), False, "eval")

    monkeypatch.setattr(verification, "verify_flip", fails_in_eval)
    assert command("verify", f"{networks}:net", "--after", "first").code == 0
    assert command("verify", f"{networks}:net", "--after", "first", "--mode", "both").code == 1


def test_verify_as_json_holds_a_report_for_each_mode_and_nothing_else(
    command: Command, networks: str
) -> None:
    done = command("verify", f"{networks}:net", "--after", "first", "--mode", "both", "--json")
    found = json.loads(done.out)
    assert (found["model"], found["ok"]) == (f"{networks}:net", True)
    assert [report["mode"] for report in found["reports"]] == ["train", "eval"]
    assert found["reports"][0]["reversals"][0]["where"] == "after first"
    failed = command("verify", f"{networks}:broken", "--json")
    assert failed.code == 1
    assert json.loads(failed.out)["ok"] is False


def test_a_network_without_known_inputs_needs_their_size(command: Command, networks: str) -> None:
    refused = command("verify", f"{networks}:without_inputs", "--after", "first")
    assert refused.code == 2
    assert re.search(r"it is not known what inputs(.|\n)*--input-size", refused.err)
    done = command(
        "verify", f"{networks}:without_inputs", "--after", "first", "--input-size", "4", "--batch", "5"
    )
    assert done.code == 0


def test_the_size_and_the_batch_of_the_input_are_those_asked_for(command: Command, networks: str) -> None:
    done = command("graph", f"{networks}:net", "--input-size", "2x2", "--batch", "7")
    assert "x       input       7x2x2" in done.out
    assert "first   Linear      7x4" in done.out


@pytest.mark.parametrize("size", ["a", "3x", "0x3", "3X64", "-3", ""])
def test_a_size_that_is_none_is_refused(size: str, command: Command, networks: str) -> None:
    done = command("verify", f"{networks}:net", "--after", "first", f"--input-size={size}")
    assert done.code == 2
    assert "for example: --input-size 3x64x64" in done.err


def test_inputs_that_the_network_does_not_take_are_one_line(command: Command, networks: str) -> None:
    done = command("verify", f"{networks}:net", "--after", "first", "--input-size", "5")
    assert (done.code, done.out) == (2, "")
    assert re.search(r"does not run on inputs of 2x5: RuntimeError: .*mat1 and mat2", done.err)


def test_the_same_command_makes_the_same_network(
    command: Command, networks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    proper = networks_of_commands.splice

    def splice(loaded: Any, *args: Any) -> Any:
        made.append(loaded.module.first.weight.detach().clone())
        return proper(loaded, *args)

    monkeypatch.setattr(networks_of_commands, "splice", splice)
    for seed in ("0", "0", "1"):
        torch.rand(1)
        command("verify", f"{networks}:net", "--after", "first", "--seed", seed)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("verb", ["insert", "verify", "graph", "strip"])
def test_an_optional_argument_that_the_factory_passes_stays_an_argument(
    verb: str, command: Command, networks: str
) -> None:
    assert command(verb, f"{networks}:masked", "--after", "mul").code == 0  # there with a mask only


def test_a_file_runs_with_and_without_the_optional_argument(
    command: Command, networks: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "masked.safetensors")
    assert command("insert", f"{networks}:masked", "--after", "fc", "-o", path).code == 0
    for made in ("masked", "unmasked"):
        done = command("verify", path, "--model", f"{networks}:{made}")
        assert done.code == 0
        assert "OK  2 of 2 upstream parameters flipped" in done.out


# --- strip and demo ---------------------------------------------------------------------------------


def test_strip_shows_that_nothing_is_left(command: Command, networks: str) -> None:
    done = command("strip", f"{networks}:net", "--after", "blocks.0.fc", "--before", "last")
    assert done.code == 0
    assert [line.split()[:2] for line in done.out.splitlines()] == [
        ["class", "identical"],
        ["state_dict", "identical"],
        ["outputs", "identical"],
    ]


def test_strip_that_changes_the_network_exits_with_1(
    command: Command, networks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        stripped = model.grl_original
        stripped.last = torch.nn.Linear(4, 2)
        return stripped

    monkeypatch.setattr("grl_surgery.surgery.insert.strip", wrong)
    done = command("strip", f"{networks}:net", "--after", "first")
    assert done.code == 1
    assert [line.split()[1] for line in done.out.splitlines()] == ["identical", "DIFFERENT", "DIFFERENT"]


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_demo_exits_with_1_where_a_check_fails(
    passed: bool, code: int, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_demo(console: Any) -> bool:
        console.print("ran")
        return passed

    monkeypatch.setattr("grl_surgery.cli.demo.run_demo", run_demo)
    done = command("demo")
    assert (done.code, done.out) == (code, "ran\n")


# --- where models come from -------------------------------------------------------------------------


def test_an_unknown_model_exits_with_2_and_near_names(command: Command) -> None:
    done = command("graph", "timm/resnet5O")
    assert (done.code, done.out) == (2, "")
    assert "timm/resnet50" in done.err


def test_a_checkpoint_that_does_not_fit_exits_with_2(command: Command, networks: str, tmp_path: Path) -> None:
    torch.save({"first.weight": torch.zeros(4, 4)}, tmp_path / "part.pt")
    done = command("graph", f"{networks}:net", "--checkpoint", str(tmp_path / "part.pt"))
    assert (done.code, done.out) == (2, "")
    assert "does not fit this network" in done.err


def test_pretrained_is_passed_on(command: Command, networks: str) -> None:
    done = command("graph", f"{networks}:net", "--pretrained")
    assert done.code == 2
    assert "takes no argument 'pretrained'" in done.err


def test_an_interrupt_exits_with_130(command: Command, networks: str) -> None:
    assert command("graph", f"{networks}:interrupted").code == 130


# --- messages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("after='layer3'", "--after layer3"),
        (
            "after='relu#1', or all: after=['relu#1', 'relu#2']",
            "--after 'relu#1', or all: --after 'relu#1' --after 'relu#2'",
        ),
        ("edge='a -> b'", "--edge 'a -> b'"),
        ("edge=grl_surgery.Edge('a', 'b', '1')", "--edge 'a -> b (argument 1)'"),
        ("nearest: Edge('a', 'b', '0')", "nearest: 'a -> b (argument 0)'"),
        (r"after=r're:layer3\.\d+'", r"--after 're:layer3\.\d+'"),
        ("coeff=0.5", "--coeff 0.5"),
        ("insert_grl(model, after='layer3', coeff=0.5)", "insert_grl(model, after='layer3', coeff=0.5)"),
        ("print(grl_surgery.graph(model)) lists the points", "'grl-surgery graph MODEL' lists the points"),
        ("edge=('layer2', 'layer3.0.conv1')", "--edge 'layer2 -> layer3.0.conv1'"),
        ("after='layer3', after='glob:a.*', after=torch.nn.Conv2d", "--after layer3, --after 'glob:a.*'"),
        ("load(path, model=Net(...))", "--model file.py:factory"),
        ("load(path, heads={'domain': MyHead()})", "load(path, heads={'domain': MyHead()}) in Python"),
        ("export(m, 'a.pt2'), or in a file", "-o a.pt2, or in a file"),
        ("grl_surgery.export(m, 'a.pt2')", "grl-surgery export MODEL -o a.pt2"),
        ("export(m, 'a.pt2', dynamic=False)", "grl-surgery export MODEL -o a.pt2 --static"),
        ("export(m, 'a.onnx', heads=['d'])", "grl-surgery export MODEL -o a.onnx --head d"),
        ("export(load('a.safetensors'), 'a.onnx')", "grl-surgery export a.safetensors -o a.onnx"),
        (
            "export(m, 'a.pt2', example_inputs=(torch.randn(2, 3, 224, 224),))",
            "-o a.pt2 --input-size 3x224x224",
        ),
        (
            "insert_grl(model, ..., example_inputs={..., 'mask': value}) keeps it an argument",
            "'grl-surgery insert' of a factory that returns (network, inputs), 'mask' among them, "
            "keeps it an argument",
        ),
        (
            "insert_grl(model, ..., example_inputs=...) with values as forward will get them",
            "'grl-surgery insert' of a factory that returns (network, inputs) "
            "with values as forward will get them",
        ),
        ("load(no call of Python", "load(no call of Python"),
        ("load(no call of Python)", "load(no call of Python)"),
    ],
)
def test_examples_in_messages_are_written_for_the_shell(message: str, shown: str) -> None:
    assert in_shell_words(message) == shown


def test_a_file_without_a_name_in_it_is_answered_with_those_in_it(command: Command, networks: str) -> None:
    done = command("insert", networks, "--after", "first")
    assert done.code == 2
    assert f"{networks}:net" in done.err
    assert "printed by the file" not in done.err


def test_a_file_in_no_folder_is_refused_in_words_of_any_option(command: Command, networks: str) -> None:
    done = command("verify", f"{networks}:net", "--after", "first", "--html", "nowhere/x.html")
    assert done.code == 2
    assert "for example: 'x.html', or make the folder first" in done.err


# --- nothing is ignored -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["verify", "{net}", "--after", "first", "--model", "{net}"], "--model says what made"),
        (["verify", "{broken}", "--coeff", "7"], "have their own"),
        (["verify", "m.pt2", "--mode", "eval"], "leave out --mode"),
        (["graph", "{net}", "--batch", "8"], "--input-size makes"),
        (["graph", "{net}", "--json", "--edges"], "--json and --edges are ways to show"),
        (["insert", "{net}", "--after", "first", "--dry-run", "-o", "m.safetensors"], "writes nothing"),
        (["insert", "{net}", "--after", "first", "-o", ""], "is no name of a file"),
        (["insert", "{net}", "--after", "first", "-o", "-"], "is no name of a file"),
        (["strip", "m.safetensors", "--after", "first"], "leave out --after"),
        (["export", "{net}", "-o", "m.safetensors", "--inference"], "--inference is not what"),
        (["export", "{net}", "-o", "m.safetensors", "--static"], "records one batch size"),
        (["zoo", "none/*", "--resume"], "none is named"),
        (["zoo", "none/*", "--ledger", "nowhere/x.jsonl"], "there can be no file"),
        (["verify", "{net}", "--after", "first", "--seed", "9" * 20], "more than 64 bits"),
        (["graph", "{net}", "--input-size", "5"], "does not run on inputs of 2x5"),
    ],
)
def test_what_would_do_nothing_is_refused(
    words: list[str],
    reason: str,
    command: Command,
    networks: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    places = {f"{{{name}}}": f"{networks}:{name}" for name in ("net", "broken")}
    done = command(*(places.get(word, word) for word in words))
    assert done.code == 2
    assert reason in done.err
    assert [entry for entry in sorted(tmp_path.iterdir()) if entry.suffix != ""] == before


def test_a_program_is_not_cut(command: Command, networks: str, tmp_path: Path) -> None:
    file = str(tmp_path / "m.pt2")
    assert command("insert", f"{networks}:net", "--after", "first", "-o", file).code == 0
    for words in (["strip", file], ["insert", file, "--after", "first"], ["attach", file, "--after", "last"]):
        done = command(*words)
        assert done.code == 2
        assert "a program is complete, and cannot be cut or stripped" in done.err
    assert ".pt2 cannot be cut" in " ".join(re.findall(r"[\w.]+", command("strip", "--help").out))


def test_a_depth_beyond_the_network_is_that_of_the_network(command: Command, networks: str) -> None:
    shown = [command("graph", f"{networks}:net", "--depth", depth).out for depth in ("3", "99999999")]
    assert shown[0] == shown[1]


# --- streams ----------------------------------------------------------------------------------------


def test_a_process_prints_plain_text_and_exits_with_the_code(networks: str) -> None:
    done = _process("verify", f"{networks}:broken")
    assert done.returncode == 1
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.startswith("FAILED")
    refused = _process("verify", f"{networks}:net", "--after", "frist")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


def test_what_takes_time_is_said_on_a_terminal_only(
    command: Command, networks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert command("graph", f"{networks}:net").err == "printed by the file\n"


def test_a_pipe_that_is_closed_ends_it_quietly(networks: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "grl_surgery", "graph", f"{networks}:net"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == "printed by the file\n"
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a file that is always full")
@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        ("2>&-", 0, ""),
        (">&-", 2, "standard output is closed"),
        (">/dev/full", 2, "standard output cannot be written or read: No space left"),
    ],
)
def test_the_status_is_1_only_where_a_check_failed(streams: str, code: int, said: str, networks: str) -> None:
    words = [sys.executable, "-m", "grl_surgery", "verify", f"{networks}:net", "--after", "first"]
    done = subprocess.run(
        f"{shlex.join(words)} {streams}", shell=True, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_of_ours_is_a_traceback_and_not_a_check_that_failed(
    command: Command, networks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*args: Any, **choices: Any) -> NoReturn:
        raise LookupError("a mistake")

    monkeypatch.setattr(graph_command, "_graphs", mistaken)
    done = command("graph", f"{networks}:net")
    assert done.code == 2
    assert "LookupError: a mistake" in done.err


def _in_a_terminal(words: list[str], **environment: str) -> str:
    """Everything that a command writes to a terminal of 80 columns."""
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    settings = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    settings |= {"TERM": "xterm-256color", "COLUMNS": "80", **environment}
    with subprocess.Popen(
        [sys.executable, "-m", "grl_surgery", *words], stdout=follower, stderr=follower, env=settings
    ):
        os.close(follower)
        written = b""
        while True:
            try:
                chunk = os.read(leader, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not chunk:
                break
            written += chunk
    os.close(leader)
    return written.decode()


_COLOUR = re.compile(r"\x1b\[(?:\d+;)*3[0-9](?:;\d+)*m")


def test_a_terminal_gets_colours_and_sees_what_takes_time(networks: str) -> None:
    written = _in_a_terminal(["graph", f"{networks}:net"])
    assert _COLOUR.search(written)
    assert "Creating" in written
    assert "Tracing" in written


def test_no_color_is_respected(networks: str) -> None:
    written = _in_a_terminal(["graph", f"{networks}:net"], NO_COLOR="1")
    assert "blocks" in written
    assert not _COLOUR.search(written)


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt2", "folder"])
def test_what_insert_writes_is_verified_from_the_file(command: Command, tmp_path: Path, name: str) -> None:
    file = str(tmp_path / name)
    done = command("insert", "timm/test_resnet", "--after", "layer2", "--input-size", "3x32x32", "-o", file)
    assert done.code == 0, done.err
    assert re.search(rf"wrote {re.escape(file)}, [\d,]+ bytes, read back and compared", done.out)
    done = command("verify", file)
    assert done.code == 0, done.err
    assert "24 of 24 upstream parameters flipped, bit for bit" in done.out


def test_a_file_is_written_in_another_format_and_stripped(command: Command, tmp_path: Path) -> None:
    one, other, plain = (str(tmp_path / name) for name in ("m.safetensors", "m.onnx", "plain.safetensors"))
    assert command("attach", "timm/test_resnet", "--after", "global_pool", "-o", one).code == 0
    done = command("export", one, "-o", other, "--head", "domain", "--input-size", "3x32x32")
    assert done.code == 0, done.err
    done = command("strip", one, "-o", plain)
    assert done.code == 0, done.err
    assert "ResNet again, 92 of 98 tensors" in done.out
    assert type(grl_surgery.load(plain)).__name__ == "ResNet"


def test_a_file_of_a_network_of_ones_own_is_verified_with_what_makes_it(
    command: Command, networks: str, tmp_path: Path
) -> None:
    file = str(tmp_path / "m.safetensors")
    assert command("insert", f"{networks}:net", "--after", "first", "-o", file).code == 0
    refused = command("verify", file)
    assert refused.code == 2
    assert "does not say how to make" in refused.err
    done = command("verify", file, "--model", f"{networks}:net")
    assert done.code == 0, done.err


def test_a_damaged_file_is_one_message_and_exit_status_2(command: Command, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"damaged by somebody")
    refused = command("verify", str(tmp_path / "m.safetensors"))
    assert refused.code == 2
    assert "is no safetensors file" in refused.err
    assert "Traceback" not in refused.err


SCRIPT = """
import argparse
from torch import nn
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=0.1)
parser.parse_args()

class Reverse(nn.Module):
    def forward(self, x):
        return 2 * x.detach() - x

class Adversarial(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.reverse, self.head = nn.Linear(4, 4), Reverse(), nn.Linear(4, 2)
    def forward(self, x):
        return self.head(self.reverse(self.body(x)))
"""


def test_a_script_that_parses_its_arguments_is_read_without_any(tmp_path: Path) -> None:
    (tmp_path / "script_with_options.py").write_text(SCRIPT)
    done = _process("doctor", "script_with_options.py:Adversarial", "--input-size", "4", cwd=tmp_path)
    assert "unrecognized arguments" not in done.stderr
    assert "reverse" in done.stdout


def test_a_script_without_a_name_offers_the_network_and_not_its_reversal(
    command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "script_unnamed.py"
    file.write_text(SCRIPT)
    assert f"for example: {file}:Adversarial" in command("doctor", str(file)).err
