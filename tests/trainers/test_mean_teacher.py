"""The checks of mean_teacher's specification, through `losses()`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autossl.trainers.base import Batch, MethodSettings, Progress, StepOutput
from autossl.trainers.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from autossl.trainers.methods.supervised import Supervised
from toys import toy_batch, toy_job


def trainer(n_unlabeled: int = 4, **settings: Any) -> MeanTeacher:
    return MeanTeacher(toy_job(n_unlabeled=n_unlabeled), MeanTeacherSettings(**settings))


def set_outputs(network: torch.nn.Module, logits: tuple[float, ...]) -> None:
    """Makes a network answer the same logits everywhere."""
    for layer in network.decoder.seg_layers:  # type: ignore[union-attr]
        torch.nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor(logits)


def step(method: MeanTeacher, fraction: float = 1.0, batch: Batch | None = None) -> StepOutput:
    return method.losses(batch or toy_batch(method.job), Progress(step=int(100 * fraction), total=100))


def test_consistency_closed_form() -> None:
    method = trainer()
    big = 60.0
    set_outputs(method.parts.trained["network"], (0.0, 0.0, -big))  # p = (0.5, 0.5, 0)
    set_outputs(method.parts.followers["teacher"], (big, 0.0, -big))  # q = (1, 0, 0)
    output = step(method)
    assert float(output.measures["consistency"]) == pytest.approx((0.25 + 0.25) / 3)
    assert output.losses["consistency"].item() == pytest.approx(0.5 / 3)
    set_outputs(method.parts.followers["teacher"], (0.0, 0.0, -big))
    assert step(method).losses["consistency"].item() == 0


def test_weight_follows_the_ramp() -> None:
    method = trainer()
    weights = [float(step(method, r).measures["consistency_weight"]) for r in (0, 0.5, 1)]
    assert weights == pytest.approx([0.0067379, 0.2865, 1.0], rel=1e-3)


def test_gradients_reach_the_student_from_both_streams_and_never_the_teacher() -> None:
    method = trainer()
    network = method.parts.trained["network"]
    for name in ("supervised", "consistency"):
        network.zero_grad()
        step(method).losses[name].backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters()), name
    assert all(p.grad is None for p in method.parts.followers["teacher"].parameters())


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


def test_zero_weight_is_the_twin_bit_for_bit() -> None:
    method = trainer(lambda_max=0.0)
    twin = Supervised(toy_job(), MethodSettings())
    batch = toy_batch(method.job)
    mine, theirs = step(method, batch=batch), twin.losses(batch, Progress(50, 100))
    assert list(mine.losses) == ["supervised"]
    assert torch.equal(mine.losses["supervised"], theirs.losses["supervised"])


def test_no_unlabeled_case_is_the_twin_unless_asked_otherwise() -> None:
    batch = toy_batch(toy_job(), n_unlabeled=0)
    assert list(step(trainer(n_unlabeled=0), batch=batch).losses) == ["supervised"]
    assert trainer(n_unlabeled=0).request(Progress(0, 1)).unlabeled.count == 0
    labeled_only = step(trainer(n_unlabeled=0, labeled_only=True), batch=batch)
    assert labeled_only.losses["consistency"].item() > 0


def test_one_forward_over_both_streams_equals_two() -> None:
    network = trainer().parts.trained["network"]
    batch = toy_batch(toy_job())
    assert batch.unlabeled is not None
    together = network(torch.cat([batch.labeled.image, batch.unlabeled.image]))[0]
    apart = torch.cat([network(batch.labeled.image)[0], network(batch.unlabeled.image)[0]])
    assert (together - apart).abs().max() < 1e-5


def test_voxels_outside_the_image_do_not_count() -> None:
    method = trainer()
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    valid = torch.zeros_like(batch.unlabeled.valid)
    batch.unlabeled.valids = (valid,)
    assert step(method, batch=batch).losses["consistency"].item() == 0


def test_options_do_what_they_say() -> None:
    plain = step(trainer())
    assert float(step(trainer(class_scale=True)).measures["consistency"]) == pytest.approx(
        1.5 * float(plain.measures["consistency"]), rel=1e-5
    )
    both = step(trainer(consist_labeled=True))
    assert float(both.measures["consistency"]) != pytest.approx(float(plain.measures["consistency"]), rel=1e-6)
    noisy = step(trainer(student_noise=True))
    assert noisy.losses["supervised"].item() != plain.losses["supervised"].item()
    assert trainer(infer="teacher").prediction().members[0].name == "teacher"
    assert list(trainer(infer="teacher").alternative_predictions()) == ["student"]
    assert trainer().prediction().members[0].name == "network"
