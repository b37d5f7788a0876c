"""Trainers, loggers and libraries that people use anyway, each tried in the real package."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import grl_surgery as gs
from grl_surgery.integrations.scalars import scalars
from grl_surgery.training.metrics import AdversarialReport
from grl_surgery.training.schedules import dann, linear

ROOT = Path(__file__).parents[2]
REPORT = AdversarialReport({0: 4, 1: 4}, 2, 0.5, {0: 1.0, 1: 0.5}, 0.6, 0.6931, 0.1, None)


def network() -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return gs.attach_domain_head(plain, after="1", hidden=8, depth=1, example_inputs=torch.randn(2, 4))


def samples(count: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    domains = torch.arange(count) % 2
    inputs = torch.randn(count, 4, generator=generator) + domains[:, None]
    return TensorDataset(inputs, torch.arange(count) % 3, domains)


def test_importing_grl_surgery_imports_no_integration() -> None:
    code = "import grl_surgery, sys; grl_surgery.load; print([m for m in sys.modules if 'integrations' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- numbers for loggers


def test_what_was_not_measured_is_no_scalar() -> None:
    found = scalars(REPORT, prefix="")
    assert found["domain_accuracy"] == 0.75
    assert found["domain_accuracy/1"] == 0.5
    assert not {"splice_gradient", "a_distance"} & found.keys()


def test_tensorboard_shows_what_the_report_says(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    from grl_surgery.integrations.tensorboard import write_report

    with SummaryWriter(str(tmp_path)) as writer:
        write_report(writer, REPORT, step=7)
    written = EventAccumulator(str(tmp_path)).Reload()
    (event,) = written.Scalars("grl/domain_accuracy")
    assert (event.step, event.value) == (7, 0.75)
    assert set(written.Tags()["scalars"]) == set(scalars(REPORT))
    assert written.Tags()["tensors"] == ["grl/verdict/text_summary"]


# --- Lightning


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("lightning.pytorch")


def lightning_run(lightning: Any, folder: Path, epochs: int, resume: Path | None = None) -> dict[str, Any]:
    """Train for some of three planned epochs of six batches, one optimizer step for each two of them."""
    from grl_surgery.integrations.lightning import GradientReversalCallback

    class Adversarial(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()
            self.used: list[float] = []

        def training_step(self, batch: list[Tensor], index: int) -> dict[str, Tensor]:
            inputs, labels, domains = batch
            logits, domain_logits = self.network(inputs)
            self.used.append(gs.reversals(self.network)["domain.reversal"].coeff.item())
            loss = nn.functional.cross_entropy(logits, labels) + gs.domain_loss(domain_logits, domains)
            return {"loss": loss, "domain_logits": domain_logits, "domains": domains}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(gs.param_groups(self.network, lr=0.01))

    class Records(lightning.Callback):
        def __init__(self) -> None:
            self.records: list[dict[str, float]] = []

        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            self.records.append({name: float(value) for name, value in trainer.logged_metrics.items()})

    callback, records, module = (
        GradientReversalCallback(linear(0.0, 1.0), total_steps=9),
        Records(),
        Adversarial(),
    )
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        log_every_n_steps=3,
        callbacks=[callback, records],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(samples(), batch_size=4), ckpt_path=resume)
    trainer.save_checkpoint(folder / "run.ckpt")
    return {"used": module.used, "callback": callback, "records": records.records, "trainer": trainer}


@pytest.mark.filterwarnings("ignore")  # of Lightning's own, about loaders and about torch's internals
def test_lightning_steps_the_coefficient_with_the_optimizer_and_logs(lightning: Any, tmp_path: Path) -> None:
    run = lightning_run(lightning, tmp_path, epochs=3)
    expected = [step / 9 for step in range(9) for _ in range(2)]  # two batches for each step
    assert run["used"] == pytest.approx(expected)
    assert run["callback"].scheduler.steps_done == 9
    assert float(run["trainer"].logged_metrics["grl/coeff"]) == pytest.approx(8 / 9)
    assert 0.0 <= float(run["trainer"].logged_metrics["grl/domain_accuracy"]) <= 1.0
    assert run["records"][0] == {}
    assert float(run["trainer"].logged_metrics["grl/chance_loss"]) == pytest.approx(math.log(2))
    assert run["callback"].metrics._reversal._forward_hooks == {}


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_lightning_run_has_the_coefficients_of_an_uninterrupted_one(
    lightning: Any, tmp_path: Path
) -> None:
    whole = lightning_run(lightning, tmp_path, epochs=3)["used"]
    first = lightning_run(lightning, tmp_path, epochs=1)["used"]
    rest = lightning_run(lightning, tmp_path, epochs=3, resume=tmp_path / "run.ckpt")["used"]
    assert first + rest == whole


class TwoHeads:
    """Training of a network with an early and a late head, a callback for each."""

    def __init__(self, lightning: Any, callbacks: list[Any], **limits: Any) -> None:
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        early = gs.attach_domain_head(plain, "0", name="early", hidden=8, example_inputs=torch.randn(2, 4))
        both = gs.attach_domain_head(early, "1", name="late", hidden=8, example_inputs=torch.randn(2, 4))

        class Adversarial(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.network = both
                self.fails, self.names_heads = False, True

            def training_step(self, batch: list[Tensor], index: int) -> dict[str, Any]:
                inputs, _, domains = batch
                logits, *said = self.network(inputs)
                loss = sum((gs.domain_loss(each, domains) for each in said), logits.sum())
                if self.fails:
                    raise RuntimeError("out of memory")
                heads = dict(zip(("network.early", "network.late"), said, strict=True))
                return {
                    "loss": loss,
                    "domain_logits": heads if self.names_heads else said[0],
                    "domains": domains,
                }

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.network.parameters(), lr=0.01)

        self.module = Adversarial()
        self.hooks = gs.reversals(self.module)["network.early.reversal"]._forward_hooks
        self.trainer = lightning.Trainer(
            **(limits or {"max_steps": 6}),
            accelerator="cpu",
            logger=False,
            log_every_n_steps=2,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )

    def fit(self) -> None:
        self.trainer.fit(self.module, DataLoader(samples(), batch_size=4))


def callback_of(which: str, /, **settings: Any) -> Any:
    from grl_surgery.integrations.lightning import GradientReversalCallback

    own = {"head": f"network.{which}", "only": f"network.{which}", "prefix": f"{which}/"}
    return GradientReversalCallback(linear(0.0, {"early": 0.5, "late": 1.0}[which]), **{**own, **settings})


@pytest.mark.filterwarnings("ignore")
def test_each_head_has_a_callback_with_its_own_schedule_numbers_and_state(lightning: Any) -> None:
    early, late = callback_of("early"), callback_of("late")
    run = TwoHeads(lightning, [early, late])
    run.fit()
    logged = run.trainer.logged_metrics
    assert float(logged["early/coeff"]) == pytest.approx(0.5 * 5 / 6)
    assert float(logged["late/coeff"]) == pytest.approx(5 / 6)
    assert float(logged["early/domain_loss"]) != float(logged["late/domain_loss"])
    assert len({callback.state_key for callback in (early, late)}) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix": "early/"}, "two callbacks log under the prefix 'early/'"),
        ({"only": None}, "two callbacks drive 'network.early.reversal'"),
        ({"head": None}, "there are 2 domain heads.*\n.*\n  for example: head='network.early'"),
        ({"head": "network.lte"}, "there is no domain head 'network.lte'"),
    ],
)
def test_callbacks_that_would_hide_each_other_are_refused(
    lightning: Any, settings: dict[str, Any], message: str
) -> None:
    run = TwoHeads(lightning, [callback_of("early"), callback_of("late", **settings)])
    with pytest.raises(gs.SurgeryError, match=message):
        run.fit()
    assert not run.hooks


@pytest.mark.filterwarnings("ignore")
def test_logits_that_may_be_of_either_head_are_refused(lightning: Any) -> None:
    run = TwoHeads(lightning, [callback_of("early"), callback_of("late")])
    run.module.names_heads = False
    with pytest.raises(gs.SurgeryError, match="does not say whose 'domain_logits'"):
        run.fit()


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_fails_leaves_no_hook_behind(lightning: Any) -> None:
    run = TwoHeads(lightning, [callback_of("early")])
    run.module.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        run.fit()
    assert not run.hooks


@pytest.mark.filterwarnings("ignore")
def test_a_run_of_unknown_length_asks_for_the_number_of_steps(lightning: Any) -> None:
    run = TwoHeads(lightning, [callback_of("early")], max_time={"minutes": 1})
    with pytest.raises(
        gs.SurgeryError, match=r"(?s)how many steps.*GradientReversalCallback\(total_steps=1000\)"
    ):
        run.fit()


@pytest.mark.parametrize("total", [0, -1, 2.5])
def test_an_impossible_number_of_lightning_steps_is_refused(lightning: Any, total: Any) -> None:
    with pytest.raises(gs.SurgeryError, match=f"total_steps is {total}, but must be a whole number"):
        callback_of("early", total_steps=total)


# --- Hugging Face


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


def trainer_run(transformers: Any, folder: Path, resume: bool = False, stop_at: int | None = None) -> Any:
    from grl_surgery.integrations.transformers import GradientReversalCallback

    callback = GradientReversalCallback(linear(0.0, 1.0))
    used: list[float] = []

    class Adversarial(transformers.Trainer):
        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Tensor], *rest: Any, **named: Any
        ) -> Tensor:
            logits, domain_logits = model(inputs["inputs"])
            used.append(next(iter(gs.reversals(model).values())).coeff.item())
            callback.watch(domain_logits, inputs["domains"])
            task = nn.functional.cross_entropy(logits, inputs["labels"])
            return task + gs.domain_loss(domain_logits, inputs["domains"])

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == stop_at

    rows = [dict(zip(("inputs", "labels", "domains"), row, strict=True)) for row in samples()]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=2,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Adversarial(network(), arguments, train_dataset=rows, callbacks=[callback, Stop()])
    trainer.train(resume_from_checkpoint=resume)
    return used, trainer, callback


@pytest.mark.filterwarnings("ignore")  # of transformers' own
def test_the_trainer_steps_the_coefficient_and_logs(transformers: Any, tmp_path: Path) -> None:
    used, trainer, callback = trainer_run(transformers, tmp_path)
    assert used == pytest.approx([step / 6 for step in range(6) for _ in range(2)])
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert [record["grl/coeff"] for record in records] == pytest.approx([2 / 6, 4 / 6, 1.0])
    assert all(0.0 <= record["grl/domain_accuracy"] <= 1.0 for record in records)
    assert all(record["grl/splice_gradient"] > 0 for record in records)
    assert callback.metrics._reversal._forward_hooks == {}


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_trainer_has_the_coefficients_of_an_uninterrupted_one(
    transformers: Any, tmp_path: Path
) -> None:
    whole, *_ = trainer_run(transformers, tmp_path / "whole")
    first, *_ = trainer_run(transformers, tmp_path / "broken", stop_at=3)
    rest, *_ = trainer_run(transformers, tmp_path / "broken", resume=True)
    assert first + rest == whole


def test_a_callback_of_a_trainer_that_failed_watches_its_next_run_alone(transformers: Any) -> None:
    from grl_surgery.integrations.transformers import GradientReversalCallback

    model, callback = network(), GradientReversalCallback()
    state = SimpleNamespace(max_steps=4, global_step=0, log_history=[{}])
    for _ in range(2):  # no callback is told that the first one failed
        callback.on_train_begin(None, state, None, model=model)
    assert len(gs.reversals(model)["domain.reversal"]._forward_hooks) == 1
    other = GradientReversalCallback()
    other.on_train_begin(None, state, None, model=model)
    logs: dict[str, float] = {}
    callback.on_log(None, state, None, logs=logs)
    with pytest.raises(gs.SurgeryError, match="two callbacks log under the prefix 'grl/'"):
        other.on_log(None, state, None, logs=logs)


class Sentences(nn.Module):
    """A classifier on a transformers encoder."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids, attention_mask=attention_mask)[0]
        return self.classifier(hidden[:, 0])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_transformers_encoder_is_spliced_and_verified(transformers: Any, mode: str) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    model = Sentences(transformers.BertModel(config, add_pooling_layer=False), 16, 3)
    inputs = torch.randint(0, 50, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    m = gs.attach_domain_head(model, after="encoder[0]", pool="nlc", hidden=8, example_inputs=inputs)
    report = gs.verify_flip(m, reference=model, example_inputs=inputs, mode=mode).raise_if_failed()
    measured = {row.name: row.measured for row in report.parameters if row.name.startswith("encoder.")}
    assert report.verdict.startswith(f"{len(measured)} of {len(measured)} upstream parameters flipped")
    # The output is a mapping that answers to a position; exchanging an item leaves the encoder's own alone.
    assert torch.equal(m.eval()(*inputs)[0], model.eval()(*inputs))


# --- Accelerate


def test_accelerate_saves_and_restores_the_schedule(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    scheduler = gs.CoefficientScheduler(model, dann(), total_steps=10)
    prepared = accelerator.prepare(model)
    accelerator.register_for_checkpointing(scheduler)
    for _ in range(4):
        scheduler.step()
    accelerator.save_state(str(tmp_path))
    expected = scheduler.coeff
    scheduler.step()
    accelerator.load_state(str(tmp_path))
    assert (scheduler.steps_done, scheduler.coeff) == (4, expected)
    assert gs.reversals(prepared)["domain.reversal"].coeff.item() == pytest.approx(expected)


# --- timm


@pytest.mark.parametrize(
    ("name", "feature", "point"),
    [
        ("test_resnet", 1, "layer1"),
        ("test_vit", -1, "blocks.5"),
        ("test_efficientnet", 2, "blocks.2"),
        ("resnet18", 3, "layer3"),
    ],
)
def test_timms_features_are_points(name: str, feature: int, point: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name)
    # timm's own answer to which module that is
    assert model.feature_info[feature]["module"] == point
    by_number = gs.insert_grl(model, after=f"feature:{feature}")
    by_name = gs.insert_grl(model, after=point)
    assert list(gs.reversals(by_number)) == list(gs.reversals(by_name))
    assert by_number.grl_surgery.cuts == by_name.grl_surgery.cuts


@pytest.mark.parametrize("wrong", ["feature:9", "feature:-6", "feature:x", "feature:"])
def test_a_feature_that_timm_does_not_list_is_answered_with_those_that_it_does(wrong: str) -> None:
    timm = pytest.importorskip("timm")
    with pytest.raises(gs.PointNotFoundError, match=r"none of the 5 .*\n.*feature:1 is layer1"):
        gs.insert_grl(timm.create_model("test_resnet"), after=wrong)


def test_a_network_without_feature_info_has_no_features() -> None:
    with pytest.raises(gs.PointNotFoundError, match="this Sequential does not have"):
        gs.insert_grl(nn.Sequential(nn.Linear(2, 2)), after="feature:0")


# --- torch.hub


def test_a_repository_on_the_disk_is_a_hub_of_one_liners() -> None:
    pytest.importorskip("timm")
    m = torch.hub.load(str(ROOT), "insert_grl", "timm/test_resnet", source="local", after="layer2", coeff=0.5)
    assert gs.reversals(m)["grl_layer2"].coeff.item() == 0.5
    m = torch.hub.load(
        str(ROOT), "attach_domain_head", "timm/test_resnet", source="local", after="global_pool"
    )
    assert len(m(torch.randn(2, 3, 64, 64))) == 2
    assert gs.verify_flip(m).ok
