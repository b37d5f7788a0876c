"""Clipping, normalising and coefficients for each place: as the papers say, in every context, in files."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from small_networks import Net, image
from torch import Tensor, nn

import grl_surgery as gs
from grl_surgery.nn.reversal import reverse_gradient

FORMULAS: list[tuple[dict[str, Any], Any]] = [
    ({"clip": 0.5}, lambda g: g.clamp(-0.5, 0.5)),
    ({"normalize": True}, lambda g: g / g.square().sum().sqrt()),
    ({"clip": 0.5, "normalize": True}, lambda g: g.clamp(-0.5, 0.5) / g.clamp(-0.5, 0.5).norm()),
]
names = [" and ".join(options) for options, _ in FORMULAS]


def gradient(function: Any, x: Tensor, weight: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (function(leaf * 1.0) * weight).sum().backward()
    return leaf.grad


@pytest.mark.parametrize(("options", "formula"), FORMULAS, ids=names)
@pytest.mark.parametrize("coeff", [0.25, torch.tensor(0.25), torch.tensor([0.0, 0.5, 2.0])])
def test_what_leaves_is_the_formula_of_what_enters(options, formula, coeff) -> None:
    x, weight = torch.randn(3, 5), torch.randn(3, 5)
    factor = coeff[:, None] if isinstance(coeff, Tensor) and coeff.dim() else coeff
    found = gradient(lambda v: reverse_gradient(v, coeff, **options), x, weight)
    torch.testing.assert_close(found, -factor * formula(weight))
    assert torch.equal(reverse_gradient(x, coeff, **options), x)


@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (1, 1, 3, 4), (2, 5, 3, 4), (1, 5, 1, 1), (2, 1, 1, 1)])
def test_a_coefficient_for_each_place_broadcasts_against_the_input(shape: tuple[int, ...]) -> None:
    x, weight, coeff = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4), torch.rand(shape)
    found = gradient(lambda v: reverse_gradient(v, coeff), x, weight)
    assert torch.equal(found, weight * -coeff)


def test_a_gradient_of_zero_stays_zero_when_it_is_normalised() -> None:
    x = torch.randn(3, 5)
    assert torch.equal(gradient(gs.GradientReversal(normalize=True), x, torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_long_gradient_in_half_precision_is_normalised_without_overflow(dtype: torch.dtype) -> None:
    x, weight = torch.randn(40, 50, dtype=dtype), torch.full((40, 50), 1000.0, dtype=dtype)
    found = gradient(gs.GradientReversal(normalize=True), x, weight)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float().norm(), torch.tensor(1.0), atol=1e-2, rtol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:The .grad attribute")
@pytest.mark.parametrize(("options", "formula"), FORMULAS, ids=names)
def test_compiled_and_exported_and_scripted_layers_obey_the_options(options, formula) -> None:
    layer = gs.GradientReversal(0.5, **options)
    x, weight = torch.randn(3, 5), torch.randn(3, 5)
    expected = -0.5 * formula(weight)
    program = torch.export.export(nn.Sequential(nn.Identity(), layer), (x,)).module()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    ways = [compiled, program, torch.jit.script(layer), torch.jit.trace(layer, x), traced]
    for way in (*ways, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(gradient(way, x, weight), expected)


def test_another_coefficient_compiles_no_second_graph() -> None:
    layer, graphs = gs.GradientReversal(clip=0.5, normalize=True), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=count, fullgraph=True)
    for coeff in (1.0, 0.5, 0.25):
        layer.set_coeff(coeff)
        compiled(torch.randn(3, 5, requires_grad=True)).sum().backward()
    assert len(graphs) == 1


@pytest.mark.parametrize(("options", "formula"), FORMULAS, ids=names)
def test_under_vmap_each_sample_is_normalised_on_its_own(options, formula) -> None:
    x, weight = torch.randn(4, 5), torch.randn(4, 5)
    per_sample = torch.func.vmap(
        torch.func.grad(lambda v, w: (reverse_gradient(v * 1.0, 0.5, **options) * w).sum())
    )
    expected = torch.stack([-0.5 * formula(row) for row in weight])
    torch.testing.assert_close(per_sample(x, weight), expected)


@pytest.mark.parametrize(("options", "formula"), FORMULAS, ids=names)
def test_a_disabled_reversal_neither_clips_nor_normalises(options, formula) -> None:
    layer, x, weight = gs.GradientReversal(**options), torch.randn(3, 5), torch.randn(3, 5)
    with gs.reversal_disabled(layer):
        assert torch.equal(gradient(layer, x, weight), weight)
    torch.testing.assert_close(gradient(layer, x, weight), -formula(weight))


def test_the_layer_shows_what_rebuilds_it() -> None:
    layer = gs.GradientReversal(0.5, clip=0.1, normalize=True)
    assert repr(layer) == "GradientReversal(coeff=0.5, clip=0.1, normalize=True)"
    assert repr(eval(repr(layer), {"GradientReversal": gs.GradientReversal})) == repr(layer)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("inf"), float("nan"), True, "0.5"])
def test_a_clip_that_is_no_positive_number_is_refused(clip: Any) -> None:
    for make in (lambda: gs.GradientReversal(clip=clip), lambda: reverse_gradient(torch.ones(2), clip=clip)):
        with pytest.raises(gs.SurgeryError, match=r"clip is .*; it must be a positive number"):
            make()


def test_complex_gradients_are_normalised_and_cannot_be_clipped() -> None:
    x = torch.randn(3, dtype=torch.complex64, requires_grad=True)
    reverse_gradient(x * 1, normalize=True).abs().sum().backward()
    torch.testing.assert_close(x.grad.abs().square().sum(), torch.tensor(1.0))
    with pytest.raises(gs.ShapeError, match="clamps real numbers"):
        reverse_gradient(x, clip=0.5)


# ---------------------------------------------------------------------------------- in networks and files


def spliced(kind: str, options: dict[str, Any]) -> tuple[nn.Module, nn.Module, str]:
    model = Net().eval()
    if kind == "head":
        m = gs.attach_domain_head(model, "stage1", example_inputs=image(), hidden=8, coeff=0.5, **options)
        return model, m, "domain.reversal"
    m = gs.insert_grl(model, "stage1", coeff=0.5, **options)
    return model, m, "grl_stage1"


def shown(m: nn.Module, name: str) -> str:
    return repr(gs.reversals(m)[name])


@pytest.mark.parametrize("kind", ["cut", "head"])
@pytest.mark.parametrize(("options", "formula"), FORMULAS, ids=names)
def test_surgery_with_options_is_proved_and_survives_files_and_strip(
    kind, options, formula, tmp_path
) -> None:
    model, m, name = spliced(kind, options)
    said = (
        "GradientReversal(coeff=0.5, " + ", ".join(f"{key}={value}" for key, value in options.items()) + ")"
    )
    assert shown(m, name) == said
    assert gs.verify_flip(m, model, image()).ok
    assert not gs.reversals(gs.strip(m))
    for file in ("m.safetensors", "m.pt2", "folder"):
        path = gs.export(m, tmp_path / file, image())
        own = {} if file == "m.pt2" else {"model": Net}
        again = gs.load(path, **own)
        assert shown(again, name) == said, file
        weight = torch.randn(2, 3)
        for network in (m, again):
            network.zero_grad()
        grads = []
        for network in (m, again):
            output = network(image())
            (output[1].square().sum() if kind == "head" else (output * weight).sum()).backward()
            grads.append(dict(network.named_parameters())["stem.weight"].grad.clone())
        torch.testing.assert_close(grads[0], grads[1])
    gs.export(m, tmp_path / "m.onnx", image())


def test_the_gradient_that_reaches_the_network_is_the_formula_of_the_one_at_the_cut() -> None:
    model, m, _ = spliced("cut", {"clip": 1e-3, "normalize": True})
    x = image()
    feature = model.stage1(torch.relu(model.stem(x)))
    plain = model(x).square().sum()
    entered = []
    hook = model.stage1.register_forward_hook(lambda _, __, y: y.register_hook(entered.append) and None)
    model(x).square().sum().backward()
    hook.remove()
    limited = entered[0].clamp(-1e-3, 1e-3)
    (expected,) = torch.autograd.grad(feature, model.stem.weight, -0.5 * limited / limited.norm())
    (found,) = torch.autograd.grad(m(x).square().sum(), model.stem.weight)
    torch.testing.assert_close(found, expected)
    assert plain.requires_grad


class Forgets(gs.GradientReversal):
    """Neither clips nor normalises, whatever it was asked for."""

    def forward(self, x: Tensor) -> Tensor:
        return reverse_gradient(x, self.coeff)


@pytest.mark.parametrize(("options", "formula"), FORMULAS, ids=names)
def test_the_proof_fails_where_an_option_has_no_effect(options, formula) -> None:
    model = nn.Sequential(nn.Linear(4, 6), Forgets(**options), nn.Linear(6, 2))
    report = gs.verify_flip(model, example_inputs=torch.randn(3, 4))
    assert not report.ok
    assert "it does not multiply by -" in report.reversals[0].note


@pytest.mark.parametrize(("options", "formula"), FORMULAS, ids=names)
def test_the_doctor_finds_a_reversal_that_clips_or_normalises_alive(options, formula) -> None:
    layer = gs.GradientReversal(0.5, **options)
    model = nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(6, 2))
    (found,) = gs.find_reversals(model, torch.randn(3, 4))
    assert (found.factor, found.verdict) == (-0.5, "reverses")
    assert repr(model[1]) == repr(layer)
