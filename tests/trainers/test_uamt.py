"""The checks of uamt's specification, through `losses()` where they are about the method."""

from __future__ import annotations

import logging
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from autossl.trainers.base import Batch, MethodSettings, Progress, StepOutput
from autossl.trainers.components.losses import entropy
from autossl.trainers.methods import uamt
from autossl.trainers.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from autossl.trainers.methods.supervised import Supervised
from autossl.trainers.methods.uamt import (
    UncertaintyAwareMeanTeacher,
    UncertaintyAwareMeanTeacherSettings,
    threshold_share,
)
from toys import toy_batch, toy_job, toy_schema


def trainer(
    n_unlabeled: int = 4, n_classes: int = 2, regions: bool = False, **settings: Any
) -> UncertaintyAwareMeanTeacher:
    job = toy_job(n_unlabeled=n_unlabeled, schema=toy_schema(n_classes, regions))
    return UncertaintyAwareMeanTeacher(job, UncertaintyAwareMeanTeacherSettings(**settings))


def set_outputs(network: torch.nn.Module, logits: tuple[float, ...]) -> None:
    """Makes a network answer the same logits everywhere."""
    for layer in network.decoder.seg_layers:  # type: ignore[union-attr]
        torch.nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor(logits)


def batch_of(method: UncertaintyAwareMeanTeacher, **options: Any) -> Batch:
    batch = toy_batch(method.job, **options)
    if not method.job.schema.has_regions:
        batch.labeled.targets = (batch.labeled.target.clamp(max=method.job.schema.n_outputs - 1),)
    return batch


def step(method: UncertaintyAwareMeanTeacher, fraction: float = 1.0, batch: Batch | None = None) -> StepOutput:
    return method.losses(batch or batch_of(method), Progress(step=int(100 * fraction), total=100))


def shares(method: UncertaintyAwareMeanTeacher) -> list[float]:
    """Share of certain voxels at the start, in the middle and at the end."""
    return [float(step(method, r).measures["certain_share"]) for r in (0, 0.5, 1)]


# ------------------------------------------------------------------------------------------------------- the threshold


def test_uniform_predictions_are_certain_only_at_the_very_end() -> None:
    method = trainer(n_classes=1)
    set_outputs(method.parts.followers["teacher"], (0.0, 0.0))
    output = step(method, 0)
    assert float(output.measures["uncertainty"]) == pytest.approx(0.6931, abs=1e-4)
    assert float(output.measures["threshold"]) == pytest.approx(0.5210, abs=1e-4)
    assert output.losses["consistency"].item() == 0
    assert shares(method) == [0, 0, 1]  # the 1e-6 in the logarithm keeps the entropy below ln 2


def test_one_hot_predictions_are_certain_throughout() -> None:
    assert abs(float(entropy(torch.tensor([[1.0, 0.0]])))) < 1e-5
    method = trainer()
    set_outputs(method.parts.followers["teacher"], (90.0, -90.0, -90.0))
    assert shares(method) == [1, 1, 1]


def test_the_threshold_rises_to_the_largest_entropy() -> None:
    values = [threshold_share(r / 20) for r in range(21)]
    assert values[0] == pytest.approx(0.75168, abs=1e-5)
    assert values[-1] == 1
    assert values == sorted(values)
    assert float(step(trainer(n_classes=2)).measures["threshold"]) == pytest.approx(math.log(3))


def test_regions_take_the_mean_binary_entropy_and_ln_2() -> None:
    method = trainer(regions=True)
    set_outputs(method.parts.followers["teacher"], (0.0, 90.0))
    output = step(method)
    assert float(output.measures["uncertainty"]) == pytest.approx(math.log(2) / 2, abs=1e-4)
    assert float(output.measures["threshold"]) == pytest.approx(math.log(2))


def test_the_quantile_follows_the_uncertainty_and_is_kept_with_the_step() -> None:
    method = trainer(umax="quantile", noise=0.0, dropout=0.0)
    entropies = []
    for index, logit in ((0, 3.0), (9, 1.0)):
        before = float(method.parts.memory["u_max"])
        set_outputs(method.parts.followers["teacher"], (logit, 0.0, 0.0))
        at = Progress(index, 100)
        output = method.losses(batch_of(method), at)
        entropies.append(float(output.measures["uncertainty"]))
        running = entropies[0] if index == 0 else 0.9 * entropies[0] + 0.1 * entropies[1]
        assert float(output.measures["threshold"]) == pytest.approx(threshold_share(at.fraction) * running, rel=1e-4)
        assert float(method.parts.memory["u_max"]) == before  # no step was taken yet
        method.after_step(at)
        assert float(method.parts.memory["u_max"]) == pytest.approx(running, rel=1e-4)
    assert entropies[0] < 0.7 * entropies[1]


