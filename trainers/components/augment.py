"""Perturbations that methods apply on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def clipped_noise(
    x: Tensor,
    generator: torch.Generator,
    sigma: float = 0.1,
    clip: float = 0.2,
    channel_std: Sequence[float] | None = None,
) -> Tensor:
    """Independent noise per voxel, clip(N(0, sigma²), -clip, clip), of x's shape [N, Ci, *S].

    Args:
        x: gives shape, device and type.
        generator: on x's device.
        sigma: in units of each channel's standard deviation.
        clip: in the same units.
        channel_std: standard deviation per channel; None: 1 everywhere.
    """
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype).mul_(sigma).clamp_(-clip, clip)
    if channel_std is not None and any(std != 1.0 for std in channel_std):
        noise *= torch.tensor(channel_std, device=x.device, dtype=x.dtype).view(1, -1, *[1] * (x.ndim - 2))
    return noise
