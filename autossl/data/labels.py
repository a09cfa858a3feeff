"""The label schema of a dataset: labels or regions, their order of writing, and the ignore label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class LabelSchema:
    """What each label value means and what a network has to predict.

    Softmax (no regions): output channel i is the i-th smallest label value without the ignore label; 0 is background.
    Regions: one sigmoid channel per region in the order of dataset.json, background left out; a region is a union
    of label values, and `regions_class_order` gives the value each is written with, later ones over earlier ones.
    """

    names: Mapping[str, tuple[int, ...]]
    """Name → label values, background and ignore included, in the order of dataset.json."""
    regions_class_order: tuple[int, ...] | None = None

    @property
    def ignore_label(self) -> int | None:
        """Voxels of this value carry no annotation."""
        return self.names["ignore"][0] if "ignore" in self.names else None

    @property
    def has_regions(self) -> bool:
        """True where a name stands for several label values (or an order of writing is given)."""
        return self.regions_class_order is not None

    @property
    def values(self) -> tuple[int, ...]:
        """All declared label values, ascending, the ignore label included."""
        return tuple(sorted({value for values in self.names.values() for value in values}))

    @property
    def foreground(self) -> dict[str, tuple[int, ...]]:
        """Foreground classes (or regions): name → label values, in output order."""
        named = {k: v for k, v in self.names.items() if k not in ("background", "ignore") and tuple(v) != (0,)}
        return named if self.has_regions else dict(sorted(named.items(), key=lambda item: item[1][0]))

    @property
    def n_outputs(self) -> int:
        """Output channels of a network: background and classes (softmax), or the regions (sigmoid)."""
        return len(self.foreground) + (0 if self.has_regions else 1)

    @property
    def written_values(self) -> tuple[int, ...]:
        """The label value that each output channel is written with (softmax: entry 0 is background 0)."""
        if self.regions_class_order is not None:
            return self.regions_class_order
        return (0, *(values[0] for values in self.foreground.values()))

    def class_masks(self, label_map: npt.NDArray[np.integer]) -> dict[str, npt.NDArray[np.bool_]]:
        """Boolean mask per foreground class or region, same shape as the label map."""
        return {name: np.isin(label_map, values) for name, values in self.foreground.items()}

    def merge_outputs(self, winners: Sequence[npt.NDArray[np.bool_]]) -> npt.NDArray[np.integer]:
        """Label map from one boolean map per region, written in `regions_class_order`; later regions win."""
        if self.regions_class_order is None:
            raise ValueError("merge_outputs is for regions; softmax outputs are merged by argmax")
        result = np.zeros(winners[0].shape, dtype=self.dtype)
        for value, mask in zip(self.regions_class_order, winners, strict=True):
            result[mask] = value
        return result

    @property
    def dtype(self) -> type[np.integer]:
        """uint8, or uint16 where a label value needs it (as nnU-Net writes)."""
        return np.uint8 if max(self.values) < 255 else np.uint16
