"""Heads: what they compute, for which shapes, what flows back out of them, and what they refuse."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from grl_surgery.errors import ShapeError, SurgeryError
from grl_surgery.nn.classifiers import DomainClassifier, PatchDomainClassifier
from grl_surgery.nn.conditions import MultilinearMap, RandomizedMultilinearMap
from grl_surgery.nn.head_building import build_head
from grl_surgery.nn.heads import DomainHead, find_heads
from grl_surgery.nn.pooling import FeaturePool, LayoutName, check_tensor, infer_layout
from grl_surgery.nn.reversal import GradientReversal

LAYOUTS: list[LayoutName] = ["nc", "nlc", "ncl", "nchw", "nhwc", "ncthw", "nthwc"]
SIZES = {"n": 2, "c": 6, "l": 5, "h": 3, "w": 4, "t": 2}


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


def feature(layout: str, **sizes: int) -> Tensor:
    return torch.randn([{**SIZES, **sizes}[letter] for letter in layout])


def gradients(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient of a fixed function of the output: that of the first input, and those of the parameters."""
    first = inputs[0].clone().requires_grad_()
    torch.manual_seed(0)
    output = module(first, *inputs[1:])
    weight = torch.linspace(-1.0, 1.0, output.numel()).reshape(output.shape)
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad((output * weight).sum(), [first, *parameters])
    return grads[0], dict(zip(names, grads[1:], strict=True))


# --------------------------------------------------------------------------------------------- classifiers


def test_a_classifier_is_linear_relu_linear_relu_linear_on_its_own_weights() -> None:
    classifier = DomainClassifier(6, num_domains=3, hidden=8, depth=2).eval()
    first, first_bias, second, second_bias, last, last_bias = classifier.state_dict().values()
    x = feature("nc")
    hidden = F.relu(F.relu(x @ first.T + first_bias) @ second.T + second_bias)
    torch.testing.assert_close(classifier(x), hidden @ last.T + last_bias)


def test_a_patch_classifier_is_the_classifier_applied_at_every_position() -> None:
    flat = DomainClassifier(6, num_domains=3, hidden=8, norm="layer").eval()
    patch = PatchDomainClassifier(6, num_domains=3, hidden=8, norm="layer").eval()
    weights = [w[:, :, None, None] if w.dim() == 2 else w for w in flat.state_dict().values()]
    patch.load_state_dict(dict(zip(patch.state_dict(), weights, strict=True)))
    x = feature("nchw")
    for row, column in itertools.product(range(3), range(4)):
        torch.testing.assert_close(patch(x)[:, :, row, column], flat(x[:, :, row, column]))


def test_a_position_of_a_patch_classifier_depends_on_that_position_alone() -> None:
    classifier = PatchDomainClassifier(6, hidden=8, norm="layer").eval()
    x = feature("nchw").requires_grad_()
    classifier(x)[:, :, 1, 2].sum().backward()
    touched = x.grad.abs().sum(dim=(0, 1)) > 0
    assert touched.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("norm", [None, "batch", "layer"])
@pytest.mark.parametrize("domains", [2, 5])
def test_every_setting_gives_one_logit_per_domain(depth: int, norm: Any, domains: int) -> None:
    flat = DomainClassifier(6, domains, hidden=8, depth=depth, norm=norm)
    assert flat(feature("nc")).shape == (2, domains)
    assert len(flat.hidden) == depth
    patch = PatchDomainClassifier(6, domains, hidden=8, depth=depth, norm=norm)
    assert patch(feature("nchw")).shape == (2, domains, 3, 4)


def test_the_output_is_logits_and_not_probabilities() -> None:
    classifier = DomainClassifier(6, hidden=8)
    with torch.no_grad():
        classifier.logits.bias.copy_(torch.tensor([100.0, -100.0]))
    assert classifier(torch.zeros(2, 6)).abs().min() > 50


def test_binary_gives_one_logit_and_so_does_one_domain_with_it() -> None:
    for domains in (1, 2):
        assert DomainClassifier(6, domains, hidden=8, binary=True)(feature("nc")).shape == (2, 1)
        assert PatchDomainClassifier(6, domains, hidden=8, binary=True)(feature("nchw")).shape == (2, 1, 3, 4)