def test_the_quantile_leaves_out_what_is_outside_the_image() -> None:
    method = trainer(umax="quantile")
    batch = batch_of(method)
    assert batch.unlabeled is not None
    uncertainty = torch.arange(512.0).view(2, 1, 16, 16)
    method.uncertainty = lambda x, at: uncertainty  # type: ignore[method-assign]
    batch.unlabeled.valids = (uncertainty < 100,)
    assert float(method.losses(batch, Progress(0, 100)).measures["threshold"]) == pytest.approx(
        98 * threshold_share(0), rel=1e-5
    )


# -------------------------------------------------------------------------------------------------------- the term


def test_where_all_is_certain_the_term_is_mean_teachers() -> None:
    method = trainer()
    method.uncertainty = lambda x, at: torch.zeros_like(x[:, :1])  # type: ignore[method-assign]
    plain = MeanTeacher(toy_job(), MeanTeacherSettings())
    for part in (method, plain):
        set_outputs(part.parts.followers["teacher"], (1.0, 0.5, 0.0))
    batch, at = batch_of(method), Progress(40, 100)
    mine, theirs = method.losses(batch, at), plain.losses(batch, at)
    assert torch.equal(mine.losses["consistency"], theirs.losses["consistency"])
    assert torch.equal(mine.losses["supervised"], theirs.losses["supervised"])


def test_consistency_closed_form() -> None:
    method = trainer(n_classes=1)
    set_outputs(method.parts.trained["network"], (0.0, 0.0))
    set_outputs(method.parts.followers["teacher"], (60.0, -60.0))
    assert float(step(method).measures["consistency"]) == pytest.approx(0.25)
    assert step(method).losses["consistency"].item() == pytest.approx(0.25)
    weights = [float(step(method, r).measures["consistency_weight"]) for r in (0, 0.5, 1)]
    assert weights == pytest.approx([0.0067379, 0.2865, 1.0], rel=1e-3)


def test_uncertain_and_invalid_voxels_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    method = trainer()
    batch = batch_of(method)
    assert batch.unlabeled is not None
    uncertainty = torch.zeros(2, 1, 16, 16)
    uncertainty[:, :, :8] = 9
    method.uncertainty = lambda x, at: uncertainty  # type: ignore[method-assign]
    valid = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    valid[:, :, :, :4] = False
    batch.unlabeled.valids = (valid,)
    q = torch.randn(2, 3, 16, 16)
    monkeypatch.setattr(method.teacher, "logits", lambda x: q)
    first = step(method, batch=batch)
    assert float(first.measures["certain_share"]) == 0.5
    q[:, :, :8] = 5
    q[:, :, :, :4] = 5
    assert torch.equal(step(method, batch=batch).losses["consistency"], first.losses["consistency"])
    q[:, 0, 8:, 4:] += 1
    assert not torch.equal(step(method, batch=batch).losses["consistency"], first.losses["consistency"])


def test_gradients_reach_the_student_and_never_the_teacher() -> None:
    method = trainer()
    step(method).losses["consistency"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parts.trained["network"].parameters())
    assert all(p.grad is None for p in method.parts.followers["teacher"].parameters())


# -------------------------------------------------------------------------------------------------------- the passes


def test_passes_differ_and_follow_the_step_alone() -> None:
    method, at = trainer(passes=1), Progress(5, 100)
    x = batch_of(method).labeled.image
    noise, dropout = at.generator("a"), at.generator("b")
    passes = [method._entropy_of_mean(x, noise, dropout) for _ in range(2)]
    assert not torch.allclose(passes[0], passes[1])
    quiet = trainer(passes=1, noise=0.0)
    passes = [quiet._entropy_of_mean(x, noise, dropout) for _ in range(2)]
    assert not torch.allclose(passes[0], passes[1])  # dropout alone makes them differ
    assert torch.equal(method.uncertainty(x, at), method.uncertainty(x, at))
    assert not torch.equal(method.uncertainty(x, at), method.uncertainty(x, Progress(6, 100)))


def test_the_target_pass_has_no_dropout_and_depends_on_the_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many, seen = trainer(passes=1), trainer(passes=4), []
    for method in (few, many):
        logits = method.teacher.logits
        monkeypatch.setattr(method.teacher, "logits", lambda x, logits=logits: seen.append(logits(x)) or seen[-1])
        step(method)
    assert torch.equal(seen[0], seen[1])
    quiet = trainer(noise=0.0)
    monkeypatch.setattr(quiet.teacher, "logits", lambda x: seen.append(quiet.teacher.network(x)) or seen[-1])
    batch = batch_of(quiet)
    step(quiet, batch=batch)
    assert torch.equal(seen[-1], quiet.parts.followers["teacher"](batch.unlabeled.image))  # type: ignore[union-attr]


def test_without_noise_and_dropout_the_uncertainty_is_that_of_one_plain_pass() -> None:
    method = trainer(noise=0.0, dropout=0.0, passes=3)
    x = batch_of(method).labeled.image
    expected = entropy(method.teacher.logits(x).softmax(1))
    torch.testing.assert_close(method.uncertainty(x, Progress(0, 100)), expected)


