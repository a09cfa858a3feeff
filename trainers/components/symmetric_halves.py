"""Images and predictions made of one half and its mirror image.

Source: Zhou et al., IEEE JBHI 2025 (arXiv:2508.19815) and its released code. Ours: what lies beyond the object's mirror
image is mirrored too, where the release leaves black, and voxels whose mirror image is cut off do not count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autossl.trainers.components.augment import IntensityChange, StrongAugment
from autossl.trainers.components.losses import probability_mse
from autossl.trainers.components.shapes import MirrorPlanes

CHANCE = 0.2
"""Of each intensity change, in each half of each image."""
NOISE, SHIFT = 0.05, 0.1
"""In standard deviations of the channel."""
GAMMA, BLUR = (1.2, 1.8), (0.5, 1.5)


def half_change(n: int, generator: torch.Generator) -> IntensityChange:
    """Noise σ 0.05, gamma 1.2..1.8, shift ±0.1, blur σ 0.5..1.5 voxels, each with probability 0.2, for n halves."""
    table = torch.rand(n, 7, generator=generator, device=generator.device).cpu()
    happens, position = table[:, :4] < CHANCE, table[:, 4:]

    def drawn(index: int, low: float, high: float, neutral: float) -> Tensor:
        return torch.where(happens[:, index], low + (high - low) * position[:, index], neutral)

    one = torch.ones(n)
    return IntensityChange(
        factor=one,
        shift=drawn(0, -SHIFT, SHIFT, 0.0),
        contrast=one,
        gamma=drawn(1, *GAMMA, 1.0),
        blur=drawn(2, *BLUR, 0.0),
        noise=torch.where(happens[:, 3], NOISE, 0.0),
    )


class SymmetricHalves:
    """B patches that are mirrored, and which of their voxels have a mirror image.

    Everything that comes in two sides is [2·B, …]: first what keeps the first halves, then what keeps the second ones.

    Args:
        planes: where each patch is mirrored.
        valid: boolean [B, 1, *S].
        acting: boolean [B]; the other patches count in no loss.
    """

    def __init__(self, planes: MirrorPlanes, valid: Tensor, acting: Tensor) -> None:
        self._planes = planes
        self._first = planes.first_half
        self._own = torch.cat([planes.first_half, ~planes.first_half])
        self._paired = planes.inside & valid & planes.mirror(valid)
        self._counted = valid & acting.view(-1, *[1] * (valid.ndim - 1))

    @torch.no_grad()
    def images(self, x: Tensor, label: Tensor, augment: StrongAugment, generator: torch.Generator) -> Tensor:
        """x [B, Ci, *S] with the object completed from either half, [2·B, Ci, *S].

        In the half that is not kept, the object (boolean `label` [B, 1, *S]) and the place of its mirror image show the
        mirror image of the other half; what surrounds them stays. Both halves of the object then change their
        intensities, each on its own.
        """
        with torch.autocast(x.device.type, enabled=False):
            mirrored_label = self._planes.mirror(label) & self._paired
            replaced = ~self._own & _twice(self._paired & (label | mirrored_label))
            image = torch.where(replaced, _twice(self._planes.mirror(x)), _twice(x))
            for region in (self._own & _twice(label), replaced & _twice(mirrored_label)):
                image = augment.apply(image, half_change(len(image), generator), generator, region)
            return image

    def completed(self, p: Tensor) -> Tensor:
        """p [B, 1, *S] from either half: itself there, mirrored on the other side, [2·B, 1, *S]."""
        return torch.where(self._own, _twice(p), _twice(self._planes.mirror(p)))

    def completion_loss(self, p_sides: Tensor, m: Tensor) -> Tensor:
        """Mean of (p_sides - m)² over the voxels for which m, as `completed` gives it, was seen in the patch."""
        seen = _twice(self._counted) & (self._own | _twice(self._paired))
        return probability_mse(p_sides, m, seen)

    def asymmetry(self, p_sides: Tensor) -> Tensor:
        """Mean over all paired voxels of (p_sides - its mirror image)², taken in the first half alone."""
        mirrored = torch.cat([self._planes.mirror(p) for p in p_sides.chunk(2)])
        first = _twice(self._first)
        # the second half holds the same differences once more; as in the release it counts as zeros
        return probability_mse(
            torch.where(first, p_sides, 0), torch.where(first, mirrored, 0), _twice(self._counted & self._paired)
        )


def _twice(x: Tensor) -> Tensor:
    return torch.cat([x, x])