def test_the_keys_of_a_head_read_well() -> None:
    head = build_head((2, 6, 3, 4), norm="batch", hidden=8, num_classes=1000, condition="randomized")
    assert [key for key in head.state_dict() if "norm" not in key] == [
        "condition.feature_matrix",
        "condition.class_matrix",
        "classifier.hidden.0.linear.weight",
        "classifier.hidden.0.linear.bias",
        "classifier.hidden.1.linear.weight",
        "classifier.hidden.1.linear.bias",
        "classifier.logits.weight",
        "classifier.logits.bias",
    ]
    assert [name for name, _ in head.named_children()] == ["reversal", "pool", "condition", "classifier"]


@pytest.mark.parametrize("kind", [DomainClassifier, PatchDomainClassifier])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_domains": 1}, "num_domains=1: a softmax over a single logit is constant.*binary=True"),
        ({"num_domains": 0}, "num_domains is 0, but must be a whole number of at least 1"),
        ({"num_domains": 2.0}, "num_domains is 2.0"),
        ({"num_domains": 3, "binary": True}, "one logit, which cannot tell num_domains=3 domains apart"),
        ({"hidden": 0}, "hidden is 0"),
        ({"depth": -1}, "depth is -1, but must be a whole number of at least 0"),
        ({"dropout": 1.0}, r"dropout is 1.0, but must be in \[0, 1\)"),
        ({"norm": "group"}, "(?s)norm='group' is not known.*nearest: None, 'batch', 'layer'"),
    ],
)
def test_an_impossible_classifier_is_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        kind(6, **settings)


def test_a_classifier_without_input_features_is_refused() -> None:
    with pytest.raises(SurgeryError, match=r"the number of input features is 0"):
        DomainClassifier(0)


