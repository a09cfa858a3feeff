"""A teacher that averages a student only at the moments at which the student scores well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autossl.trainers.components.ema import EMATeacher
from autossl.trainers.components.losses import one_hot


class GatedAverage(EMATeacher):
    """Moves only when a score enters the pool of the best ones; the better the score, the further.

    The pool fills first; the score that fills it makes the teacher a copy. From then on a score D above the lowest
    D_min takes its place, and teacher ← a·teacher + (1 - a)·student with b = (D - D_min) / D, a = min(1 - b, limit).
    The pool is the caller's, a plain list, so that it can be part of a checkpoint. Source: Zhang et al., Medical Image
    Analysis 83 (2023), Semi-CML (best-model average), in publicly hosted code.

    Args:
        student: copied; `network` belongs into `Parts.followers`.
        size: of the pool.
        decay_max: the limit of a.
    """

    def __init__(self, student: nn.Module, size: int = 6, decay_max: float = 0.99) -> None:
        super().__init__(student, decay_max)
        self.size = size

    def is_ready(self, pool: Sequence[float]) -> bool:
        """Whether the teacher was ever given weights."""
        return len(pool) >= self.size

    @torch.no_grad()
    def offer(self, student: nn.Module, score: float, pool: Sequence[float]) -> list[float]:
        """The pool after this score, lowest first. A score or weights that are not finite change nothing."""
        if score - score != 0 or not all(bool(torch.isfinite(weight).all()) for weight in student.parameters()):
            return list(pool)
        if not self.is_ready(pool):
            grown = sorted([*pool, score])
            if self.is_ready(grown):
                self.copy_from(student)
            return grown
        lowest = min(pool)
        if score <= lowest:
            return list(pool)
        self.follow(student, min(1 - (score - lowest) / score, self.decay_max))
        return sorted([score, *sorted(pool)[1:]])


@torch.no_grad()
def foreground_score(z: Tensor, target: Tensor, valid: Tensor, regions: bool = False) -> Tensor:
    """Dice of decisions on labeled patches, averaged over the foreground classes that are there or were predicted.

    Args:
        z: logits [N, C, *S].
        target: class numbers [N, 1, *S]; regions: 0/1 [N, C, *S].
        valid: boolean [N, 1, *S].
        regions: z are logits of sigmoids.

    Returns:
        [2]: the score and 1; or 0 and 0 where there is nothing to score, or z is not finite.
    """
    said = (z > 0).float() if regions else one_hot(z.argmax(1, keepdim=True), z.shape[1])[:, 1:]
    true = target.float() if regions else one_hot(target, z.shape[1])[:, 1:]
    said, true = said * valid, true * valid
    axes = (0, *range(2, z.ndim))
    sizes = said.sum(axes) + true.sum(axes)
    counts = (sizes > 0) & torch.isfinite(z).all()
    dice = torch.where(counts, 2 * (said * true).sum(axes) / sizes.clamp(min=1), 0)
    return torch.stack([dice.sum() / counts.sum().clamp(min=1), counts.any().float()])
