"""What a result keeps of its original: names, calls, checkpoints, arguments, and what others do with it."""

import copy
import gc
import inspect
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import grl_surgery as gs


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.c = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.a(x))


class Untraceable(nn.Module):
    """Its forward decides by a value, so surgery goes inside."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(6, 6), block

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        return self.block(x) if x.sum() < 1e9 else x


def gradient(model: nn.Module, x: torch.Tensor, name: str) -> torch.Tensor:
    """Of one parameter, of a result or of its original."""
    parameter = dict(model.named_parameters())[name]
    (found,) = torch.autograd.grad(model(x).square().sum(), [parameter])
    return found


def is_flipped(spliced: nn.Module, model: nn.Module, x: torch.Tensor, name: str) -> bool:
    """Whether outputs are equal, and the gradient of one parameter is the negative of the original's."""
    same = torch.equal(spliced(x), model(x))
    return same and torch.equal(gradient(spliced, x, name), -gradient(model, x, name))


# ----------------------------------------------------------------------------------------------- names

OURS = ("cuts", "arguments", "whole", "is_opaque", "taken_apart", "original", "_traced", "_graphs", "_flags")
OF_FX = (
    "graph",
    "code",
    "meta",
    "recompile",
    "print_readable",
    "to_folder",
    "_graph",
    "_code",
    "add_submodule",
)


class Named(Net):
    """One of its children has a name of the test's choice."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(getattr(self, self.name)(self.a(x)) * 2)


@pytest.mark.parametrize("name", OURS)
def test_a_child_may_have_any_name_that_torch_fx_does_not_need(name: str, x: torch.Tensor):
    model = Named(name)
    spliced = gs.insert_grl(model, after="mul")
    assert isinstance(spliced, torch.fx.GraphModule)
    assert is_flipped(spliced, model, x, f"{name}.weight")
    assert is_flipped(copy.deepcopy(spliced), model, x, f"{name}.weight")
    assert getattr(spliced, name).weight is getattr(model, name).weight
    assert type(gs.strip(spliced)) is Named
    assert gs.verify_flip(spliced, model, x).ok


@pytest.mark.parametrize("name", OF_FX)
def test_a_root_with_a_child_that_torch_fx_would_hide_keeps_its_class(name: str, x: torch.Tensor):
    model = Named(name)
    spliced = gs.insert_grl(model, after=name)
    assert type(spliced) is Named
    assert is_flipped(spliced, model, x, f"{name}.weight")
    assert list(spliced.state_dict()) == list(model.state_dict())
    with pytest.raises(
        gs.TracingError, match=f"a graph cannot take the place of Named: its attribute '{name}'"
    ):
        gs.insert_grl(model, after="mul")


@pytest.mark.parametrize("hold", ["parameter", "buffer", "plain"])
def test_parameters_buffers_and_plain_attributes_keep_their_names(hold: str, x: torch.Tensor):
    class Holder(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(x) * self.code)

    model = Holder()
    if hold == "plain":
        model.code = 2.0
    elif hold == "buffer":
        model.register_buffer("code", torch.tensor(2.0))
    else:
        model.code = nn.Parameter(torch.tensor(2.0))
    spliced = gs.insert_grl(model, after="a")
    assert spliced.code is model.code
    assert is_flipped(spliced, model, x, "a.weight")


def test_plain_attributes_stay_and_come_back_as_they_were_left():
    model = Net()
    model.meta, model.cuts, model.classes = {"classes": 3}, "sirloin", ["cat"]
    spliced = gs.insert_grl(model, after="a")
    assert isinstance(spliced, torch.fx.GraphModule)
    for twin in (spliced, copy.deepcopy(spliced), copy.copy(spliced), gs.insert_grl(spliced, before="c")):
        assert (twin.meta, twin.cuts, twin.classes) == ({"classes": 3}, "sirloin", ["cat"])
    spliced.cuts = "fillet"
    assert gs.strip(spliced).cuts == "fillet"
    assert model.cuts == "sirloin"


def test_a_graph_of_torch_fx_is_cut_like_any_network(x: torch.Tensor):
    model = torch.fx.symbolic_trace(Net())
    model.meta["source"] = "torch.fx"
    spliced = gs.insert_grl(model, after="a")
    assert is_flipped(spliced, model, x, "a.weight")
    assert spliced.meta == {"source": "torch.fx"}


def test_a_head_does_not_take_a_name_that_torch_fx_needs(x: torch.Tensor):
    with pytest.raises(gs.SurgeryError, match="already has an attribute 'graph'"):
        gs.attach_domain_head(Net(), after="a", num_domains=2, name="graph", example_inputs=x)


def test_a_constant_of_the_forward_avoids_the_networks_own_names(x: torch.Tensor):
    class Own(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("_constant_0", torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(x) * torch.tensor([3.0]) * self._constant_0 + torch.tensor([1.0]))

    model = Own()
    assert is_flipped(gs.insert_grl(model, after="a"), model, x, "a.weight")


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"class": nn.Sequential(nn.Linear(6, 3)), "class_2": nn.Linear(6, 2)})
        self.add_module("in", nn.Linear(6, 6))
        self.register_parameter("global", nn.Parameter(torch.ones(6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = getattr(self, "in")(x) * getattr(self, "global")
        return torch.cat([self.heads["class"](x), self.heads["class_2"](x)], -1)


def test_names_that_are_keywords_of_python_are_written_as_strings(x: torch.Tensor, tmp_path: Any):
    model = Keywords()
    for point in ("in", "heads.class.0"):
        spliced = gs.insert_grl(model, after=point)
        assert 'getattr(self, "in")(x)' in spliced.code
        for twin in (spliced, copy.deepcopy(spliced), pickle.loads(pickle.dumps(spliced))):
            assert is_flipped(twin, model, x, "in.weight" if point == "in" else "heads.class.0.weight")
    pytest.importorskip("safetensors")
    gs.export(spliced, tmp_path / "folder", example_inputs=(x,))
    written: dict[str, Any] = {"__file__": str(tmp_path / "folder" / "model.py")}
    exec((tmp_path / "folder" / "model.py").read_text(encoding="utf-8"), written)
    assert is_flipped(written["load"](Keywords()), model, x, "heads.class.0.weight")


# ----------------------------------------------------------------------------------- a class's own __call__


class Scaled(nn.Linear):
    """What it is given is divided before its forward, and its value doubled after it."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x / 255) * 2


