"""Volumes as slices and back, and the 2D networks that see them."""

from __future__ import annotations

import pytest
import torch
from tiny_weights import tiny_weights_file
from torch import nn

from autossl.networks.build import build_network
from autossl.networks.encoders2d import Encoder2D, pretrained_encoder, read_encoder_weights
from autossl.networks.slices import (
    ChannelMapping,
    PretrainedUNet,
    SliceWise,
    plane_architecture,
    to_slices,
    to_volume,
)
from toys import toy_architecture


def tiny_encoder() -> Encoder2D:
    return pretrained_encoder(read_encoder_weights(tiny_weights_file()))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("n", [1, 3])
def test_slices_become_the_same_volume_again(n: int, axis: int) -> None:
    volume = torch.randn(n, 2, 3, 4, 5)
    slices = to_slices(volume, axis)
    assert torch.equal(to_volume(slices, n, axis), volume)
    edge = volume.shape[2 + axis]
    assert slices.shape == (n * edge, 2, *(size for a, size in enumerate((3, 4, 5)) if a != axis))
    for index in range(n * edge):
        assert torch.equal(slices[index], volume[index // edge].select(1 + axis, index % edge)), "volume by volume"


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_slice_is_segmented_for_itself_at_its_own_size(axis: int) -> None:
    network = SliceWise(PretrainedUNet(tiny_encoder(), (1.0,), 3, seed=0), 32)
    volume = torch.randn(2, 1, 5, 37, 40, generator=torch.Generator().manual_seed(0))
    (z,) = network(volume, axis)
    assert z.shape == (2, 3, 5, 37, 40)
    changed = volume.clone()
    changed.select(2 + axis, 3).add_(1)
    (other,) = network(changed, axis)
    moved = (z != other).movedim(2 + axis, 0).flatten(1).any(1)
    assert moved.tolist() == [index == 3 for index in range(volume.shape[2 + axis])]


def test_padding_is_taken_off_where_it_was_put_on() -> None:
    class Plane(nn.Module):
        """Says what it sees."""

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            assert image.shape == (6, 1, 32, 64)
            assert float(image[:, :, 30:].abs().sum() + image[:, :, :, 40:].abs().sum()) == 0
            return image

    volume = torch.randn(2, 1, 3, 30, 40)
    assert torch.equal(SliceWise(Plane(), 32)(volume)[0], volume)


def test_channels_are_mapped_to_those_of_the_encoder() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(ChannelMapping((1.0, 1.0, 1.0), 3)(x), x)
    assert torch.equal(ChannelMapping((1.0,), 3)(x[:, :1]), x[:, :1].repeat(1, 3, 1, 1))
    mixed = ChannelMapping((1.0, 1.0), 3)
    torch.testing.assert_close(mixed(x[:, :2]), x[:, :2].mean(1, keepdim=True).repeat(1, 3, 1, 1))
    assert sum(p.numel() for p in mixed.parameters()) == 3 * 2 + 3
    assert torch.equal(ChannelMapping((0.5,), 3)(x[:, :1]), 2 * x[:, :1].repeat(1, 3, 1, 1)), "unit variance"


def test_the_encoder_sees_values_as_it_saw_photographs() -> None:
    encoder, seen = tiny_encoder(), []
    encoder.input_mean, encoder.input_std = -0.1, 0.45
    encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    image = 3 * torch.randn(2, 1, 64, 64)
    PretrainedUNet(encoder, (3.0,), 3, seed=0)(image)
    torch.testing.assert_close(seen[0], (0.45 * image / 3 - 0.1).repeat(1, encoder.in_channels, 1, 1))


def test_the_decoder_comes_from_its_seed_and_uses_every_level() -> None:
    networks = [PretrainedUNet(tiny_encoder(), (1.0,), 3, seed) for seed in (0, 0, 1)]
    states = [network.decoder.state_dict() for network in networks]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])
    image = torch.randn(2, 1, 64, 64)
    networks[0](image).square().sum().backward()
    silent = [name for name, p in networks[0].named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert silent == []


@pytest.mark.parametrize("anisotropic", [False, True])
def test_the_plan_in_two_dimensions(anisotropic: bool) -> None:
    architecture = toy_architecture(3, (4, 8, 8), anisotropic)
    flat = plane_architecture(architecture)
    assert flat.dims == 2
    assert flat.cumulative_strides == [stride[1:] for stride in architecture.cumulative_strides]
    network = build_network(flat, 1, 3, deep_supervision=False, seed=0)
    assert network(torch.zeros(1, 1, 16, 16)).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="2 dimensions"):
        plane_architecture(flat)
