"""The checks of fixmatch's specification that are its own; see test_weak_to_strong for what it shares with unimatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autossl.trainers.base import Batch, MethodSettings, Progress, StepOutput
from autossl.trainers.components import weak_to_strong
from autossl.trainers.components.masks import cutmix_box
from autossl.trainers.methods.fixmatch import FixMatch, FixMatchSettings
from autossl.trainers.methods.supervised import Supervised
from toys import toy_batch, toy_configuration, toy_job


def trainer(n_unlabeled: int = 4, dims: int = 2, **settings: Any) -> FixMatch:
    return FixMatch(toy_job(dims, n_unlabeled=n_unlabeled), FixMatchSettings(**settings))


def set_outputs(network: torch.nn.Module, logits: tuple[float, ...]) -> None:
    """Makes a network answer the same logits everywhere."""
    for layer in network.decoder.seg_layers:  # type: ignore[union-attr]
        torch.nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor(logits)


def step(method: FixMatch, fraction: float = 1.0, batch: Batch | None = None) -> StepOutput:
    return method.losses(batch or toy_batch(method.job), Progress(step=int(100 * fraction), total=100))


def test_the_term_is_weighted() -> None:
    output = step(trainer(lambda_max=0.25, threshold=0.1))
    assert output.losses["strong"].item() == pytest.approx(0.25 * float(output.measures["strong"]))
    assert float(output.measures["strong"]) > 0.1
    assert output.measures["unlabeled_weight"] == 0.25


@pytest.mark.parametrize("dims", [2, 3])
def test_the_term_reaches_encoder_and_decoder(dims: int) -> None:
    method = trainer(dims=dims, threshold=0.1)
    network = method.parts.trained["network"]
    step(method).losses["strong"].backward()
    for part in (network.encoder, network.decoder.seg_layers[-1]):  # type: ignore[union-attr]
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("fraction, settings", [(1.0, {"lambda_max": 0.0}), (0.01, {}), (0.01, {"teacher": "ema"})])
def test_zero_weight_is_the_twin_bit_for_bit(fraction: float, settings: dict[str, Any]) -> None:
    method, twin = trainer(**settings), Supervised(toy_job(), MethodSettings())
    batch = toy_batch(method.job)
    mine, theirs = step(method, fraction, batch), twin.losses(batch, Progress(50, 100))
    assert list(mine.losses) == ["supervised"]
    assert torch.equal(mine.losses["supervised"], theirs.losses["supervised"])


def test_the_supervised_term_is_the_twins_beside_unlabeled_patches() -> None:
    batch = toy_batch(toy_job())
    theirs = Supervised(toy_job(), MethodSettings()).losses(batch, Progress(50, 100)).losses["supervised"].item()
    for teacher in ("none", "ema"):
        assert step(trainer(teacher=teacher), batch=batch).losses["supervised"].item() == pytest.approx(
            theirs, rel=1e-5
        )


def test_no_unlabeled_case_is_the_twin() -> None:
    method = trainer(n_unlabeled=0)
    assert method.request(Progress(0, 1)).unlabeled.count == 0
    assert list(step(method, batch=toy_batch(method.job, n_unlabeled=0)).losses) == ["supervised"]


def test_voxels_outside_the_image_do_not_count() -> None:
    method = trainer(threshold=0.1)
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    batch.unlabeled.valids = (torch.zeros_like(batch.unlabeled.valid),)
    assert step(method, batch=batch).losses["strong"].item() == 0


@pytest.mark.parametrize("spacing, free", [((8.0, 1.0, 1.0), True), ((2.0, 1.0, 1.0), False)])
def test_boxes_of_anisotropic_patches_may_span_all_slices(
    spacing: tuple[float, ...], free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def keep(*arguments: Any, through_plane_free: bool, **named: Any) -> torch.Tensor:
        asked.append(through_plane_free)
        return cutmix_box(*arguments, through_plane_free=through_plane_free, **named)

    monkeypatch.setattr(weak_to_strong, "cutmix_box", keep)
    step(FixMatch(toy_job(3, configuration=toy_configuration(3, spacing=spacing)), FixMatchSettings()))
    assert asked == [free]


def test_the_teacher_labels_where_there_is_one() -> None:
    method = trainer(teacher="ema")
    network, teacher = method.parts.trained["network"], method.parts.followers["teacher"]
    set_outputs(network, (60.0, 0.0, 0.0))
    set_outputs(teacher, (60.0, 0.0, 0.0))
    assert step(method).losses["strong"].item() < 1e-3
    set_outputs(teacher, (0.0, 60.0, 0.0))
    output = step(method)
    assert output.losses["strong"].item() > 10
    output.losses["strong"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in network.parameters())
    plain = trainer()
    assert plain.parts.followers == {}
    plain.after_step(Progress(0, 100))


def test_the_teacher_follows_with_the_plans_decay_or_the_given_one() -> None:
    method = trainer(teacher="ema", ema_decay_max=0.25)
    weight = next(method.parts.trained["network"].parameters())
    followed = next(method.parts.followers["teacher"].parameters())
    values = []
    for index, value in enumerate((1.0, 3.0)):
        torch.nn.init.constant_(weight, value)
        method.after_step(Progress(step=index, total=100))
        values.append(followed.flatten()[0].item())
    assert values == pytest.approx([1.0, 0.25 * 1 + 0.75 * 3])
    default = trainer(teacher="ema").teacher
    assert default is not None
    assert default.decay_max == 0.99


def test_who_predicts() -> None:
    assert trainer().prediction().members[0].name == "network"
    assert trainer().alternative_predictions() == {}
    averaged = trainer(teacher="ema")
    assert averaged.prediction().members[0].name == "teacher"
    assert averaged.alternative_predictions()["student"].members[0].name == "network"
