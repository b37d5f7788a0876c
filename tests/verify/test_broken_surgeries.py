"""A verifier that has never been seen to fail proves nothing: it must reject each of these, and say why."""

import re
from collections.abc import Iterator

import pytest
import torch
from broken_surgeries import (
    BROKEN,
    BROKEN_HEADS,
    PATIENTS,
    BrokenSurgery,
    KeepsTheSign,
    Patient,
    Small,
)
from torch import Tensor, nn

import grl_surgery as gs

# Known defects of the verifier. A test that begins to pass fails until its line is taken out here.
CASES = [
    pytest.param(
        broken,
        PATIENTS[patient],
        mode,
        id=f"{name}-{patient}-{mode}",
    )
    for name, broken in BROKEN.items()
    for patient in broken.patients
    for mode in broken.modes
]


@pytest.fixture(autouse=True)
def same_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def images_for(patient: Patient) -> Tensor:
    return torch.randn(4, 3, patient.pixels, patient.pixels)


def parameters_in(model: nn.Module, patient: Patient, group: str) -> list[str]:
    prefixes = tuple(f"{path}." for path in patient.groups[group])
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("coeff", [1.0, 0.3])
@pytest.mark.parametrize("patient", PATIENTS.values(), ids=PATIENTS)
def test_the_surgery_that_is_not_broken_passes(patient: Patient, coeff: float, mode: str) -> None:
    model = patient.make()
    spliced = gs.insert_grl(model, after=patient.after, coeff=coeff)

    report = gs.verify_flip(spliced, model, images_for(patient), mode=mode).raise_if_failed()

    flipped = {row.name for row in report.parameters if row.measured == "flipped"}
    assert flipped == set(parameters_in(model, patient, "upstream"))


def assert_rejected_for_its_own_reason(
    broken: BrokenSurgery, report: gs.FlipReport, model: nn.Module, patient: Patient
) -> None:
    assert not report.ok, "it was accepted"
    assert report.forward_identical == broken.forward_identical == (not report.difference)
    assert re.search(broken.difference, report.difference)
    assert bool(report.problems) == bool(broken.problem), report.problems
    assert re.search(broken.problem, "\n".join(report.problems))
    for reversal in report.reversals:
        assert reversal.ok == (not broken.reversal), reversal.note
        assert re.search(broken.reversal, reversal.note)
    if broken.parameters is not None:
        notes = {(row.objective, row.name): row.note for row in report.parameters if not row.ok}
        blamed = {}
        for key, note in broken.parameters.items():
            objective, _, group = key.rpartition(": ")
            names = parameters_in(model, patient, group)
            blamed.update({(objective or "output", name): note for name in names})
        assert notes.keys() == blamed.keys()
        for name, note in blamed.items():
            assert re.search(note, notes[name]), (name, notes[name])


@pytest.mark.parametrize(("broken", "patient", "mode"), CASES)
def test_a_broken_surgery_is_rejected_for_its_own_reason(
    broken: BrokenSurgery, patient: Patient, mode: str
) -> None:
    model, images = patient.make(), images_for(patient)
    spliced = gs.insert_grl(model, after=patient.after, coeff=broken.coeff)
    wrong = broken.breaks(spliced, patient)

    report = gs.verify_flip(wrong, reference=model, example_inputs=images, mode=mode)

    assert len(report.reversals) == 1
    assert_rejected_for_its_own_reason(broken, report, model, patient)


def with_head(model: nn.Module, images: Tensor) -> nn.Module:
    return gs.attach_domain_head(model, after="stem", name="domain", hidden=8, example_inputs=images)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_head_that_is_not_broken_passes(mode: str) -> None:
    model, images = Small(), images_for(PATIENTS["small"])
    gs.verify_flip(with_head(model, images), model, images, mode=mode).raise_if_failed()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("broken", BROKEN_HEADS.values(), ids=BROKEN_HEADS)
def test_a_broken_head_is_rejected_for_its_own_reason(broken: BrokenSurgery, mode: str) -> None:
    patient = PATIENTS["small"]
    model, images = Small(), images_for(patient)
    wrong = broken.breaks(with_head(model, images), patient)

    report = gs.verify_flip(wrong, reference=model, example_inputs=images, mode=mode)

    assert_rejected_for_its_own_reason(broken, report, wrong, patient)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sign kept", r"reversal grl_stem \(after stem\): .*not -1 times the one that enters.* 1 times"),
        ("too late", r"- parameter left\.weight: its gradient is reversed, and should not be"),
        ("output nudged", "- the forward differs from the reference: output has other values"),
        ("upstream frozen", r"- reversal grl_stem \(after stem\): no gradient reaches it"),
    ],
)
def test_the_error_names_what_is_wrong(name: str, message: str) -> None:
    patient = PATIENTS["small"]
    model = patient.make()
    wrong = BROKEN[name].breaks(gs.insert_grl(model, after="stem"), patient)
    report = gs.verify_flip(wrong, model, images_for(patient))
    with pytest.raises(gs.FlipError, match=message):
        report.raise_if_failed()
    assert "FAILED" in str(report)


# --- Networks of which no graph predicts anything


class LooksAtItsInput(nn.Module):
    """A forward that cannot be traced: surgery is done inside `body`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.body = Small()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.first(x)) if x.sum() > -1e9 else x


def test_a_splice_inside_an_untraceable_network_passes() -> None:
    model = LooksAtItsInput()
    spliced = gs.insert_grl(model, after="body.stem")
    gs.verify_flip(spliced, model, torch.randn(4, 3, 8, 8)).raise_if_failed()


def test_a_broken_splice_inside_an_untraceable_network_is_rejected() -> None:
    model = LooksAtItsInput()
    spliced = gs.insert_grl(model, after="body.stem")
    (hook,) = spliced.body.stem._forward_hooks.values()
    spliced.grl_body_stem = KeepsTheSign()
    hook.spliced = (spliced.grl_body_stem,)

    report = gs.verify_flip(spliced, model, torch.randn(4, 3, 8, 8))

    upstream = ("first.", "body.conv.", "body.stem.")
    names = [name for name, _ in model.named_parameters() if name.startswith(upstream)]
    assert [row.name for row in report.parameters if not row.ok] == names
    with pytest.raises(gs.FlipError, match="its gradient is not what tensor hooks at the same places give"):
        report.raise_if_failed()


def test_a_broken_layer_that_the_user_wrote_is_rejected() -> None:
    model = nn.Sequential(nn.Linear(3, 4), KeepsTheSign(), nn.Linear(4, 2))
    with pytest.raises(gs.FlipError, match=r"reversal 1 \(in the network\): .* 1 times"):
        gs.verify_flip(model, example_inputs=torch.randn(4, 3)).raise_if_failed()


def test_a_network_without_a_reversal_is_rejected() -> None:
    model = Small()
    with pytest.raises(gs.FlipError, match="there is no reversal in this network"):
        gs.verify_flip(model, model, torch.randn(4, 3, 8, 8)).raise_if_failed()


def test_flags_that_differ_from_the_references_are_taken_from_the_model_and_shown() -> None:
    model = Small().train()
    spliced = gs.insert_grl(model, after="stem")
    spliced.norm.eval()
    assert gs.verify_flip(spliced, model, torch.randn(4, 3, 8, 8)).raise_if_failed().mode == "mixed"
