"""The checks of mutual mask mix with high- and low-level consistency, through `losses()` and the loop."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from autossl.networks import features
from autossl.trainers.base import Batch, Job, MethodSettings, Progress, StepOutput
from autossl.trainers.components.feature_agreement import high_distance, low_distance
from autossl.trainers.components.losses import hard_label_dice, hard_label_loss, one_hot
from autossl.trainers.methods import m3hl
from autossl.trainers.methods.m3hl import MutualMaskMix, MutualMaskMixSettings
from autossl.trainers.methods.supervised import Supervised
from autossl.trainers.registry import make_settings
from toys import toy_architecture, toy_batch, toy_configuration, toy_job, toy_schema

WARM = Progress(step=1, total=100)
AT = Progress(step=50, total=100)


def trainer(job: Job | None = None, **settings: Any) -> MutualMaskMix:
    return MutualMaskMix(job or toy_job(), MutualMaskMixSettings(**settings))


class Seen:
    """What the student saw and answered, and the feature maps of both networks."""

    def __init__(self, method: MutualMaskMix, monkeypatch: pytest.MonkeyPatch) -> None:
        def spy(network: nn.Module, image: Tensor, taps: list[str]) -> Any:
            z, maps = features.forward_features(network, image, taps)
            side = "teacher" if network is method.teacher.network else "student"
            self.__dict__ |= {f"{side}_image": image, f"{side}_z": z, f"{side}_maps": maps}
            return z, maps

        self.student_image: Tensor
        self.student_z: list[Tensor]
        self.student_maps: dict[str, Tensor]
        self.teacher_maps: dict[str, Tensor]
        monkeypatch.setattr(m3hl, "forward_features", spy)


def stepped(
    method: MutualMaskMix, batch: Batch, monkeypatch: pytest.MonkeyPatch, at: Progress = AT
) -> tuple[StepOutput, Seen]:
    seen = Seen(method, monkeypatch)
    return method.losses(batch, at), seen


def unlabeled_image(batch: Batch) -> Tensor:
    assert batch.unlabeled is not None
    return batch.unlabeled.image


def differing(method: MutualMaskMix) -> MutualMaskMix:
    """With a teacher that is not the student."""
    other = method.job.build_network("another")
    method.teacher.network.load_state_dict(other.state_dict())
    return method


# ---------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    ("patch", "spacing", "wanted", "cells"),
    [
        ((16, 16), (1.0, 1.0), 4, (4, 4)),
        ((16, 20), (1.0, 1.0), 3, (3, 3)),
        ((16, 16, 16), (1.0, 1.0, 1.0), 4, (4, 4, 4)),
        ((8, 48, 40), (4.0, 1.0, 1.0), 4, (3, 4, 4)),
        ((4, 16, 16), (1.0, 1.0, 1.0), 5, (4, 5, 5)),
    ],
)
def test_grid_of_each_pair(
    patch: tuple[int, ...], spacing: tuple[float, ...], wanted: int, cells: tuple[int, ...]
) -> None:
    """Half of the cells come from the second image, cells tile the patch, and the pairs differ."""
    configuration = toy_configuration(len(patch), patch_size=patch, spacing=spacing)
    method = trainer(toy_job(configuration=configuration), cells=wanted)
    mask = method._mask(3, torch.zeros(1, 1, *patch), AT)
    assert mask.shape == (3, 1, *patch)
    corners = [[size * index // count for index in range(count)] for size, count in zip(patch, cells, strict=True)]
    by_cell = mask[(slice(None), 0, *torch.meshgrid(*map(torch.tensor, corners), indexing="ij"))]
    assert by_cell.shape[1:] == cells
    assert (~by_cell).flatten(1).sum(1).tolist() == [math.prod(cells) // 2] * 3
    whole = by_cell.unsqueeze(1)
    for axis, (size, starts) in enumerate(zip(patch, corners, strict=True), 2):
        whole = whole.repeat_interleave(torch.tensor([*starts[1:], size]) - torch.tensor(starts), axis)
    assert torch.equal(whole, mask)
    assert not torch.equal(by_cell[0], by_cell[1])


def test_cells_and_ratio_are_adjustable(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = toy_batch(toy_job())
    shares = {
        (ratio, cells): float(trainer(ratio=ratio, cells=cells).losses(batch, AT).measures["mixed_share"])
        for ratio, cells in (("0.5", 4), ("0.25", 4), ("0.5", 2), ("0.3", 2), ("1", 4))
    }
    assert shares == {("0.5", 4): 0.5, ("0.25", 4): 0.25, ("0.5", 2): 0.5, ("0.3", 2): 0.25, ("1", 4): 1.0}
    method, image = trainer(ratio="0.25:0.75", cells=8), torch.zeros(1, 1, 16, 16)
    drawn = (~method._mask(50, image, AT)).float().mean((1, 2, 3))
    assert 0.25 - 1 / 64 <= float(drawn.min()) < 0.35
    assert 0.65 < float(drawn.max()) <= 0.75
    assert not torch.equal(method._mask(1, image, AT), method._mask(1, image, replace(AT, step=51)))
    assert torch.equal(method._mask(1, image, AT), trainer(ratio="0.25:0.75", cells=8)._mask(1, image, AT))


@pytest.mark.parametrize("ratio", ["1.5", "-0.1", "0.6:0.4", "0.1:0.2:0.3", "half"])
def test_a_ratio_that_is_none_is_refused(ratio: str) -> None:
    with pytest.raises(ValidationError, match="ratio"):
        MutualMaskMixSettings(ratio=ratio)
    settings = make_settings(MutualMaskMix, {"ratio": "0.2:0.4"})
    assert isinstance(settings, MutualMaskMixSettings)
    assert settings.ratio_range == (0.2, 0.4)


# --------------------------------------------------------------------------------------------------------- the mixtures


def test_mixtures_are_complementary(monkeypatch: pytest.MonkeyPatch) -> None:
    method = trainer()
    batch = toy_batch(method.job)
    _, seen = stepped(method, batch, monkeypatch)
    mask, x = method._mask(1, seen.student_image, AT), seen.student_image
    labeled, unlabeled = batch.labeled.image, unlabeled_image(batch)
    assert torch.equal(x, torch.cat([torch.where(mask, unlabeled[:1], labeled[:1]), mixed_2 := x[1:]]))
    assert torch.equal(mixed_2, torch.where(mask, labeled[1:], unlabeled[1:]))
    labeled_places = torch.cat([x[:1] == labeled[:1], x[1:] == labeled[1:]])
    assert labeled_places.sum(0).eq(1).all(), "labeled cells of both mixtures cover the patch once"
    unlabeled_places = torch.cat([x[:1] == unlabeled[:1], x[1:] == unlabeled[1:]])
    assert unlabeled_places.sum(0).eq(1).all()


def test_with_ratio_zero_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    method = trainer(ratio="0")
    batch = toy_batch(method.job)
    output, seen = stepped(method, batch, monkeypatch)
    assert torch.equal(seen.student_image, torch.cat([unlabeled_image(batch)[:1], batch.labeled.image[1:]]))
    assert float(output.measures["mixed_share"]) == 0


def test_every_voxel_is_judged_by_the_image_that_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    method = differing(trainer(alpha=0.3))
    batch = toy_batch(method.job)
    output, seen = stepped(method, batch, monkeypatch)
    mask, z, y = method._mask(1, seen.student_image, AT), seen.student_z, batch.labeled.target
    pseudo = method.teacher.logits(unlabeled_image(batch)).argmax(1, keepdim=True)
    z_1, z_2 = [level[:1] for level in z], [level[1:] for level in z]
    true = 0.5 * (hard_label_loss(z_1, y[:1], ~mask) + hard_label_loss(z_2, y[1:], mask))
    guessed = 0.5 * (hard_label_loss(z_1, pseudo[:1], mask) + hard_label_loss(z_2, pseudo[1:], ~mask))
    assert output.losses["supervised"].item() == pytest.approx(true.item(), rel=1e-6)
    assert float(output.measures["pseudo"]) == pytest.approx(guessed.item(), rel=1e-6)
    assert output.losses["pseudo"].item() == pytest.approx(0.3 * guessed.item(), rel=1e-6)
    assert float(output.measures["pseudo_share"]) == 0.5


def test_uniform_logits_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    job = toy_job(schema=toy_schema(3))
    method = trainer(job)
    for layer in method.parts.trained["network"].decoder.seg_layers:  # type: ignore[union-attr]
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    batch = toy_batch(job)
    output, seen = stepped(method, batch, monkeypatch)
    mask, y = method._mask(1, seen.student_image, AT), batch.labeled.target
    pseudo = method.teacher.logits(unlabeled_image(batch)).argmax(1, keepdim=True)
    z = [level[:1] for level in seen.student_z]
    true = hard_label_dice(z, y[:1], ~mask) + hard_label_dice(z, y[1:], mask)
    guessed = hard_label_dice(z, pseudo[:1], mask) + hard_label_dice(z, pseudo[1:], ~mask)
    entropies = output.losses["supervised"] + output.losses["pseudo"] - 0.5 * true - 0.25 * guessed
    assert entropies.item() == pytest.approx(2.0794, abs=1e-4), "1.0397 = ½ · (1 + 0.5) · ln 4 of each mixture"


@pytest.mark.parametrize("regions", [False, True])
def test_only_single_component_classes_lose_their_islands(regions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def oracle(network: nn.Module, image: Tensor, taps: list[str]) -> Any:
        """Reads the class off the image's rounded value and is sure of it."""
        label = image[:, :1].round().clamp(0, 2).long()
        if regions:
            return [torch.cat([80.0 * (label >= index) - 40 for index in (1, 2)], 1)], {}
        return [40 * one_hot(label, 3)], {}

    monkeypatch.setattr(m3hl, "forward_features", oracle)
    job = toy_job(schema=toy_schema(regions=regions))
    batch = toy_batch(job)
    assert batch.unlabeled is not None
    image = torch.zeros_like(batch.unlabeled.image)
    image[0, 0, 2:5, 2:5] = 1
    image[0, 0, 8, 4] = 1
    batch.unlabeled.views = (image,)
    off = {"lambda_low": 0, "lambda_high": 0}
    gated = replace(job, single_component_classes=(1,))
    removed = [
        float(method.losses(batch, AT).measures["removed_share"])
        for method in (trainer(job, **off), trainer(gated, largest_component=False, **off), trainer(gated, **off))
    ]
    assert removed == pytest.approx([0, 0, 1 / (512 * (2 if regions else 1))])