@pytest.mark.parametrize("value", [feature("nchw"), feature("nc", c=7), feature("nlc"), torch.ones(6)])
def test_a_classifier_refuses_another_shape_with_both_shapes(value: Tensor) -> None:
    shape = str(tuple(value.shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(
        ShapeError, match=rf"(?s)DomainClassifier expects .* \(B, 6\), got {shape}.*for example"
    ):
        DomainClassifier(6, hidden=8)(value)


def test_a_patch_classifier_refuses_channels_last() -> None:
    with pytest.raises(ShapeError, match=r"\(B, 6, H, W\), got \(2, 3, 4, 6\)"):
        PatchDomainClassifier(6, hidden=8)(feature("nhwc"))


@pytest.mark.parametrize("module", [DomainClassifier(6), FeaturePool("nchw"), DomainHead(nn.Identity())])
@pytest.mark.parametrize("value", [None, [1.0, 2.0], (torch.ones(2, 6),)])
def test_what_is_not_a_tensor_is_refused_by_its_type(module: nn.Module, value: object) -> None:
    with pytest.raises(ShapeError, match=f"works on a tensor, got {type(value).__name__}"):
        module(value)


# ------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pooling_is_the_mean_over_all_positions_of_each_channel(layout: LayoutName) -> None:
    x = feature(layout)
    channels_last = x.movedim(layout.index("c"), -1)
    expected = torch.stack(
        [
            torch.stack([sample[..., c].flatten().sum() / sample[..., c].numel() for c in range(6)])
            for sample in channels_last
        ]
    )
    torch.testing.assert_close(FeaturePool(layout)(x), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pooling_to_nothing_only_moves_the_channels_to_axis_one(layout: LayoutName) -> None:
    x = feature(layout)
    letters = ["n", "c", *[letter for letter in layout if letter not in "nc"]]
    expected = torch.einsum(f"{layout}->{''.join(letters)}", x)
    assert torch.equal(FeaturePool(layout, reduction="none")(x), expected)


def test_the_class_token_is_the_first_and_prefix_tokens_can_be_left_out() -> None:
    x = feature("nlc")
    assert torch.equal(FeaturePool("nlc", reduction="class_token")(x), x[:, 0])
    expected = (x[:, 2] + x[:, 3] + x[:, 4]) / 3
    torch.testing.assert_close(FeaturePool("nlc", num_prefix_tokens=2)(x), expected)


@pytest.mark.parametrize(
    ("shape", "num_features", "name", "channels"),
    [
        ((8, 512), None, "nc", 512),
        ((8, 1024, 14, 14), 2048, "nchw", 1024),  # an inner layer of a ResNet
        ((8, 2048, 7, 7), 2048, "nchw", 2048),
        ((8, 7, 7, 768), 768, "nhwc", 768),  # the end of a swin
        ((8, 7, 10, 768), 768, "nhwc", 768),
        ((8, 197, 192), 192, "nlc", 192),  # a ViT
        ((8, 192, 196), 192, "ncl", 192),
        ((8, 512, 2, 7, 7), 512, "ncthw", 512),
        ((8, 256, 4, 14, 14), 512, "ncthw", 256),
        ((8, 4, 7, 7, 768), 768, "nthwc", 768),
    ],
)
def test_a_layout_is_certain_where_the_shape_decides(
    shape: tuple[int, ...], num_features: int | None, name: str, channels: int
) -> None:
    layout = infer_layout(shape, num_features)
    assert (layout.name, layout.channels, layout.ambiguous) == (name, channels, False)


@pytest.mark.parametrize(
    ("shape", "num_features", "name", "assumption"),
    [
        ((8, 56, 56, 96), 768, "nhwc", "assumed nhwc, whose image is square; pool='nchw' would read C=56"),
        ((8, 64, 56, 40), None, "nchw", "assumed nchw; pool='nhwc' would read C=40"),
        ((8, 7, 7, 7), None, "nchw", "assumed nchw, whose image is square; pool='nhwc' would read C=7"),
        ((8, 768, 7, 768), 768, "nchw", "assumed nchw; pool='nhwc' would read C=768"),
        ((8, 197, 192), None, "nlc", "assumed nlc; pool='ncl' would read C=197"),
        ((8, 192, 192), 192, "nlc", "assumed nlc; pool='ncl' would read C=192"),
        (
            (8, 4, 7, 7, 96),
            None,
            "nthwc",
            "assumed nthwc, whose image is square; pool='ncthw' would read C=4",
        ),
    ],
)
def test_an_ambiguous_layout_says_what_was_assumed_and_how_to_choose(
    shape: tuple[int, ...], num_features: int | None, name: str, assumption: str
) -> None:
    layout = infer_layout(shape, num_features)
    assert (layout.name, layout.assumption) == (name, assumption)
    assert layout.ambiguous
    assert assumption in str(layout)
    if len(shape) > 2:
        assert assumption in repr(build_head(shape, num_features=num_features, hidden=4))


@given(
    layout=st.sampled_from(["nchw", "nhwc", "nlc", "ncl", "ncthw", "nthwc"]),
    channels=st.integers(30, 40),
    others=st.integers(2, 20),
)
def test_the_axis_that_has_num_features_holds_the_channels(layout: str, channels: int, others: int) -> None:
    shape = [channels if letter == "c" else others for letter in layout]
    found = infer_layout(shape, num_features=channels)
    assert (found.name, found.channels, found.ambiguous) == (layout, channels, False)


@pytest.mark.parametrize("shape", [(), (8,), (8, 1, 2, 3, 4, 5)])
def test_a_shape_with_too_few_or_too_many_axes_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=f"has {len(shape)} axes: a head can be sized for 2 to 5"):
        infer_layout(shape)


def test_an_empty_feature_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"shape \(8, 0, 7, 7\) has no elements"):
        infer_layout((8, 0, 7, 7))
    with pytest.raises(ShapeError, match=r"shape \(2, 6, 0, 4\) has no elements to pool"):
        FeaturePool("nchw")(torch.ones(2, 6, 0, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeaturePool("nwhc"), "(?s)layout='nwhc' is not known.*nchw"),
        (lambda: FeaturePool("nchw", reduction="median"), "reduction='median' is not known"),
        (lambda: FeaturePool("nchw", reduction="class_token"), "only tokens .* have a class token"),
        (lambda: FeaturePool("nhwc", num_prefix_tokens=1), "only tokens .* or prefix tokens"),
        (lambda: FeaturePool("nlc", num_prefix_tokens=-1), "num_prefix_tokens=-1 does not go with"),
        (
            lambda: FeaturePool("nlc", reduction="class_token", num_prefix_tokens=1),
            "num_prefix_tokens=1 does not go with reduction='class_token'",
        ),
    ],
)
def test_an_impossible_pool_is_refused(make: Callable[[], FeaturePool], message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        make()


def test_a_pool_refuses_a_feature_of_another_layout() -> None:
    with pytest.raises(ShapeError, match=r"(?s)pooling \(N, C, H, W\) got .* \(2, 5, 6\).*nearest: nlc, ncl"):
        FeaturePool("nchw")(feature("nlc"))
    with pytest.raises(ShapeError, match=r"num_prefix_tokens=5 leaves none of the 5 tokens"):
        FeaturePool("nlc", num_prefix_tokens=5)(feature("nlc"))


# -------------------------------------------------------------------------------------------- conditioning


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 4), channels=st.integers(1, 6), classes=st.integers(1, 5))
def test_the_multilinear_map_is_every_product_of_a_feature_and_a_probability(
    batch: int, channels: int, classes: int
) -> None:
    features, logits = torch.randn(batch, channels), torch.randn(batch, classes)
    mapped = MultilinearMap()(features, logits)
    assert mapped.shape == (batch, channels * classes)
    for b in range(batch):
        total = sum(math.exp(logits[b, k].item()) for k in range(classes))
        for k, c in itertools.product(range(classes), range(channels)):
            product = features[b, c].item() * math.exp(logits[b, k].item()) / total
            assert mapped[b, k * channels + c].item() == pytest.approx(product, rel=1e-4, abs=1e-6)


