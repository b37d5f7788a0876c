"""A head whose logits stay on it: the network returns what it did, and the gradients are those of a hook."""

from __future__ import annotations

import copy
import os
import pickle
import socket
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import grl_surgery as gs

X = torch.linspace(-1, 1, 20).view(5, 4)


class Traced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class OwnClass(Traced):
    def forward(self, x: torch.Tensor, scale: Any = None) -> dict[str, Any]:
        value = self.body(x)
        return {"scores": self.head(value if scale is None else value * scale), "count": len(value)}


class OncePerPair(Traced):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.head(x[:, :2].repeat(1, 3))
        for _ in range(len(x) // 2):
            out = out + self.head(self.body(x))
        return out


def attached(kind: type[nn.Module] = Traced, **settings: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = kind()
    settings = {"hidden": 8, "dropout": 0.0, "outputs": "original", "example_inputs": X, **settings}
    return model, gs.attach_domain_head(model, "body", **settings)


def by_hand(model: nn.Module, m: Any, task: float = 1.0) -> dict[str, torch.Tensor]:
    """Gradients of task and domain of the original, negated by a hook of torch where the head reads."""
    twin: Any = copy.deepcopy(model)
    head = copy.deepcopy(m.domain)
    head.reversal = nn.Identity()
    caught = []
    twin.body.register_forward_hook(lambda _m, _i, value: caught.append(value))
    output = twin(X)
    reversed_value = caught[0].clone()
    reversed_value.register_hook(torch.neg)
    loss = task * total(output) + head(reversed_value).square().sum()
    named = {**dict(twin.named_parameters()), **{f"domain.{k}": p for k, p in head.named_parameters()}}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: value for name, value in zip(named, found, strict=True) if value is not None}


def total(output: Any) -> torch.Tensor:
    return (output["scores"] if isinstance(output, dict) else output).square().sum()


def trained(m: Any, run: Any = None) -> dict[str, torch.Tensor]:
    m.zero_grad()
    output = m(X) if run is None else run(X)
    (total(output) + m.domain.logits.square().sum()).backward()
    return {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [Traced, OwnClass])
def test_the_output_is_the_original_and_both_losses_have_the_gradients_of_a_hook(
    kind: type[nn.Module],
) -> None:
    model, m = attached(kind)
    plain, output = model(X), m(X)
    assert type(output) is type(plain)
    if isinstance(plain, dict):
        assert list(output) == list(plain)
    assert torch.equal(total(output), total(plain))
    assert_same(trained(m), by_hand(model, m))


@pytest.mark.parametrize("kind", [Traced, OwnClass])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_each_objective_is_proved_and_the_proof_leaves_no_logits(kind: type[nn.Module], mode: Any) -> None:
    model, m = attached(kind)
    report = gs.verify_flip(m, model, X, mode=mode)
    assert report.ok, report
    measured = {(row.name, row.objective): row.measured for row in report.parameters}
    assert measured["body.0.weight", "domain"] == "flipped"
    assert measured["body.0.weight", "output"] == "unchanged"
    with pytest.raises(gs.SurgeryError, match="no call of the network has left logits"):
        _ = m.domain.logits


def test_the_proof_notices_a_kept_head_without_its_reversal() -> None:
    model, m = attached()
    m.domain.reversal = nn.Identity()
    assert not gs.verify_flip(m, model, X).ok


def test_logits_before_any_call_are_an_error_that_says_what_to_do() -> None:
    _, m = attached()
    with pytest.raises(gs.SurgeryError, match=r"(?s)no call of the network.*m\(x\); m\.domain\.logits"):
        _ = m.domain.logits
    _, usual = attached(outputs="with_logits")
    usual(X)
    with pytest.raises(gs.SurgeryError, match="those of others are in what the network returns"):
        _ = usual.domain.logits


@pytest.mark.parametrize("kind", [Traced, OwnClass])
def test_what_is_left_is_of_the_last_call_in_either_mode(kind: type[nn.Module]) -> None:
    _, m = attached(kind)
    m(X)
    first = m.domain.logits
    m.eval()
    with torch.no_grad():
        m(X[:2])
    assert first.shape == (5, 2)
    assert m.domain.logits.shape == (2, 2)
    assert not m.domain.logits.requires_grad


def test_several_passes_leave_a_tuple_and_none_is_an_error() -> None:
    _, m = attached(OncePerPair)
    m(X)
    assert [value.shape for value in m.domain.logits] == [(5, 2), (5, 2)]
    m(X[:2])
    assert m.domain.logits.shape == (2, 2)
    m(X[:1])
    with pytest.raises(gs.SurgeryError, match="did not come past the point"):
        _ = m.domain.logits


@pytest.mark.parametrize("first", ["original", "with_logits"])
@pytest.mark.parametrize("kind", [Traced, OwnClass])
def test_heads_of_both_kinds_stand_side_by_side(kind: type[nn.Module], first: Any) -> None:
    model, m = attached(kind, outputs=first, name="one")
    second = "with_logits" if first == "original" else "original"
    m = gs.attach_domain_head(m, "head", name="two", outputs=second, hidden=8, example_inputs=X)
    m = gs.attach_domain_head(m, "head", name="three", hidden=8, example_inputs=X)
    output = m(X)
    kept, named = ("one", "two") if first == "original" else ("two", "one")
    returned = (output[f"{named}_logits"], output["three_logits"]) if kind is OwnClass else output[1:]
    assert [value.shape for value in returned] == [(5, 2), (5, 2)]
    assert m.get_submodule(kept).logits.shape == (5, 2)
    assert gs.verify_flip(m, model, X).ok


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("kind", [Traced, OwnClass])
def test_copies_begin_without_logits_and_keep_their_own(kind: type[nn.Module], copied: Any) -> None:
    model, m = attached(kind)
    m(X)
    twin = copied(m)
    if copied is not copy.copy:
        with pytest.raises(gs.SurgeryError, match="no call of the network"):
            _ = twin.domain.logits
        assert_same(trained(twin), by_hand(model, m))
    twin(X[:1])
    assert twin.domain.logits.shape == (1, 2)


def test_more_surgery_begins_without_logits_and_strip_takes_all_out() -> None:
    model, m = attached()
    m(X)
    again = gs.insert_grl(m, "head")
    with pytest.raises(gs.SurgeryError, match="no call of the network"):
        _ = again.domain.logits
    stripped = gs.strip(m)
    assert type(stripped) is Traced
    assert list(stripped.state_dict()) == list(model.state_dict())
    assert torch.equal(stripped(X), model(X))


# ----------------------------------------------------------------------------------- ways to run a network


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", [Traced, OwnClass])
def test_compiled_in_one_graph_both_losses_have_the_same_gradients(kind: type[nn.Module]) -> None:
    model, m = attached(kind)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    assert_same(trained(m, compiled), by_hand(model, m))
    compiled(X[:3])
    assert m.domain.logits.shape == (3, 2)


@pytest.mark.parametrize("kind", [Traced, OwnClass])
def test_a_checkpoint_around_the_network_keeps_the_gradients(kind: type[nn.Module]) -> None:
    model, m = attached(kind)
    assert_same(trained(m, lambda x: checkpoint(m, x, use_reentrant=False)), by_hand(model, m))


def test_a_reentrant_checkpoint_is_refused_where_the_logits_are_read() -> None:
    _, m = attached()
    output = checkpoint(m, X.clone().requires_grad_(), use_reentrant=True)
    assert output.requires_grad
    with pytest.raises(gs.SurgeryError, match=r"(?s)would train nothing.*use_reentrant=False"):
        _ = m.domain.logits


class Checkpointed(Traced):
    reentrant = False

    def forward(self, x: torch.Tensor, scale: Any = None) -> torch.Tensor:
        value = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.head(value if scale is None else value * scale)


@pytest.mark.parametrize("outputs", ["original", "with_logits"])
def test_a_head_in_a_checkpointed_part_is_right_or_refused(outputs: Any) -> None:
    model, m = attached(Checkpointed, outputs=outputs)
    if outputs == "original":
        assert_same(trained(m), by_hand(model, m))
    m.reentrant = True
    with pytest.raises(gs.SurgeryError, match=r"(?s)'domain'.*without gradients.*use_reentrant=False"):
        m(X.clone().requires_grad_())


@pytest.fixture
def one_process() -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [Traced, OwnClass])
@pytest.mark.parametrize("static", [False, True])
def test_under_ddp_every_gradient_is_exchanged(
    kind: type[nn.Module], static: bool, one_process: None
) -> None:
    """The communication hook sees all gradients, those of the head among them."""
    model, m = attached(kind)
    parallel = DistributedDataParallel(m, static_graph=static)
    exchanged = []

    def count(state, bucket):  # type: ignore[no-untyped-def]
        exchanged.append(sum(value.numel() for value in bucket.gradients()))
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    parallel.register_comm_hook(None, count)
    for _ in range(3):
        found = trained(m, parallel)
    assert_same(found, by_hand(model, m))
    assert sum(exchanged) == 3 * sum(p.numel() for p in m.parameters())


