"""Surgery on real networks: exactly the right gradients flip, and nothing else about the network changes.

What a point must flip is written down in the table below, by hand, from each network's own code. Two
judges follow: `verify_flip`, and, knowing neither graphs nor this library, tensor hooks that an eager
forward hook puts onto the output of a module.
"""

import copy
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import timm
import torch
import torchvision.models
from torch import Tensor, nn

import grl_surgery as gs

BOTH = ("train", "eval")


@dataclass(frozen=True)
class Point:
    """A place to cut, and the parameters that it flips; those named nowhere are left unchanged.

    A group of parameters is a module path; `a..b` is everything from a to b in the order of
    named_parameters, and `..b` everything up to the end of b. Several are separated by spaces. An
    operation is a point that is not the output of a module.
    """

    label: str
    after: str | None = None
    before: str | None = None
    edge: str | None = None
    flipped: str = ""
    mixed: str = ""
    operation: bool = False

    def where(self) -> dict[str, str]:
        """The keyword of insert_grl."""
        given = {"after": self.after, "before": self.before, "edge": self.edge}
        return {keyword: name for keyword, name in given.items() if name is not None}


@dataclass(frozen=True)
class Network:
    """How to build a network, the smallest images that it takes, and where to cut it."""

    make: Callable[..., nn.Module]
    points: tuple[Point, ...]
    pixels: int = 32
    modes: tuple[str, ...] = BOTH
    unreached: str = ""