def test_probabilities_of_passes_are_averaged_before_the_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    method = trainer(n_classes=1, passes=2)
    answers = iter([torch.tensor([60.0, -60.0]), torch.tensor([-60.0, 60.0])])
    monkeypatch.setattr(
        uamt, "forward_features", lambda *_: ([next(answers).view(1, 2, 1, 1).expand(2, 2, 16, 16)], {})
    )
    uncertainty = method.uncertainty(batch_of(method).labeled.image, Progress(0, 100))
    assert float(uncertainty.mean()) == pytest.approx(math.log(2), abs=1e-4)  # each pass alone is certain


def test_no_more_maps_live_at_once_with_more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    most = {}
    for passes in (2, 8):
        method, alive = trainer(passes=passes), []
        maps: list[weakref.ref[Tensor]] = []
        forward = uamt.forward_features

        def counted(
            *arguments: Any, maps: Any = maps, alive: Any = alive, forward: Any = forward
        ) -> tuple[list[Tensor], dict[str, Tensor]]:
            z, taps = forward(*arguments)
            maps.append(weakref.ref(z[0]))
            alive.append(sum(entry() is not None for entry in maps))
            return z, taps

        monkeypatch.setattr(uamt, "forward_features", counted)
        method.uncertainty(batch_of(method).labeled.image, Progress(0, 100))
        monkeypatch.setattr(uamt, "forward_features", forward)
        assert len(alive) == passes
        most[passes] = max(alive)
    assert most[8] == most[2] <= 2


def test_large_batches_go_one_patch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    method = trainer(noise=0.0, dropout=0.0)
    x = batch_of(method).labeled.image
    whole = method.uncertainty(x, Progress(0, 100))
    sizes: list[int] = []
    forward = uamt.forward_features
    monkeypatch.setattr(uamt, "MAPS_LIMIT_BYTES", 4 * 4 * 2 * 256 - 1)
    monkeypatch.setattr(uamt, "forward_features", lambda *a: sizes.append(len(a[1])) or forward(*a))
    torch.testing.assert_close(method.uncertainty(x, Progress(0, 100)), whole)
    assert set(sizes) == {1}
    monkeypatch.setattr(uamt, "MAPS_LIMIT_BYTES", 4 * 4 * 2 * 256)
    sizes.clear()
    method.uncertainty(x, Progress(0, 100))
    assert set(sizes) == {2}


# --------------------------------------------------------------------------------------------------------- the method


def test_student_dropout_touches_unlabeled_patches_alone() -> None:
    plain, dropped = step(trainer()), step(trainer(student_dropout=0.5))
    torch.testing.assert_close(dropped.losses["supervised"], plain.losses["supervised"])
    assert not torch.allclose(dropped.losses["consistency"], plain.losses["consistency"])


def test_after_one_step_the_teacher_equals_the_student_and_then_averages() -> None:
    method = trainer()
    weight = next(method.parts.trained["network"].parameters())
    teacher_weight = next(method.parts.followers["teacher"].parameters())
    values = []
    for index, value in enumerate((1.0, 3.0)):
        torch.nn.init.constant_(weight, value)
        method.after_step(Progress(step=index, total=100))
        values.append(teacher_weight.flatten()[0].item())
    assert values == pytest.approx([1.0, 2.0])


def test_a_hundred_steps_without_a_certain_voxel_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    method = trainer(n_classes=1, passes=1)
    set_outputs(method.parts.followers["teacher"], (0.0, 0.0))
    batch = batch_of(method)
    step(method, 0, batch)
    with caplog.at_level(logging.WARNING):
        for index in range(150):
            method.after_step(Progress(index, 1000))
    assert [record.getMessage() for record in caplog.records] == [
        "uamt: the teacher was certain of no voxel in 100 steps in a row"
    ]
    set_outputs(method.parts.followers["teacher"], (90.0, -90.0))
    step(method, 0, batch)
    method.after_step(Progress(150, 1000))
    assert method.parts.memory["steps_without_a_certain_voxel"] == 0


def test_zero_weight_and_no_unlabeled_case_are_the_twin_bit_for_bit() -> None:
    for method in (trainer(lambda_max=0.0), trainer(n_unlabeled=0)):
        twin = Supervised(toy_job(), MethodSettings())
        batch = batch_of(method, n_unlabeled=2 if method.job.has_unlabeled else 0)
        mine, theirs = step(method, batch=batch), twin.losses(batch, Progress(100, 100))
        assert list(mine.losses) == ["supervised"]
        assert torch.equal(mine.losses["supervised"], theirs.losses["supervised"])
        method.after_step(Progress(100, 100))
    method = trainer(n_unlabeled=0, labeled_only=True)
    assert step(method, batch=batch_of(method, n_unlabeled=0)).losses["consistency"].item() > 0


def test_student_or_teacher_predicts() -> None:
    assert trainer().prediction().members[0].name == "network"
    assert trainer(infer="teacher").prediction().members[0].name == "teacher"
    assert list(trainer().alternative_predictions()) == ["teacher"]
    assert list(trainer(infer="teacher").alternative_predictions()) == ["student"]
