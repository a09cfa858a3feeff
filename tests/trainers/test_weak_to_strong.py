"""What fixmatch and unimatch share, through the `losses()` of both: which labels teach the strong views, and how much.

A scripted network answers the first pass of a step (the weak view) with one function of the image and all later ones
(the disturbed views) with another. Images that are constant over a patch pass the strong augmentation unchanged, so
that a value tells which patch a voxel comes from.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autossl.trainers.base import Batch, Progress, SemiSupervisedTrainer, StepOutput, StreamBatch
from autossl.trainers.components import weak_to_strong
from autossl.trainers.methods import unimatch
from autossl.trainers.registry import METHODS
from toys import toy_batch, toy_configuration, toy_job, toy_schema

Answer = Callable[[Tensor], Tensor]
SIZE = (16, 16)
TERMS = {"fixmatch": ["strong"], "unimatch": ["strong_1", "strong_2", "features"]}

pytestmark = pytest.mark.parametrize("name", list(TERMS))


class Scripted(nn.Module):
    """A network that keeps what it sees."""

    def __init__(self, weak: Answer, later: Answer | None = None) -> None:
        super().__init__()
        self.answers = (weak, later or weak)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        self.seen.append(x)
        return [self.answers[min(len(self.seen) - 1, 1)](x)]


@pytest.fixture(autouse=True)
def _scripted_networks_have_no_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unimatch, "encode", lambda network, x: [x])
    monkeypatch.setattr(unimatch, "decode", lambda network, skips: (network(skips[0]), []))


def scripted(name: str, network: Scripted, schema: Any = None, n_channels: int = 1, **settings: Any) -> Any:
    """The method with the scripted network in place of its own, features left alone."""
    if name == "unimatch":
        settings = {"feature_dropout": 0, **settings}
    masked = settings.pop("use_mask_for_norm", (False,) * n_channels)
    configuration = toy_configuration(2, n_channels, use_mask_for_norm=masked)
    job = toy_job(schema=schema or toy_schema(), configuration=configuration)
    method = METHODS[name](job, METHODS[name].Settings(**settings))
    method.parts.trained["network"] = network
    return method


def constant_batch(method: SemiSupervisedTrainer, labeled: list[float], unlabeled: list[float]) -> Batch:
    """One value per patch."""
    batch = toy_batch(method.job, n_labeled=len(labeled), n_unlabeled=len(unlabeled))
    for stream, values in ((batch.labeled, labeled), (batch.unlabeled, unlabeled)):
        assert stream is not None
        stream.views = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, *SIZE).clone(),)
    return batch


def unlabeled_of(batch: Batch) -> StreamBatch:
    assert batch.unlabeled is not None
    return batch.unlabeled


def step(method: SemiSupervisedTrainer, batch: Batch | None = None, at: int = 100, seed: int = 0) -> StepOutput:
    network = method.parts.trained["network"]
    if isinstance(network, Scripted):
        network.seen.clear()
    return method.losses(batch or toy_batch(method.job), Progress(step=at, total=100, seed=seed))


def class_of_value(x: Tensor, n_classes: int = 3, sharpness: float = 60.0) -> Tensor:
    """Logits that are sure of class round(value)."""
    classes = torch.arange(n_classes).view(1, -1, 1, 1)
    return sharpness * (x[:, :1].round() == classes).float()


def strong_inputs(method: SemiSupervisedTrainer) -> Tensor:
    """What the network saw last: the strong views."""
    return method.parts.trained["network"].seen[-1]  # type: ignore[index,union-attr]


def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(target, weight, count) of each loss, in the order of the terms."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(z: list[Tensor], target: Tensor, w: Tensor, count: Tensor, regions: bool) -> Tensor:
        found.append((target, w, count))
        return z[0].sum() * 0

    monkeypatch.setattr(weak_to_strong, "hard_label_loss", keep)
    return found


# ----------------------------------------------------------------------------------------------------- the loss itself


def test_views_that_say_what_the_labels_say_cost_nothing(name: str) -> None:
    network = Scripted(class_of_value)
    method = scripted(name, network)
    batch = constant_batch(method, [0, 1], [0, 1, 2])
    output = step(method, batch)
    assert list(output.losses) == ["supervised", *TERMS[name]]
    for term in TERMS[name]:
        assert output.losses[term].item() < 1e-3
    assert output.measures["confident_share"] == 1


def test_no_voxel_confident_enough_is_zero_with_a_graph(name: str) -> None:
    bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
    network = Scripted(class_of_value, lambda x: x * 0 + bias)
    output = step(scripted(name, network, threshold=1.01))
    total = torch.stack([output.losses[term] for term in TERMS[name]]).sum()
    assert total.item() == 0
    total.backward()
    assert bias.grad is not None
    assert not bias.grad.any()
    assert output.measures["confident_share"] == 0


@pytest.mark.parametrize("confident_rows, expected", [(16, math.log(4)), (8, math.log(4) / 2)])
def test_cross_entropy_is_divided_by_all_valid_voxels(name: str, confident_rows: int, expected: float) -> None:
    def weak(x: Tensor) -> Tensor:
        z = class_of_value(x, 4)
        z[:, :, confident_rows:] *= 0.01
        return z

    network = Scripted(weak, lambda x: torch.zeros(len(x), 4, *SIZE))
    method = scripted(name, network, toy_schema(3), u_loss="ce", cutmix_p=0)
    output = step(method, constant_batch(method, [0, 1], [2, 3]))
    for term in TERMS[name]:
        assert float(output.measures[term]) == pytest.approx(expected, rel=1e-5)
    assert float(output.measures["confident_share"]) == pytest.approx(confident_rows / 16)


def test_dice_alone_has_squares_below_and_both_is_the_pair(name: str) -> None:
    """p = 1/4 everywhere, every voxel labeled 1: classes 2 and 3 are absent but predicted, their Dice is 0."""

    def run(**settings: Any) -> float:
        network = Scripted(lambda x: class_of_value(x * 0 + 1, 4), lambda x: torch.zeros(len(x), 4, *SIZE))
        method = scripted(name, network, toy_schema(3), **settings)
        return float(step(method, constant_batch(method, [1, 1], [1, 1])).measures[TERMS[name][0]])

    assert run(u_loss="dice") == pytest.approx(1 - (2 * 0.25 / (0.25**2 + 1)) / 3, rel=1e-4)
    assert run(u_loss="both") == pytest.approx(math.log(4) + 1 - (2 * 0.25 / (0.25 + 1)) / 3, rel=1e-4)


def test_only_confident_voxels_count_in_dice(name: str) -> None:
    """Class 1 left, class 2 right; the right half is not sure and would be wrong."""

    def weak(x: Tensor) -> Tensor:
        z = torch.zeros(len(x), 3, *SIZE)
        z[:, 1, :, :8] = 60.0
        z[:, 2, :, 8:] = 1.0
        return z

    network = Scripted(weak, lambda x: class_of_value(x * 0 + 1))
    output = step(scripted(name, network, u_loss="dice", cutmix_p=0))
    for term in TERMS[name]:
        assert float(output.measures[term]) == pytest.approx(0, abs=1e-5)


def test_all_levels_are_taught(name: str) -> None:
    levels = [torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4)]
    for level in levels:
        level.requires_grad_()
    method = scripted(name, Scripted(class_of_value))
    batch = constant_batch(method, [0], [1, 2])
    weak = method.weak_to_strong.weak_view(batch.unlabeled, class_of_value(unlabeled_of(batch).weak))
    method.weak_to_strong.loss(levels, weak).backward()
    moved = [bool(level.grad is not None and level.grad.any()) for level in levels]
    assert moved == [True, True, False], "the lowest level has weight 0, as in the supervised loss"


# --------------------------------------------------------------------------------------------------- where labels come


def test_inside_the_box_everything_comes_from_the_partner(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = captured(monkeypatch)

    def weak(x: Tensor) -> Tensor:
        return class_of_value(x, sharpness=1.0) * torch.where(x.round() == 2, 1.0, 60.0)  # unsure of class 2

    method = scripted(name, Scripted(weak), cutmix_p=1)
    batch = constant_batch(method, [0, 0], [0, 1, 2])
    unlabeled_of(batch).valids = (unlabeled_of(batch).weak != 1,)  # nothing of patch 1 is inside the image
    step(method, batch)
    images = strong_inputs(method).split(3)
    for image, (target, w, count) in zip(images, found, strict=False):
        for index in range(3):
            values = image[index].unique().tolist()
            assert len(values) == 2, "own voxels and those of one partner"
            assert (image[index] == index).float().mean() > 0.5, "a box covers 2 to 40 % of a patch"
        assert torch.equal(target, image.long())
        assert torch.equal(count, image != 1)
        assert torch.equal(w > 0, image == 0), "class 2 is not confident, patch 1 not valid"


def test_every_patch_has_another_one_as_partner(name: str) -> None:
    method = scripted(name, Scripted(class_of_value), cutmix_p=1)
    batch = constant_batch(method, [0], [0, 1])
    for seed in range(20):
        step(method, batch, seed=seed)
        for view in strong_inputs(method):
            assert view.unique().tolist() == [0, 1]


def test_boxes_come_half_of_the_time_and_not_at_all(name: str) -> None:
    def boxed(**settings: Any) -> float:
        method = scripted(name, Scripted(class_of_value), **settings)
        batch = constant_batch(method, [0], [0, 1])
        views = []
        for seed in range(60):
            step(method, batch, seed=seed)
            views += [len(view.unique()) == 2 for view in strong_inputs(method)]
        return sum(views) / len(views)

    assert boxed() == pytest.approx(0.5, abs=0.12)
    assert boxed(cutmix_p=0) == 0


def test_a_single_patch_has_a_labeled_partner_with_its_true_label(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = captured(monkeypatch)
    method = scripted(name, Scripted(lambda x: class_of_value(x, sharpness=0.1)), toy_schema(ignore=True), cutmix_p=1)
    batch = constant_batch(method, [2, 0], [1])
    batch.labeled.targets = (torch.full_like(batch.labeled.target, 2),)
    valid = torch.ones_like(batch.labeled.valid)
    valid[:, :, ::2] = False  # ignore label
    batch.labeled.valids = (valid,)
    step(method, batch)
    image = strong_inputs(method)[:1]
    assert image.unique().tolist() == [1, 2]
    target, w, count = found[0]
    assert torch.equal(target, image.long())
    assert torch.equal(w > 0, (image == 2) & valid[:1]), "the network is sure of nothing, a true label is sure"
    assert torch.equal(count, (image == 1) | valid[:1])


def test_a_labeled_partner_is_changed_under_its_ignore_label_too(name: str) -> None:
    method = scripted(name, Scripted(class_of_value), cutmix_p=1)
    batch = constant_batch(method, [0], [7])
    image = torch.linspace(0, 2, 256).view(1, 1, *SIZE)
    batch.labeled.views, batch.labeled.valids = (image,), (torch.zeros_like(batch.labeled.valid),)
    changed = []
    for seed in range(5):
        step(method, batch, seed=seed)
        view = strong_inputs(method)[:1]
        changed.append(not torch.equal(view[view != 7], image[view != 7]))
    assert any(changed)


def test_a_single_patch_may_stay_alone(name: str) -> None:
    method = scripted(name, Scripted(class_of_value), cutmix_p=1, partner="none")
    step(method, constant_batch(method, [2], [1]))
    assert strong_inputs(method).unique().tolist() == [1]


def test_labels_have_no_gradient_and_views_have_one(name: str) -> None:
    weak_bias, later_bias = (nn.Parameter(torch.zeros(1, 3, 1, 1)) for _ in range(2))
    network = Scripted(lambda x: class_of_value(x) + weak_bias, lambda x: class_of_value(x, sharpness=1.0) + later_bias)
    output = step(scripted(name, network))
    torch.stack([output.losses[term] for term in TERMS[name]]).sum().backward()
    assert weak_bias.grad is None, "the weak view reaches the terms through its decisions only"
    assert later_bias.grad is not None
    assert later_bias.grad.any()
    output.losses["supervised"].backward()
    assert weak_bias.grad is not None


def test_one_pass_over_both_streams_then_the_views(name: str) -> None:
    method = scripted(name, Scripted(class_of_value))
    batch = toy_batch(method.job)
    step(method, batch)
    seen = method.parts.trained["network"].seen
    assert torch.equal(seen[0], torch.cat([batch.labeled.image, unlabeled_of(batch).weak]))
    assert [len(x) for x in seen] == ([4, 2] if name == "fixmatch" else [4, 2, 4])
    assert not torch.equal(seen[-1][:2], unlabeled_of(batch).weak), "the view is strong"


def test_voxels_outside_the_image_and_zeros_outside_the_mask_stay_in_the_strong_view(name: str) -> None:
    method = scripted(name, Scripted(class_of_value), cutmix_p=0, use_mask_for_norm=(True,))
    batch = toy_batch(method.job, n_unlabeled=2)
    image = unlabeled_of(batch).weak.clone()
    image[:, :, :4], image[:, :, 12:] = 0.0, 50.0
    valid = torch.ones_like(unlabeled_of(batch).valid)
    valid[:, :, 12:] = False
    unlabeled_of(batch).views, unlabeled_of(batch).valids = (image,), (valid,)
    for seed in range(5):
        step(method, batch, seed=seed)
        views = strong_inputs(method)
        assert not views[:, :, :4].any()
        assert (views[:, :, 12:] == 50).all()


# ------------------------------------------------------------------------------------------------------------- regions


def test_regions_have_their_own_confidence(name: str) -> None:
    """p = 0.99 for the first region, 0.6 for the second: one of two channels counts."""

    def weak(x: Tensor) -> Tensor:
        return torch.logit(torch.tensor([0.99, 0.6])).view(1, 2, 1, 1).expand(len(x), -1, *SIZE).clone()

    network = Scripted(weak, lambda x: torch.zeros(len(x), 2, *SIZE))
    output = step(scripted(name, network, toy_schema(regions=True), u_loss="ce"))
    assert float(output.measures[TERMS[name][0]]) == pytest.approx(math.log(2) / 2, rel=1e-5)
    assert float(output.measures["confident_share"]) == pytest.approx(0.5)
    assert output.measures["confident_share whole"] == 1
    assert output.measures["confident_share core"] == 0
    unsure = Scripted(lambda x: -weak(x), lambda x: torch.zeros(len(x), 2, *SIZE))
    output = step(scripted(name, unsure, toy_schema(regions=True)))
    assert float(output.measures["confident_share"]) == pytest.approx(0.5), "sure that it is not there"
    assert "confident_share whole" not in output.measures, "no voxel was labeled so"


# ------------------------------------------------------------------------------------------- weight, twin and warnings


def test_weight_is_off_during_the_warm_up_and_full_from_a_tenth_on(name: str) -> None:
    method = METHODS[name](toy_job(), METHODS[name].Settings())
    batch = toy_batch(method.job)
    key = "unlabeled_weight" if name == "fixmatch" else "features_weight"
    share = 1 if name == "fixmatch" else 0.5
    outputs = {at: step(method, batch, at) for at in (0, 2, 6, 10, 100)}
    assert [list(outputs[at].losses) for at in (0, 2)] == [["supervised"]] * 2
    weights = [float(outputs[at].measures[key]) for at in (6, 10, 100)]
    assert weights == pytest.approx([0.5 * share, share, share])
    early = METHODS[name](toy_job(), METHODS[name].Settings(r_warm=0, ramp_end=0, lambda_max=0.3))
    assert float(step(early, batch, 0).measures[key]) == pytest.approx(0.3 * share)
    late = METHODS[name](toy_job(), METHODS[name].Settings(r_warm=0.5))
    assert list(step(late, batch, 49).losses) == ["supervised"]
    assert float(step(late, batch, 50).measures[key]) == pytest.approx(share)


def sure_of_class_1_only(x: Tensor) -> Tensor:
    """Left: class 1 for sure; right: class 2, not sure at all."""
    z = torch.zeros(len(x), 3, *SIZE)
    z[:, 1, :, :8] = 60.0
    z[:, 2, :, 8:] = 1.0
    return z


def test_confidence_is_measured_by_class(name: str) -> None:
    measures = step(scripted(name, Scripted(sure_of_class_1_only))).measures
    assert float(measures["confident_share"]) == pytest.approx(0.5)
    assert measures["confident_share class 1"] == 1
    assert measures["confident_share class 2"] == 0
    method = scripted(name, Scripted(class_of_value))
    assert "confident_share class 2" not in step(method, constant_batch(method, [0], [0, 1])).measures


def test_a_class_without_confidence_is_named_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    method = scripted(name, Scripted(sure_of_class_1_only))
    batch = toy_batch(method.job)
    with caplog.at_level(logging.WARNING):
        for at in (30, 50, 55, 59):
            step(method, batch, at)
        assert not caplog.records, "it is judged over a part of the run, not at one step"
        for at in (60, 61, 90):
            step(method, batch, at)
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert message.startswith(f"{name}: between 50 % and 60 % of the run")
    assert "class 2 (0.00%)" in message
    assert "class 1" not in message
    assert "--set threshold" in message
    assert method.parts.memory["class_voxels"] == [4 * 256, 4 * 256], "steps 50, 55, 59 and 60"


def test_confident_classes_are_not_warned_of(name: str, caplog: pytest.LogCaptureFixture) -> None:
    method = scripted(name, Scripted(class_of_value))
    with caplog.at_level(logging.WARNING):
        for at in (50, 60):
            step(method, constant_batch(method, [0], [1, 2]), at)
        assert not caplog.records
        never = scripted(name, Scripted(class_of_value))
        step(never, constant_batch(never, [0], [1, 1]), 60)
    assert "class 2 (0.00%)" in caplog.text, "a class that is never predicted is not learned either"