def of_timm(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return functools.partial(timm.create_model, name, **kwargs)


def of_torchvision(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return functools.partial(torchvision.models.get_model, name, weights=None, **kwargs)


def narrow_vgg11_bn() -> nn.Module:
    """The network without the 120 million parameters of its two linear layers."""
    with torch.device("meta"):
        model = torchvision.models.vgg11_bn(init_weights=False)
        model.classifier[0], model.classifier[3] = nn.Linear(512 * 7 * 7, 64), nn.Linear(64, 64)
        model.classifier[6] = nn.Linear(64, 10)
    model.to_empty(device="cpu")
    for layer in model.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return model


NETWORKS = {
    "timm/resnet18": Network(
        of_timm("resnet18"),
        (
            Point("start", after="conv1", flipped="conv1"),
            Point("middle", after="layer2", flipped="..layer2"),
            Point("end", before="fc", flipped="..layer4"),
            Point("inside", after="layer3.1.act1", flipped="layer3.1.conv1 layer3.1.bn1", mixed="..layer3.0"),
            Point(
                "residual",
                edge="layer2.0.downsample.1 -> layer2.0.add",
                flipped="layer2.0.downsample",
                mixed="..layer1",
            ),
        ),
    ),
    "timm/resnet50": Network(
        of_timm("resnet50"),
        (
            Point("start", after="maxpool", flipped="..bn1"),
            Point("middle", after="layer3.2", flipped="..layer3.2"),
            Point("end", after="global_pool", flipped="..layer4"),
            Point(
                "inside", before="layer2.1.conv2", flipped="layer2.1.conv1..layer2.1.bn1", mixed="..layer2.0"
            ),
            Point("residual", edge="layer3.0.act3 -> layer3.1.add", mixed="..layer3.0"),
        ),
    ),
    "timm/convnext_atto": Network(
        of_timm("convnext_atto"),
        (
            Point("start", after="stem", flipped="stem"),
            Point("middle", after="stages.1", flipped="..stages.1"),
            Point("end", after="head.norm", flipped="..head.norm"),
            Point(
                "inside",
                after="stages.2.blocks.1.mlp.fc1",
                flipped="stages.2.blocks.1.conv_dw..stages.2.blocks.1.mlp.fc1",
                mixed="..stages.2.blocks.0",
            ),
            Point(
                "residual",
                edge="stages.2.blocks.1.drop_path -> stages.2.blocks.1.add",
                flipped="stages.2.blocks.1",
                mixed="..stages.2.blocks.0",
            ),
        ),
    ),
    "timm/vit_tiny_patch16_224": Network(
        of_timm("vit_tiny_patch16_224", img_size=32),
        (
            Point("start", after="patch_embed", flipped="patch_embed"),
            Point("middle", after="blocks.5", flipped="..blocks.5"),
            Point("end", after="norm", flipped="..norm"),
            Point(
                "inside",
                after="blocks.3.attn.scaled_dot_product_attention",
                flipped="blocks.3.norm1 blocks.3.attn.qkv",
                mixed="..blocks.2",
                operation=True,
            ),
            Point(
                "residual",
                edge="blocks.7.drop_path1 -> blocks.7.add#1",
                flipped="blocks.7.norm1 blocks.7.attn",
                mixed="..blocks.6",
            ),
        ),
    ),
    "timm/swin_tiny_patch4_window7_224": Network(
        of_timm("swin_tiny_patch4_window7_224", img_size=32, window_size=2),
        (
            Point("start", after="patch_embed", flipped="patch_embed"),
            Point("middle", after="layers.1", flipped="..layers.1"),
            Point("end", after="norm", flipped="..norm"),
            Point(
                "inside",
                after="layers.2.blocks.1.attn.proj",
                flipped="layers.2.blocks.1.norm1 layers.2.blocks.1.attn",
                mixed="..layers.2.blocks.0",
            ),
            Point(
                "residual",
                edge="layers.2.blocks.3.drop_path1 -> layers.2.blocks.3.add#1",
                flipped="layers.2.blocks.3.norm1 layers.2.blocks.3.attn",
                mixed="..layers.2.blocks.2",
            ),
        ),
    ),
    "timm/efficientnet_b0": Network(
        of_timm("efficientnet_b0"),
        (
            Point("start", after="bn1", flipped="..bn1"),
            Point("middle", after="blocks.3", flipped="..blocks.3"),
            Point("end", after="global_pool", flipped="..bn2"),
            Point("inside", after="blocks.3.1.se.gate", flipped="blocks.3.1.se", mixed="..blocks.3.1.bn2"),
            Point(
                "residual",
                edge="blocks.3.1.drop_path -> blocks.3.1.add",
                flipped="blocks.3.1",
                mixed="..blocks.3.0",
            ),
        ),
    ),
    "timm/mobilenetv3_small_100": Network(
        of_timm("mobilenetv3_small_100"),
        (
            Point("start", after="conv_stem", flipped="conv_stem"),
            Point("middle", after="blocks.2", flipped="..blocks.2"),
            Point("end", after="flatten", flipped="..conv_head"),
            Point(
                "inside",
                after="blocks.4.1.conv_dw",
                flipped="blocks.4.1.conv_pw..blocks.4.1.conv_dw",
                mixed="..blocks.4.0",
            ),
            Point("residual", edge="blocks.2.0.bn3.act -> blocks.2.1.add", mixed="..blocks.2.0"),
        ),
    ),
    "timm/densenet121": Network(
        of_timm("densenet121"),
        (
            Point("start", after="features.pool0", flipped="..features.norm0"),
            Point("middle", after="features.transition2", flipped="..features.transition2"),
            Point("end", after="features.norm5", flipped="..features"),
            Point(
                "inside",
                after="features.denseblock3.denselayer2.conv1",
                flipped="features.denseblock3.denselayer2.norm1..features.denseblock3.denselayer2.conv1",
                mixed="..features.denseblock3.denselayer1",
            ),
            Point(
                "concatenation",
                edge="features.denseblock1.denselayer1.conv2 -> features.denseblock1.denselayer2.cat",
                mixed="..features.denseblock1.denselayer1",
            ),
        ),
    ),
    "timm/regnetx_002": Network(
        of_timm("regnetx_002"),
        (
            Point("start", after="stem", flipped="stem"),
            Point("middle", after="s3.b2", flipped="..s3.b2"),
            Point("end", after="final_conv", flipped="..s4"),
            Point("inside", after="s3.b3.conv2", flipped="s3.b3.conv1 s3.b3.conv2", mixed="..s3.b2"),
            Point("residual", edge="s3.b2.downsample -> s3.b2.add", mixed="..s3.b1"),
        ),
    ),
    "timm/mixer_s16_224": Network(
        of_timm("mixer_s16_224", img_size=32),
        (
            Point("start", after="stem", flipped="stem"),
            Point("middle", after="blocks.3", flipped="..blocks.3"),
            Point("end", after="mean", flipped="..norm"),
            Point(
                "inside",
                after="blocks.2.transpose#2",
                flipped="blocks.2.norm1 blocks.2.mlp_tokens",
                mixed="..blocks.1",
                operation=True,
            ),
            Point("residual", edge="blocks.5.add#1 -> blocks.5.add#2", mixed="..blocks.5.mlp_tokens"),
        ),
    ),
    "torchvision/resnet18": Network(
        of_torchvision("resnet18"),
        (
            Point("start", after="relu", flipped="..bn1"),
            Point("middle", after="layer2.1", flipped="..layer2"),
            Point("end", after="flatten", flipped="..layer4"),
            Point(
                "inside",
                after="layer3.0.relu#1",
                flipped="layer3.0.conv1 layer3.0.bn1",
                mixed="..layer2",
                operation=True,
            ),
            Point("residual", edge="layer4.0.relu#2 -> layer4.1.add", mixed="..layer4.0"),
        ),
    ),
    "torchvision/vgg11_bn": Network(
        narrow_vgg11_bn,
        (
            Point("start", after="features.0", flipped="features.0"),
            Point("middle", after="features.14", flipped="..features.12"),
            Point("end", before="classifier.6", flipped="..classifier.3"),
            Point("inside", after="classifier.1", flipped="..classifier.0"),
            Point("edge", edge="avgpool -> flatten", flipped="..features"),
        ),
    ),
    "torchvision/googlenet in training": Network(
        of_torchvision("googlenet", init_weights=False),
        (
            Point("start", after="conv1", flipped="conv1"),
            Point("middle", after="inception4b", flipped="inception4b", mixed="..inception4a"),
            Point("end", after="inception5b", flipped="inception4e..inception5b", mixed="..inception4d"),
            Point(
                "inside",
                after="inception4c.branch2.0",
                flipped="inception4c.branch2.0",
                mixed="..inception4b",
            ),
            Point(
                "concatenation",
                edge="inception3a.branch3.1.relu -> inception3a.cat",
                flipped="inception3a.branch3",
                mixed="..conv3",
            ),
            Point("auxiliary output", edge="inception4a -> aux1", mixed="..inception4a"),
        ),
        modes=("train",),
    ),
    "torchvision/googlenet in evaluation": Network(
        of_torchvision("googlenet", init_weights=False),
        (
            Point("start", after="conv1", flipped="conv1"),
            Point("middle", after="inception4b", flipped="..inception4b"),
            Point("end", after="inception5b", flipped="..inception5b"),
            Point(
                "inside",
                after="inception4c.branch2.0",
                flipped="inception4c.branch2.0",
                mixed="..inception4b",
            ),
            Point(
                "concatenation",
                edge="inception3a.branch3.1.relu -> inception3a.cat",
                flipped="inception3a.branch3",
                mixed="..conv3",
            ),
        ),
        modes=("eval",),
        unreached="aux1 aux2",
    ),
    "torchvision/inception_v3 with auxiliary output": Network(  # which takes no smaller image
        of_torchvision("inception_v3", init_weights=False),
        (Point("middle", after="Mixed_6e", flipped="..Mixed_6e"),),
        pixels=299,
        modes=("train",),
    ),
    "torchvision/inception_v3": Network(
        of_torchvision("inception_v3", init_weights=False, aux_logits=False),
        (
            Point("start", after="Conv2d_2b_3x3", flipped="..Conv2d_2b_3x3"),
            Point("middle", after="Mixed_6b", flipped="..Mixed_6b"),
            Point("end", after="avgpool", flipped="..Mixed_7c"),
            Point(
                "inside",
                after="Mixed_6c.branch7x7_2",
                flipped="Mixed_6c.branch7x7_1..Mixed_6c.branch7x7_2",
                mixed="..Mixed_6b",
            ),
            Point(
                "concatenation",
                edge="Mixed_5c.branch_pool.relu -> Mixed_5c.cat",
                flipped="Mixed_5c.branch_pool",
                mixed="..Mixed_5b",
            ),
        ),
        pixels=75,
    ),
    "torchvision/vit_b_16": Network(
        of_torchvision("vit_b_16", image_size=32),
        (
            Point("start", after="conv_proj", flipped="conv_proj"),
            Point(
                "middle", after="encoder.layers.encoder_layer_5", flipped="..encoder.layers.encoder_layer_5"
            ),
            Point("end", after="encoder", flipped="..encoder"),
            Point(
                "inside",
                after="encoder.layers.encoder_layer_8.self_attention[0]",
                flipped="encoder.layers.encoder_layer_8.ln_1..encoder.layers.encoder_layer_8.self_attention",
                mixed="..encoder.layers.encoder_layer_7",
                operation=True,
            ),
            Point(
                "residual",
                edge="encoder.layers.encoder_layer_2.add#1 -> encoder.layers.encoder_layer_2.add#2",
                mixed="..encoder.layers.encoder_layer_2.self_attention",
            ),
        ),
    ),
    "torchvision/deeplabv3_mobilenet_v3_large": Network(
        of_torchvision("deeplabv3_mobilenet_v3_large", weights_backbone=None),
        (
            Point("start", after="backbone.0", flipped="backbone.0"),
            Point("middle", after="backbone.6", flipped="..backbone.6"),
            Point("end", after="classifier.3", flipped="..classifier.2"),
            Point(
                "inside",
                after="backbone.8.block.1",
                flipped="backbone.8.block.0..backbone.8.block.1",
                mixed="..backbone.7",
            ),
            Point("residual", edge="backbone.7.block.2.1 -> backbone.8.add", mixed="..backbone.7"),
            Point("item of a dict", after="backbone[out]", flipped="..backbone"),
        ),
    ),
}

LONG = ("torchvision/inception_v3", "timm/densenet121", "torchvision/vit_b_16", "timm/swin_tiny")


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    """Large networks take longest, and each kind of forward is in a smaller one as well."""
    return [pytest.mark.long] * name.startswith(LONG)


CASES = [
    pytest.param(name, mode, point, id=f"{name}-{mode}-{point.label}", marks=marks_of(name))
    for name, network in NETWORKS.items()
    for mode in network.modes
    for point in network.points
]


def in_group(names: list[str], group: str) -> list[str]:
    """The parameters that `a`, `a..b` or `..b` stands for."""

    def places(path: str) -> list[int]:
        found = [i for i, name in enumerate(names) if name == path or name.startswith(f"{path}.")]
        assert found, f"the table names {path!r}, which has no parameters"
        return found

    first, dots, last = group.rpartition("..")
    if not dots:
        return [names[place] for place in places(group)]
    return names[places(first)[0] if first else 0 : places(last)[-1] + 1]


def expected_kinds(model: nn.Module, network: Network, point: Point) -> dict[str, str]:
    """What the table says of every parameter."""
    names = [name for name, _ in model.named_parameters()]
    kinds = dict.fromkeys(names, "unchanged")
    groups = {"mixed": point.mixed, "flipped": point.flipped, "unreached": network.unreached}
    for kind, text in groups.items():
        for group in text.split():
            kinds.update(dict.fromkeys(in_group(names, group), kind))
    return kinds


# --- The networks


class Subject:
    """A network with its input, and what its forward gives in each mode."""

    def __init__(self, network: Network) -> None:
        self.network = network
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = network.make()
            self.images = torch.randn(2, 3, network.pixels, network.pixels)
        fill_zeros(self.model)
        weight = next(self.model.parameters())
        weight.grad = torch.ones_like(weight)
        self._forwards: dict[str, Forward] = {}

    def in_mode(self, mode: str) -> nn.Module:
        return self.model.train(mode == "train")

    def forward(self, mode: str) -> "Forward":
        if mode not in self._forwards:
            self._forwards[mode] = Forward.of(self.in_mode(mode), self.images)
        return self._forwards[mode]


@functools.lru_cache(maxsize=1)
def subject_of(name: str) -> Subject:
    """Built once for all the tests of a network that follow each other."""
    return Subject(NETWORKS[name])


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    return subject_of(request.param)


def fill_zeros(model: nn.Module) -> None:
    """Give values to parameters that are all zero: a head of zeros makes every output the same."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).reshape(parameter.shape))


def tensors(value: Any) -> list[Tensor]:
    if value is None or isinstance(value, Tensor):
        return [] if value is None else [value]
    return [
        tensor for item in (value.values() if hasattr(value, "values") else value) for tensor in tensors(item)
    ]


@dataclass
class Forward:
    """What one forward returns, and what it does to the buffers (which are put back)."""

    kind: type
    keys: list[str]
    outputs: list[Tensor]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> "Forward":
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            result = model(images)
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
        return cls(type(result), list(getattr(result, "keys", list)()), tensors(result), buffers)

    def same_as(self, other: "Forward") -> bool:
        return (
            self.kind is other.kind
            and self.keys == other.keys
            and len(self.outputs) == len(other.outputs) > 0
            and all(map(torch.equal, self.outputs, other.outputs))
            and all(torch.equal(self.buffers[name], buffer) for name, buffer in other.buffers.items())
        )


def everything_about(model: nn.Module) -> dict[str, Any]:
    """All that surgery and verification could have changed, here and in the generators."""
    values: dict[str, Any] = {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": [part.tolist() if hasattr(part, "tolist") else part for part in numpy.random.get_state()],
        "grad mode": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    for path, module in model.named_modules():
        hooks = {key: list(held) for key, held in module.__dict__.items() if "hooks" in key and held}
        values[f"module {path}"] = (type(module), module.training, list(module.__dict__), hooks)
        values[f"children of {path}"] = [(name, id(child)) for name, child in module.named_children()]
    for name, parameter in model.named_parameters():
        version = (parameter._version, parameter.requires_grad)
        values[f"parameter {name}"] = (
            id(parameter),
            *version,
            parameter.grad is None or parameter.grad.sum(),
        )
    for name, buffer in model.named_buffers():
        values[f"buffer {name}"] = (id(buffer), buffer.tolist())
    return values


# --- Tests


@pytest.fixture(autouse=True)
def same_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(("subject", "mode", "point"), CASES, indirect=["subject"])
def test_exactly_the_right_gradients_flip_and_nothing_else_changes(
    subject: Subject, mode: str, point: Point
) -> None:
    model, plain = subject.in_mode(mode), subject.forward(mode)
    before = everything_about(model)

    spliced = gs.insert_grl(model, **point.where())
    report = gs.verify_flip(spliced, reference=model, example_inputs=(subject.images,))
    stripped = gs.strip(spliced)

    assert everything_about(model) == before
    assert report.ok, str(report)
    assert report.mode == mode
    kinds = expected_kinds(model, subject.network, point)
    predicted = {row.name: row.predicted for row in report.parameters}
    is_graph = isinstance(spliced, torch.fx.GraphModule)  # of no other network is anything predicted
    assert predicted == (kinds if is_graph else dict.fromkeys(kinds, "unknown"))
    certain = [row for row in report.parameters if row.measured != "no signal" and row.predicted != "mixed"]
    assert {row.name: row.measured for row in certain} == {row.name: kinds[row.name] for row in certain}
    assert sum(row.measured == "no signal" for row in report.parameters) <= len(kinds) // 10, str(report)

    for network in (spliced, stripped):
        assert list(network.state_dict()) == list(model.state_dict())
        assert Forward.of(network, subject.images).same_as(plain)
        held = dict(network.named_parameters())
        assert all(held[name] is parameter for name, parameter in model.named_parameters())
    assert type(stripped) is type(model)


@pytest.mark.parametrize(
    "subject",
    [
        pytest.param(name, marks=marks_of(name))
        for name, network in NETWORKS.items()
        if len(network.points) > 1
    ],
    indirect=True,
)
def test_checkpoints_load_strictly_into_a_fresh_network_and_back(subject: Subject) -> None:
    mode = subject.network.modes[-1]
    point = subject.network.points[0]
    twin = copy.deepcopy(subject.in_mode(mode))
    spliced = gs.insert_grl(twin, **point.where())
    fresh = subject.network.make().train(mode == "train")

    fresh.load_state_dict(spliced.state_dict(), strict=True)
    assert Forward.of(fresh, subject.images).same_as(subject.forward(mode))

    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not Forward.of(spliced, subject.images).same_as(subject.forward(mode))
    spliced.load_state_dict(fresh.state_dict(), strict=True)
    assert Forward.of(spliced, subject.images).same_as(subject.forward(mode))
    gs.strip(spliced).load_state_dict(fresh.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["timm/mixer_s16_224", "torchvision/vit_b_16"])
def test_a_head_that_starts_at_zero_does_not_hide_the_flip(name: str) -> None:
    network = NETWORKS[name]
    model, point = network.make(), network.points[1]
    images = torch.randn(2, 3, network.pixels, network.pixels)
    head = [parameter for name, parameter in model.named_parameters() if name.startswith("head")]
    assert not any(parameter.any() for parameter in head)

    report = gs.verify_flip(gs.insert_grl(model, **point.where()), model, images).raise_if_failed()

    kinds = expected_kinds(model, network, point)
    assert {row.name: row.measured for row in report.parameters} == kinds
    assert not any(parameter.any() for parameter in head)


def reverse_in_eager(model: nn.Module, path: str) -> nn.Module:
    """A copy of the network whose module at `path` returns a copy of its output with a negating hook."""

    def negate(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        copied = output.clone()
        copied.register_hook(torch.neg)
        return copied

    twin = copy.deepcopy(model)
    twin.get_submodule(path).register_forward_hook(negate)
    return twin


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor | None]:
    """Of an objective that looks at every output in a direction of its own."""
    torch.manual_seed(2)
    outputs = tensors(model(images))
    directions = torch.Generator().manual_seed(3)
    objective = sum((output * torch.randn(output.shape, generator=directions)).sum() for output in outputs)
    assert isinstance(objective, Tensor)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(objective, parameters, allow_unused=True), strict=True))


def is_hooked(point: Point) -> bool:
    return point.after is not None and point.label in ("middle", "inside") and not point.operation


HOOKED = [case for case in CASES if is_hooked(case.values[2])]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums whose order depends on threads come out the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("subject", "mode", "point"), HOOKED, indirect=["subject"])
def test_an_eager_hook_at_the_same_module_gives_the_same_gradients(
    subject: Subject, mode: str, point: Point
) -> None:
    model = copy.deepcopy(subject.in_mode(mode))  # a forward in train mode moves the statistics
    expected = gradients(reverse_in_eager(model, point.after), subject.images)

    found = gradients(gs.insert_grl(model, after=point.after), subject.images)

    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        same = gradient is found[name] if gradient is None else torch.equal(gradient, found[name])
        assert same, name


# --- Heads: where each network is usually given one; the parameters up to there flip for the domain loss

HEADS = {
    "timm/resnet18": "global_pool",
    "timm/resnet50": "layer3",
    "timm/convnext_atto": "stages.2",
    "timm/vit_tiny_patch16_224": "blocks.5",
    "timm/swin_tiny_patch4_window7_224": "layers.2",
    "timm/efficientnet_b0": "blocks.4",
    "timm/mobilenetv3_small_100": "blocks.3",
    "timm/densenet121": "features.denseblock3",
    "timm/regnetx_002": "s3",
    "timm/mixer_s16_224": "blocks.4",
    "torchvision/resnet18": "layer4",
    "torchvision/vgg11_bn": "features",
    "torchvision/googlenet": "inception4c",
    "torchvision/inception_v3": "Mixed_6b",
    "torchvision/vit_b_16": "encoder.layers.encoder_layer_3",
    "torchvision/deeplabv3_mobilenet_v3_large": "backbone[out]",
}


@pytest.mark.filterwarnings("ignore:at '")
@pytest.mark.parametrize(
    "subject", [pytest.param(name, marks=marks_of(name)) for name in NETWORKS], indirect=True
)
def test_with_a_head_each_objective_has_its_own_gradients(subject: Subject) -> None:
    (name,) = (name for name, network in NETWORKS.items() if network is subject.network)
    place = HEADS[name.partition(" ")[0]]
    model = subject.in_mode(subject.network.modes[-1])
    m = gs.attach_domain_head(model, after=place, hidden=16, example_inputs=(subject.images,))
    report = gs.verify_flip(m, reference=model, example_inputs=(subject.images,))
    assert report.ok, str(report)
    point = place.partition("[")[0]
    task = {row.name: row.measured for row in report.parameters if row.objective == "output"}
    domain = {row.name: row.measured for row in report.parameters if row.objective == "domain"}
    assert "flipped" not in task.values()
    flipped = [name for name, measured in domain.items() if measured == "flipped"]
    assert any(name.startswith(point) for name in flipped) or point == "global_pool"
    assert not any(name.startswith("domain.") for name in flipped)
    kept = [measured for name, measured in domain.items() if name.startswith("domain.")]
    assert set(kept) <= {"unchanged", "no signal"}
    assert "unchanged" in kept
