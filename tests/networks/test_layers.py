"""Layers as PyTorch's, the layout they keep, and that networks of a plan have them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autossl.networks.build import build_network
from autossl.networks.layers import InstanceNorm2d, InstanceNorm3d, LeakyReLU, join_activations, to_channels_last
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


def drawn(*shape: int, channels_last: bool = False) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=layout) if channels_last else x


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 3, 4, 5, 6), (1, 2, 8, 8)])
def test_norm_of_channels_last_is_pytorchs_and_stays_channels_last(shape: tuple[int, ...]) -> None:
    ours, theirs = (InstanceNorm2d, nn.InstanceNorm2d) if len(shape) == 4 else (InstanceNorm3d, nn.InstanceNorm3d)
    gradient = drawn(*shape).flip(0)
    found = []
    for kind, channels_last in ((ours, True), (theirs, False)):
        norm = kind(shape[1], affine=True, dtype=torch.float64)
        with torch.no_grad():
            norm.weight.copy_(torch.arange(1, shape[1] + 1))
            norm.bias.copy_(torch.arange(shape[1]))
        x = drawn(*shape, channels_last=channels_last).requires_grad_()
        y = norm(x)
        found.append((y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), gradient)))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)
    assert all(t.stride() == drawn(*shape, channels_last=True).stride() for t in found[0][:2])


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_joined_activation_changes_no_bit(channels_last: bool) -> None:
    apart, joined = (nn.Sequential(InstanceNorm2d(3, affine=True), LeakyReLU(0.01)).double() for _ in range(2))
    join_activations(joined)
    assert isinstance(joined[1], nn.Identity)
    found = []
    for network in (apart, joined):
        x = drawn(2, 3, 4, 5, channels_last=channels_last).requires_grad_()
        y = network(x)
        found.append((y, *torch.autograd.grad(y, (x, *network.parameters()), drawn(2, 3, 4, 5).flip(0))))
    assert (found[0][0] < 0).any()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    with torch.no_grad():
        assert torch.equal(joined(drawn(2, 3, 4, 5, channels_last=channels_last)), found[0][0])


def test_norm_of_channels_first_has_pytorchs_bits() -> None:
    x = drawn(2, 3, 8, 8)
    norm, expected = InstanceNorm2d(3, affine=True).double(), nn.InstanceNorm2d(3, affine=True).double()
    assert torch.equal(norm(x), expected(x))


def test_second_derivatives_of_the_norm_are_there() -> None:
    norm = InstanceNorm2d(2, affine=True).double()
    x = drawn(2, 2, 3, 3, channels_last=True).requires_grad_()
    torch.autograd.gradcheck(norm, x)
    torch.autograd.gradgradcheck(lambda v: norm(v).square(), x)
    norm.slope = 0.1
    torch.autograd.gradcheck(norm, x)
    torch.autograd.gradgradcheck(lambda v: norm(v).square(), x)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_networks_stay_channels_last_from_end_to_end(dimensions: int) -> None:
    """Nothing between the convolutions goes back to channels first; the values are those of channels first."""
    network = build_network(toy_architecture(dimensions), 2, 3, seed=0)
    x = torch.randn(2, 2, *[32] * dimensions, generator=torch.Generator().manual_seed(0))
    expected = network(x)
    names = list(network.state_dict())
    to_channels_last(network)
    assert list(network.state_dict()) == names
    layout = torch.channels_last if dimensions == 2 else torch.channels_last_3d
    seen = []
    for module in network.modules():
        if isinstance(module, InstanceNorm2d | InstanceNorm3d | nn.Identity):
            module.register_forward_hook(lambda _, ins, out: seen.append((ins[0], out)))
    found = network(x)
    assert len(seen) >= 6
    assert all(t.is_contiguous(memory_format=layout) for pair in seen for t in pair)
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-4)
    found[0].square().mean().backward()
    assert all(p.grad is not None for name, p in network.named_parameters() if "seg_layers" not in name)


def test_networks_of_a_plan_have_them() -> None:
    modules = list(build_network(toy_architecture(2), 1, 2, seed=0).modules())
    for ours, theirs in ((LeakyReLU, nn.LeakyReLU), (InstanceNorm2d, nn.InstanceNorm2d)):
        found = [module for module in modules if isinstance(module, theirs)]
        assert found
        assert all(isinstance(module, ours) for module in found)