class Calling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.s = nn.Linear(6, 6), Scaled(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.s(self.a(x)))


class Root(Calling):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x / 255)


def test_a_child_that_overrides_its_call_stays_one_call(x: torch.Tensor):
    model = Calling()
    for point in ("a", "s"):
        spliced = gs.insert_grl(model, after=point)
        assert is_flipped(spliced, model, x, "a.weight")
    assert [node.name for node in gs.graph(model, depth=None).nodes] == ["x", "a", "s", "relu", "output"]


def test_a_root_that_overrides_its_call_keeps_its_class(x: torch.Tensor):
    model = Root()
    spliced = gs.insert_grl(model, after="s")
    assert type(spliced) is Root
    assert is_flipped(spliced, model, x, "a.weight")
    with pytest.raises(gs.TracingError, match="overrides __call__"):
        gs.insert_grl(model, after="relu")


def test_inside_an_untraceable_root_a_call_of_the_class_is_made_once_and_so_are_hooks(x: torch.Tensor):
    model = Untraceable(Scaled(6, 6))
    seen: list[torch.Tensor] = []
    model.block.register_forward_hook(lambda module, inputs, value: seen.append(value))
    spliced = gs.insert_grl(model, after="block")
    assert is_flipped(spliced, model, x, "stem.weight")
    seen.clear()
    spliced(x)
    assert len(seen) == 1


def test_heads_read_a_root_that_overrides_its_call(x: torch.Tensor):
    model = Root()
    spliced = gs.attach_domain_head(model, after="a", num_domains=2, example_inputs=x)
    value, logits = spliced(x)
    assert torch.equal(value, model(x))
    assert logits.shape == (4, 2)


