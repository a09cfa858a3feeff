"""The strong view and the perturbations of features: what they change, what they leave, and by how much."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from autossl.trainers.components.augment import (
    IntensityChange,
    StrongAugment,
    blurred,
    channel_dropout,
    clipped_noise,
    perturb_features,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def change(n: int = 1, **values: float) -> IntensityChange:
    """A change with the given values for all samples, neutral otherwise."""
    neutral = {"factor": 1.0, "shift": 0.0, "contrast": 1.0, "gamma": 1.0, "blur": 0.0, "noise": 0.0}
    return IntensityChange(**{name: torch.full((n,), value) for name, value in {**neutral, **values}.items()})


def applied(x: Tensor, valid: Tensor | None = None, augment: StrongAugment | None = None, **values: float) -> Tensor:
    augment = augment or StrongAugment((1.0,) * (x.ndim - 2), (1.0,) * x.shape[1])
    return augment.apply(x, change(len(x), **values), generator(), valid)


def random_image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(1))


# ------------------------------------------------------------------------------------------------------- strong view


def test_changes_are_drawn_with_their_probabilities_and_ranges() -> None:
    drawn = IntensityChange.draw(20_000, generator())
    expected: dict[str, tuple[float, float, float, float]] = {  # neutral, probability, low, high
        "factor": (1.0, 0.8, 0.5, 1.5),
        "shift": (0.0, 0.8, -0.5, 0.5),
        "contrast": (1.0, 0.8, 0.5, 1.5),
        "gamma": (1.0, 0.3, 0.7, 1.5),
        "blur": (0.0, 0.5, 0.1, 2.0),
        "noise": (0.0, 0.3, 0.0, 0.1),
    }
    for name, (neutral, p, low, high) in expected.items():
        values = getattr(drawn, name)
        chosen = values[values != neutral]
        assert len(chosen) / len(values) == pytest.approx(p, abs=0.02), name
        assert chosen.min() >= low
        assert chosen.max() <= high
        assert chosen.mean().item() == pytest.approx((low + high) / 2, abs=0.02), name
    assert torch.equal(drawn.factor == 1, drawn.shift == 0), "brightness is one draw: factor and shift together"


def test_brightness_and_contrast_closed_form() -> None:
    x = torch.tensor([0.0, 0.0, 8.0, 8.0]).view(1, 1, 2, 2)
    assert applied(x, factor=0.5, shift=0.25).flatten().tolist() == pytest.approx([0.25, 0.25, 4.25, 4.25])
    assert applied(x, contrast=0.5).flatten().tolist() == pytest.approx([2.0, 2.0, 6.0, 6.0])
    augment = StrongAugment((1.0, 1.0), (2.0,))
    assert applied(x, augment=augment, shift=0.5).flatten().tolist() == pytest.approx([1.0, 1.0, 9.0, 9.0])


def test_gamma_keeps_the_range_and_bends_between() -> None:
    x = torch.tensor([2.0, 3.0, 4.0, 6.0]).view(1, 1, 2, 2)
    expected = [2 + 4 * ((value - 2) / 4) ** 1.5 for value in (2, 3, 4, 6)]
    assert applied(x, gamma=1.5).flatten().tolist() == pytest.approx(expected)


def test_result_stays_within_the_inputs_range_and_a_fifth() -> None:
    x = torch.tensor([-1.0, 1.0, 3.0, 4.0]).view(1, 1, 2, 2)
    assert applied(x, factor=1.5, shift=0.5).max().item() == pytest.approx(4 + 0.2 * 5)
    assert applied(x, shift=-3.0).flatten().tolist() == pytest.approx([-2.0, -2.0, 0.0, 1.0])


@pytest.mark.parametrize("shape", [(3, 2, 9, 12), (2, 1, 5, 8, 7)])
def test_shape_is_kept_the_input_too_and_the_generator_decides(shape: tuple[int, ...]) -> None:
    x = random_image(*shape)
    before = x.clone()
    augment = StrongAugment((1.0,) * (len(shape) - 2), (1.0,) * shape[1])
    first, same, other = (augment(x, generator(seed)) for seed in (3, 3, 4))
    assert first.shape == x.shape
    assert first.dtype == x.dtype
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(x, before)
    assert not torch.equal(first, x)


def test_samples_draw_for_themselves() -> None:
    one = random_image(1, 1, 16, 16)
    strong = StrongAugment((1.0, 1.0), (1.0,))(one.expand(8, -1, -1, -1), generator())
    assert len({round(value, 4) for value in strong.std(dim=(1, 2, 3)).tolist()}) > 4
    drawn = [IntensityChange.draw(n, generator()).factor[0] for n in (1, 8)]
    assert drawn[0] == drawn[1], "a sample's draws do not depend on how many follow it"


def test_constant_images_stay_finite() -> None:
    for value in (0.0, -3.0):
        x = torch.full((40, 1, 8, 8), value)
        strong = StrongAugment((1.0, 1.0), (1.0,))(x, generator())
        assert torch.equal(strong, x), "there is no range to move within"


@pytest.mark.parametrize("place", [(8, 9), (0, 0), (15, 1)])
def test_an_impulse_is_not_moved(place: tuple[int, int]) -> None:
    x = torch.zeros(60, 1, 16, 18)
    x[:, 0, place[0], place[1]] = 100.0
    strong = StrongAugment((1.0, 1.0), (1.0,))(x, generator())
    brightest = strong.flatten(1).argmax(1)
    assert brightest.unique().tolist() == [place[0] * 18 + place[1]]


def test_voxels_outside_the_image_keep_their_value_and_count_nowhere() -> None:
    x = random_image(20, 2, 12, 10)
    valid = torch.ones(20, 1, 12, 10, dtype=torch.bool)
    valid[:, :, 8:] = False
    far = x.clone()
    far[:, :, 8:] = 1000.0
    strong = StrongAugment((1.0, 1.0), (1.0, 1.0))(far, generator(), valid)
    assert torch.equal(strong[:, :, 8:], far[:, :, 8:])
    assert strong[:, :, :8].max() <= x[:, :, :8].max() * 1.5
    apart = applied(x[:, :, :8].clone(), contrast=0.5)
    assert torch.allclose(applied(far, valid, contrast=0.5)[:, :, :8], apart, atol=1e-6)
    nothing = torch.zeros_like(valid)
    assert torch.equal(StrongAugment((1.0, 1.0), (1.0, 1.0))(x, generator(), nothing), x)


def test_zero_outside_the_mask_stays_zero_in_flagged_channels() -> None:
    x = random_image(20, 2, 8, 8)
    x[:, :, :3] = 0
    strong = StrongAugment((1.0, 1.0), (1.0, 1.0), zero_outside=(True, False))(x, generator())
    assert not strong[:, 0, :3].any()
    assert strong[:, 1, :3].any()


def test_no_gradient_and_noise_of_the_channels_size() -> None:
    x = torch.cat([torch.linspace(-50, 50, 4096).view(1, 1, 64, 64)] * 2, 1).requires_grad_()
    augment = StrongAugment((1.0, 1.0), (1.0, 4.0))
    strong = augment.apply(x.detach(), change(noise=0.1), generator())
    deviation = (strong - x).std(dim=(2, 3))
    assert deviation[0].tolist() == pytest.approx([0.1, 0.4], rel=0.1)
    assert not augment(x, generator()).requires_grad


# -------------------------------------------------------------------------------------------------------------- blur


def test_blur_of_an_impulse_is_a_gaussian() -> None:
    x = torch.zeros(2, 1, 41, 41)
    x[:, 0, 20, 20] = 1.0
    y = blurred(x, torch.tensor([1.0, 2.0]), (1.0, 1.0))
    assert y.sum(dim=(1, 2, 3)).tolist() == pytest.approx([1.0, 1.0], rel=1e-5)
    assert y[1, 0, 20, 20].item() == pytest.approx(1 / (2 * math.pi * 4), rel=1e-2)
    assert (y[1, 0, 22, 20] / y[1, 0, 20, 20]).item() == pytest.approx(math.exp(-0.5), rel=1e-4)
    assert torch.allclose(y, y.flip(2), atol=1e-7)
    assert torch.allclose(y, y.transpose(2, 3), atol=1e-7)


def test_through_plane_is_blurred_less() -> None:
    x = torch.zeros(1, 1, 21, 21, 21)
    x[..., 10, 10, 10] = 1.0
    y = blurred(x, torch.tensor([2.0]), (4.0, 1.0, 1.0))[0, 0]
    at = y[10, 10, 10]
    assert (y[11, 10, 10] / at).item() == pytest.approx(math.exp(-1 / (2 * 0.5**2)), rel=1e-3)  # sigma 2 / 4
    assert (y[10, 11, 10] / at).item() == pytest.approx(math.exp(-1 / (2 * 2.0**2)), rel=1e-3)
    isotropic = blurred(x, torch.tensor([2.0]), (3.0, 3.0, 3.0))[0, 0]
    assert isotropic[11, 10, 10].item() == pytest.approx(isotropic[10, 10, 11].item(), rel=1e-5)


def test_blur_continues_the_edge() -> None:
    assert torch.allclose(blurred(torch.full((1, 1, 3, 5), 7.0), torch.tensor([2.0]), (1.0, 1.0)), torch.tensor(7.0))
    x = torch.zeros(1, 1, 30, 1)
    x[0, 0, 0] = 1.0
    weights = torch.exp(-(torch.arange(-8.0, 9.0) ** 2) / 8)
    weights /= weights.sum()
    expected = weights[:9].cumsum(0).flip(0)  # row i: all weights that reach the edge or beyond
    assert torch.allclose(blurred(x, torch.tensor([2.0]), (1.0, 1.0))[0, 0, :9, 0], expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- features


def test_half_of_the_channels_go_and_the_rest_is_doubled() -> None:
    f = torch.full((50, 40, 2, 2), 3.0)
    dropped = channel_dropout(f, 0.5, generator())
    assert set(dropped.unique().tolist()) == {0.0, 6.0}
    channels = dropped.flatten(2)
    assert torch.equal(channels.amin(2), channels.amax(2)), "a channel goes or stays as a whole"
    assert (dropped == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert not torch.equal(dropped[0], dropped[1])
    quarter = channel_dropout(f, 0.25, generator())
    assert set(quarter.unique().tolist()) == {0.0, 4.0}


def test_no_dropout_gives_the_features_back() -> None:
    f = random_image(2, 3, 4, 4)
    assert channel_dropout(f, 0.0, generator()) is f


def test_one_channel_is_always_kept() -> None:
    dropped = channel_dropout(torch.ones(400, 2, 1, 1), 0.7, generator())
    assert (dropped != 0).any(1).all()
    single = channel_dropout(torch.ones(50, 1, 2, 2), 0.5, generator())
    assert (single == 2).all()


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_dropping_everything_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"channel dropout is .* below 1"):
        channel_dropout(torch.ones(1, 2, 1, 1), p, generator())


def test_feature_noise_is_multiplicative_and_bounded() -> None:
    skips = [torch.full((2, 3, 16, 16), 2.0), torch.full((2, 5, 8, 8), -1.0)]
    noisy = perturb_features(skips, "noise", generator())
    assert [f.shape for f in noisy] == [f.shape for f in skips]
    ratio = (noisy[0] / skips[0]).flatten()
    assert ratio.min() >= 0.7
    assert ratio.max() <= 1.3
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.02)
    assert ratio.std().item() == pytest.approx(0.6 / math.sqrt(12), abs=0.01)


def test_attention_drop_removes_what_stands_out() -> None:
    f = torch.zeros(1, 2, 1, 4)
    f[0, :, 0] = torch.tensor([[1.0, 6.0, 9.5, 10.0]]).expand(2, -1)
    for seed in range(10):
        (kept,) = perturb_features([f], "attention", generator(seed))
        assert kept[0, 0, 0].tolist() == [1.0, 6.0, 0.0, 0.0], "below 0.7 of the maximum stays, from 0.9 on goes"
    between = torch.tensor([8.0, 10.0]).view(1, 1, 1, 2).expand(200, 1, 1, 2)
    (kept,) = perturb_features([between], "attention", generator())
    assert (kept[..., 0] > 0).float().mean().item() == pytest.approx(0.5, abs=0.12), "each sample has its threshold"


def test_feature_dropout_draws_anew_for_each_map() -> None:
    skips = [torch.ones(4, 16, 2, 2)] * 2
    first, second = perturb_features(skips, "dropout", generator())
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="'blur' is unknown"):
        perturb_features(skips, "blur", generator())  # type: ignore[arg-type]


def test_perturbations_let_gradients_through() -> None:
    kinds: tuple[Any, ...] = ("noise", "attention", "dropout")
    for kind in kinds:
        f = random_image(2, 4, 3, 3).requires_grad_()
        perturb_features([f], kind, generator())[0].sum().backward()
        assert f.grad is not None
        assert f.grad.abs().sum() > 0


def test_clipped_noise_is_bounded() -> None:
    noise = clipped_noise(torch.zeros(1, 2, 64, 64), generator(), 0.1, 0.2, (1.0, 10.0))
    assert noise[:, 0].abs().max().item() == pytest.approx(0.2)
    assert noise[:, 1].abs().max().item() == pytest.approx(2.0)