def test_the_multilinear_map_has_the_columns_of_the_authors_code() -> None:
    features, logits = torch.randn(4, 6), torch.randn(4, 3)
    # Their two lines: a batched product of (B, K, 1) and (B, 1, C), viewed as (B, K C).
    theirs = torch.bmm(logits.softmax(1).unsqueeze(2), features.unsqueeze(1)).view(-1, 3 * 6)
    torch.testing.assert_close(MultilinearMap()(features, logits), theirs)


def test_the_randomised_map_is_the_paper_formula_written_with_its_matrices() -> None:
    mapping = RandomizedMultilinearMap(6, 3, output_dim=16)
    features, logits = torch.randn(4, 6), torch.randn(4, 3)
    r_f, r_g = mapping.feature_matrix, mapping.class_matrix
    expected = torch.einsum("bc,cd,bk,kd->bd", features, r_f, logits.softmax(1), r_g) / 16**0.5
    torch.testing.assert_close(mapping(features, logits), expected)


def test_the_randomised_map_keeps_inner_products_in_expectation() -> None:
    torch.manual_seed(0)
    features, logits = torch.randn(2, 6), torch.randn(2, 3)
    exact = MultilinearMap()(features, logits)
    random = RandomizedMultilinearMap(6, 3, output_dim=200_000)(features, logits)
    torch.testing.assert_close(random @ random.T, exact @ exact.T, rtol=0.05, atol=0.05)


def test_the_random_matrices_are_saved_and_never_trained() -> None:
    torch.manual_seed(0)
    mapping, other = RandomizedMultilinearMap(6, 3, 16), RandomizedMultilinearMap(6, 3, 16)
    assert list(mapping.parameters()) == []
    features, logits = torch.randn(4, 6), torch.randn(4, 3)
    assert not torch.equal(mapping(features, logits), other(features, logits))
    other.load_state_dict(mapping.state_dict())
    assert torch.equal(mapping(features, logits), other(features, logits))
    for matrix in mapping.state_dict().values():
        assert abs(matrix.mean()) < 0.5
        assert 0.6 < matrix.std() < 1.4