def test_ddp_that_looks_for_unused_parameters_is_refused_by_its_name(one_process: None) -> None:
    _, m = attached()
    parallel = DistributedDataParallel(m, find_unused_parameters=True)
    with pytest.raises(gs.SurgeryError, match="find_unused_parameters=True"):
        parallel(X)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda m: torch.export.export(m, (X,)), "torch.export"),
        (lambda m: torch.jit.trace(m, (X,)), "torch.jit.trace"),
        (lambda m: replica(m)(X), "DataParallel"),
    ],
)
def test_what_would_lose_the_logits_is_refused_by_its_name(run: Any, name: str) -> None:
    _, m = attached()
    with pytest.raises(Exception, match=rf"(?s){name}.*has no place for logits.*with_logits"):
        run(m)


def replica(m: Any) -> Any:
    """What DataParallel makes for each device of a machine that has several."""
    twin = m._replicate_for_data_parallel()
    twin._modules["domain"] = m.domain._replicate_for_data_parallel()
    return twin


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("kind", [Traced, OwnClass])
def test_a_checkpoint_file_remembers_where_the_logits_go(kind: type[nn.Module], tmp_path: Any) -> None:
    model, m = attached(kind)
    m(X)
    before = m.domain.logits
    gs.export(m, tmp_path / "m.safetensors")
    assert m.domain.logits is before
    again = gs.load(tmp_path / "m.safetensors", model=kind())
    assert type(again(X)) is type(model(X))
    assert torch.equal(again.domain.logits, before)
    assert_same(trained(again), by_hand(model, m))


