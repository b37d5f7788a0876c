"""What goes wrong and what is then said: every wrong call here is run, and its message compared word by word.

``python tests/bad_input.py`` runs the calls and prints their messages; ``docs/write_errors.py`` makes
docs/errors.md from this table.
"""

from __future__ import annotations

import errno
import io
import os
import shlex
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from small_networks import (
    DrawsInPython,
    InPlace,
    KeywordOnly,
    Net,
    Repeated,
    Tuples,
    Untraceable,
    image,
    vector,
)
from torch import nn

import grl_surgery as gs
from grl_surgery.cli import main as cli


@dataclass(frozen=True)
class BadInput:
    """A wrong call.

    Args:
        call: Python code, in which ``model`` is a small network and ``x`` its input; or a command line that
            starts with ``grl-surgery``.
        error: Name of the exception's class; for a command line its exit status.
        message: All that it says.
        section: Heading in docs/errors.md.
    """

    call: str
    error: str
    message: str
    section: str


class Interrupted(Net):
    """Somebody presses Ctrl-C while it runs."""

    def forward(self, x: Any) -> Any:
        raise KeyboardInterrupt


class TwoDevices(Net):
    """Half of it is on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.stage2.to("meta")


class Counting(nn.Module):
    """Its output is a class, not a score."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        return self.fc(x).argmax(1)


def quantised() -> nn.Module:
    """Integer weights, as dynamic quantisation leaves them."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model[0].weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.int8), requires_grad=False)
    return model


def scripted() -> nn.Module:
    """A network as TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit announces its end
        return torch.jit.script(nn.Linear(2, 2))


def frozen(model: nn.Module) -> nn.Module:
    """No parameter requires a gradient."""
    return model.requires_grad_(False)


@contextmanager
def disk_full() -> Any:
    """Every write to a file fails, as on a full disk."""
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch("os.fsync", side_effect=error):
        yield


@contextmanager
def read_only() -> Any:
    """No file can be made."""
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), ".")
    with mock.patch("tempfile.mkdtemp", side_effect=error):
        yield


def interrupt(*args: Any) -> None:
    """A hook in which somebody presses Ctrl-C."""
    raise KeyboardInterrupt


def hooked(model: nn.Module) -> nn.Module:
    """A network with that hook."""
    model.fc.register_forward_hook(interrupt)
    return model


NAMES: dict[str, Callable[..., Any] | Any] = {
    "gs": gs,
    "torch": torch,
    "nn": nn,
    **{kind.__name__: kind for kind in (Counting, DrawsInPython, InPlace, Interrupted, KeywordOnly, Net)},
    **{kind.__name__: kind for kind in (Repeated, TwoDevices, Tuples, Untraceable)},
    **{f.__name__: f for f in (disk_full, frozen, hooked, image, quantised, read_only, scripted, vector)},
}


NETS = """
import sys
sys.path.insert(0, {tests!r})
from small_networks import Net, image

number = 3

def net():
    return Net(), image()

def fails():
    raise RuntimeError("no weights here")
"""


def complaint_of(command: str) -> tuple[str, str]:
    """Exit status of a command line, and what it says on standard error."""
    Path("nets.py").write_text(NETS.format(tests=os.path.dirname(__file__)))
    errors = io.StringIO()
    with redirect_stderr(errors), redirect_stdout(io.StringIO()), mock.patch.dict(os.environ, COLUMNS="100"):
        try:
            cli.main(shlex.split(command)[1:])
        except SystemExit as end:
            said = errors.getvalue().replace(f"{os.getcwd()}{os.sep}", "").strip()
            lines = (line.rstrip() for line in said.splitlines())
            return str(end.code), "\n".join(lines)
    raise AssertionError


def raised_by(call: str, model: nn.Module) -> BaseException:
    """What a call raises."""
    names = {**NAMES, "model": model, "x": image()}
    try:
        exec(call, names)
    except BaseException as error:
        return error
    raise AssertionError(f"{call} did not fail")