@pytest.mark.parametrize("mapping", [MultilinearMap(), RandomizedMultilinearMap(6, 3, 16)])
def test_the_domain_loss_does_not_reach_the_class_logits(mapping: nn.Module) -> None:
    features, logits = torch.randn(4, 6, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    mapping(features, logits).sum().backward()
    assert logits.grad is None
    assert features.grad is not None
    assert features.grad.abs().sum() > 0


@pytest.mark.parametrize("mapping", [MultilinearMap(), RandomizedMultilinearMap(6, 3, 16)])
@pytest.mark.parametrize("shapes", [((4, 6, 1), (4, 3)), ((4, 6), (5, 3)), ((4, 6), (4,))])
def test_a_map_refuses_anything_but_two_matrices_of_one_batch(mapping: nn.Module, shapes: Any) -> None:
    with pytest.raises(ShapeError, match=r"expects features \(B, C\) and class logits \(B, K\) of one batch"):
        mapping(torch.randn(shapes[0]), torch.randn(shapes[1]))


def test_the_randomised_map_refuses_other_widths_than_its_own() -> None:
    mapping = RandomizedMultilinearMap(6, 3, 16)
    with pytest.raises(ShapeError, match=r"expects features of shape \(B, 6\), got \(4, 7\)"):
        mapping(torch.randn(4, 7), torch.randn(4, 3))
    with pytest.raises(ShapeError, match=r"for its classes, expects .* \(B, 3\), got \(4, 2\)"):
        mapping(torch.randn(4, 6), torch.randn(4, 2))


def test_half_precision_stays_half_precision() -> None:
    features, logits = torch.randn(4, 6).bfloat16(), torch.randn(4, 3)
    assert MultilinearMap()(features, logits).dtype == torch.bfloat16
    assert RandomizedMultilinearMap(6, 3, 16).bfloat16()(features, logits).dtype == torch.bfloat16
    assert build_head((4, 6, 3, 3), hidden=8).bfloat16()(feature("nchw").bfloat16()).dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------- domain head


class WithoutReversal(nn.Module):
    """The same head with nothing reversed, built by hand from its children."""

    def __init__(self, head: DomainHead) -> None:
        super().__init__()
        self.pool, self.condition, self.classifier = head.pool, head.condition, head.classifier

    def forward(self, x: Tensor, class_logits: Tensor | None = None) -> Tensor:
        x = x if self.pool is None else self.pool(x)
        x = x if self.condition is None else self.condition(x, class_logits)
        return self.classifier(x)


CONDITIONED = {"pool": "nchw", "num_classes": 3}

HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    **{layout: (layout, {"pool": layout}) for layout in LAYOUTS},
    "class token": ("nlc", {"pool": "class_token"}),
    "prefix tokens": ("nlc", {"num_prefix_tokens": 1}),
    "no pool": ("nc", {"pool": "none"}),
    "patch": ("nchw", {"pool": "nchw", "classifier": "patch"}),
    "patch, channels last": ("nhwc", {"pool": "nhwc", "classifier": "patch"}),
    "multilinear": ("nchw", {**CONDITIONED, "condition": "multilinear"}),
    "randomised": ("nchw", {**CONDITIONED, "condition": "randomized"}),
    "own module": ("nchw", {"pool": "none", "classifier": nn.Sequential(nn.Flatten(), nn.Linear(72, 2))}),
}


def case(name: str) -> tuple[DomainHead, tuple[Tensor, ...]]:
    """A head by name, and the inputs of its forward."""
    layout, arguments = HEADS[name]
    x = feature(layout)
    head = build_head(x.shape, num_features=6, hidden=32, **copy.deepcopy(arguments))
    return head, (x, torch.randn(2, 3)) if "num_classes" in arguments else (x,)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("training", [True, False])