def test_what_lies_inside_a_module_that_overrides_its_call_can_be_cut(x: torch.Tensor):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x) + x

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.fc(x))

    model = nn.Sequential(Block())
    assert is_flipped(gs.insert_grl(model, after="0.fc"), model, x, "0.fc.weight")
    with pytest.raises(gs.TracingError, match="overrides __call__"):
        gs.insert_grl(model, after="0.tanh")


def test_classes_are_not_told_of_the_copies_that_a_trace_makes(x: torch.Tensor):
    known = []

    class Registered(Scaled):
        def __init_subclass__(cls) -> None:
            known.append(cls)

    gs.insert_grl(nn.Sequential(nn.Linear(6, 6), Registered(6, 6)), after="0")
    assert not known


# ----------------------------------------------------------------------------------------- checkpoints


class Extra(Net):
    """Keeps a number in its checkpoints that is no tensor."""

    step = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class Prefixed(Net):
    """Writes its checkpoints under names of its own."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"net/{key}": value for key, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({k.removeprefix("net/"): v for k, v in state.items()}, *args, **kwargs)


class Migrating(Net):
    """Reads an older checkpoint's name."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        old = f"{prefix}b"
        if old in state:
            state[f"{prefix}c.bias"] = state.pop(old)
        super()._load_from_state_dict(state, prefix, *args)


class Opaque(Extra):
    """Its forward cannot be traced, so a head is called behind it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() < 1e9 else x


@pytest.mark.parametrize("kind", [Extra, Prefixed, Opaque])
def test_checkpoints_go_both_ways_and_hold_what_the_original_puts_there(kind: type[Net], x: torch.Tensor):
    model, other = kind(), kind()
    spliced = gs.insert_grl(model, after="a")
    assert list(spliced.state_dict()) == list(model.state_dict())
    other.load_state_dict(spliced.state_dict())
    spliced.load_state_dict(kind().state_dict())
    assert not torch.equal(model(x), other(x))
    assert torch.equal(spliced(x), model(x))


@pytest.mark.parametrize("kind", [Extra, Opaque])
def test_extra_state_is_that_of_the_result(kind: type[Extra]):
    spliced, other = gs.insert_grl(kind(), after="a"), kind()
    spliced.step = 5
    other.load_state_dict(spliced.state_dict())
    assert other.step == 5
    other.step = 7
    spliced.load_state_dict(other.state_dict())
    assert spliced.step == gs.strip(spliced).step == 7


@pytest.mark.parametrize("kind", [Net, Extra, Opaque])
def test_a_head_adds_its_keys_and_nothing_else(kind: type[Net], x: torch.Tensor):
    model = kind()
    spliced = gs.attach_domain_head(model, after="a", num_domains=2, name="domain", example_inputs=x)
    added = spliced.state_dict().keys() - model.state_dict().keys()
    assert added == {f"domain.{key}" for key in spliced.domain.state_dict()}
    twin = gs.attach_domain_head(kind(), after="a", num_domains=2, name="domain", example_inputs=x)
    twin.load_state_dict(spliced.state_dict())
    assert all(map(torch.equal, twin.eval()(x), spliced.eval()(x)))
    outer, other = nn.Sequential(spliced), nn.Sequential(copy.deepcopy(twin))
    other.load_state_dict(outer.state_dict())


def test_hooks_and_overrides_that_read_older_checkpoints_are_obeyed():
    old = Net().state_dict()
    old["b"] = old.pop("c.bias")
    spliced = gs.insert_grl(Migrating(), after="a")
    spliced.load_state_dict(dict(old))
    assert torch.equal(spliced.c.bias, old["b"])

    hooked = Net()
    hooked.register_load_state_dict_pre_hook(
        lambda module, state, prefix, *_: state.update({f"{prefix}c.bias": state.pop(f"{prefix}b")})
    )
    spliced = nn.Sequential(gs.insert_grl(hooked, after="a"))
    spliced.load_state_dict({f"0.{key}": value for key, value in old.items()})
    assert torch.equal(spliced[0].c.bias, old["b"])


# ------------------------------------------------------------------------------------------- arguments


class Options(Net):
    def forward(self, x: torch.Tensor, *more: torch.Tensor, bias: float = 0.0, **kw: Any) -> torch.Tensor:
        return self.c(self.a(x)) * kw.get("scale", 1.0) + bias


def test_any_arguments_that_a_forward_takes_are_taken_by_the_result(x: torch.Tensor):
    model = Options()
    spliced = gs.insert_grl(model, after="a")
    assert inspect.signature(spliced.forward) == inspect.signature(model.forward)
    for twin in (spliced, copy.deepcopy(spliced), pickle.loads(pickle.dumps(spliced))):
        assert torch.equal(twin(x, x, scale=2.0, bias=1.0), model(x, x, scale=2.0, bias=1.0))
        assert is_flipped(twin, model, x, "a.weight")


def test_programs_have_the_arguments_with_names(x: torch.Tensor, tmp_path: Any):
    model = Options()
    spliced = gs.insert_grl(model, after="a")
    program = torch.export.export(spliced, (x,)).module()
    torch.testing.assert_close(program(x), model(x))
    with pytest.raises(gs.ExportError, match="runs as it is, so there is no graph to write as code"):
        gs.export(spliced, tmp_path / "folder", example_inputs=(x,))


# -------------------------------------------------------------------------------- what others do with it


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:Converting a tensor to a Python boolean")
@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), lambda: Opaque()])
def test_a_program_of_torch_jit_trace_reverses(make: Any, x: torch.Tensor):
    model = make()
    first = next(name for name, _ in model.named_children())
    spliced = gs.insert_grl(model, after=first, coeff=0.5)
    program = torch.jit.trace(spliced, x)
    assert torch.equal(program(x), model(x))
    weight = f"{first}.weight"
    assert torch.equal(gradient(program, x, weight), gradient(model, x, weight) * -0.5)
    assert torch.equal(gradient(spliced, x, weight), gradient(model, x, weight) * -0.5)


class Asking(nn.Module):
    """Looks into its block as into the list that it is, and cannot be traced."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(6, 6), block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if x.sum() > 1e9 or len(self.block) != 2 or len(list(self.block)) != 2:
            return x
        assert self.block[0] is next(iter(self.block))
        return self.block(x.to(self.block[-1].weight.dtype))