# -------------------------------------------------------------------------------------------------- feature consistency


def test_distances_closed_forms() -> None:
    w = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    f = torch.randn(2, 3, 4, 4)
    assert high_distance(f, 5 * f, w).item() == pytest.approx(0, abs=1e-6)
    assert high_distance(f, -f, w).item() == pytest.approx(2, abs=1e-6)
    one, other = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    one[:, 0], other[:, 1] = 1, 1
    assert high_distance(one, other, w).item() == pytest.approx(1, abs=1e-6)
    assert high_distance(torch.cat([f[:1], one[1:]]), torch.cat([f[:1], other[1:]]), w).item() == pytest.approx(0.5)
    assert low_distance(torch.full_like(f, 3), torch.full_like(f, 1), w).item() == 2
    assert low_distance(torch.full_like(f, 1), torch.full_like(f, 3), w).item() == 2


def test_features_of_zeros_cost_one_without_nan() -> None:
    w = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    f = torch.zeros(1, 3, 4, 4, requires_grad=True)
    loss = high_distance(f, torch.ones(1, 3, 4, 4), w)
    loss.backward()
    assert loss.item() == 1
    assert f.grad is not None
    assert torch.isfinite(f.grad).all()


@pytest.mark.parametrize("distance", [low_distance, high_distance])
def test_distances_see_counting_voxels_alone(distance: Any) -> None:
    f, wanted = torch.randn(2, 2, 3, 4, 4)
    w = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    w[..., 2:] = False
    spoiled = torch.where(w, f, 100.0)
    cut = distance(f[..., :2], wanted[..., :2], w[..., :2])
    assert distance(spoiled, wanted, w).item() == pytest.approx(cut.item(), rel=1e-6)
    first = w & torch.tensor([True, False]).view(2, 1, 1, 1)
    assert distance(f, wanted, first).item() == pytest.approx(distance(f[:1], wanted[:1], w[:1]).item(), rel=1e-6)
    nothing = distance(f.requires_grad_(), wanted, torch.zeros_like(w))
    assert nothing.item() == 0
    assert nothing.requires_grad


