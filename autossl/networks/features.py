"""Encoder, decoder and feature taps of a U-Net as plain loops over its stages: no hooks, so compile and DDP are safe.

Taps: `enc:i` (0 = full resolution, negative from the deepest), `bottleneck` = `enc:-1`, `dec:i` (0 = deepest,
negative from the full resolution), `dec:last` = input of the last segmentation layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autossl.planners.plans import Architecture

Skips = list[Tensor]
_Entry = TypeVar("_Entry")


def encode(network: nn.Module, image: Tensor) -> Skips:
    """Feature maps of the encoder's stages `[N,c_i,*S_i]`, full resolution first, the bottleneck last."""
    encoder: Any = network.encoder
    features = image
    stem = getattr(encoder, "stem", None)  # residual encoders only
    if stem is not None:
        features = stem(features)
    skips = []
    for stage in encoder.stages:
        features = stage(features)
        skips.append(features)
    return skips


def decode(
    network: nn.Module, skips: Sequence[Tensor], perturb_last: Callable[[Tensor], Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and decoder features from the encoder's feature maps.

    Args:
        network: a U-Net of `build_network`.
        skips: as `encode` gives them.
        perturb_last: function of `dec:last`, applied before the last segmentation layer.

    Returns:
        Logits, full resolution first: all levels with deep supervision, else that one alone; and the feature maps
        of the decoder's stages, deepest first (the last one after `perturb_last`).
    """
    decoder: Any = network.decoder
    below = skips[-1]
    n_stages = len(decoder.stages)
    logits: list[Tensor] = []
    features: list[Tensor] = []
    for index in range(n_stages):
        up = decoder.transpconvs[index](below)
        below = decoder.stages[index](torch.cat((up, skips[-(index + 2)]), 1))
        last = index == n_stages - 1
        if last and perturb_last is not None:
            below = perturb_last(below)
        features.append(below)
        if last or decoder.deep_supervision:
            logits.append(decoder.seg_layers[index](below))
    return logits[::-1], features


def forward_features(
    network: nn.Module,
    image: Tensor,
    taps: Sequence[str] = (),
    perturb: Callable[[Skips], Skips] | None = None,
    perturb_last: Callable[[Tensor], Tensor] | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits, as `decode` gives them, and the named feature maps `{tap: [N,c,*S_tap]}` of one forward pass.

    Args:
        network: a U-Net of `build_network`.
        image: `[N,Ci,*S]`.
        taps: names as the module describes them.
        perturb: function of the list of skips, applied before decoding; `enc:` taps show its result.
        perturb_last: function of `dec:last`; that tap shows its result.

    Raises:
        ValueError: an unknown tap.
    """
    skips = encode(network, image)
    if perturb is not None:
        skips = perturb(skips)
    logits, features = decode(network, skips, perturb_last)
    return logits, {tap: _tapped(tap, skips, features) for tap in taps}


def tap_channels(architecture: Architecture, tap: str) -> int:
    """Channels of the map that `forward_features` gives for a tap.

    Raises:
        ValueError: an unknown tap.
    """
    widths: Sequence[int] = architecture.arch_kwargs["features_per_stage"]
    return _tapped(tap, widths, widths[-2::-1])


def _tapped(tap: str, skips: Sequence[_Entry], features: Sequence[_Entry]) -> _Entry:
    """The entry of a tap among the encoder's stages (full resolution first) and the decoder's (deepest first)."""
    if tap == "bottleneck":
        return skips[-1]
    side, _, position = tap.partition(":")
    maps = {"enc": skips, "dec": features}.get(side)
    try:
        if maps is not None:
            return maps[-1 if tap == "dec:last" else int(position)]
    except (ValueError, IndexError):
        pass
    raise ValueError(
        f"tap '{tap}' is unknown: expected bottleneck, dec:last, enc:i with i below {len(skips)} "
        f"or dec:i with i below {len(features)}"
    )
