"""Preprocessed cases of a few voxels, written as preprocessing writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from autossl.data.store import CaseStore, write_array
from autossl.trainers.batches import LabeledCase, UnlabeledCase


@dataclass
class TinyStore:
    """Writes arrays below `root` and gives cases that point at them."""

    root: Path

    def labeled(
        self,
        case: str,
        image: npt.NDArray[np.float32],
        label: npt.NDArray[np.integer],
        nonzero: npt.NDArray[np.bool_] | None = None,
        classes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> LabeledCase:
        """A case with its label and voxel lists of the given classes (default: each value above 0 by its name)."""
        classes = classes or {f"class {value}": (int(value),) for value in np.unique(label) if value > 0}
        locations = {name: np.argwhere(np.isin(label, values)) for name, values in classes.items()}
        self._store.write_label(case, label.astype(np.int8), locations)
        return LabeledCase(
            id=case,
            image=self._image(case, image),
            label=self._store.label_path(case),
            locations=self._store.locations_path(case),
            nonzero=self._nonzero(case, nonzero),
            attributes={"patient": case},
        )

    def unlabeled(
        self,
        case: str,
        image: npt.NDArray[np.float32],
        nonzero: npt.NDArray[np.bool_] | None = None,
        stores: Mapping[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] | None = None,
    ) -> UnlabeledCase:
        """A case without label; `stores` maps names to (label map, confidence × 255)."""
        paths = {}
        for name, (label, confidence) in (stores or {}).items():
            paths[name] = (self.root / name / f"{case}_label.b2nd", self.root / name / f"{case}_confidence.b2nd")
            write_array(paths[name][0], label)
            write_array(paths[name][1], confidence)
        image_path = self._image(case, image)
        return UnlabeledCase(case, image_path, self._nonzero(case, nonzero), {"patient": case}, paths)

    @property
    def _store(self) -> CaseStore:
        return CaseStore(self.root)

    def _image(self, case: str, image: npt.NDArray[np.float32]) -> Path:
        write_array(self._store.image_path(case), image.astype(np.float32))
        return self._store.image_path(case)

    def _nonzero(self, case: str, nonzero: npt.NDArray[np.bool_] | None) -> Path | None:
        if nonzero is None:
            return None
        write_array(self._store.nonzero_path(case), nonzero)
        return self._store.nonzero_path(case)


def code_image(shape: tuple[int, int, int], n_channels: int = 1) -> npt.NDArray[np.float32]:
    """Each voxel holds its own index (from 1) in every channel, so that a patch tells where it comes from."""
    codes = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    return np.stack([codes] * n_channels)


def code_label(shape: tuple[int, int, int], n_values: int = 3) -> npt.NDArray[np.int8]:
    """A label that follows from `code_image`: index modulo the number of values."""
    return (code_image(shape)[0].astype(np.int64) % n_values).astype(np.int8)