@pytest.mark.parametrize("pairs", ["all", "matched"])
@pytest.mark.parametrize("n_unlabeled", [2, 1])
def test_both_terms_are_means_over_the_pairs(pairs: Any, n_unlabeled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    method = differing(trainer(pairs=pairs, lambda_low=0.2, lambda_high=0.7))
    output, seen = stepped(method, toy_batch(method.job, 0, 2, n_unlabeled), monkeypatch)
    mine, wanted = seen.student_maps, seen.teacher_maps
    couples = [(0, 0), (0, 1), (1, 0), (1, 1)] if pairs == "all" else [(0, 0), (1, 1)]
    low, high = [], []
    for i, j in couples:
        low.append((mine["dec:last"][i] - wanted["dec:last"][j % n_unlabeled]).abs().mean())
        a, b = mine["bottleneck"][i].flatten(), wanted["bottleneck"][j % n_unlabeled].flatten()
        high.append(1 - a @ b / (a.norm() * b.norm()))
    expected = {"low": torch.stack(low).mean(), "high": torch.stack(high).mean()}
    for name, weight in (("low", 0.2), ("high", 0.7)):
        assert float(output.measures[name]) == pytest.approx(expected[name].item(), rel=1e-5)
        assert output.losses[name].item() == pytest.approx(weight * expected[name].item(), rel=1e-5)
        assert float(output.measures[f"{name}_weight"]) == weight


@pytest.mark.parametrize(
    "configuration",
    [
        toy_configuration(2),
        toy_configuration(3, patch_size=(8, 8, 8)),
        toy_configuration(
            3,
            patch_size=(4, 16, 16),
            spacing=(5.0, 1.0, 1.0),
            architecture=toy_architecture(3, (4, 8, 8), True, ((1, 2, 2), (2, 2, 2))),
        ),
    ],
    ids=["2d", "isotropic", "anisotropic"],
)
def test_taps_have_the_shapes_of_the_plan(configuration: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = toy_job(configuration=configuration)
    method, patch = trainer(job), configuration.patch_size
    _, seen = stepped(method, toy_batch(job), monkeypatch)
    kwargs = configuration.architecture.arch_kwargs
    strides = [math.prod(stage[axis] for stage in kwargs["strides"]) for axis in range(len(patch))]
    deep = tuple(size // stride for size, stride in zip(patch, strides, strict=True))
    for maps in (seen.student_maps, seen.teacher_maps):
        assert maps["dec:last"].shape == (2, 4, *patch)
        assert maps["bottleneck"].shape == (2, 8, *deep)


def test_gradients_reach_the_student_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    method = differing(trainer())
    output, seen = stepped(method, toy_batch(method.job), monkeypatch)
    assert not any(values.requires_grad for values in seen.teacher_maps.values())
    student = method.parts.trained["network"]
    encoder, decoder = list(student.encoder.parameters()), list(student.decoder.stages.parameters())  # type: ignore[union-attr]
    for name, reached in (("low", (True, True)), ("high", (True, False))):
        for parameters, expected in zip((encoder, decoder), reached, strict=True):
            found = torch.autograd.grad(output.losses[name], parameters, retain_graph=True, allow_unused=True)
            assert any(g is not None and bool((g != 0).any()) for g in found) == expected
    sum(output.losses.values()).backward()  # type: ignore[union-attr]
    assert all(weight.grad is None and not weight.requires_grad for weight in method.teacher.network.parameters())


def test_voxels_outside_the_images_have_no_part_in_the_agreement() -> None:
    method = differing(trainer())
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    valid = torch.ones_like(batch.unlabeled.valid)
    valid[..., 8:] = False
    whole = method.losses(batch, AT)
    batch.unlabeled.valids = (valid,)
    half = method.losses(batch, AT)
    assert float(half.measures["feature_share"]) == 0.5
    assert half.losses["low"].item() != whole.losses["low"].item()
    batch.unlabeled.valids = (torch.zeros_like(valid),)
    none = method.losses(batch, AT)
    assert all(none.losses[name].item() == 0 and none.losses[name].requires_grad for name in ("pseudo", "low", "high"))


def test_the_ablation_leaves_mutual_mask_mix() -> None:
    batch = toy_batch(toy_job())
    full = trainer().losses(batch, AT)
    ablated = MutualMaskMix(toy_job(), make_settings(MutualMaskMix, dict(MutualMaskMix.ablation))).losses(batch, AT)
    assert list(ablated.losses) == ["supervised", "pseudo"]
    assert all(ablated.losses[name].item() == full.losses[name].item() for name in ablated.losses)
    assert list(trainer(lambda_low=0).losses(batch, AT).losses) == ["supervised", "pseudo", "high"]


def test_large_features_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    method = trainer()
    batch, at = toy_batch(method.job), replace(AT, step=100, total=200)
    with caplog.at_level(logging.WARNING):
        method.losses(batch, at)
        assert not caplog.records
        for norm in method.parts.trained["network"].decoder.modules():  # type: ignore[union-attr]
            if isinstance(norm, nn.InstanceNorm2d):
                nn.init.constant_(norm.bias, 50.0)
        method.losses(batch, at)
        method.losses(batch, at)
    assert len(caplog.records) == 1
    assert "lambda_low" in caplog.text


# ------------------------------------------------------------------------------------------------ warm-up and the rest


def test_until_the_warm_up_ends_the_step_is_the_twins() -> None:
    job = toy_job()
    batch, twin = toy_batch(job), Supervised(job, MethodSettings())
    expected = twin.losses(batch, WARM).losses["supervised"]
    method = trainer(job)
    assert method.request(WARM) == replace(twin.request(WARM), unlabeled=method.request(WARM).unlabeled)
    assert [method.request(at).unlabeled.count for at in (WARM, replace(WARM, step=2))] == [0, 2]
    output = method.losses(batch, WARM)
    assert list(output.losses) == ["supervised"]
    assert torch.equal(output.losses["supervised"], expected)
    assert "low" in trainer(job, r_warm=0).losses(batch, WARM).losses
    assert "low" not in trainer(job, r_warm=0.6).losses(batch, AT).losses


def test_the_teacher_follows_from_the_first_step() -> None:
    method = trainer(ema_decay_max=0.75)
    student, teacher = method.parts.trained["network"], method.parts.followers["teacher"]
    old = [weight.clone() for weight in teacher.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(old, student.parameters(), strict=True))
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(4.0)
    method.after_step(AT)
    for a, b in zip(old, teacher.parameters(), strict=True):
        assert torch.allclose(b, a + 0.25 * 4.0)
    method.after_step(replace(WARM, step=0))
    for a, b in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.allclose(a, b), "the first update takes all"


def test_a_teacher_that_is_not_finite_makes_its_terms_so() -> None:
    method = trainer()
    nn.init.constant_(method.teacher.network.encoder.stages[0][0].convs[0].norm.bias, float("nan"))  # type: ignore[union-attr,index]
    losses = method.losses(toy_batch(method.job), AT).losses
    assert {name for name, term in losses.items() if torch.isfinite(term)} == {"supervised"}


@pytest.mark.parametrize("counts", [(1, 1), (1, 2), (2, 1), (3, 2)])
def test_any_batch_size_is_legal(counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    method = trainer()
    batch = toy_batch(method.job, 0, *counts)
    output, seen = stepped(method, batch, monkeypatch)
    x = seen.student_image
    assert len(x) == 2 * math.ceil(max(counts) / 2)
    sum(output.losses.values()).backward()  # type: ignore[union-attr]
    if counts == (1, 1):
        mask = method._mask(1, x, AT)
        assert torch.equal(x[:1], torch.where(mask, unlabeled_image(batch), batch.labeled.image))
        assert torch.equal(x[1:], torch.where(mask, batch.labeled.image, unlabeled_image(batch)))


@pytest.mark.parametrize("n_labeled", [2, 1])
def test_labeled_only_exchanges_cells_of_labeled_patches(n_labeled: int) -> None:
    job = toy_job(n_unlabeled=0)
    batch = toy_batch(job, n_labeled=n_labeled, n_unlabeled=0)
    plain = trainer(job).losses(batch, AT)
    twin = Supervised(job, MethodSettings()).losses(batch, AT).losses["supervised"]
    assert torch.equal(plain.losses["supervised"], twin)
    method = trainer(job, labeled_only=True)
    seen: list[Any] = []
    method.parts.trained["network"].register_forward_hook(lambda _, x, z: seen.append((x[0], z)))
    output = method.losses(batch, AT)
    assert list(output.losses) == ["supervised"]
    x, z = seen[0]
    mask, image, y = method._mask(1, x, AT), batch.labeled.image, batch.labeled.target
    pairs = [(v[:1], v[1:] if n_labeled == 2 else v.flip(2, 3)) for v in (image, y)]
    assert torch.equal(x, torch.where(mask, *pairs[0]))
    target = torch.where(mask, *pairs[1])
    expected = 0.5 * (hard_label_loss(z, target, mask) + hard_label_loss(z, target, ~mask))
    assert output.losses["supervised"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_student_predicts_and_the_teacher_is_the_alternative() -> None:
    method = trainer()
    assert method.prediction() == method.job.single_network_prediction("network")
    assert method.alternative_predictions() == {"teacher": method.job.single_network_prediction("teacher")}
