"""nnU-Net v2's default training augmentation, with geometry drawn apart from intensity.

`Geometry` (rotation, scaling, mirroring) is drawn once and applied to everything that belongs to a patch: image,
labels, masks, confidences. Intensity augmentation changes image values only, so views of one patch that share their
geometry keep corresponding voxels. Values are changed by batchgeneratorsv2's transforms; those for intensities draw
from the global generators of numpy and torch, therefore they run inside `seeded`.
Source of all probabilities and ranges: nnU-Net v2 2.8.1, `nnUNetTrainer.get_training_transforms`. Two differences, both
for equal bits on every run: mirroring comes before the intensities, and the blur never times itself to choose between
two algorithms.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import blur_dimension
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.spatial import (
    SpatialTransform,
    create_affine_matrix_2d,
    create_affine_matrix_3d,
)
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from torch import Tensor

from autossl.planners.plans import ConfigurationPlan
from autossl.trainers.sampling import is_dummy_2d, rotation_limit

P_ROTATION = 0.2
P_SCALING = 0.2
SCALING = (0.7, 1.4)
P_MIRROR = 0.5
BLUR_SIGMA = (0.5, 1.0)
P_BLUR = 0.2
P_BLUR_CHANNEL = 0.5
BLUR_REACH = 3
"""Voxels to each side that the widest blur kernel takes, mirrored at the border: a shorter axis is not blurred."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of random, numpy and torch (CPU) and puts them back as they were."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the accelerators
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.random.set_rng_state(states[2])


# ---------------------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class Geometry:
    """One drawn geometry, as plain numbers: first rotation and scaling, then flips."""

    angles: tuple[float, ...] = ()
    """Radians about each spatial axis (in plane: the last one counts); empty: no rotation."""
    scale: float = 1.0
    """Above 1 things become smaller."""
    flips: tuple[int, ...] = ()
    """Spatial axes of the patch, 0 = first."""

    @property
    def resamples(self) -> bool:
        """Whether values are interpolated, from the initial patch; else the final patch is enough as a source."""
        return bool(self.angles) or self.scale != 1


@dataclass
class PatchArrays:
    """Everything of one patch that moves together. Channels first; spatial axes as the plan has them (2 or 3)."""

    image: Tensor
    """Float32 [Ci, *S]; outside the case 0."""
    maps: dict[str, Tensor]
    """Integer maps [*S] (labels, pseudo-labels, masks), interpolated per value; outside the case 0."""
    scalars: dict[str, Tensor]
    """Float32 maps [*S] (confidences), interpolated linearly; outside the case 0."""


class GeometricAugmentation:
    """Draws and applies geometry for one configuration.

    Args:
        patch: final patch of the plan, 2 or 3 axes.
        mirror_axes: axes that may be flipped, 0 = first axis of the patch.
    """

    def __init__(self, patch: Sequence[int], mirror_axes: Sequence[int]) -> None:
        self.patch = tuple(patch)
        self.mirror_axes = tuple(mirror_axes)
        self.rotation_limit = rotation_limit(patch)
        self.dummy_2d = is_dummy_2d(patch)
        plane = self.patch[1:] if self.dummy_2d else self.patch
        self._sampler = SpatialTransform(plane, patch_center_dist_from_border=0, random_crop=False)
        lines = [torch.arange(size, dtype=torch.float32) - (size - 1) / 2 for size in plane]
        self._grid = torch.stack(torch.meshgrid(lines, indexing="ij"), dim=-1)

    def draw(self, seed: int) -> Geometry:
        """The geometry of this seed."""
        rng = np.random.default_rng(seed)
        angles: tuple[float, ...] = ()
        scale = 1.0
        if rng.random() < P_ROTATION:
            angles = tuple(rng.uniform(-self.rotation_limit, self.rotation_limit, size=self._grid.shape[-1]).tolist())
        if rng.random() < P_SCALING:
            scale = float(rng.uniform(*SCALING))
        return Geometry(angles, scale, tuple(axis for axis in self.mirror_axes if rng.random() < P_MIRROR))

    def apply(self, geometry: Geometry, source: PatchArrays) -> PatchArrays:
        """The final patch from the initial one, or from the final one where nothing is resampled."""
        moved = self._resample(geometry, source) if geometry.resamples else source
        axes = [axis - len(self.patch) for axis in geometry.flips]

        def flip(value: Tensor) -> Tensor:
            return torch.flip(value, axes) if axes else value

        return PatchArrays(
            flip(moved.image),
            {name: flip(value) for name, value in moved.maps.items()},
            {name: flip(value) for name, value in moved.scalars.items()},
        )

    def _resample(self, geometry: Geometry, source: PatchArrays) -> PatchArrays:
        data: dict[str, Any] = {"image": source.image}
        if source.maps:
            data["segmentation"] = torch.stack([value.to(torch.int16) for value in source.maps.values()])
        if source.scalars:
            data["regression_target"] = torch.stack(list(source.scalars.values()))
        if self.dummy_2d:
            data = Convert3DTo2DTransform()(**data)
        data = self._sampler.apply(data, grid=self._sampling_grid(geometry, data["image"].shape[1:]))
        if self.dummy_2d:
            data = Convert2DTo3DTransform()(**data)
        return PatchArrays(
            data["image"],
            dict(zip(source.maps, data.get("segmentation", ()), strict=True)),
            dict(zip(source.scalars, data.get("regression_target", ()), strict=True)),
        )

    def _sampling_grid(self, geometry: Geometry, source_shape: Sequence[int]) -> Tensor:
        """Where each voxel of the patch comes from, in torch's grid_sample coordinates (last axis first, -1..1)."""
        dims = self._grid.shape[-1]
        angles, scales = geometry.angles or (0.0,) * dims, (geometry.scale,) * dims
        affine = create_affine_matrix_2d(angles[-1], scales) if dims == 2 else create_affine_matrix_3d(angles, scales)
        halves = np.array(source_shape)[:, None] / 2
        matrix = torch.from_numpy((affine / halves)[::-1].T.astype(np.float32))
        return self._grid @ matrix