def test_a_head_sends_back_exactly_the_negative_and_learns_exactly_the_same(
    name: str, training: bool
) -> None:
    head, inputs = case(name)
    head.train(training)
    flipped, own = gradients(head, *inputs)
    plain, reference = gradients(WithoutReversal(head).train(training), *inputs)
    assert torch.equal(flipped, -plain)
    assert flipped.abs().sum() > 0
    assert own.keys() == reference.keys()
    assert all(torch.equal(own[key], reference[key]) for key in own)


@pytest.mark.parametrize("name", HEADS)
def test_the_coefficient_scales_what_a_head_sends_back_and_not_what_it_learns(name: str) -> None:
    head, inputs = case(name)
    full, own = gradients(head, *inputs)
    head.reversal.set_coeff(0.25)
    quarter, same = gradients(head, *inputs)
    assert torch.equal(quarter, 0.25 * full)
    assert all(torch.equal(own[key], same[key]) for key in own)


def test_a_head_takes_its_initial_coefficient() -> None:
    assert build_head((2, 6), coeff=0.5).reversal.coeff.item() == 0.5
    with pytest.raises(SurgeryError, match=r"coeff is -1\.0"):
        build_head((2, 6), coeff=-1.0)


def test_a_classifier_that_works_in_place_does_not_write_into_the_feature() -> None:
    own = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 2))
    for pool in ("none", "auto"):
        head = build_head((2, 6), classifier=own, pool=pool)
        x = -torch.ones(2, 6, requires_grad=True).exp()
        kept = x.detach().clone()
        head(x).sum().backward()
        assert torch.equal(x, kept)
    head = DomainHead(nn.Linear(6, 2), pool=nn.ReLU(inplace=True))
    x = -torch.ones(2, 6)
    head(x)
    assert torch.equal(x, -torch.ones(2, 6))


@pytest.mark.parametrize("name", HEADS)
def test_a_head_copies_and_pickles(name: str) -> None:
    head, inputs = case(name)
    head.eval()
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other(*inputs), head(*inputs))


@pytest.mark.parametrize("name", HEADS)
def test_a_head_can_be_traced_and_still_flips(name: str) -> None:
    head, inputs = case(name)
    head.eval()
    conditional = len(inputs) == 2
    fixed = {} if conditional else {"class_logits": None}
    traced = fx.symbolic_trace(head, concrete_args=fixed)
    extra = () if conditional else (None,)
    assert torch.equal(traced(*inputs, *extra), head(*inputs))
    expected, _ = gradients(head, *inputs)
    assert torch.equal(gradients(traced, *inputs, *extra)[0], expected)


def test_a_head_compiles_and_exports_in_one_graph() -> None:
    head, (x,) = case("nchw")
    head.eval()
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), head(x))
    exported = torch.export.export(head, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(feature("nchw", n=5)).shape, torch.Size([5, 2]))


def test_a_conditional_head_needs_class_logits_and_another_refuses_them() -> None:
    with pytest.raises(SurgeryError, match=r"was given no class logits"):
        case("multilinear")[0](feature("nchw"))
    with pytest.raises(SurgeryError, match=r"this head has no condition, but was given class logits"):
        case("nchw")[0](feature("nchw"), torch.randn(2, 3))


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        (nn.Linear(6, 3), r"Linear returned logits of shape \(2, 3\), but this head needs \(2, 2\)"),
        (nn.Flatten(0), r"Flatten returned logits of shape \(12,\)"),
        (nn.Sequential(nn.Linear(6, 2), nn.Flatten(0), nn.Unflatten(0, (1, 4))), r"shape \(1, 4\)"),
        (nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (2, 2)), nn.Flatten(0, 1)), r"shape \(4, 2\)"),
        (nn.LSTM(6, 2), "LSTM returned tuple, not a tensor of logits"),
    ],
)
def test_a_classifier_with_the_wrong_logits_is_refused(classifier: nn.Module, message: str) -> None:
    head = build_head((2, 6), num_domains=2, classifier=classifier)
    with pytest.raises(ShapeError, match=message):
        head(feature("nc"))


def test_one_logit_may_come_without_an_axis_of_its_own() -> None:
    own = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))
    assert build_head((2, 6), classifier=own, binary=True)(feature("nc")).shape == (2,)


