"""The price of a network by nnU-Net v2's measure: elements of all feature maps that convolutions write, batch 1.

Each part reports its own cost from sizes alone: no weight is ever allocated, one estimate takes microseconds. A test
compares the figures with the networks themselves, built on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NetworkShape:
    """What the price depends on. Kernel sizes and input channels do not matter: only outputs are counted."""

    kind: Literal["plain", "resenc"]
    features: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    encoder_blocks: tuple[int, ...]
    """Per stage: convolutions (plain) or residual blocks (resenc)."""
    decoder_convolutions: tuple[int, ...]
    """Per decoder stage, the deepest first."""
    n_outputs: int
    """Channels of the output layer, as nnU-Net prices it: every name in dataset.json's labels counts."""


def feature_map_elements(network: NetworkShape, patch_size: Sequence[int], deep_supervision: bool = False) -> int:
    """Elements of the feature maps of one forward pass of one patch; plans are made without deep-supervision heads."""
    sizes = _stage_voxels(network.strides, patch_size)
    encoder = _plain_encoder(network, sizes) if network.kind == "plain" else _residual_encoder(network, sizes)
    return encoder + _decoder(network, sizes, deep_supervision)


def _stage_voxels(strides: Sequence[Sequence[int]], patch_size: Sequence[int]) -> list[int]:
    size, voxels = list(patch_size), []
    for stride in strides:
        size = [edge // step for edge, step in zip(size, stride, strict=True)]
        voxels.append(math.prod(size))
    return voxels


def _plain_encoder(network: NetworkShape, sizes: Sequence[int]) -> int:
    return sum(
        blocks * width * size
        for blocks, width, size in zip(network.encoder_blocks, network.features, sizes, strict=True)
    )


def _residual_encoder(network: NetworkShape, sizes: Sequence[int]) -> int:
    total = network.features[0] * sizes[0]  # stem
    before = network.features[0]
    for blocks, width, stride, size in zip(
        network.encoder_blocks, network.features, network.strides, sizes, strict=True
    ):
        # A skip path that pools or projects is counted as one more map of the block's own width, in the first block.
        has_skip_path = width != before or any(step != 1 for step in stride)
        total += (2 * blocks + has_skip_path) * width * size
        before = width
    return total


def _decoder(network: NetworkShape, sizes: Sequence[int], deep_supervision: bool) -> int:
    widths_up = list(zip(network.features[:-1], sizes[:-1], strict=True))[::-1]
    total = 0
    for convolutions, (width, size) in zip(network.decoder_convolutions, widths_up, strict=True):
        total += (convolutions + 1) * width * size  # + 1: the transposed convolution
    heads = sizes[:-1] if deep_supervision else sizes[:1] if widths_up else []
    return total + network.n_outputs * sum(heads)