def test_a_folder_of_code_leaves_them_there_too(tmp_path: Any) -> None:
    model, m = attached()
    gs.export(m, tmp_path / "made", X)
    again = gs.load(tmp_path / "made", model=Traced())
    assert torch.equal(again(X), model(X))
    m(X)
    assert torch.equal(again.domain.logits, m.domain.logits)


def test_a_program_to_train_is_refused_and_one_for_inference_is_the_plain_network(tmp_path: Any) -> None:
    model, m = attached()
    for options in ({}, {"purpose": "inference", "heads": ["domain"]}):
        with pytest.raises(gs.ExportError, match=r"(?s)'domain' keeps its logits.*m\.safetensors"):
            gs.export(m, tmp_path / "m.pt2", X, **options)
    gs.export(m, tmp_path / "m.pt2", X, purpose="inference")
    torch.testing.assert_close(gs.load(tmp_path / "m.pt2")(X), model.eval()(X))


def test_outputs_that_are_not_known_are_refused_with_those_that_are() -> None:
    with pytest.raises(gs.SurgeryError, match=r"(?s)outputs='plain' is not known.*'original'"):
        attached(outputs="plain")


def test_a_head_inside_a_part_leaves_the_forward_around_it_alone() -> None:
    """The part goes back into the network, whose own forward sees no logits."""
    torch.manual_seed(0)
    model = Traced()
    whole: Any = copy.deepcopy(model)
    whole.body = gs.attach_domain_head(
        whole.body, "0", hidden=8, outputs="original", example_inputs=X, dropout=0.0
    )
    assert torch.equal(whole(X), model(X))
    assert whole.body.domain.logits.shape == (5, 2)