@pytest.mark.parametrize(
    ("channels", "classes", "kind"),
    [(64, 64, MultilinearMap), (64, 65, RandomizedMultilinearMap), (2048, 31, RandomizedMultilinearMap)],
)
def test_the_condition_is_chosen_as_in_the_paper(channels: int, classes: int, kind: type) -> None:
    head = build_head((2, channels), num_classes=classes, hidden=8)
    assert type(head.condition) is kind
    assert head(torch.randn(2, channels), torch.randn(2, classes)).shape == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shape": (2, 6, 3, 4), "pool": "nlc"}, ShapeError, r"pool='nlc' needs a feature with 3 axes"),
        ({"shape": (2, 6, 3, 4), "pool": "median"}, SurgeryError, "pool='median' is not known"),
        ({"shape": (2, 6, 3, 4), "pool": "none"}, ShapeError, r"pool='none' would hand \(N, C, H, W\) to"),
        ({"shape": (2, 6), "classifier": "patch"}, ShapeError, "it needs a feature with positions"),
        (
            {"shape": (2, 6), "classifier": "dense"},
            SurgeryError,
            "classifier='dense' is neither a module nor",
        ),
        ({"shape": (2, 6), "condition": "outer"}, SurgeryError, "condition='outer' is neither a module nor"),
        ({"shape": (2, 6), "condition": "multilinear"}, SurgeryError, "needs the number of classes"),
        ({"shape": (2, 6), "num_classes": 0}, SurgeryError, "num_classes is 0"),
        ({"shape": (2, 6), "condition": MultilinearMap()}, SurgeryError, "needs a classifier of your own"),
        ({"shape": (2, 6), "num_prefix_tokens": 1}, SurgeryError, "only tokens"),
        ({"shape": (2, 6), "hidden": 0}, SurgeryError, "hidden is 0"),
        ({"shape": (2, 6), "num_domains": 1}, SurgeryError, "num_domains=1"),
        ({"shape": (2, 6), "num_domains": 1, "classifier": nn.Identity()}, SurgeryError, "num_domains=1"),
        (
            {"shape": (2, 6, 3, 4), "classifier": "patch", "num_classes": 3},
            SurgeryError,
            "a condition needs one vector",
        ),
        (
            {"shape": (2, 6, 3, 4), "classifier": nn.Identity(), "pool": "none", "num_classes": 3},
            SurgeryError,
            "a condition needs one vector",
        ),
    ],
)
def test_a_head_that_cannot_be_is_refused(arguments: Any, error: type[SurgeryError], message: str) -> None:
    with pytest.raises(error, match=message):
        build_head(**arguments)


def test_a_condition_of_ones_own_works_with_a_classifier_of_ones_own() -> None:
    head = build_head((2, 6), condition=MultilinearMap(), classifier=DomainClassifier(18, hidden=8))
    assert head(feature("nc"), torch.randn(2, 3)).shape == (2, 2)


# --------------------------------------------------------------------------------------------- find_heads


def test_heads_are_found_by_their_path() -> None:
    model = nn.ModuleDict({"net": nn.ModuleDict({"a": build_head((2, 6)), "b": nn.Linear(2, 2)})})
    model["c"] = build_head((2, 6))
    assert list(find_heads(model)) == ["net.a", "c"]
    assert find_heads(model["net"]["b"]) == {}


def test_a_head_is_found_after_a_tracer_went_through_it_and_a_mere_reversal_is_none() -> None:
    remains = nn.ModuleDict({"reversal": GradientReversal(), "classifier": nn.Linear(6, 2)})
    spliced = nn.ModuleDict({"reversal": GradientReversal(), "layer4": nn.Linear(6, 2)})
    assert list(find_heads(nn.ModuleDict({"domain": remains, "body": spliced}))) == ["domain"]


def test_a_proxy_counts_as_a_tensor_whose_shape_is_not_known_yet() -> None:
    proxy = fx.Proxy(fx.Graph().placeholder("x"))
    assert check_tensor(proxy, "test") is False
    assert check_tensor(torch.ones(1), "test") is True
