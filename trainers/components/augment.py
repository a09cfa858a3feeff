"""Perturbations of images and features that methods apply on the device. All draws come from a given generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLUR_REACH = 4.0
"""A blur kernel ends this many sigmas from its middle."""
EPS = 1e-8

Perturbation = Literal["noise", "attention", "dropout"]


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


# ------------------------------------------------------------------------------------------------------- strong view


@dataclass(frozen=True)
class IntensityChange:
    """What was drawn for each of N samples [N]; neutral where a change was not drawn. The channels share it."""

    factor: Tensor
    shift: Tensor
    """In standard deviations of the channel."""
    contrast: Tensor
    gamma: Tensor
    blur: Tensor
    """Sigma in voxels of the finest axis; 0: none."""
    noise: Tensor
    """Sigma in standard deviations of the channel; 0: none."""

    @classmethod
    def draw(cls, n: int, generator: torch.Generator) -> IntensityChange:
        """Each change with its own probability, for each sample on its own."""
        # One table whatever is chosen, so that a sample's draws do not depend on those of the others.
        table = torch.rand(n, 11, generator=generator, device=generator.device).cpu()
        chance, position = table[:, :5], table[:, 5:]

        def drawn(index: int, place: int, p: float, low: float, high: float, neutral: float) -> Tensor:
            return torch.where(chance[:, index] < p, low + (high - low) * position[:, place], neutral)

        return cls(
            factor=drawn(0, 0, 0.8, 0.5, 1.5, 1.0),
            shift=drawn(0, 1, 0.8, -0.5, 0.5, 0.0),
            contrast=drawn(1, 2, 0.8, 0.5, 1.5, 1.0),
            gamma=drawn(2, 3, 0.3, 0.7, 1.5, 1.0),
            blur=drawn(3, 4, 0.5, 0.1, 2.0, 0.0),
            noise=drawn(4, 5, 0.3, 0.0, 0.1, 0.0),
        )


@dataclass(frozen=True)
class StrongAugment:
    """The strong view of an image: the same geometry, other intensities.

    Brightness, contrast about the mean, gamma, Gaussian blur and noise, then clipped to the input's range ± 20 %; range
    and mean are those of each sample's channel. Source: the strong view of UniMatch (Yang et al., CVPR 2023; color
    jitter and blur), moved to normalized medical intensities; gamma, noise and the clipping are ours.
    """

    spacing: tuple[float, ...]
    """Mm per axis of the patch: a coarse axis is blurred over fewer voxels, the same way in mm."""
    channel_std: tuple[float, ...]
    """Standard deviation of each normalized channel, the unit of shift and noise."""
    zero_outside: tuple[bool, ...] = ()
    """Channels that were normalized within their non-zero mask: what is 0 there stays 0. Empty: none."""

    @torch.no_grad()
    def __call__(self, x: Tensor, generator: torch.Generator, valid: Tensor | None = None) -> Tensor:
        """A changed copy of x [N, Ci, *S].

        Args:
            x: images, float.
            generator: of all draws, on the CPU or on x's device.
            valid: boolean [N, 1, *S]; voxels outside the image (False) keep their value and count in no statistic.
        """
        with torch.autocast(x.device.type, enabled=False):
            return self.apply(x, IntensityChange.draw(len(x), generator), generator, valid)

    def apply(
        self, x: Tensor, change: IntensityChange, generator: torch.Generator, valid: Tensor | None = None
    ) -> Tensor:
        """Applies what was drawn; the generator gives the noise."""
        moving = self._moving(x, valid)
        low, high, _ = _statistics(x, moving)
        std = torch.tensor(self.channel_std, device=x.device, dtype=x.dtype).view(1, -1, *[1] * (x.ndim - 2))
        y = x * _column(change.factor, x) + _column(change.shift, x) * std
        mean = _statistics(y, moving)[2]
        y = (y - mean) * _column(change.contrast, x) + mean
        rows = _rows(change.gamma != 1)
        if rows:
            y[rows] = _gamma(y[rows], _column(change.gamma[rows], x), moving[rows])
        rows = _rows(change.blur > 0)
        if rows:
            y[rows] = blurred(y[rows], change.blur[rows], self.spacing)
        rows = _rows(change.noise > 0)
        if rows:
            noise = torch.randn(y[rows].shape, generator=generator, device=generator.device, dtype=x.dtype)
            y[rows] += noise.to(x.device) * _column(change.noise[rows], x) * std
        margin = 0.2 * (high - low)
        return torch.where(moving, y.clamp(low - margin, high + margin), x)

    def _moving(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Boolean [N, Ci, *S]: the voxels whose values may change."""
        moving = torch.ones_like(x, dtype=torch.bool) if valid is None else valid.expand_as(x)
        if any(self.zero_outside):
            flags = torch.tensor(self.zero_outside, device=x.device).view(1, -1, *[1] * (x.ndim - 2))
            moving = moving & ~(flags & (x == 0))
        return moving


