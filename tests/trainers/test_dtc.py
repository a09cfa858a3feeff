"""The checks of dtc's specification, through `losses()`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autossl.trainers.base import Batch, MethodSettings, Progress, StepOutput
from autossl.trainers.components.geometry import signed_distance
from autossl.trainers.methods import dtc
from autossl.trainers.methods.dtc import DualTaskConsistency, DualTaskConsistencySettings, mask_of_distance
from autossl.trainers.methods.supervised import Supervised
from toys import toy_batch, toy_configuration, toy_job, toy_schema


def trainer(job: dict[str, Any] | None = None, **settings: Any) -> DualTaskConsistency:
    return DualTaskConsistency(toy_job(**(job or {})), DualTaskConsistencySettings(**settings))


def masks_of(method: DualTaskConsistency, target: Tensor) -> Tensor:
    """Boolean [B, F, *S]."""
    n = len(method.job.schema.foreground)
    return target > 0.5 if method.job.schema.has_regions else torch.cat([target == c + 1 for c in range(n)], 1)


def batch_of(method: DualTaskConsistency, **options: Any) -> Batch:
    """The toy batch with the distance maps that the loader makes."""
    batch = toy_batch(method.job, **options)
    masks = masks_of(method, batch.labeled.target).numpy()
    spacing = (1.0,) * (masks.ndim - 2)
    maps = [[signed_distance(mask, spacing) for mask in row] for row in masks]
    batch.labeled.signed_distances = torch.from_numpy(np.array(maps))
    return batch


def step(method: DualTaskConsistency, batch: Batch | None = None, fraction: float = 1.0) -> StepOutput:
    return method.losses(batch or batch_of(method), Progress(step=int(100 * fraction), total=100))


class Answer(nn.Module):
    """Stands for the distance head and answers the given distances, of the classes that it is asked for."""

    def __init__(self, s: Tensor) -> None:
        super().__init__()
        self.s = s
        self.asked: list[list[int] | None] = []

    def forward(self, features: Tensor, classes: list[int] | None = None) -> Tensor:
        self.asked.append(classes)
        s = self.s[: len(features)]
        return s if classes is None else s[:, classes]


def answer(method: DualTaskConsistency, monkeypatch: pytest.MonkeyPatch, z: Tensor, s: Tensor) -> Answer:
    """Network and head answer z and s."""
    head = Answer(s)
    method.parts.trained["distance_head"] = head
    monkeypatch.setattr(dtc, "forward_features", lambda network, x, taps: ([z[: len(x)]], {"dec:last": x}))
    return head


def perfect_logits(method: DualTaskConsistency, target: Tensor, big: float = 60.0) -> Tensor:
    masks = masks_of(method, target)
    foreground = torch.where(masks, big, -big)
    if method.job.schema.has_regions:
        return foreground
    return torch.cat([torch.where(masks.any(1, keepdim=True), -big, big), foreground], 1)


# ------------------------------------------------------------------------------------------------------------ the terms


def test_the_sigmoid_is_steep_and_safe() -> None:
    m = mask_of_distance(torch.tensor([0.0, 0.01, -0.01, 1.0, -1.0]), 1500)
    assert m[:3].tolist() == pytest.approx([0.5, 3.06e-7, 1 - 3.06e-7], rel=1e-2)
    assert m.tolist()[3:] == [0, 1]
    assert mask_of_distance(torch.tensor([0.01], dtype=torch.float16), 1500).dtype == torch.float32


def test_thresholding_the_mask_of_true_distances_gives_the_mask_back_except_its_boundary() -> None:
    mask = np.zeros((12, 12), dtype=bool)
    mask[3:9, 2:8] = True
    m = mask_of_distance(torch.from_numpy(signed_distance(mask, (1, 1))), 1500).numpy()
    boundary = mask.copy()
    boundary[4:8, 3:7] = False
    np.testing.assert_array_equal((m > 0.5)[~boundary], mask[~boundary])
    assert (m[boundary] == 0.5).all()


@pytest.mark.parametrize("regions", [False, True])
def test_two_perfect_tasks_disagree_on_the_boundary_alone(monkeypatch: pytest.MonkeyPatch, regions: bool) -> None:
    method = trainer({"schema": toy_schema(regions=regions)})
    batch = batch_of(method)
    assert batch.labeled.signed_distances is not None
    assert batch.unlabeled is not None
    s = batch.labeled.signed_distances.repeat(2, 1, 1, 1)
    batch.unlabeled.views = batch.labeled.views
    answer(method, monkeypatch, perfect_logits(method, batch.labeled.target.repeat(2, 1, 1, 1)), s)
    output = step(method, batch)
    share = float((s == 0).float().mean())
    assert float(output.measures["distance"]) == 0
    assert 0 < float(output.measures["consistency"]) == pytest.approx(0.25 * share, rel=1e-4)
    assert float(output.measures["boundary_share"]) == pytest.approx(share)


def test_background_only_patches_agree_where_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    method = trainer()
    batch = batch_of(method)
    batch.labeled.targets = (torch.zeros_like(batch.labeled.target),)
    batch.labeled.signed_distances = torch.ones(2, 2, 16, 16)
    z = torch.tensor([60.0, -60.0, -60.0]).view(1, 3, 1, 1).expand(4, 3, 16, 16)
    answer(method, monkeypatch, z, torch.ones(4, 2, 16, 16))
    output = step(method, batch)
    assert float(output.measures["consistency"]) == float(output.measures["distance"]) == 0


def test_terms_are_means_and_weighted(monkeypatch: pytest.MonkeyPatch) -> None:
    method = trainer()
    batch = batch_of(method)
    s = torch.full((4, 2, 16, 16), 0.5)  # m = 0
    answer(method, monkeypatch, torch.zeros(4, 3, 16, 16), s)  # p = 1/3 each
    output = step(method, batch, 0.5)
    assert batch.labeled.signed_distances is not None
    distance = float((0.5 - batch.labeled.signed_distances).square().mean())
    assert output.losses["supervised_distance"].item() == pytest.approx(0.3 * distance, rel=1e-5)
    assert output.losses["consistency"].item() == pytest.approx(0.2865048 / 9, rel=1e-5)
    weights = [float(step(method, batch, r).measures["consistency_weight"]) for r in (0, 0.5, 1)]
    assert weights == pytest.approx([0.0067379, 0.2865048, 1], rel=1e-5)


def test_gradient_towards_the_mask_is_exact_and_half_precision_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = trainer({"schema": toy_schema(regions=True)})
    batch = batch_of(method)
    torch.manual_seed(0)
    s = (0.004 * torch.randn(4, 2, 16, 16)).half().float().requires_grad_()
    z = torch.randn(4, 2, 16, 16).half().float().requires_grad_()
    answer(method, monkeypatch, z, s)
    loss = step(method, batch).losses["consistency"]
    loss.backward()
    p, m = torch.sigmoid(z.detach()), torch.sigmoid(-1500 * s.detach())
    assert z.grad is not None
    assert s.grad is not None
    torch.testing.assert_close(z.grad, 2 * (p - m) / p.numel() * p * (1 - p))
    torch.testing.assert_close(s.grad, 2 * (m - p) / p.numel() * -1500 * m * (1 - m))
    answer(method, monkeypatch, z.detach().half(), s.detach().half())
    with torch.autocast("cpu", torch.bfloat16):
        assert step(method, batch).losses["consistency"].item() == pytest.approx(loss.item(), rel=1e-6)


def test_ignored_voxels_teach_no_distance_but_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    method = trainer({"schema": toy_schema(ignore=True)})
    batch = batch_of(method)
    valid = torch.ones_like(batch.labeled.valid)
    valid[0, :, :4] = False  # a quarter of the patch
    valid[1, :, :5] = False  # 31 percent: the patch is left out
    batch.labeled.valids = (valid,)
    phi = torch.rand(2, 2, 16, 16)
    batch.labeled.signed_distances = phi
    s = torch.zeros(4, 2, 16, 16)
    answer(method, monkeypatch, torch.zeros(4, 3, 16, 16), s)
    output = step(method, batch)
    assert float(output.measures["distance"]) == pytest.approx(float(phi[0, :, 4:].square().mean()), rel=1e-5)
    assert float(output.measures["distance_share"]) == pytest.approx(12 * 16 / 512)
    assert float(output.measures["valid_share"]) == 1


def test_voxels_outside_the_image_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    method = trainer()
    batch = batch_of(method)
    assert batch.unlabeled is not None
    batch.unlabeled.valids = (torch.zeros_like(batch.unlabeled.valid),)
    s = torch.full((4, 2, 16, 16), 0.5)
    s[2:] = -0.5
    answer(method, monkeypatch, torch.zeros(4, 3, 16, 16), s)
    assert float(step(method, batch).measures["consistency"]) == pytest.approx(1 / 9)


def test_of_many_structures_sixteen_are_drawn_and_those_that_are_there_come_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = trainer({"schema": toy_schema(20)})
    batch = batch_of(method)
    assert batch.labeled.signed_distances is not None
    phi = batch.labeled.signed_distances
    phi[:, 18] = phi[:, 0]
    s = torch.linspace(-1, 1, 20).view(1, 20, 1, 1).expand(4, 20, 16, 16)
    head = answer(method, monkeypatch, torch.randn(4, 21, 16, 16), s)
    drawn = set()
    for index in range(4):
        output = method.losses(batch, Progress(step=index, total=100))
        classes = head.asked[-1]
        assert classes is not None
        assert len(set(classes)) == 16
        assert {0, 1, 18} <= set(classes)
        assert classes == sorted(classes)
        expected = (s[:2, classes] - phi[:, classes]).square().mean()
        assert float(output.measures["distance"]) == pytest.approx(float(expected), rel=1e-5)
        drawn.add(tuple(classes))
    assert len(drawn) > 1
    method.losses(batch, Progress(step=0, total=100))
    assert head.asked[-1] == head.asked[0]


def test_steepness_grows_with_patches_above_two_hundred_voxels() -> None:
    assert trainer().steepness == 1500
    large = toy_configuration(2, patch_size=(200, 400))
    assert trainer({"configuration": large}, steepness=1000).steepness == 2000


# --------------------------------------------------------------------------------------------------------- the method


def gradients(method: DualTaskConsistency, term: str, batch: Batch) -> dict[str, bool]:
    """Which groups of weights the term reaches."""
    network: Any = method.parts.trained["network"]
    head = method.parts.trained["distance_head"]
    for module in (network, head):
        module.zero_grad()
    step(method, batch).losses[term].backward()

    def reached(module: nn.Module) -> bool:
        return any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())

    parts = {
        "encoder": network.encoder,
        "decoder": network.decoder.stages,
        "segmentation": network.decoder.seg_layers[-1],
    }
    return {name: reached(module) for name, module in (parts | {"distance": head}).items()}


def test_gradients_reach_what_the_specification_says() -> None:
    method = trainer()
    batch = batch_of(method)
    head: Any = method.parts.trained["distance_head"]
    torch.nn.init.normal_(head.convolution.weight, std=1e-4)  # near the zero level, where the sigmoid is not flat
    torch.nn.init.zeros_(head.convolution.bias)
    everything = dict.fromkeys(("encoder", "decoder", "segmentation", "distance"), True)
    assert gradients(method, "consistency", batch) == everything
    assert gradients(method, "supervised_distance", batch) == everything | {"segmentation": False}
    assert gradients(method, "supervised", batch) == everything | {"distance": False}


def test_unlabeled_patches_are_touched_by_the_agreement_alone() -> None:
    method = trainer()
    batch = batch_of(method)
    assert batch.unlabeled is not None
    image = batch.unlabeled.image.clone().requires_grad_()
    batch.unlabeled.views = (image,)
    output = step(method, batch)
    for name, reached in (("supervised", False), ("supervised_distance", False), ("consistency", True)):
        (gradient,) = torch.autograd.grad(output.losses[name], image, retain_graph=True, allow_unused=True)
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) == reached, name


def test_the_head_adds_few_parameters_and_is_not_deployed() -> None:
    method = trainer()
    assert sum(p.numel() for p in method.parts.trained["distance_head"].parameters()) == 2 * (4 + 1)
    assert [member.name for member in method.prediction().members] == ["network"]
    assert method.needs.signed_distance


def test_zero_weights_are_the_twin_bit_for_bit() -> None:
    method = trainer(lambda_max=0.0, beta=0.0)
    twin = Supervised(toy_job(), MethodSettings())
    batch = batch_of(method)
    mine, theirs = step(method, batch), twin.losses(batch, Progress(100, 100))
    assert list(mine.losses) == ["supervised"]
    assert torch.equal(mine.losses["supervised"], theirs.losses["supervised"])


def test_without_the_agreement_only_labeled_patches_are_seen() -> None:
    method = trainer(lambda_max=0.0)
    assert list(step(method).losses) == ["supervised", "supervised_distance"]
    full, alone = step(trainer()).losses, step(method).losses
    torch.testing.assert_close(alone["supervised_distance"], full["supervised_distance"])


def test_no_unlabeled_case_is_the_twin_unless_asked_otherwise() -> None:
    method = trainer({"n_unlabeled": 0})
    assert list(method.parts.trained) == ["network"]
    assert list(step(method, batch_of(method, n_unlabeled=0)).losses) == ["supervised"]
    method = trainer({"n_unlabeled": 0}, labeled_only=True)
    losses = step(method, batch_of(method, n_unlabeled=0)).losses
    assert list(losses) == ["supervised", "supervised_distance", "consistency"]
    assert losses["consistency"].item() > 0


def test_missing_distance_maps_are_named() -> None:
    with pytest.raises(ValueError, match="no signed distance maps"):
        step(trainer(), toy_batch(toy_job()))
