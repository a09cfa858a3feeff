"""LeakyReLU as PyTorch's, and that networks of a plan have it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autossl.networks.activations import LeakyReLU
from autossl.networks.build import build_network
from toys import toy_architecture


def step(norm: nn.Module, act: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of what went in."""
    x = x.clone().requires_grad_()
    y = act(norm(x))
    (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("slope", [0.01, 0.3, 0.0, -0.1])
def test_bits_are_those_of_pytorch(slope: float) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = 0
    norm = nn.InstanceNorm2d(3, affine=True)
    inplace = slope > 0
    mine, theirs = (step(norm, kind(slope, inplace), x) for kind in (LeakyReLU, nn.LeakyReLU))
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[1], theirs[1])
    with torch.no_grad():
        assert torch.equal(LeakyReLU(slope)(x), nn.LeakyReLU(slope)(x))


def test_one_tensor_is_kept_and_nothing_is_changed_in_place() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    between = nn.InstanceNorm2d(3)(x)
    before = between.detach().clone()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = LeakyReLU(0.01, inplace=True)(between)
    assert [t.data_ptr() for t in kept] == [y.data_ptr()]
    assert torch.equal(between, before)


def test_second_derivatives_are_there() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(LeakyReLU(0.1), x)
    torch.autograd.gradgradcheck(lambda v: LeakyReLU(0.1)(v).square(), x)


def test_networks_of_a_plan_have_it() -> None:
    network = build_network(toy_architecture(2), 1, 2, seed=0)
    found = [module for module in network.modules() if isinstance(module, nn.LeakyReLU)]
    assert found
    assert all(isinstance(module, LeakyReLU) for module in found)
