"""Surgery and verification from several threads at once, and the same answer every time."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import torch
from oracles import assert_untouched, snapshot
from small_networks import Modes, Net, Repeated, image, vector
from torch import nn

import grl_surgery as gs

POINTS = ["stem", "stage1", "stage1.0.conv", "stage1.1.add", "stage2.0.norm", "stage2.1.act", "fc", "mean"]


def everything(model: nn.Module, point: str) -> str:
    """Splice, prove and strip; what the report says."""
    spliced = gs.insert_grl(model, after=point)
    report = gs.verify_flip(spliced, model, image())
    assert type(gs.strip(spliced)) is type(model)
    return json.dumps(report.to_dict())


def test_threads_that_share_a_network_get_what_one_thread_gets():
    model = Net()
    before = snapshot(model)
    alone = [everything(model, point) for point in POINTS]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda point: everything(model, point), POINTS))
    assert together == alone
    assert all(json.loads(report)["ok"] for report in together)
    assert_untouched(model, before)


def test_threads_with_networks_that_share_parameters_do_not_meet():
    first = Net()
    second = Net()
    second.stage1 = first.stage1
    before = [snapshot(first), snapshot(second)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(everything, model, point) for point in POINTS for model in (first, second)]
    assert all(json.loads(job.result())["ok"] for job in jobs)
    for model, untouched in zip((first, second), before, strict=True):
        assert_untouched(model, untouched)


def test_a_verification_that_waits_for_another_puts_back_what_was_before_both():
    model, other = Net(), Net()
    spliced, second = gs.insert_grl(model, after="stem"), gs.insert_grl(other, after="stem")
    waiting = Thread(target=gs.verify_flip, args=(second, other, image()))

    def start_the_other(module: nn.Module, args: object, output: object) -> None:
        if not waiting.ident:
            waiting.start()
            waiting.join(timeout=0.5)
            assert waiting.is_alive()

    model.fc.register_forward_hook(start_the_other)
    level = logging.root.manager.disable

    assert gs.verify_flip(spliced, model, image()).ok
    waiting.join()

    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.is_grad_enabled()
    assert logging.root.manager.disable == level
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_network_can_run_in_one_thread_while_another_traces_it():
    model, x = Modes().eval(), vector()
    expected = model(x)
    with ThreadPoolExecutor(2) as pool:
        surgeries = [pool.submit(gs.insert_grl, model, after="relu#3") for _ in range(20)]
        while not all(surgery.done() for surgery in surgeries):
            assert torch.equal(model(x), expected)
    assert all(torch.equal(surgery.result()(x), expected) for surgery in surgeries)


def test_the_same_seed_gives_the_same_report_in_another_process():
    code = (
        "import torch, json, grl_surgery as gs; from small_networks import Repeated, vector\n"
        "torch.manual_seed(0); model = Repeated()\n"
        "report = gs.verify_flip(gs.insert_grl(model, after='act#2'), model, vector(), seed=3)\n"
        "print(json.dumps(report.to_dict())); print(report)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    torch.manual_seed(0)
    model = Repeated()
    report = gs.verify_flip(gs.insert_grl(model, after="act#2"), model, vector(), seed=3)
    assert done.stdout == f"{json.dumps(report.to_dict())}\n{report}\n"