# --------------------------------------------------------------------------------------------------------- intensity


class IntensityAugmentation:
    """nnU-Net's noise, blur, brightness, contrast, low resolution and two gammas, each with its own probability.

    Args:
        patch: final patch of the plan; a flat 3D patch keeps its resolution across the planes.
    """

    def __init__(self, patch: Sequence[int]) -> None:
        ignored = (0,) if is_dummy_2d(patch) else None
        each = {"synchronize_channels": False, "p_per_channel": 1}
        gamma = {"gamma": BGContrast((0.7, 1.5)), "p_retain_stats": 1, **each}
        factor = BGContrast((0.75, 1.25))
        self._transforms: list[tuple[float, BasicTransform]] = [
            (0.1, GaussianNoiseTransform(noise_variance=(0, 0.1), p_per_channel=1, synchronize_channels=True)),
            (P_BLUR, _Blur()),
            (0.15, MultiplicativeBrightnessTransform(multiplier_range=factor, **each)),
            (0.15, ContrastTransform(contrast_range=factor, preserve_range=True, **each)),
            (
                0.25,
                SimulateLowResolutionTransform(
                    scale=(0.5, 1),
                    synchronize_channels=False,
                    synchronize_axes=True,
                    ignore_axes=ignored,
                    p_per_channel=0.5,
                ),
            ),
            (0.1, GammaTransform(p_invert_image=1, **gamma)),
            (0.3, GammaTransform(p_invert_image=0, **gamma)),
        ]

    def apply(self, image: Tensor, seed: int) -> Tensor:
        """A changed copy of the image [Ci, *S]; the given one stays as it is."""
        chances = np.random.default_rng(seed).random(len(self._transforms))
        chosen = [transform for (p, transform), chance in zip(self._transforms, chances, strict=True) if chance < p]
        data = {"image": image.clone(memory_format=torch.contiguous_format)}
        if chosen:
            with seeded(seed):
                for transform in chosen:
                    data = transform(**data)
        return data["image"]


class _Blur(BasicTransform):
    """Gaussian blur per channel and axis, batchgeneratorsv2's kernels, always by direct convolution."""

    def apply(self, data_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        image = data_dict["image"]
        for channel in np.flatnonzero(torch.rand(len(image)).numpy() < P_BLUR_CHANNEL):
            blurred = image[channel : channel + 1]
            for axis, size in enumerate(image.shape[1:]):
                sigma = float(np.random.uniform(*BLUR_SIGMA))  # noqa: NPY002
                if size > BLUR_REACH:
                    blurred = blur_dimension(blurred, sigma, axis)
            image[channel] = blurred[0]
        return data_dict


# -------------------------------------------------------------------------------------------------------------- both


@dataclass(frozen=True)
class Augmentation:
    """Geometry and intensity of one configuration."""

    geometric: GeometricAugmentation
    intensity: IntensityAugmentation


def default_augmentation(configuration: ConfigurationPlan) -> Augmentation:
    """nnU-Net's default training augmentation for the plan's patch, mirroring over the plan's axes."""
    patch = configuration.patch_size
    return Augmentation(GeometricAugmentation(patch, configuration.mirror_axes), IntensityAugmentation(patch))


def mask_outside(image: Tensor, nonzero: Tensor, channels: Sequence[bool]) -> None:
    """Sets the image [Ci, *S] to 0, in place, where `nonzero` [*S] is false, in the flagged channels.

    Channels that were normalized within the non-zero mask have 0 outside; intensity changes must not move that.
    """
    for channel, masked in zip(image, channels, strict=True):
        if masked:
            channel.masked_fill_(nonzero == 0, 0)
