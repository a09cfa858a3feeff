"""The projector head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autossl.trainers.components.heads import Projector


def features(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_formula() -> None:
    head = Projector(3, 2, hidden=4, norm=None, seed=0)
    f = features(2, 3, 5, 6)
    first, last = head.first, head.last
    hidden = nn.functional.leaky_relu(nn.functional.conv2d(f, first.weight[..., None, None], first.bias), 0.01)
    e = nn.functional.conv2d(hidden, last.weight[..., None, None], last.bias)
    torch.testing.assert_close(head(f), e / e.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6)])
@pytest.mark.parametrize("norm", ["instance", None])
@pytest.mark.parametrize("act", ["leaky_relu", "prelu"])
def test_unit_vectors_of_the_maps_shape(shape: tuple[int, ...], norm: str | None, act: str) -> None:
    head = Projector(3, 5, norm=norm, act=act, seed=0)  # type: ignore[arg-type]
    e = head(features(2, 3, *shape))
    assert e.shape == (2, 5, *shape)
    torch.testing.assert_close(e.norm(dim=1), torch.ones(2, *shape))
    assert any(isinstance(module, nn.InstanceNorm1d) for module in head.modules()) == (norm == "instance")
    assert any(isinstance(module, nn.PReLU) for module in head.modules()) == (act == "prelu")
    assert head.first.out_features == 3, "hidden is c_in by default"


def test_statistics_are_per_image() -> None:
    head, f = Projector(3, 5, seed=0), features(2, 3, 4, 6)
    torch.testing.assert_close(head(f)[1:], head(f[1:]))
    torch.testing.assert_close(head(f), head(3 * f), atol=1e-4, rtol=1e-4)


def test_projecting_commutes_with_sampling() -> None:
    head, f = Projector(3, 5, norm=None, act="prelu", seed=0), features(2, 3, 4, 6)
    of_map = head(f).permute(0, 2, 3, 1).reshape(-1, 5)
    torch.testing.assert_close(head(f.permute(0, 2, 3, 1).reshape(-1, 3)), of_map)
    assert head(features(0, 3)).shape == (0, 5)


def test_global_pooling_comes_first() -> None:
    head, f = Projector(3, 5, norm=None, pool="global", seed=0), features(2, 3, 4, 6)
    torch.testing.assert_close(head(f), head(f.mean((2, 3))))
    assert head(f).shape == (2, 5)


@pytest.mark.parametrize("cells", [(2, 3), (1, 2, 3)])
def test_a_grid_pools_the_embedding(cells: tuple[int, ...]) -> None:
    f = features(2, 3, *(2 * n for n in cells))
    plain, pooled = (Projector(3, 5, pool=pool, seed=0) for pool in (None, cells))
    pool = nn.AvgPool2d(2) if len(cells) == 2 else nn.AvgPool3d(2)
    e = pool(plain._project(f.flatten(2)).unflatten(2, f.shape[2:]))
    torch.testing.assert_close(pooled(f), e / e.norm(dim=1, keepdim=True))
    assert pooled(f).shape == (2, 5, *cells)


def test_the_norm_is_float32_under_autocast() -> None:
    head = Projector(3, 5, norm=None, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        e = head(features(2, 3, 4, 6))
    assert e.dtype == torch.float32
    torch.testing.assert_close(e.norm(dim=1), torch.ones(2, 4, 6))


def test_zeros_have_finite_gradients() -> None:
    head = Projector(3, 5, norm=None, seed=0)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    e = head(features(2, 3))
    e.sum().backward()
    assert not e.any()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters() if parameter.grad is not None)


def test_weights_come_from_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (Projector(3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.last.weight, again.last.weight)
    assert not torch.equal(first.last.weight, other.last.weight)


def test_a_norm_layer_needs_a_map() -> None:
    with pytest.raises(ValueError, match="use norm=None"):
        Projector(3, pool="global", seed=0)
    with pytest.raises(ValueError, match=r"vectors of shape \(7, 3\).*expected a map"):
        Projector(3, seed=0)(features(7, 3))
