"""What label values become as targets of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autossl.data.labels import LabelSchema


class TargetMap:
    """Turns label values into targets, by table: the output channel's number, or one 0/1 map per region.

    Ignored voxels get background, which is a value that every loss accepts; `annotated` tells them apart.
    """

    def __init__(self, schema: LabelSchema) -> None:
        self.ignore_label = schema.ignore_label
        self.has_regions = schema.has_regions
        self.n_foreground = len(schema.foreground)
        size = max(schema.values) + 1
        self._table = torch.zeros((self.n_foreground, size) if self.has_regions else (1, size), dtype=torch.int64)
        for index, values in enumerate(schema.foreground.values()):
            if self.has_regions:
                self._table[index, list(values)] = 1
            else:
                self._table[0, list(values)] = index + 1

    def target(self, label_map: Tensor) -> Tensor:
        """Int64 [1, *S], or float32 [C, *S] for regions, from label values [*S]."""
        target = self._table[:, label_map.long()]
        return target.float() if self.has_regions else target

    def annotated(self, label_map: Tensor) -> Tensor:
        """Boolean [*S], false at the ignore label."""
        if self.ignore_label is None:
            return torch.ones(label_map.shape, dtype=torch.bool)
        return label_map != self.ignore_label

    def foreground(self, targets: Tensor) -> Tensor:
        """Boolean [B, F, *S] of stacked targets."""
        if self.has_regions:
            return targets > 0.5
        return torch.cat([targets == index + 1 for index in range(self.n_foreground)], dim=1)

    def none(self, patch: Sequence[int]) -> Tensor:
        """The targets of no patch."""
        if self.has_regions:
            return torch.empty((0, self.n_foreground, *patch))
        return torch.empty((0, 1, *patch), dtype=torch.int64)