def blurred(x: Tensor, sigma: Tensor, spacing: Sequence[float]) -> Tensor:
    """Gaussian blur of x [N, C, *S] with one sigma per sample [N], in voxels of the finest axis; edges are continued.

    A separable blur: each axis is multiplied by a band matrix per sample, so that samples with different sigmas go
    together. An axis with k times the finest spacing gets sigma / k voxels.
    """
    finest = min(spacing)
    for axis, (size, step) in enumerate(zip(x.shape[2:], spacing, strict=True), start=2):
        own = sigma * (finest / step)
        reach = int(torch.ceil(BLUR_REACH * own.max()))
        source = torch.arange(-reach, size + reach)
        offset = (source[:, None] - torch.arange(size)[None]).float()
        exponent = -(offset**2) / (2 * own.view(-1, 1, 1) ** 2).clamp(min=EPS)
        exponent = exponent.masked_fill(offset.abs() > reach, float("-inf"))
        kernel = torch.softmax(exponent, 1).to(device=x.device, dtype=x.dtype)  # [N, S + 2·reach, S]
        continued = x.index_select(axis, source.clamp(0, size - 1).to(x.device)).movedim(axis, -1)
        shape = (*continued.shape[:-1], size)
        x = torch.bmm(continued.flatten(1, -2), kernel).view(shape).movedim(-1, axis)
    return x


def _statistics(x: Tensor, moving: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Minimum, maximum and mean per sample and channel over the moving voxels, [N, C, 1, …]."""
    axes = tuple(range(2, x.ndim))
    low = torch.where(moving, x, float("inf")).amin(axes, keepdim=True)
    high = torch.where(moving, x, float("-inf")).amax(axes, keepdim=True)
    mean = torch.where(moving, x, 0).sum(axes, keepdim=True) / moving.sum(axes, keepdim=True).clamp(min=1)
    return low, high, mean


def _gamma(x: Tensor, gamma: Tensor, moving: Tensor) -> Tensor:
    low, high, _ = _statistics(x, moving)
    extent = (high - low).clamp(min=EPS)
    return ((x - low) / extent).clamp(0, 1) ** gamma * extent + low


def _column(values: Tensor, x: Tensor) -> Tensor:
    """One value per sample, ready to be multiplied with x."""
    return values.to(device=x.device, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))


def _rows(chosen: Tensor) -> list[int]:
    return chosen.nonzero()[:, 0].tolist()


# ---------------------------------------------------------------------------------------------------------- features


def channel_dropout(f: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Sets whole channels of f [N, c, *S] to 0 with probability p, the others are multiplied by 1 / (1 - p).

    Each sample draws for itself; where all of its channels would go, it draws again, so that one is always kept.

    Args:
        f: feature maps.
        p: 0 gives f back as it is.
        generator: on the CPU or on f's device.

    Raises:
        ValueError: p is not in [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"channel dropout is {p}; expected at least 0 and below 1: something must be kept")
    if p == 0:
        return f
    kept = torch.rand(f.shape[:2], generator=generator, device=generator.device) >= p
    while (empty := ~kept.any(1)).any():
        again = torch.rand((int(empty.sum()), f.shape[1]), generator=generator, device=generator.device) >= p
        kept[empty] = again
    scale = kept.to(device=f.device, dtype=f.dtype) / (1 - p)
    return f * scale.view(*f.shape[:2], *[1] * (f.ndim - 2))


def perturb_features(skips: Sequence[Tensor], kind: Perturbation, generator: torch.Generator) -> list[Tensor]:
    """Perturbs every feature map [N, c, *S_i] of a list; each map and each sample draws for itself.

    noise: times 1 + U(-0.3, 0.3) per value. attention: voxels whose mean over the channels reaches U(0.7, 0.9) of the
    sample's largest are set to 0, so that the rest has to do. dropout: whole channels with probability 0.5.
    Source: Ouali et al., CVPR 2020 (cross-consistency training); drawing per sample is ours.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "noise":
        return [_feature_noise(f, generator) for f in skips]
    if kind == "attention":
        return [_attention_drop(f, generator) for f in skips]
    if kind == "dropout":
        return [channel_dropout(f, 0.5, generator) for f in skips]
    raise ValueError(f"feature perturbation '{kind}' is unknown; expected noise, attention or dropout")


def _feature_noise(f: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(f.shape, generator=generator, device=generator.device).to(device=f.device, dtype=f.dtype)
    return f * (1 + 0.6 * (drawn - 0.5))


def _attention_drop(f: Tensor, generator: torch.Generator) -> Tensor:
    attention = f.detach().mean(1, keepdim=True)
    share = 0.7 + 0.2 * torch.rand(len(f), generator=generator, device=generator.device)
    threshold = attention.amax(tuple(range(1, f.ndim)), keepdim=True) * _column(share, attention)
    return f * (attention < threshold)