@pytest.mark.parametrize("point", ["block", "block.0"])
def test_a_sequence_stays_a_sequence_for_those_who_look_into_it(point: str, x: torch.Tensor):
    model = Asking(nn.Sequential(nn.ReLU(), nn.Linear(6, 3)))
    spliced = gs.insert_grl(model, after=point)
    assert is_flipped(spliced, model, x, "stem.weight")


def test_a_graph_has_the_items_of_its_original_and_its_truth():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    spliced = gs.insert_grl(model, after="0")
    assert len(spliced) == 3
    assert list(spliced) == [spliced.get_submodule(str(place)) for place in range(3)]
    assert spliced[-1].weight is model[-1].weight
    assert [type(layer) for layer in spliced[:2]] == [nn.Linear, nn.ReLU]
    assert len(copy.deepcopy(spliced)) == 3
    plain = gs.insert_grl(Net(), after="a")
    assert plain
    with pytest.raises(TypeError):
        len(plain)


def test_a_full_backward_hook_on_a_module_that_runs_as_it_is_stays_one(x: torch.Tensor):
    def gradients_seen(model: nn.Module) -> list[torch.Size]:
        seen: list[torch.Size] = []
        for path, module in model.named_modules():
            if path == "block":
                module.register_full_backward_hook(lambda _, given, got: seen.append(given[0].shape))
        model(x).sum().backward()
        return seen

    class Block(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() < 1e9 else x

    model = Untraceable(Block(nn.Linear(6, 3)))
    model.block.register_full_backward_hook(lambda *_: None)
    assert gradients_seen(gs.insert_grl(model, after="block")) == [torch.Size([4, 6])]


# ----------------------------------------------------------------------------------------------- moving


class Buffers(nn.Module):
    """Buffers with two names, of an integer, of nothing, a view and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.register_buffer("mean", torch.ones(6))
        self.register_buffer("tied", self.mean)
        self.register_buffer("view", torch.ones(1).expand(6), persistent=False)
        self.register_buffer("none", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.fc(x)) + self.mean * self.tied + self.view + torch.ones(6).to(x)


MOVES: dict[str, Any] = {
    "double": lambda m: m.double(),
    "half and back": lambda m: m.half().float(),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "share_memory": lambda m: m.share_memory(),
    "apply": lambda m: m._apply(torch.clone),
}


@pytest.mark.parametrize("cuts", [["fc"], ["fc", "norm"]])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_the_original_goes_where_the_result_is_moved(move: Any, cuts: list[str]):
    model = Buffers()
    spliced = model
    for cut in cuts:
        spliced = gs.insert_grl(spliced, after=cut)
    constants = {id(b) for name, b in spliced.named_buffers() if name not in dict(model.named_buffers())}
    assert move(spliced) is spliced
    held = {**dict(spliced.named_parameters()), **dict(spliced.named_buffers())}
    assert all(held[name] is tensor for name, tensor in (*model.named_parameters(), *model.named_buffers()))
    assert model.tied is model.mean
    assert constants <= {id(buffer) for buffer in spliced.buffers()}
    assert all(a is b for a, b in zip(spliced.buffers(), spliced.grl_original.buffers(), strict=True))


def test_both_compute_after_the_result_was_cast(x: torch.Tensor):
    model = Buffers()
    spliced = gs.insert_grl(model, after="fc").double()
    assert gs.verify_flip(spliced, model, (x.double(),)).ok
    assert gs.reversals(spliced)["grl_fc"].coeff.dtype == torch.float32


def test_the_original_of_what_goes_to_meta_stays_where_it_is(x: torch.Tensor):
    model = Buffers()
    spliced = gs.insert_grl(model, after="fc").to("meta")
    assert spliced(x.to("meta")).device.type == "meta"
    assert model(x).device.type == "cpu"


def test_where_torch_is_told_to_replace_parameters_the_original_keeps_all_it_has(x: torch.Tensor):
    model = Buffers()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        spliced = gs.insert_grl(model, after="fc").double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert spliced(x.double()).dtype == torch.float64
    assert model(x).dtype == torch.float32


# ----------------------------------------------------------------------------------------------- graphs


class Steered(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x) * 2 if self.training else self.a(x)
        return self.c(x)


def test_dead_code_can_be_taken_out_of_the_graph_of_each_mode(x: torch.Tensor):
    model = Steered()
    spliced = gs.insert_grl(model, after="a")
    for network in (spliced, copy.deepcopy(spliced), copy.copy(spliced), pickle.loads(pickle.dumps(spliced))):
        for mode in (True, False):
            network.train(mode)
            dead = network.graph.call_module("c", (next(iter(network.graph.nodes)),))
            network.graph.eliminate_dead_code()
            assert dead not in network.graph.nodes
            network.graph.lint()
            network.recompile()
            assert is_flipped(network, model.train(mode), x, "a.weight")


def test_a_graph_does_not_keep_its_network_alive():
    spliced = gs.insert_grl(Net(), after="a")
    graph, alive = spliced.graph, weakref.ref(spliced)
    assert graph.owning_module.get_submodule("a") is spliced.a
    collecting = gc.isenabled()
    gc.disable()
    try:
        del spliced
        assert alive() is None
    finally:
        if collecting:
            gc.enable()
    assert graph.owning_module is None


def test_a_name_that_no_code_can_spell_sends_surgery_into_the_modules():
    class Quoted(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.ModuleDict(
                {'5" gauge': nn.Linear(4, 4), "b": nn.Sequential(nn.Linear(4, 4), nn.Tanh())}
            )

        def forward(self, x):
            for layer in self.by.values():
                x = layer(x)
            return x

    model, x = Quoted(), torch.randn(3, 4)
    for point in ("by.b", "by.b.0", 'by.5" gauge'):
        assert gs.verify_flip(gs.insert_grl(model, after=point), model, x).ok
    assert gs.verify_flip(gs.insert_grl(model, edge=('by.5" gauge', "by.b")), model, x).ok
