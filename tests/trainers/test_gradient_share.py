"""The unsupervised terms' share of the gradient: closed form, how often it is taken, and that it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autossl.trainers.base import Batch, Progress, StepOutput
from autossl.trainers.gradient_share import gradient_shares, measuring_interval
from autossl.trainers.loop import LoopOptions, TrainingLoop
from autossl.trainers.methods.cps import CPS, CPSSettings
from autossl.trainers.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from family import FamilySource, weights_of
from toys import toy_job


def shares(*terms: str, scale: float = 1.0) -> dict[str, float]:
    """Of weights w = (w0, w1) and a head h: supervised 3·w0 + 4·w1, a: 10·w0, b: -10·w0 + h, c: h alone."""
    w, h = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(()))
    known = {"a": 10 * w[0], "b": -10 * w[0] + h, "c": 2 * h}
    supervised = [3 * w[0], 4 * w[1]]
    found = gradient_shares(supervised, {name: known[name] for name in terms}, [w, h], lambda term: term * scale)
    assert w.grad is None
    assert h.grad is None
    return {name: share.item() for name, share in found.items()}


def test_closed_form() -> None:
    assert shares("a") == pytest.approx({"total": 10 / 15, "a": 10 / 15})
    assert shares("a", scale=65536.0) == pytest.approx(shares("a")), "the scaler's factor falls out"


def test_only_what_the_supervised_terms_reach_counts() -> None:
    assert shares("b") == pytest.approx({"total": 10 / 15, "b": 10 / 15}), "the head's own gradient is left out"
    assert shares("c") == {"total": 0, "c": 0}


def test_terms_that_cancel_have_a_share_each_and_none_together() -> None:
    assert shares("a", "b") == pytest.approx({"total": 0, "a": 10 / 15, "b": 10 / 15})


def test_nothing_to_compare() -> None:
    w = nn.Parameter(torch.ones(()))
    assert shares() == {}
    assert gradient_shares([], {"a": 2 * w}, [w]) == {}
    other = nn.Parameter(torch.ones(()))
    assert gradient_shares([2 * w], {"a": 2 * w}, [other]) == {}, "the supervised terms reach nothing that is trained"


def test_the_graph_is_still_there() -> None:
    w = nn.Parameter(torch.tensor(2.0))
    supervised, term = w**2, w**3
    gradient_shares([supervised], {"a": term}, [w])
    (supervised + term).backward()
    assert w.grad is not None
    assert w.grad.item() == 4 + 12


@pytest.mark.parametrize("n_terms", [1, 2, 3])
@pytest.mark.parametrize("total", [500, 1000, 50_000])
def test_it_costs_two_percent_at_most(total: int, n_terms: int) -> None:
    every = measuring_interval(total, n_terms)
    passes = 2 if n_terms == 1 else n_terms + 2
    most = max(0.02 * total, 13 * passes * (2 / 3))  # of a short run at least twelve, whatever that costs
    assert (total // every) * passes * (2 / 3) <= most
    assert total // every >= min(total, 12)
    assert total // every <= 50
    if total == 50_000:
        assert total // every == 50


def run(folder: Path, every: int | None, total: int = 6, **settings: Any) -> tuple[MeanTeacher, list[dict[str, Any]]]:
    folder.mkdir()
    method = MeanTeacher(toy_job(total_steps=total), MeanTeacherSettings(**settings))
    options = LoopOptions(total, log_every=2, checkpoint_every=100, gradient_share_every=every)
    TrainingLoop(method, FamilySource(method), folder, options).run()
    return method, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_it_is_logged_and_leaves_the_bits_of_the_run_alone(tmp_path: Path) -> None:
    without, silent = run(tmp_path / "without", 0)
    measured, lines = run(tmp_path / "with", 1)
    before, after = weights_of(without), weights_of(measured)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [line["gradient_share"] for line in silent] == [{}, {}, {}]
    for line, quiet in zip(lines, silent, strict=True):
        assert line["losses"] == quiet["losses"]
        assert set(line["gradient_share"]) == {"total", "consistency"}
        assert 0 < line["gradient_share"]["total"] < 1
    _, by_default = run(tmp_path / "default", None, total=4)
    assert all(line["gradient_share"] == {} for line in by_default), "too short to be measured"


def test_a_step_on_which_it_falls_is_measured(tmp_path: Path) -> None:
    _, lines = run(tmp_path / "run", 4, total=8)
    assert [bool(line["gradient_share"]) for line in lines] == [False, True, False, True]
    _, without_term = run(tmp_path / "zero", 1, lambda_max=0.0)
    assert all(line["gradient_share"] == {} for line in without_term)


def test_the_share_in_the_log_is_that_of_the_step(tmp_path: Path) -> None:
    """Against gradients computed here, with the weights of the first step."""

    class Constant(MeanTeacher):
        def losses(self, batch: Batch, at: Progress) -> StepOutput:
            weight = next(self.parts.trained["network"].parameters())
            return StepOutput({"supervised": 3.0 * weight.sum(), "consistency": weight.sum() * 1.0})

    (tmp_path / "run").mkdir()
    method = Constant(toy_job(total_steps=1), MeanTeacherSettings())
    options = LoopOptions(1, log_every=1, gradient_share_every=1)
    TrainingLoop(method, FamilySource(method), tmp_path / "run", options).run()
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert line["gradient_share"] == pytest.approx({"total": 0.25, "consistency": 0.25})


def test_with_a_gradient_scaler_and_recomputed_passes(tmp_path: Path) -> None:
    """A scaler's factor, and networks whose activations are computed again in the backward pass, change no share."""
    found = []
    for name, scaled, sequential in (("plain", False, False), ("scaled", True, False), ("again", False, True)):
        (tmp_path / name).mkdir()
        method = CPS(toy_job(total_steps=3), CPSSettings(sequential=sequential, r_warm=0.0))
        options = LoopOptions(3, log_every=3, gradient_share_every=1)
        loop = TrainingLoop(method, FamilySource(method), tmp_path / name, options)
        if scaled:
            loop._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        loop.run()
        assert loop.skipped_steps == 0
        found.append(json.loads((tmp_path / name / "log.jsonl").read_text())["gradient_share"])
    assert found[0]["total"] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[2] == pytest.approx(found[0], rel=1e-6)
