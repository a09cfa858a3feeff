"""The checks of urpc's specification, through `losses()` where they are about the method."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from autossl.data.problems import InvalidInput
from autossl.trainers.base import Batch, MethodSettings, Progress, StepOutput
from autossl.trainers.checks import check_needs
from autossl.trainers.methods import urpc
from autossl.trainers.methods.supervised import Supervised
from autossl.trainers.methods.urpc import PyramidConsistency, PyramidConsistencySettings, pyramid_consistency
from toys import toy_architecture, toy_batch, toy_configuration, toy_job, toy_schema


def configuration(stages: int = 4, dims: int = 2, **changes: Any) -> Any:
    features = (4, 8, 8, 8, 8, 8, 8)[:stages]
    return toy_configuration(dims, architecture=toy_architecture(dims, features), **changes)


def trainer(
    plan: Any = None, n_classes: int = 2, regions: bool = False, n_unlabeled: int = 4, **settings: Any
) -> PyramidConsistency:
    job = toy_job(configuration=plan or configuration(), schema=toy_schema(n_classes, regions), n_unlabeled=n_unlabeled)
    return PyramidConsistency(job, PyramidConsistencySettings(**settings))


def step(method: PyramidConsistency, batch: Batch | None = None, fraction: float = 1.0) -> StepOutput:
    return method.losses(batch or toy_batch(method.job), Progress(step=int(100 * fraction), total=100))


def set_level(method: PyramidConsistency, level: int, p: tuple[float, ...]) -> None:
    """The head of a level answers these probabilities everywhere."""
    network: Any = method.parts.trained["network"]
    layer = network.decoder.seg_layers[-(level + 1)]
    torch.nn.init.zeros_(layer.weight)
    layer.bias.data = torch.logit(torch.tensor(p)) if method.job.schema.has_regions else torch.log(torch.tensor(p))


def in_float64(z: list[Tensor], detach_weight: bool = False) -> Tensor:
    """The equations as they are written, on logits [B, C, *S_s] of any type."""
    full = [functional.interpolate(level, z[0].shape[2:], mode="bilinear", align_corners=False) for level in z]
    p = [level.softmax(1) for level in full]
    mean = torch.stack(p).mean(0)
    total = torch.zeros((), dtype=z[0].dtype)
    for scale in p:
        divergence = (mean * (mean / scale).log()).sum(1, keepdim=True)
        w = (-divergence).exp()
        w = w.detach() if detach_weight else w
        total = total + ((mean - scale).square() * w).mean() / (w.mean() + 1e-8) + divergence.mean()
    return total / len(z)


def random_levels(dtype: torch.dtype = torch.float32, n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 8 >> s, 12 >> s, generator=generator, dtype=torch.float64).to(dtype) for s in range(n)]


def everywhere(z: list[Tensor]) -> Tensor:
    return torch.ones(len(z[0]), 1, *z[0].shape[2:], dtype=torch.bool)


# ------------------------------------------------------------------------------------------------------------- the loss


def test_closed_form_of_two_scales() -> None:
    method = trainer(n_classes=1)
    set_level(method, 0, (0.8, 0.2))
    set_level(method, 1, (0.6, 0.4))
    batch = toy_batch(method.job)
    batch.labeled.targets = (batch.labeled.target.clamp(max=1),)
    output = step(method, batch)
    assert float(output.measures["consistency"]) == pytest.approx(0.034884, abs=2e-6)
    assert float(output.measures["divergence"]) == pytest.approx((0.028168 + 0.021601) / 2, abs=1e-6)
    weights = (math.exp(-0.028168) + math.exp(-0.021601)) / 2
    assert float(output.measures["mean_weight"]) == pytest.approx(weights, abs=1e-6)
    assert output.losses["consistency"].item() == pytest.approx(0.034884, abs=2e-6)


def test_regions_take_the_mean_of_their_binary_divergences() -> None:
    method = trainer(regions=True)
    set_level(method, 0, (0.2, 0.5))
    set_level(method, 1, (0.4, 0.5))
    output = step(method)
    divergences = (0.028168 / 2, 0.021601 / 2)  # the second region agrees
    squares = 0.01 / 2  # of the first region alone
    assert float(output.measures["divergence"]) == pytest.approx(sum(divergences) / 2, abs=1e-6)
    assert float(output.measures["consistency"]) == pytest.approx(squares + sum(divergences) / 2, abs=2e-6)


def test_voxels_that_disagree_count_less() -> None:
    agree, one, other = torch.tensor([2.0, 0.0]), torch.tensor([4.0, 0.0]), torch.tensor([0.0, 4.0])
    z = [torch.stack([agree, side], 1).view(1, 2, 1, 2) for side in (one, other)]
    loss, measures = pyramid_consistency(z, everywhere(z))
    p = [level.softmax(1) for level in z]
    plain = float((sum(p) / 2 - p[0]).square().mean())  # type: ignore[operator]
    assert 0 < float(loss - measures["divergence"]) < 0.95 * plain


def test_it_is_zero_where_all_scales_agree_and_positive_else() -> None:
    z = random_levels()
    assert float(pyramid_consistency(z, everywhere(z))[0]) > 0
    same = z[0].requires_grad_()
    loss, _ = pyramid_consistency([same, same, same], everywhere(z))
    assert abs(float(loss.detach())) < 1e-6
    loss.backward()
    assert same.grad is not None
    assert same.grad.abs().max() < 1e-7


def test_classes_and_scales_may_be_permuted() -> None:
    z = [functional.interpolate(level, (8, 12), mode="nearest") for level in random_levels()]
    loss, _ = pyramid_consistency(z, everywhere(z))
    torch.testing.assert_close(pyramid_consistency([level[:, [2, 0, 1]] for level in z], everywhere(z))[0], loss)
    torch.testing.assert_close(pyramid_consistency(z[::-1], everywhere(z))[0], loss)


def test_scales_are_compared_at_full_resolution() -> None:
    board = (torch.arange(4).view(-1, 1) + torch.arange(4)) % 2
    coarse = 6.0 * torch.stack([board, 1 - board])[None].float()
    fine = functional.interpolate(coarse, (8, 8), mode="bilinear", align_corners=False)
    loss, _ = pyramid_consistency([fine, coarse], torch.ones(1, 1, 8, 8, dtype=torch.bool))
    assert abs(float(loss)) < 1e-6  # the fine map is the coarse one, up-sampled
    down = functional.interpolate(fine, (4, 4), mode="bilinear", align_corners=False)
    wrong, _ = pyramid_consistency([down, coarse], torch.ones(1, 1, 4, 4, dtype=torch.bool))
    assert float(wrong) > 0.05


@pytest.mark.parametrize("detach_weight", [False, True])
def test_value_and_gradient_are_those_of_the_equations(detach_weight: bool) -> None:
    ours, written = ([level.requires_grad_() for level in random_levels(torch.float64)] for _ in range(2))
    loss, _ = pyramid_consistency(ours, everywhere(ours), detach_weight=detach_weight)
    expected = in_float64(written, detach_weight)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for mine, theirs in zip(ours, written, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("regions", [False, True])
def test_finite_differences(regions: bool) -> None:
    z = [level[:1, :2, :4, :4].contiguous().requires_grad_() for level in random_levels(torch.float64, 2)]
    assert torch.autograd.gradcheck(lambda *levels: pyramid_consistency(levels, everywhere(z), regions)[0], z)


def test_detaching_the_mean_stops_its_gradient() -> None:
    z = [level.requires_grad_() for level in random_levels()]
    loss, _ = pyramid_consistency(z, everywhere(z))
    detached, _ = pyramid_consistency(z, everywhere(z), detach_mean=True)
    torch.testing.assert_close(detached, loss)
    first, second = (torch.autograd.grad(value, z)[0] for value in (loss, detached))
    assert not torch.allclose(first, second)


def test_certain_disagreement_is_finite_and_still_pulls() -> None:
    z = [torch.tensor([side, -side]).view(1, 2, 1, 1).requires_grad_() for side in (400.0, -400.0)]
    loss, measures = pyramid_consistency(z, everywhere(z))
    assert math.isfinite(float(loss.detach()))
    assert float(measures["divergence"]) == pytest.approx(50 - math.log(2), rel=1e-5)
    z = [torch.tensor([side, -side]).view(1, 2, 1, 1).requires_grad_() for side in (20.0, -20.0)]
    loss, _ = pyramid_consistency(z, everywhere(z))
    loss.backward()
    assert all(level.grad is not None and torch.isfinite(level.grad).all() for level in z)


def test_half_precision_gives_the_same_loss() -> None:
    z = random_levels()
    loss, _ = pyramid_consistency(z, everywhere(z))
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = pyramid_consistency([level.half() for level in z], everywhere(z))
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(loss), abs=1e-3)


def test_large_maps_are_computed_twice_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for limit in (urpc.CHECKPOINT_ABOVE, 0):
        monkeypatch.setattr(urpc, "CHECKPOINT_ABOVE", limit)
        z = [level.requires_grad_() for level in random_levels()]
        loss, _ = pyramid_consistency(z, everywhere(z))
        loss.backward()
        results.append((loss, [level.grad for level in z]))
    assert torch.equal(results[0][0], results[1][0])
    for first, second in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------- the method


def test_the_weight_follows_the_ramp() -> None:
    method = trainer()
    weights = [float(step(method, fraction=r).measures["consistency_weight"]) for r in (0, 0.5, 1)]
    assert weights == pytest.approx([0.0067379, 0.2865, 1.0], rel=1e-3)


def test_only_unlabeled_patches_are_judged() -> None:
    method = trainer()
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    first = step(method, batch)
    batch.labeled.views = (batch.labeled.image + 1,)
    assert float(step(method, batch).measures["consistency"]) == pytest.approx(
        float(first.measures["consistency"]), rel=1e-5
    )
    batch.unlabeled.valids = (torch.zeros_like(batch.unlabeled.valid),)
    assert step(method, batch).losses["consistency"].item() == 0


def test_gradients_reach_the_heads_of_the_pyramid_and_not_the_lowest() -> None:
    method = trainer()
    network: Any = method.parts.trained["network"]
    step(method).losses["consistency"].backward()
    heads = [layer.weight.grad for layer in network.decoder.seg_layers]
    assert heads[0] is None
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in heads[1:])
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in list(network.encoder.parameters())[:1])


@pytest.mark.parametrize(
    "stages, changes, expected",
    [
        (4, {}, 2),
        (5, {"patch_size": (32, 32)}, 3),
        (7, {"patch_size": (64, 64)}, 4),
        (6, {"patch_size": (32, 32)}, 4),
        (5, {"patch_size": (16, 32)}, 3),
        (6, {"patch_size": (96, 32)}, 4),
    ],
)
def test_the_number_of_scales_follows_the_plan(stages: int, changes: dict[str, Any], expected: int) -> None:
    assert trainer(configuration(stages, **changes)).n_scales == expected


def test_scales_with_a_side_below_four_voxels_are_left_out_down_to_two() -> None:
    thin = toy_architecture(3, (4, 8, 8, 8, 8), strides=((2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)))
    plan = toy_configuration(3, patch_size=(8, 32, 32), architecture=thin)
    assert trainer(plan).n_scales == 2
    flat = toy_configuration(3, patch_size=(4, 32, 32), architecture=thin)
    assert trainer(flat).n_scales == 2


def test_too_few_levels_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"2 level\(s\) of deep supervision"):
        trainer(configuration(3))
    plan = configuration(3)
    setup: Any = SimpleNamespace(
        method=PyramidConsistency,
        configuration=plan,
        schema=toy_schema(),
        folds={},
        request=SimpleNamespace(initial_weights=None),
        settings=PyramidConsistency.Settings(),
    )
    with pytest.raises(InvalidInput, match="at least 3, which urpc needs"):
        check_needs(setup)


def test_zero_weight_and_no_unlabeled_case_are_the_twin_bit_for_bit() -> None:
    for method in (trainer(lambda_max=0.0), trainer(n_unlabeled=0), trainer(n_unlabeled=0, pyramid_sup=True)):
        twin = Supervised(toy_job(configuration=configuration()), MethodSettings())
        batch = toy_batch(method.job, n_unlabeled=2 if method.job.has_unlabeled else 0)
        mine, theirs = step(method, batch), twin.losses(batch, Progress(100, 100))
        assert list(mine.losses) == ["supervised"]
        assert torch.equal(mine.losses["supervised"], theirs.losses["supervised"])


def test_pyramid_supervision_is_the_mean_over_the_up_sampled_scales() -> None:
    method = trainer(pyramid_sup=True)
    batch = toy_batch(method.job)
    z = method.parts.trained["network"](batch.labeled.image)
    loss, target = method.job.supervised_loss, batch.labeled.target
    up = functional.interpolate(z[1], (16, 16), mode="bilinear", align_corners=False)
    expected = (loss.at_one_level(z[0], target, None) + loss.at_one_level(up, target, None)) / 4
    assert step(method, batch).losses["supervised"].item() == pytest.approx(float(expected.detach()), rel=1e-5)


def test_pyramid_supervision_needs_no_consistency_but_unlabeled_cases() -> None:
    whole, alone = trainer(pyramid_sup=True), trainer(pyramid_sup=True, lambda_max=0.0)
    batch = toy_batch(whole.job)
    assert set(step(alone, batch).losses) == {"supervised"}
    assert step(alone, batch).losses["supervised"].item() == pytest.approx(
        step(whole, batch).losses["supervised"].item(), rel=1e-5
    )


def test_perturbed_branches_change_the_auxiliary_outputs_alone() -> None:
    plan = configuration(6, patch_size=(64, 64))
    method, plain = trainer(plan, branch_perturb=True), trainer(plan)
    x, at = toy_batch(method.job).labeled.image, Progress(3, 100)
    changed, same, clean = method._logits(x, at), method._logits(x, at), plain._logits(x, at)
    torch.testing.assert_close(changed[0], clean[0])
    torch.testing.assert_close(changed[4], clean[4])
    assert all(torch.equal(a, b) for a, b in zip(changed, same, strict=True))
    network: Any = method.parts.trained["network"]
    bias = network.decoder.seg_layers[-2].bias.view(1, -1, 1, 1)
    ratio = (changed[1] - bias) / (clean[1] - bias)
    for level in (1, 2, 3):
        assert changed[level].shape == clean[level].shape
        assert not torch.allclose(changed[level], clean[level])
    assert 0.5 < ratio.median() < 1.5  # noise of at most 30 percent
    assert not torch.equal(method._logits(x, Progress(4, 100))[1], changed[1])