TABLE = [
    # Points and edges
    BadInput(
        'gs.insert_grl(model, after="layr3")',
        "PointNotFoundError",
        "there is no point 'layr3' in this network\n"
        "  for example: print(grl_surgery.graph(model)) lists the points",
        "Points and edges",
    ),
    BadInput(
        'gs.insert_grl(model, after="stage1.0.cnv")',
        "PointNotFoundError",
        "there is no point 'stage1.0.cnv' in this network\n"
        "  nearest: stage1.0.conv, stage2.0.conv, stage1.1.conv, stage1.0.act, stage2.1.conv\n"
        "  for example: after='stage1.0.conv'",
        "Points and edges",
    ),
    BadInput(
        'gs.insert_grl(Repeated(), after="act")',
        "AmbiguousPointError",
        "'act' is called 3 times, so the name alone does not say which call\n"
        "  nearest: act#1, act#2, act#3\n"
        "  for example: after='act#1', or all of them: after=['act#1', 'act#2', 'act#3']",
        "Points and edges",
    ),
    BadInput(
        'gs.insert_grl(model, after="")',
        "SurgeryError",
        "after='' is no point: expected a name, 'glob:...', 're:...', a module class or a function "
        "of a graph node, got str\n"
        "  for example: after='layer3', after='glob:layer3.*', after=torch.nn.Conv2d",
        "Points and edges",
    ),
    BadInput(
        "gs.insert_grl(model, after=[])",
        "SurgeryError",
        "after=[] names no point\n  for example: after='layer3'",
        "Points and edges",
    ),
    BadInput(
        "gs.insert_grl(model, after=3)",
        "SurgeryError",
        "after=3 is no point: expected a name, 'glob:...', 're:...', a module class or a function "
        "of a graph node, got int\n"
        "  for example: after='layer3', after='glob:layer3.*', after=torch.nn.Conv2d",
        "Points and edges",
    ),
    BadInput(
        'gs.insert_grl(model, after="fc", before="fc")',
        "SurgeryError",
        "give exactly one of after, before and edge; got after and before\n"
        "  for example: insert_grl(model, after='layer3')",
        "Points and edges",
    ),
    BadInput(
        'gs.insert_grl(model, after=["stem", "nowhere"])',
        "PointNotFoundError",
        "there is no point 'nowhere' in this network\n"
        "  for example: print(grl_surgery.graph(model)) lists the points",
        "Points and edges",
    ),
    BadInput(
        'gs.insert_grl(model, after="glob:stage9.*")',
        "PointNotFoundError",
        "'glob:stage9.*' matches none of the 8 points in this network\n"
        "  nearest: stage2, stage1\n"
        "  for example: 'glob:layer3.*' (* stays within one part of a name, ** crosses the dots)",
        "Points and edges",
    ),
    BadInput(
        'gs.insert_grl(model, after="re:stage(")',
        "SurgeryError",
        "'re:stage(' is not a regular expression: missing ), unterminated subpattern at position 5\n"
        "  for example: after=r're:layer3\\.\\d+'",
        "Points and edges",
    ),
    BadInput(
        "gs.insert_grl(model, after=nn.LSTM)",
        "PointNotFoundError",
        "there is no LSTM in this Net\n"
        "  nearest: Conv2d, Sequential, Residual, BatchNorm2d, ReLU\n"
        "  for example: after='layer3', or a class that is there: after=torch.nn.Conv2d",
        "Points and edges",
    ),
    BadInput(
        "gs.insert_grl(model, after=int)",
        "SurgeryError",
        "after=<class 'int'> is no point: expected a name, 'glob:...', 're:...', a module class or "
        "a function of a graph node, got type\n"
        "  for example: after='layer3', after='glob:layer3.*', after=torch.nn.Conv2d",
        "Points and edges",
    ),
    BadInput(
        "gs.insert_grl(model, after=nn.ReLU())",
        "PointNotFoundError",
        "a ReLU was given that is not a module of this Net\n"
        "  nearest: stage1.0.act, stage1.1.act, stage2.0.act, stage2.1.act\n"
        "  for example: insert_grl(model, after=model.layer3), with a module of the model that is passed",
        "Points and edges",
    ),
    BadInput(
        "gs.insert_grl(model, after=lambda node: False)",
        "PointNotFoundError",
        "the predicate is true for none of the 22 points in this network\n"
        "  nearest: GraphNode(name='x', op='placeholder', type='placeholder', shape=None, "
        "parameters=0, role='', coeff=None), GraphNode(name='stem', op='call_module', "
        "type='Conv2d', shape=None, parameters=112, role='', coeff=None)\n"
        "  for example: after=lambda node: node.type == 'Conv2d'",
        "Points and edges",
    ),
    BadInput(
        'gs.insert_grl(model, after="output")',
        "SurgeryError",
        "nothing comes after the output\n  for example: before='output'",
        "Points and edges",
    ),
    BadInput(
        'gs.insert_grl(model, before="x")',
        "SurgeryError",
        "nothing flows into 'x'\n  for example: after='x'",
        "Points and edges",
    ),
    BadInput(
        'gs.insert_grl(model, edge=("stem", "fc"))',
        "PointNotFoundError",
        "'fc' does not use the value of 'stem'\n  nearest: mean -> fc\n  for example: edge='mean -> fc'",
        "Points and edges",
    ),
    BadInput(
        'gs.insert_grl(model, edge=("stem", "nowhere"))',
        "PointNotFoundError",
        "there is no point 'nowhere' in this network\n"
        "  for example: print(grl_surgery.graph(model)) lists the points",
        "Points and edges",
    ),
    BadInput(
        'gs.insert_grl(model, edge="stem")',
        "SurgeryError",
        "'stem' is not an edge: expected two names, an Edge, or 'source -> target'\n"
        "  for example: edge=('layer2', 'layer3.0.conv1')",
        "Points and edges",
    ),
    BadInput(
        "gs.insert_grl(model, edge=[])",
        "SurgeryError",
        "[] is not an edge: expected two names, an Edge, or 'source -> target'\n"
        "  for example: edge=('layer2', 'layer3.0.conv1')",
        "Points and edges",
    ),
    BadInput(
        'gs.insert_grl(model, edge=("stem", "relu", "fc"))',
        "SurgeryError",
        "('stem', 'relu', 'fc') is not an edge: expected two names, an Edge, or 'source -> target'\n"
        "  for example: edge=('layer2', 'layer3.0.conv1')",
        "Points and edges",
    ),
    BadInput(
        'gs.insert_grl(model, edge=gs.Edge("mean", "fc", "7"))',
        "PointNotFoundError",
        "'fc' does not use the value of 'mean' as '7'\n"
        "  nearest: mean -> fc\n"
        "  for example: edge='mean -> fc'",
        "Points and edges",
    ),
    BadInput(
        'gs.insert_grl(model, after="fc[0]")',
        "ShapeError",
        "the value of 'fc' is one tensor, which has no items\n  for example: after='fc'",
        "Points and edges",
    ),
    BadInput(
        'gs.insert_grl(Tuples(), after="encoder")(vector())',
        "ShapeError",
        "a gradient reversal takes one tensor; its input is a tuple of 2; choose one item\n"
        "  for example: after='encoder[0]'",
        "Points and edges",
    ),
    BadInput(
        "gs.graph(model, depth=0)",
        "SurgeryError",
        "depth must be 1 or more, or None for all levels; got 0\n  for example: depth=2",
        "Points and edges",
    ),
    BadInput(
        'gs.graph(model, depth="all")',
        "SurgeryError",
        "depth must be 1 or more, or None for all levels; got 'all'\n  for example: depth=2",
        "Points and edges",
    ),
    BadInput(
        'gs.graph(model, example_inputs={"y": x})',
        "SurgeryError",
        "example_inputs have no 'x': the forward takes x\n"
        "  for example: example_inputs={'x': torch.randn(...)}",
        "Points and edges",
    ),
    BadInput(
        "gs.graph(model, example_inputs=(x, x))",
        "SurgeryError",
        "2 example inputs were passed; forward takes 1: x",
        "Points and edges",
    ),
    # Coefficients
    BadInput(
        'gs.insert_grl(model, after="fc", coeff=float("nan"))',
        "SurgeryError",
        "coeff is nan; it must be finite and not negative: the gradient is multiplied by -coeff, "
        "so that a negative one un-reverses it, and infinity or nan destroys it\n"
        "  for example: coeff=0.5, or GradientReversal(-0.5, signed=True) "
        "on purpose",
        "Coefficients",
    ),
    BadInput(
        'gs.insert_grl(model, after="fc", coeff=-0.1)',
        "SurgeryError",
        "coeff is -0.1; it must be finite and not negative: the gradient is multiplied by -coeff, "
        "so that a negative one un-reverses it, and infinity or nan destroys it\n"
        "  for example: coeff=0.5, or GradientReversal(-0.5, signed=True) "
        "on purpose",
        "Coefficients",
    ),
    BadInput(
        'gs.insert_grl(model, after="fc", coeff=float("inf"))',
        "SurgeryError",
        "coeff is inf; it must be finite and not negative: the gradient is multiplied by -coeff, "
        "so that a negative one un-reverses it, and infinity or nan destroys it\n"
        "  for example: coeff=0.5, or GradientReversal(-0.5, signed=True) "
        "on purpose",
        "Coefficients",
    ),
    BadInput(
        'gs.insert_grl(model, after="fc", coeff="high")',
        "SurgeryError",
        "coeff is of type str; it must be a number or a tensor\n  for example: coeff=0.5",
        "Coefficients",
    ),
    BadInput(
        'gs.insert_grl(model, after="fc", coeff=None)',
        "SurgeryError",
        "coeff is of type NoneType; it must be a number or a tensor\n  for example: coeff=0.5",
        "Coefficients",
    ),
    BadInput(
        'gs.insert_grl(model, after="fc", coeff=torch.ones(3))',
        "ShapeError",
        "a layer has one coefficient; this one has shape (3,); for one per sample, call the "
        "function\n"
        "  for example: reverse_gradient(x, coeff)",
        "Coefficients",
    ),
    BadInput(
        'gs.insert_grl(model, after="fc", coeff=torch.tensor(1))',
        "SurgeryError",
        "coeff has dtype torch.int64; it must be floating point\n  for example: coeff.float()",
        "Coefficients",
    ),
    BadInput(
        "gs.GradientReversal(1 + 2j)",
        "SurgeryError",
        "coeff is of type complex; it must be a number or a tensor\n  for example: coeff=0.5",
        "Coefficients",
    ),
    BadInput(
        "gs.reverse_gradient(x, coeff=torch.ones(5))",
        "ShapeError",
        "coeff has shape (5,) and the input (2, 3, 8, 8); a coefficient is a number, a 0-d tensor, "
        "a tensor with one number for each sample along the first dimension, or one that broadcasts "
        "against the input\n"
        "  for example: reverse_gradient(x, torch.ones(x.shape[0]))",
        "Coefficients",
    ),
    BadInput(
        "gs.GradientReversal(clip=0.0)",
        "SurgeryError",
        "clip is 0.0; it must be a positive number: each entry of the gradient is clamped to [-clip, "
        "clip]\n"
        "  for example: GradientReversal(clip=0.5)",
        "Coefficients",
    ),
    BadInput(
        "gs.CoefficientScheduler(gs.GradientReversal(), gs.schedules.dual_ascent(0.69), 10).step()",
        "SurgeryError",
        "dual_ascent needs the domain loss\n  for example: scheduler.step(domain_loss(logits, domains))",
        "Coefficients",
    ),
    BadInput(
        "gs.reverse_gradient(torch.arange(3))",
        "ShapeError",
        "a gradient reversal takes a tensor that can have a gradient; its input has dtype "
        "torch.int64; choose a point where the values are floating point",
        "Coefficients",
    ),
    BadInput(
        "gs.reverse_gradient([1.0, 2.0])",
        "ShapeError",
        "a gradient reversal takes one tensor; its input is a list of 2; choose one item\n"
        "  for example: after='encoder[0]'",
        "Coefficients",
    ),
    BadInput(
        "gs.GradientReversal().set_coeff(-1)",
        "SurgeryError",
        "coeff is -1; it must be finite and not negative: the gradient is multiplied by -coeff, so "
        "that a negative one un-reverses it, and infinity or nan destroys it\n"
        "  for example: coeff=0.5, or GradientReversal(-0.5, signed=True) on purpose",
        "Coefficients",
    ),
    BadInput(
        'gs.insert_grl(model, after="fc", coeff=1e300)',
        "SurgeryError",
        "coeff is 1e+300; a layer keeps it in float32, where it would be infinite\n  for example: coeff=0.5",
        "Coefficients",
    ),
    # Networks
    BadInput(
        'gs.insert_grl("timm/resnet18", after="layer3")',
        "SurgeryError",
        "insert_grl works on an nn.Module; got str: 'timm/resnet18'\n"
        "  for example: insert_grl(timm.create_model('resnet18'), ...)",
        "Networks",
    ),
    BadInput(
        'gs.insert_grl(None, after="fc")',
        "SurgeryError",
        "insert_grl works on an nn.Module; got NoneType: 'None'\n"
        "  for example: insert_grl(timm.create_model('resnet18'), ...)",
        "Networks",
    ),
    BadInput(
        'gs.insert_grl(Net, after="fc")',
        "SurgeryError",
        "insert_grl works on an nn.Module; got type: \"<class 'small_networks.Net'>\"\n"
        "  for example: insert_grl(timm.create_model('resnet18'), ...)",
        "Networks",
    ),
    BadInput(
        'gs.insert_grl(scripted(), after="input")',
        "SurgeryError",
        "insert_grl cannot cut a scripted network: pass the nn.Module that it was made from",
        "Networks",
    ),
    BadInput(
        'gs.insert_grl(torch.compile(Net()), after="fc")',
        "SurgeryError",
        "this network is wrapped in OptimizedModule, which would run the old network: "
        "cut first, then wrap\n"
        "  for example: insert_grl(model._orig_mod, ...)",
        "Networks",
    ),
    BadInput(
        'gs.insert_grl(nn.DataParallel(model), after="fc")',
        "SurgeryError",
        "this network is wrapped in DataParallel, which would run the old network: "
        "cut first, then wrap\n"
        "  for example: insert_grl(model.module, ...)",
        "Networks",
    ),
    BadInput(
        'gs.insert_grl(Untraceable(), after="bdy")',
        "PointNotFoundError",
        "there is no point 'bdy' in this network\n  nearest: body, body.fc",
        "Networks",
    ),
    BadInput(
        'gs.insert_grl(nn.Sequential(DrawsInPython()), edge=("input", "0.fc"))',
        "TracingError",
        "the point input -> 0.fc lies inside a forward that cannot be traced: the forward of '0' "
        "(DrawsInPython) cannot be traced: it draws random numbers in Python, which a graph would freeze\n"
        "  for example: after='block', the path of a module: a cut at the output of a module needs no trace",
        "Networks",
    ),
    BadInput(
        "gs.strip(model)",
        "SurgeryError",
        "this Net is not spliced, so there is nothing to strip\n"
        "  for example: strip(insert_grl(model, after='layer3'))",
        "Networks",
    ),
    BadInput(
        'gs.strip(gs.insert_grl(model, after="stem"), "grl_stm")',
        "SurgeryError",
        "there is no 'grl_stm' to strip\n  nearest: grl_stem",
        "Networks",
    ),
    BadInput(
        'gs.strip(gs.insert_grl(model, after="stem"), ["grl_stem", "head"])',
        "SurgeryError",
        "there is no 'head' to strip\n  nearest: grl_stem",
        "Networks",
    ),
    BadInput(
        "gs.strip(3)",
        "SurgeryError",
        "strip works on an nn.Module; got int: '3'\n  for example: strip(timm.create_model('resnet18'), ...)",
        "Networks",
    ),
    BadInput(
        "gs.reversals(3)",
        "SurgeryError",
        "reversals works on an nn.Module; got int: '3'\n"
        "  for example: reversals(insert_grl(model, after='layer3'))",
        "Networks",
    ),
    BadInput(
        "gs.reversal_disabled(3).__enter__()",
        "SurgeryError",
        "reversal_disabled works on an nn.Module; got int: '3'\n"
        "  for example: with reversal_disabled(model): ...",
        "Networks",
    ),
    # Heads
    BadInput(
        'gs.attach_domain_head(model, "nowhere", example_inputs=x)',
        "PointNotFoundError",
        "there is no point 'nowhere' in this network\n"
        "  for example: print(grl_surgery.graph(model)) lists the points",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1")',
        "SurgeryError",
        "it is not known what inputs Net takes, so the head cannot be sized\n"
        "  for example: attach_domain_head(model, 'layer3', example_inputs=(torch.randn(2, 3, 224, "
        "224),))",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, ["stage1", "fc"], example_inputs=x)',
        "SurgeryError",
        "one head cannot read values with different axes: 'stage1' (2, 4, 8, 8), 'fc' (2, 3)\n"
        "  nearest: stage1, fc\n"
        "  for example: after='stage1', and another head for the others",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1", kind="wgan", example_inputs=x)',
        "SurgeryError",
        "kind='wgan' is not known\n  nearest: dann, mdd, wdgrl\n  for example: kind='mdd'",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1", kind="mdd", example_inputs=x)',
        "SurgeryError",
        "kind='mdd' is a second classifier of the task, and needs its number of classes\n"
        "  for example: kind='mdd', num_classes=10",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1", num_domains=1, example_inputs=x)',
        "SurgeryError",
        "num_domains=1: a softmax over a single logit is constant, so such a head trains nothing. "
        "Two domains are num_domains=2; binary=True makes one logit of them, for a binary loss\n"
        "  for example: DomainClassifier(512, num_domains=2, binary=True)",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1", num_domains=2.5, example_inputs=x)',
        "SurgeryError",
        "num_domains is 2.5, but must be a whole number of at least 1\n"
        "  for example: DomainClassifier(512, num_domains=2)",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1", name="fc", example_inputs=x)',
        "SurgeryError",
        "the network already has an attribute 'fc'\n  for example: name='fc_2'",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1", name="my head", example_inputs=x)',
        "SurgeryError",
        "name='my head' cannot be an attribute of a module\n  for example: name='domain'",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1", pool="median", example_inputs=x)',
        "SurgeryError",
        "pool='median' is not known\n"
        "  nearest: auto, none, class_token, mean, max, attention, statistics, last, nc, nlc, ncl, lnc, "
        "nchw, nhwc, ncthw, nthwc, ncdhw, ndhwc\n"
        "  for example: pool='auto'",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1", dropout=1.5, example_inputs=x)',
        "SurgeryError",
        "dropout is 1.5, but must be in [0, 1): at 1 nothing is left to learn from\n"
        "  for example: DomainClassifier(512, dropout=0.5)",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1", condition_on="stage2", example_inputs=x)',
        "SurgeryError",
        "condition_on='stage2' has the shape (2, 4, 8, 8), not (B, classes)\n"
        "  for example: condition_on='fc'",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1", classifier="pixel", example_inputs=x)',
        "SurgeryError",
        "classifier='pixel' is neither a module nor a known name\n"
        "  nearest: global, patch\n"
        "  for example: classifier='global'",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1", example_inputs=torch.randn(2, 5, 8, 8))',
        "ShapeError",
        "this Net does not run on inputs of 2x5x8x8: RuntimeError: Given groups=1, weight of size "
        "[4, 3, 3, 3], expected input[2, 5, 8, 8] to have 3 channels, but got 5 channels instead\n"
        "  for example: example_inputs=x, where model(x) runs",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(Tuples(), "encoder", example_inputs=vector())',
        "ShapeError",
        "the value of 'encoder' is not one tensor\n  for example: one item of it, as in after='encoder[0]'",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1", dropout="0.5", example_inputs=x)',
        "SurgeryError",
        "dropout is '0.5', but must be in [0, 1): at 1 nothing is left to learn from\n"
        "  for example: DomainClassifier(512, dropout=0.5)",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1", condition_on="", example_inputs=x)',
        "SurgeryError",
        "condition_on='' is no point: expected a name, 'glob:...', 're:...', a module class or a "
        "function of a graph node, got str\n"
        "  for example: condition_on='layer3', condition_on='glob:layer3.*', condition_on=torch.nn.Conv2d",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1", condition_on=["fc", "mean"], example_inputs=x)',
        "SurgeryError",
        "a head reads one point, and condition_on=['fc', 'mean'] stands for 2\n"
        "  nearest: fc, mean\n"
        "  for example: condition_on='fc'",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1", name="class", example_inputs=x)',
        "SurgeryError",
        "name='class' cannot be an attribute of a module\n  for example: name='domain'",
        "Heads",
    ),
    BadInput(
        'gs.attach_domain_head(model, "stage1", name="_domain", example_inputs=x)',
        "SurgeryError",
        "name='_domain' begins with an underscore, which names of heads must not\n"
        "  for example: name='domain'",
        "Heads",
    ),
    BadInput(
        "gs.DomainHead(None)",
        "SurgeryError",
        "DomainHead, for its classifier, works on an nn.Module; got NoneType: 'None'\n"
        "  for example: DomainHead(DomainClassifier(512), pool=FeaturePool('nchw'))",
        "Heads",
    ),
    BadInput(
        "gs.DomainHead(nn.Linear(8, 2), pool=3)",
        "SurgeryError",
        "DomainHead, for its pool, works on an nn.Module; got int: '3'\n"
        "  for example: DomainHead(DomainClassifier(512), pool=FeaturePool('nchw'))",
        "Heads",
    ),
    BadInput(
        "gs.DomainClassifier(8.0)",
        "SurgeryError",
        "the number of input features is 8.0, but must be a whole number of at least 1\n"
        "  for example: DomainClassifier(512, num_domains=2)",
        "Heads",
    ),
    # Verification
    BadInput(
        "gs.verify_flip(model, example_inputs=x).raise_if_failed()",
        "FlipError",
        "there is no reversal in this network; 20 downstream unchanged; forward identical\n"
        "- there is no reversal in this network",
        "Verification",
    ),
    BadInput(
        'gs.verify_flip(gs.insert_grl(model, after="stem"))',
        "SurgeryError",
        "it is not known what inputs Net takes\n"
        "  for example: verify_flip(m, reference=model, example_inputs=(torch.randn(2, 3, 224, "
        "224),))",
        "Verification",
    ),
    BadInput(
        'gs.verify_flip(gs.insert_grl(model, after="stem"), reference=Repeated(), example_inputs=x)',
        "SurgeryError",
        "the reference is another network: the model has no parameter 'first.weight'\n"
        "  for example: verify_flip(insert_grl(model, after='layer3'), reference=model)",
        "Verification",
    ),
    BadInput(
        'gs.verify_flip(gs.insert_grl(model, after="stem"), example_inputs=(x, x))',
        "SurgeryError",
        "Net itself fails on these example inputs: Net.forward() takes 2 positional arguments but "
        "3 were given\n"
        "  for example: example_inputs=(x,), with an x for which model(x) works",
        "Verification",
    ),
    BadInput(
        'gs.verify_flip(gs.insert_grl(model, after="stem"), example_inputs={"images": x})',
        "SurgeryError",
        "Net itself fails on these example inputs: Net.forward() got an unexpected keyword "
        "argument 'images'\n"
        "  for example: example_inputs=(x,), with an x for which model(x) works",
        "Verification",
    ),
    BadInput(
        'gs.verify_flip(gs.insert_grl(model, after="stem"), example_inputs=torch.randn(2, 5, 8, 8))',
        "SurgeryError",
        "Net itself fails on these example inputs: Given groups=1, weight of size [4, 3, 3, 3], "
        "expected input[2, 5, 8, 8] to have 3 channels, but got 5 channels instead\n"
        "  for example: example_inputs=(x,), with an x for which model(x) works",
        "Verification",
    ),
    BadInput(
        'gs.verify_flip(gs.insert_grl(model, after="stem"), example_inputs=x, mode="test")',
        "SurgeryError",
        "mode='test' is not known; None keeps the network's own flags\n"
        "  nearest: train, eval\n"
        "  for example: mode='eval'",
        "Verification",
    ),
    BadInput(
        'gs.verify_flip(gs.insert_grl(frozen(Net()), after="stem"), example_inputs=x).raise_if_failed()',
        "FlipError",
        "NOT PROVED: no parameter upstream of a reversal receives a gradient, so nothing is proved; "
        "forward identical; 1 of 1 reversals WRONG\n"
        "- no parameter upstream of a reversal receives a gradient, so nothing is proved\n"
        "- reversal grl_stem (after stem): no gradient reaches it",
        "Verification",
    ),
    BadInput(
        'gs.verify_flip(gs.insert_grl(Net().to("meta"), after="stem"), example_inputs=x)',
        "SurgeryError",
        "'stem.weight' is on the meta device, where there are no numbers to compare\n"
        "  for example: model.to_empty(device='cpu'), then load_state_dict",
        "Verification",
    ),
    BadInput(
        'gs.verify_flip(gs.insert_grl(TwoDevices(), after="stem"), example_inputs=x)',
        "SurgeryError",
        "'stage2.0.conv.weight' is on the meta device, where there are no numbers to compare\n"
        "  for example: model.to_empty(device='cpu'), then load_state_dict",
        "Verification",
    ),
    BadInput(
        'gs.verify_flip(gs.insert_grl(nn.Sequential(nn.LazyLinear(3), nn.ReLU()), after="0"), '
        "example_inputs=vector())",
        "SurgeryError",
        "'0.weight' has no shape yet: its lazy module has not run\n  for example: model(inputs), then verify",
        "Verification",
    ),
    BadInput(
        'gs.verify_flip(gs.insert_grl(Counting(), after="fc"), example_inputs=vector()).raise_if_failed()',
        "FlipError",
        "NOT PROVED: no parameter upstream of a reversal receives a gradient, so nothing is proved; "
        "2 without signal; forward identical; 1 of 1 reversals WRONG\n"
        "- no parameter upstream of a reversal receives a gradient, so nothing is proved\n"
        "- reversal grl_fc (after fc): no gradient reaches it",
        "Verification",
    ),
    BadInput(
        'gs.verify_flip(gs.insert_grl(quantised(), after="0"), example_inputs=vector())',
        "SurgeryError",
        "Sequential itself fails on these example inputs: self and mat2 must have the same dtype, "
        "but got Float and Char\n"
        "  for example: example_inputs=(x,), with an x for which model(x) works",
        "Verification",
    ),
    BadInput(
        "gs.verify_flip(3)",
        "SurgeryError",
        "verify_flip works on an nn.Module; got int: '3'\n"
        "  for example: verify_flip(timm.create_model('resnet18'), ...)",
        "Verification",
    ),
    # Training
    BadInput(
        "gs.domain_loss(torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))",
        "SurgeryError",
        "domains[2] is 2, but the logits are of the domains 0 to 1\n"
        "  for example: a head with num_domains=3, or labels below 2",
        "Training",
    ),
    BadInput(
        "gs.domain_loss(torch.randn(4, 2), torch.tensor([0.0, 1.0, 0.0, 1.0]))",
        "SurgeryError",
        "domain labels are integers 0 to 1, got torch.float32\n"
        "  for example: domain_loss(logits, domains.long())",
        "Training",
    ),
    BadInput(
        "gs.domain_loss(torch.randn(4, 2), torch.tensor([0, 1]))",
        "ShapeError",
        "domain labels of shape (2,) for logits of shape (4, 2): expected one label per sample, "
        "(4,)\n"
        "  for example: domain_loss(logits, domains.flatten())",
        "Training",
    ),
    BadInput(
        "gs.param_groups(model, lr=-1.0)",
        "SurgeryError",
        "lr is -1.0, but must be a positive finite number\n  for example: lr=0.01",
        "Training",
    ),
    BadInput(
        "gs.dann_lr(1.5)",
        "SurgeryError",
        "training progress is 1.5, which is outside [0, 1]: 0 is the start, 1 the end\n"
        "  for example: dann()(step / total_steps)",
        "Training",
    ),
    BadInput(
        'gs.schedules.dann()(float("nan"))',
        "SurgeryError",
        "training progress is nan, which is outside [0, 1]: 0 is the start, 1 the end\n"
        "  for example: dann()(step / total_steps)",
        "Training",
    ),
    BadInput(
        "gs.proxy_a_distance(torch.randn(4, 2), torch.randn(4, 3))",
        "ShapeError",
        "features of shapes (4, 2) and (4, 3): expected (N, C) and (M, C), N and M at least 4\n"
        "  for example: proxy_a_distance(FeaturePool('nchw')(source), FeaturePool('nchw')(target))",
        "Training",
    ),
    BadInput(
        "gs.domain_loss(None, 0)",
        "ShapeError",
        "domain_loss works on a tensor, got NoneType\n"
        "  for example: domain_loss(torch.randn(8, 2), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))",
        "Training",
    ),
    BadInput(
        "gs.domain_loss(torch.randn(4, 2), [0, 0, 1, 1])",
        "SurgeryError",
        "domain labels are integers 0 to 1, got list\n"
        "  for example: domain_loss(logits, torch.tensor([0, 0, 1, 1])), or domain_loss(logits, 0)",
        "Training",
    ),
    BadInput(
        'gs.domain_loss(torch.randn(2, 2), 0, weights=torch.tensor([1.0, float("inf")]))',
        "SurgeryError",
        "weights must not be negative, infinite or nan, and not all zero; the least is 1.0, their sum inf\n"
        "  for example: domain_loss(logits, domains, weights=entropy_weights(class_logits, domains))",
        "Training",
    ),
    BadInput(
        "gs.entropy_weights(torch.randn(4, 3), [0, 0, 1, 1])",
        "ShapeError",
        "entropy_weights, for its domains, works on a tensor, got list\n"
        "  for example: entropy_weights(torch.randn(4, 10), torch.tensor([0, 0, 1, 1]))",
        "Training",
    ),
    BadInput(
        "gs.entropy_weights(torch.tensor([[1, 2], [2, 1]]))",
        "ShapeError",
        "class logits of shape (2, 2), torch.int64: expected (B, classes), floating point, not empty\n"
        "  for example: entropy_weights(torch.randn(4, 10), torch.tensor([0, 0, 1, 1]))",
        "Training",
    ),
    BadInput(
        "gs.param_groups(None, lr=0.1)",
        "SurgeryError",
        "param_groups works on an nn.Module; got NoneType: 'None'\n"
        "  for example: param_groups(model, lr=0.01)",
        "Training",
    ),
    BadInput(
        'gs.param_groups(model, lr="0.1")',
        "SurgeryError",
        "lr is '0.1', but must be a positive finite number\n  for example: lr=0.01",
        "Training",
    ),
    BadInput(
        "gs.param_groups(model, lr=0.1, new=model.fc)",
        "SurgeryError",
        "new= takes a name or a list of names, got Linear\n"
        "  for example: param_groups(model, lr=0.01, new='fc')",
        "Training",
    ),
    BadInput(
        "gs.dann_lr(0.5, alpha=-10)",
        "SurgeryError",
        "alpha is -10, but must be a non-negative finite number\n"
        "  for example: dann_lr(0.5, lr0=0.01, alpha=10.0, beta=0.75)",
        "Training",
    ),
    BadInput(
        'gs.schedules.delayed("0.5", gs.schedules.dann())',
        "SurgeryError",
        "p0 is '0.5', but must be a non-negative finite number\n  for example: delayed(0.5, dann())",
        "Training",
    ),
    BadInput(
        "gs.schedules.delayed(0.5, gs.schedules.dann)",
        "SurgeryError",
        "dann makes a schedule and is not one itself: call it\n  for example: dann(hi=0.3)",
        "Training",
    ),
    BadInput(
        "gs.schedules.dann().at_step(5, 0)",
        "SurgeryError",
        "total_steps is 0, but must be a positive finite number\n"
        "  for example: dann().at_step(5, total_steps=1000)",
        "Training",
    ),
    BadInput(
        'gs.CoefficientScheduler({"a": 3}, gs.schedules.dann(), 10)',
        "SurgeryError",
        "'a' is no GradientReversal but of type int\n"
        "  for example: CoefficientScheduler(reversals(model), dann(), total_steps=1000)",
        "Training",
    ),
    BadInput(
        "gs.CoefficientScheduler(gs.GradientReversal(), gs.schedules.dann, 10)",
        "SurgeryError",
        "dann makes a schedule and is not one itself: call it\n  for example: dann(hi=0.3)",
        "Training",
    ),
    BadInput(
        'gs.CoefficientScheduler(gs.insert_grl(model, after="stem"), gs.schedules.dann(), 10, only=3)',
        "SurgeryError",
        "only= takes a name or a list of names, got int\n  for example: only='grl_stem'",
        "Training",
    ),
    BadInput(
        "gs.AdversarialMetrics(None)",
        "SurgeryError",
        "AdversarialMetrics works on an nn.Module; got NoneType: 'None'\n"
        "  for example: AdversarialMetrics(model)",
        "Training",
    ),
    BadInput(
        "gs.AdversarialMetrics(nn.ModuleDict(dict(domain=gs.DomainHead(nn.Linear(8, 2)))), head=3)",
        "PointNotFoundError",
        "there is no domain head 3\n  nearest: domain\n  for example: head='domain'",
        "Training",
    ),
    # Files
    BadInput(
        'gs.export(model, "m.h5")',
        "ExportError",
        "'m.h5' has an unknown ending; formats are .safetensors, .pt2, .onnx, and a "
        "folder of code for a name without an ending\n"
        "  for example: export(m, 'm.safetensors')",
        "Files",
    ),
    BadInput(
        'gs.export(model, "nowhere/m.safetensors")',
        "ExportError",
        "there is no folder 'nowhere' to write 'm.safetensors' into\n"
        "  for example: 'm.safetensors', or make the folder first",
        "Files",
    ),
    BadInput(
        'gs.export(model, "m.safetensors", heads=["domain"])',
        "ExportError",
        "heads= chooses outputs of a program for inference; this format keeps all heads as they "
        "are\n"
        "  for example: export(m, 'm.onnx', heads=['domain'])",
        "Files",
    ),
    BadInput(
        'gs.export("timm/resnet18", "m.pt2")',
        "SurgeryError",
        "export works on an nn.Module; got str: 'timm/resnet18'\n"
        "  for example: export(timm.create_model('resnet18'), ...)",
        "Files",
    ),
    BadInput(
        'gs.export(gs.insert_grl(model, after="stem"), "m.pt2")',
        "ExportError",
        "it is not known what inputs Net takes; a program is recorded by running it\n"
        "  for example: export(m, 'm.pt2', example_inputs=(torch.randn(2, 3, 224, 224),))",
        "Files",
    ),
    BadInput(
        'gs.load("nowhere.safetensors")',
        "ExportError",
        "there is no file 'nowhere.safetensors'",
        "Files",
    ),
    BadInput(
        'gs.load("m.h5")',
        "ExportError",
        "there is no file 'm.h5'",
        "Files",
    ),
    BadInput(
        'with disk_full(): gs.export(gs.insert_grl(model, after="stem"), "m.pt2", example_inputs=x)',
        "ExportError",
        "m.pt2 cannot be written: No space left on device; an older file is unchanged\n"
        "  for example: another folder: '/tmp/m.pt2'",
        "Files",
    ),
    BadInput(
        'with read_only(): gs.export(gs.insert_grl(model, after="stem"), "m.pt2", example_inputs=x)',
        "ExportError",
        "m.pt2 cannot be written: Permission denied; an older file is unchanged\n"
        "  for example: another folder: '/tmp/m.pt2'",
        "Files",
    ),
    # The command line
    BadInput(
        "grl-surgery graph timm/resnt18",
        "2",
        "error: timm has no model 'resnt18'\n"
        "  nearest: timm/resnet18, timm/resnet18d, timm/skresnet18, timm/seresnet18, "
        "timm/resnetv2_18\n"
        "  for example: timm/resnet18",
        "The command line",
    ),
    BadInput(
        "grl-surgery graph resnet18",
        "2",
        "error: 'resnet18' does not say where the model comes from\n"
        "  nearest: timm/resnet18, torchvision/resnet18\n"
        "  for example: timm/resnet50, torchvision/resnet50, transformers/BertModel, "
        "package.module:factory or file.py:factory",
        "The command line",
    ),
    BadInput(
        "grl-surgery graph torchvision/resnet19",
        "2",
        "error: torchvision has no model 'resnet19'\n"
        "  nearest: torchvision/resnet18, torchvision/resnet152, torchvision/resnet101, "
        "torchvision/resnet50, torchvision/resnet34\n"
        "  for example: torchvision/resnet18",
        "The command line",
    ),
    BadInput(
        "grl-surgery graph nowhere.py:net",
        "2",
        "error: there is no file nowhere.py\n"
        "  nearest: nets.py\n"
        "  for example: package.module:factory or file.py:factory",
        "The command line",
    ),
    BadInput(
        "grl-surgery graph nets.py:nett",
        "2",
        "error: nets.py has no 'nett'\n  nearest: nets.py:net\n  for example: nets.py:net",
        "The command line",
    ),
    BadInput(
        "grl-surgery graph nets.py:number",
        "2",
        "error: nets.py:number is a int, not a function that returns a network",
        "The command line",
    ),
    BadInput(
        "grl-surgery graph nets.py:fails",
        "2",
        "error: nets.py:fails raised RuntimeError: no weights here\n"
        "  for example: a factory takes no arguments: def factory(): return Network(classes=10)",
        "The command line",
    ),
    BadInput(
        "grl-surgery insert nets.py:net --after layr3",
        "2",
        "error: there is no point 'layr3' in this network\n"
        "  for example: 'grl-surgery graph MODEL' lists the points",
        "The command line",
    ),
    BadInput(
        "grl-surgery insert nets.py:net --after stage1.0.cnv",
        "2",
        "error: there is no point 'stage1.0.cnv' in this network\n"
        "  nearest: stage1.0.conv, stage2.0.conv, stage1.1.conv, stage1.0.act, stage2.1.conv\n"
        "  for example: --after stage1.0.conv",
        "The command line",
    ),
    BadInput(
        "grl-surgery insert nets.py:net",
        "2",
        "error: no point is named: give --after, --before or --edge\n"
        "  for example: --after layer3 ('grl-surgery graph MODEL' lists the points)",
        "The command line",
    ),
    BadInput(
        "grl-surgery insert nets.py:net --after fc --coeff -1",
        "2",
        "error: coeff is -1.0; it must be finite and not negative: the gradient is multiplied by "
        "-coeff, so that a negative one un-reverses it, and infinity or nan destroys it\n"
        "  for example: --coeff 0.5, or --coeff=-0.5 --signed on purpose",
        "The command line",
    ),
    BadInput(
        "grl-surgery insert nets.py:net --after fc -o m.h5",
        "2",
        "error: 'm.h5' has an unknown ending; formats are .safetensors, .pt2, .onnx, and a "
        "folder of code for a name without an ending\n"
        "  for example: -o m.safetensors",
        "The command line",
    ),
    BadInput(
        "grl-surgery insert nets.py:net --after fc -o nowhere/m.safetensors",
        "2",
        "error: there is no folder 'nowhere' to write 'm.safetensors' into\n"
        "  for example: 'm.safetensors', or make the folder first",
        "The command line",
    ),
    BadInput(
        "grl-surgery insert nets.py:net --edge 'stem -> fc'",
        "2",
        "error: 'fc' does not use the value of 'stem'\n"
        "  nearest: mean -> fc\n"
        "  for example: --edge 'mean -> fc'",
        "The command line",
    ),
    BadInput(
        "grl-surgery attach nets.py:net --after stage1 --name fc",
        "2",
        "error: the network already has an attribute 'fc'\n  for example: --name fc_2",
        "The command line",
    ),
    BadInput(
        "grl-surgery verify nets.py:net --after nowhere",
        "2",
        "error: there is no point 'nowhere' in this network\n"
        "  for example: 'grl-surgery graph MODEL' lists the points",
        "The command line",
    ),
    BadInput(
        "grl-surgery verify nowhere.safetensors",
        "2",
        "error: there is no file 'nowhere.safetensors'",
        "The command line",
    ),
    BadInput(
        "grl-surgery strip nowhere.pt2",
        "2",
        "error: there is no file 'nowhere.pt2'",
        "The command line",
    ),
    BadInput(
        "grl-surgery export nowhere.safetensors -o m.onnx",
        "2",
        "error: there is no file 'nowhere.safetensors'",
        "The command line",
    ),
    # Interrupted
    BadInput(
        'gs.verify_flip(gs.insert_grl(hooked(Net()), after="stem"), example_inputs=x)',
        "KeyboardInterrupt",
        "",
        "Interrupted",
    ),
    BadInput(
        'gs.insert_grl(Interrupted(), after="stem")',
        "KeyboardInterrupt",
        "",
        "Interrupted",
    ),
    BadInput(
        'gs.export(gs.insert_grl(hooked(Net()), after="stem"), "m.pt2", example_inputs=x)',
        "KeyboardInterrupt",
        "",
        "Interrupted",
    ),
]
