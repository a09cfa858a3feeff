"""The checks of entropy minimization, its variants and its guard."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autossl.trainers.base import Batch, Job, MethodSettings, Progress, StepOutput
from autossl.trainers.components.certainty import class_balanced_mean, prior_divergence, uncertainty
from autossl.trainers.components.losses import normalized_entropy
from autossl.trainers.methods.entropy_min import EntropyMinimization, EntropyMinimizationSettings
from autossl.trainers.methods.supervised import Supervised
from toys import toy_batch, toy_job, toy_schema

END = Progress(step=100, total=100)


def trainer(job: Job | None = None, **settings: Any) -> EntropyMinimization:
    return EntropyMinimization(job or toy_job(), EntropyMinimizationSettings(**settings))


def set_outputs(method: EntropyMinimization, logits: tuple[float, ...]) -> EntropyMinimization:
    """Makes the network answer the same logits everywhere."""
    for layer in method.parts.trained["network"].decoder.seg_layers:  # type: ignore[union-attr]
        nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor(logits)
    return method


def step(method: EntropyMinimization, batch: Batch | None = None, at: Progress = END) -> StepOutput:
    return method.losses(batch or toy_batch(method.job), at)


def voxel(*logits: float) -> Tensor:
    """Logits [1, C, 1, 1]."""
    return torch.tensor(logits).view(1, -1, 1, 1)


# ----------------------------------------------------------------------------------------------------------- the term


def test_term_closed_form() -> None:
    method = trainer()
    cases = {(1.0, 1.0, 1.0): 1.0, (0.0, 0.0, -90.0): math.log(2) / math.log(3), (0.0, 90.0, 0.0): 0.0}
    for logits, expected in cases.items():
        output = step(set_outputs(method, logits))
        assert float(output.measures["entropy"]) == pytest.approx(expected, abs=1e-6)
        assert output.losses["entropy"].item() == pytest.approx(expected, abs=1e-6)
    binary = trainer(toy_job(schema=toy_schema(1)))
    batch = toy_batch(binary.job)
    batch.labeled.targets = (batch.labeled.target.clamp(max=1),)
    output = step(set_outputs(binary, (math.log(0.9), math.log(0.1))), batch)
    assert float(output.measures["entropy"]) == pytest.approx(0.46900, abs=1e-5)


def test_weight_follows_the_ramp() -> None:
    ats = [Progress(step=s, total=100) for s in (0, 50, 100)]
    weights = [float(step(trainer(), at=at).measures["entropy_weight"]) for at in ats]
    assert weights == pytest.approx([0.0067379, 0.2865, 1.0], rel=1e-3)
    assert float(step(trainer(ramp_end=0), at=ats[0]).measures["entropy_weight"]) == 1.0


def test_gradient_is_the_analytic_one() -> None:
    for n_classes in (2, 5):
        z = torch.randn(1, n_classes, 3, 3, dtype=torch.float32, requires_grad=True)
        h = normalized_entropy(z)
        h.sum().backward()
        log_p = z.detach().log_softmax(1)
        expected = -log_p.exp() * (log_p + h.detach() * math.log(n_classes)) / math.log(n_classes)
        assert z.grad is not None
        assert (z.grad - expected).abs().max() < 1e-6
        assert z.grad.sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("max_squares", [False, True])
def test_a_descent_step_sharpens_and_keeps_the_winner(max_squares: bool) -> None:
    z = torch.randn(500, 4, 1, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    uncertainty(z, False, max_squares).sum().backward()
    assert z.grad is not None
    before, after = z.detach().softmax(1), (z.detach() - 0.5 * z.grad).softmax(1)
    assert torch.equal(before.argmax(1), after.argmax(1))
    assert (after.amax(1) > before.amax(1)).all()
    uniform = torch.zeros(1, 4, 1, 1, requires_grad=True)
    uncertainty(uniform, False, max_squares).sum().backward()
    assert uniform.grad is not None
    assert uniform.grad.abs().max() < 1e-7


def test_only_the_full_resolution_head_and_what_is_below_it_learn() -> None:
    method = trainer()
    network: Any = method.parts.trained["network"]
    step(method).losses["entropy"].backward()
    heads = list(network.decoder.seg_layers)
    assert all(p.grad is None for head in heads[:-1] for p in head.parameters())
    idle = {id(p) for head in heads[:-1] for p in head.parameters()}
    without_effect = {id(m.bias) for m in network.modules() if isinstance(m, nn.Conv2d)}  # instance norm undoes them
    for name, parameter in network.named_parameters():
        if id(parameter) not in idle | without_effect:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


# ----------------------------------------------------------------------------------------------------- which voxels


def test_rows() -> None:
    batch = toy_batch(toy_job())
    assert batch.unlabeled is not None
    z = trainer().parts.trained["network"](torch.cat([batch.labeled.image, batch.unlabeled.image]))[0]
    h = normalized_entropy(z)
    assert float(step(trainer(), batch).measures["entropy"]) == pytest.approx(h[2:].mean().item(), rel=1e-6)
    assert float(step(trainer(rows="all"), batch).measures["entropy"]) == pytest.approx(h.mean().item(), rel=1e-6)


def test_invalid_voxels_do_not_count() -> None:
    batch = toy_batch(toy_job())
    assert batch.unlabeled is not None
    valid = batch.unlabeled.valid.clone()
    valid[..., 5:] = False
    batch.unlabeled.valids = (valid,)
    h = normalized_entropy(trainer().parts.trained["network"](batch.unlabeled.image)[0])
    for balanced in (False, True):
        output = step(trainer(class_balanced=balanced), batch)
        assert float(output.measures["valid_share"]) == pytest.approx(5 / 16)
    assert float(step(trainer(), batch).measures["entropy"]) == pytest.approx(h[..., :5].mean().item(), rel=1e-5)
    batch.unlabeled.valids = (torch.zeros_like(valid),)
    for settings in ({}, {"class_balanced": True}, {"max_squares": True}, {"prior_weight": 1.0}):
        output = step(trainer(**settings), batch)
        assert output.losses["entropy"].item() == 0
        sum(output.losses.values()).backward()  # type: ignore[union-attr]


def test_infinite_logits_outside_the_image_do_no_harm() -> None:
    z = torch.randn(1, 3, 4, 4)
    z[..., 0] = float("inf")
    z.requires_grad_()
    valid = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    valid[..., 0] = False
    for settings in ({}, {"class_balanced": True}, {"max_squares": True}):
        z.grad = None
        value = trainer(**settings)._entropy(z, valid)
        value.backward()
        assert torch.isfinite(value)
        assert z.grad is not None
        assert torch.isfinite(z.grad).all()


# ----------------------------------------------------------------------------------------------------------- the twin


def test_zero_weight_is_the_twin_bit_for_bit() -> None:
    method = trainer(lambda_max=0.0)
    batch = toy_batch(method.job)
    mine = step(method, batch)
    theirs = Supervised(toy_job(), MethodSettings()).losses(batch, END)
    assert list(mine.losses) == ["supervised"]
    assert torch.equal(mine.losses["supervised"], theirs.losses["supervised"])


def test_no_unlabeled_case_is_the_twin_unless_asked_otherwise() -> None:
    job = toy_job(n_unlabeled=0)
    batch = toy_batch(job, n_unlabeled=0)
    for settings in ({}, {"rows": "all"}, {"labeled_only": True}, {"prior_weight": 1.0}):
        assert list(step(trainer(job, **settings), batch).losses) == ["supervised"]
    labeled_only = step(trainer(job, labeled_only=True, rows="all", prior_weight=1.0), batch)
    assert list(labeled_only.losses) == ["supervised", "entropy"], "the prior is about unlabeled patches"
    assert labeled_only.losses["entropy"].item() > 0


# -------------------------------------------------------------------------------------------------------- the variants


def test_max_squares_hand_values() -> None:
    for n_classes in (2, 4):
        assert uncertainty(torch.zeros(1, n_classes, 1, 1), False, True).item() == pytest.approx(1.0)
    assert uncertainty(voxel(90.0, 0.0, 0.0), False, True).item() == pytest.approx(0, abs=1e-6)
    p = voxel(0.6, 0.3, 0.1)
    assert uncertainty(p.log(), False, True).item() == pytest.approx((1 - 0.46) * 1.5)
    logit = torch.logit(voxel(0.9, 0.5))
    assert uncertainty(logit, True, True).flatten().tolist() == pytest.approx([0.36, 1.0])
    output = step(set_outputs(trainer(max_squares=True), (0.0, 0.0, -90.0)))
    assert float(output.measures["entropy"]) == pytest.approx(0.75)


def test_class_balanced_hand_value() -> None:
    values, z = torch.zeros(1, 1, 10, 100), torch.zeros(1, 2, 10, 100)
    z[:, 0] = 1.0
    values[..., 0, 0], z[:, 1, 0, 0] = 0.9, 2.0
    valid = torch.ones(1, 1, 10, 100, dtype=torch.bool)
    assert class_balanced_mean(values, z, valid, regions=False).item() == pytest.approx(0.45)
    assert values.mean().item() == pytest.approx(0.0009)
    three = torch.cat([z, torch.full((1, 1, 10, 100), -9.0)], 1)
    assert class_balanced_mean(values, three, valid, regions=False).item() == pytest.approx(0.45), "absent: left out"
    valid[..., 0, 0] = False
    assert class_balanced_mean(values, z, valid, regions=False).item() == 0
    region = torch.full((1, 1, 10, 100), -1.0)
    region[..., 0, 0] = 1.0
    valid[:] = True
    assert class_balanced_mean(values, region, valid, regions=True).item() == pytest.approx(0.45), "inside and outside"


def test_class_balanced_through_the_step() -> None:
    batch = toy_batch(toy_job())
    assert batch.unlabeled is not None
    z = trainer().parts.trained["network"](batch.unlabeled.image)[0]
    h, label = normalized_entropy(z), z.argmax(1, keepdim=True)
    expected = torch.stack([h[label == c].mean() for c in label.unique().tolist()]).mean().item()
    assert len(label.unique()) > 1
    measured = float(step(trainer(class_balanced=True), batch).measures["entropy"])
    assert measured == pytest.approx(expected, rel=1e-5)
    assert measured != pytest.approx(h.mean().item(), rel=1e-4)


def test_prior_hand_values() -> None:
    shares = torch.tensor([0.8, 0.2])
    assert prior_divergence(shares, shares, regions=False).item() == pytest.approx(0, abs=1e-7)
    gone = torch.tensor([1.0, 0.0])
    values = [prior_divergence(torch.tensor([1 - f, f]), shares, regions=False).item() for f in (0.2, 0.1, 0.01, 0.0)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(math.log(1 / 0.8), abs=1e-4)
    both = torch.tensor([0.5, 0.2])
    expected = (0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)) / 2
    assert prior_divergence(both, shares, regions=True).item() == pytest.approx(expected, rel=1e-4)
    gone.requires_grad_()
    prior_divergence(gone, shares, regions=False).backward()
    assert gone.grad is not None
    assert gone.grad[1] < gone.grad[0] < float("inf"), "descent brings the foreground back"


@pytest.mark.parametrize("regions", [False, True])
def test_prior_is_zero_where_the_mean_prediction_is_that_of_the_labels(regions: bool) -> None:
    job = toy_job(schema=toy_schema(regions=regions))
    method = trainer(job, prior_weight=2.0)
    batch = toy_batch(job)
    target = batch.labeled.target
    classes = target if regions else torch.cat([target == c for c in range(3)], 1).float()
    shares = classes.mean((0, 2, 3))
    logits = torch.logit(shares) if regions else shares.log()
    output = step(set_outputs(method, tuple(logits.tolist())), batch)
    assert output.losses["prior"].item() == pytest.approx(0, abs=1e-6)
    background = (-9.0, -9.0) if regions else (9.0, 0.0, 0.0)
    output = step(set_outputs(trainer(job, prior_weight=2.0), background), batch)
    assert output.losses["prior"].item() == pytest.approx(2 * float(output.measures["prior"]), rel=1e-6)
    assert output.losses["prior"].item() > 0.1
    assert float(output.measures["prior_weight"]) == 2.0
    assert "prior" not in step(trainer(job), batch).losses
    alone = step(set_outputs(trainer(job, prior_weight=2.0, lambda_max=0.0), background), batch)
    assert alone.losses["prior"].item() == output.losses["prior"].item(), "it has its own weight"


def test_label_shares_leave_ignored_voxels_out_and_forget_slowly() -> None:
    job = toy_job(schema=toy_schema(1, ignore=True))
    method = trainer(job)
    batch = toy_batch(job)
    half = torch.zeros_like(batch.labeled.valid)
    half[..., :8] = True
    for target, expected in ((1, 1.0), (0, 1 / 1.99 * 0.99)):
        batch.labeled.valids, batch.labeled.targets = (half,), (torch.where(half, target, 0),)
        output = step(method, batch)
        assert float(output.measures["labeled_foreground_share"]) == pytest.approx(expected, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- the guard


def run_guard(foreground: bool, steps: int = 9, recover_at: int = -1, total: int = 100) -> EntropyMinimization:
    method = trainer(toy_job(total_steps=total))
    for index in range(steps):
        present = foreground or index == recover_at
        step(set_outputs(method, (0.0, 9.0, 0.0) if present else (9.0, 0.0, 0.0)), at=Progress(index, total))
    return method


def test_vanishing_foreground_is_reported_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autossl.trainers.methods.entropy_min.COLLAPSE_STEPS", 5)
    with caplog.at_level(logging.WARNING):
        run_guard(foreground=True)
        run_guard(foreground=False, steps=4)
        run_guard(foreground=False, recover_at=4)
        run_guard(foreground=False, total=401, steps=8)
        assert not caplog.records, "2 % of the run and five steps in a row, not less"
        method = run_guard(foreground=False)
        assert len(caplog.records) == 1
        assert "step 4: foreground is 0 of the unlabeled voxels" in caplog.text
        run_guard(foreground=False, total=401)
    assert len(caplog.records) == 2
    assert method.parts.memory["collapsed"] == 9


def test_foreground_shares_are_measured() -> None:
    output = step(set_outputs(trainer(), (0.0, 9.0, 0.0)))
    assert float(output.measures["foreground_share"]) == 1
    batch = toy_batch(toy_job())
    expected = (batch.labeled.target > 0).float().mean().item()
    assert float(output.measures["labeled_foreground_share"]) == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- regions


@pytest.mark.parametrize("settings", [{}, {"class_balanced": True}, {"max_squares": True}, {"prior_weight": 1.0}])
def test_regions(settings: dict[str, Any]) -> None:
    job = toy_job(schema=toy_schema(regions=True))
    uniform = step(set_outputs(trainer(job, **settings), (0.0, 0.0)))
    assert float(uniform.measures["entropy"]) == pytest.approx(1.0)
    output = step(set_outputs(trainer(job, **settings), (0.0, 90.0)))
    assert float(output.measures["entropy"]) == pytest.approx(0.5, abs=1e-6)
    assert float(output.measures["foreground_share"]) == pytest.approx(0.5), "the mean over regions"
    target = toy_batch(job).labeled.target
    assert float(output.measures["labeled_foreground_share"]) == pytest.approx(target.mean().item(), rel=1e-5)
