"""Stage loops equal the network's own forward pass, and taps give the maps they name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autossl.networks.build import build_network, set_deep_supervision
from autossl.networks.features import decode, encode, forward_features, tap_channels
from autossl.planners.plans import NETWORK_CLASSES, Architecture

SHAPES = {"2d": (16, 16), "isotropic": (8, 16, 16), "anisotropic": (6, 16, 16)}


def architecture_of(kind: str, geometry: str) -> Architecture:
    dims = len(SHAPES[geometry])
    flat = geometry == "anisotropic"
    kwargs: dict[str, Any] = {
        "n_stages": 3,
        "features_per_stage": [4, 6, 8],
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": [[1, 3, 3] if flat else [3] * dims, [3] * dims, [3] * dims],
        "strides": [[1] * dims, [1, 2, 2] if flat else [2] * dims, [2] * dims],
        ("n_conv_per_stage" if kind == "plain" else "n_blocks_per_stage"): [1, 2, 1],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return Architecture(network_class_name=NETWORK_CLASSES[kind], arch_kwargs=kwargs)


def network_of(kind: str, geometry: str) -> nn.Module:
    return build_network(architecture_of(kind, geometry), 2, 3, seed=1)


@pytest.mark.parametrize("kind", ["plain", "resenc"])
@pytest.mark.parametrize("geometry", list(SHAPES))
def test_encode_and_decode_equal_the_network(kind: str, geometry: str) -> None:
    network = network_of(kind, geometry)
    image = torch.rand(2, 2, *SHAPES[geometry])
    expected = network(image)
    logits, features = decode(network, encode(network, image))
    assert len(logits) == len(expected) == len(features) == 2
    for ours, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    set_deep_supervision(network, False)
    (alone,), _ = decode(network, encode(network, image))
    torch.testing.assert_close(alone, network(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize("kind", ["plain", "resenc"])
@pytest.mark.parametrize("geometry", list(SHAPES))
def test_forward_features_equals_the_network(kind: str, geometry: str, deep_supervision: bool) -> None:
    network = network_of(kind, geometry)
    set_deep_supervision(network, deep_supervision)
    image = torch.rand(2, 2, *SHAPES[geometry])
    answer = network(image)
    expected = answer if deep_supervision else [answer]
    logits, _ = forward_features(network, image, ("bottleneck", "dec:last"))
    assert len(logits) == len(expected) == (2 if deep_supervision else 1)
    for ours, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "resenc"])
@pytest.mark.parametrize("geometry", list(SHAPES))
def test_tap_channels_and_strides_tell_the_shape_of_every_tap(kind: str, geometry: str) -> None:
    architecture = architecture_of(kind, geometry)
    stages = {"enc:0": 0, "enc:1": 1, "enc:-1": 2, "bottleneck": 2, "dec:0": 1, "dec:1": 0, "dec:-2": 1, "dec:last": 0}
    image = torch.rand(1, 2, *SHAPES[geometry])
    _, maps = forward_features(network_of(kind, geometry), image, tuple(stages))
    for tap, stage in stages.items():
        factors = architecture.cumulative_strides[stage]
        size = tuple(side // factor for side, factor in zip(SHAPES[geometry], factors, strict=True))
        assert maps[tap].shape == (1, tap_channels(architecture, tap), *size), tap


def test_taps_have_the_sizes_of_their_stages_and_the_last_one_feeds_the_head() -> None:
    network = network_of("plain", "anisotropic")
    image = torch.rand(1, 2, *SHAPES["anisotropic"])
    taps = ("enc:0", "enc:-1", "bottleneck", "dec:0", "dec:-1", "dec:last")
    logits, maps = forward_features(network, image, taps)
    assert maps["enc:0"].shape == (1, 4, 6, 16, 16)
    assert maps["bottleneck"].shape == (1, 8, 3, 4, 4)
    assert maps["enc:-1"] is maps["bottleneck"]
    assert maps["dec:0"].shape == (1, 6, 6, 8, 8)
    assert maps["dec:-1"] is maps["dec:last"]
    head: nn.Module = network.decoder.seg_layers[-1]  # type: ignore[union-attr, index, assignment]
    torch.testing.assert_close(head(maps["dec:last"]), logits[0])


def test_perturbations_act_where_they_say() -> None:
    network = network_of("resenc", "2d")
    image = torch.rand(1, 2, *SHAPES["2d"])
    clean, _ = forward_features(network, image)

    def silent_bottleneck(skips: list[Tensor]) -> list[Tensor]:
        return [*skips[:-1], skips[-1] * 0]

    changed, maps = forward_features(network, image, ("bottleneck", "enc:0"), perturb=silent_bottleneck)
    assert maps["bottleneck"].abs().max() == 0
    assert maps["enc:0"].abs().max() > 0
    assert not torch.allclose(changed[0], clean[0])
    zeroed, maps = forward_features(network, image, ("dec:last",), perturb_last=torch.zeros_like)
    assert maps["dec:last"].abs().max() == 0
    assert torch.equal(zeroed[1], clean[1])  # the lower level does not pass through it
    bias: Tensor = network.decoder.seg_layers[-1].bias  # type: ignore[union-attr, index, assignment]
    torch.testing.assert_close(zeroed[0], bias.view(1, -1, 1, 1).expand_as(zeroed[0]))


def test_gradients_flow_through_the_taps() -> None:
    network = network_of("plain", "2d")
    _, maps = forward_features(network, torch.rand(1, 2, *SHAPES["2d"]), ("dec:last",))
    maps["dec:last"].sum().backward()
    assert next(network.parameters()).grad is not None


@pytest.mark.parametrize("tap", ["enc:9", "middle", "dec:x", "last"])
def test_unknown_taps_are_named(tap: str) -> None:
    with pytest.raises(ValueError, match=f"tap '{tap}'"):
        forward_features(network_of("plain", "2d"), torch.rand(1, 2, *SHAPES["2d"]), (tap,))
    with pytest.raises(ValueError, match=f"tap '{tap}'"):
        tap_channels(architecture_of("plain", "2d"), tap)
