"""The price of a network equals what the network says of itself, built on the meta device."""

from __future__ import annotations

import pydoc
from typing import Any

import pytest
import torch

from autossl.planners.configurations import build_architecture
from autossl.planners.memory import NetworkShape, feature_map_elements
from autossl.planners.presets import PRESETS, Preset
from autossl.planners.topology import derive_topology


def _measured(preset: Preset, spacing: tuple[float, ...], patch: tuple[int, ...], outputs: int, heads: bool) -> int:
    architecture = build_architecture(preset, derive_topology(spacing, patch))
    kwargs: dict[str, Any] = {
        key: pydoc.locate(value) if key in architecture.kw_requires_import and value else value
        for key, value in architecture.arch_kwargs.items()
    }
    network_class: Any = pydoc.locate(architecture.network_class_name)
    with torch.device("meta"):
        network = network_class(input_channels=3, num_classes=outputs, deep_supervision=heads, **kwargs)
    return int(network.compute_conv_feature_map_size(patch))


@pytest.mark.parametrize("name", ["plain", "resenc_l", "nano"])
@pytest.mark.parametrize(
    ("spacing", "patch"),
    [((1, 1, 1), (64, 96, 64)), ((6, 1, 1), (24, 256, 224)), ((1, 1), (640, 896)), ((3, 1), (9, 64))],
)
def test_price_of_real_networks(name: str, spacing: tuple[float, ...], patch: tuple[int, ...]) -> None:
    topology = derive_topology(spacing, patch)
    assert PRESETS[name].cost(topology, n_outputs=5) == _measured(PRESETS[name], spacing, topology.patch_size, 5, False)


@pytest.mark.parametrize(("name", "elements"), [("plain", 453_160_960), ("resenc_m", 557_723_648)])
def test_reference_figures_of_five_stages_at_128_cubed(name: str, elements: int) -> None:
    preset = PRESETS[name]
    shape = NetworkShape(
        kind=preset.network,
        features=preset.features(5, 3),
        strides=((1, 1, 1), *((2, 2, 2),) * 4),
        encoder_blocks=preset.encoder_blocks(5),
        decoder_convolutions=preset.decoder_convolutions(5),
        n_outputs=3,
    )
    assert feature_map_elements(shape, (128, 128, 128), deep_supervision=True) == elements


def test_a_price_by_hand() -> None:
    shape = NetworkShape("plain", (2, 4), ((1, 1), (2, 2)), (2, 1), (1,), n_outputs=3)
    # encoder 2 × 2 × 16 + 1 × 4 × 4; decoder one transposed and one plain convolution of 2 × 16; output 3 × 16
    assert feature_map_elements(shape, (4, 4)) == 64 + 16 + 64 + 48
    shape = NetworkShape("resenc", (2, 4), ((1, 1), (2, 2)), (1, 2), (1,), n_outputs=3)
    # stem 2 × 16; block 2 × 2 × 16; first of stage 2 with a skip path 3 × 4 × 4, second 2 × 4 × 4
    assert feature_map_elements(shape, (4, 4)) == 32 + 64 + 48 + 32 + 64 + 48
