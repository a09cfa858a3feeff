"""What prediction writes for a case, each file whole or not at all, the label map last: it says that a case is done."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from autossl.data.files import atomic_write
from autossl.data.geometry import Geometry
from autossl.data.image_io import write_label_map, write_scalar_map
from autossl.inference.restore import Restored, Wanted

MAP_ENDING = ".nii.gz"
COMPRESSION_LEVEL = 1  # probabilities: higher levels cost several times the time and save a few percent


class OutputFolder:
    """Names and writes the results of cases.

    `CASE<file_ending>` label map; `CASE.npz` probabilities; `CASE_entropy.nii.gz` and `CASE_disagreement.nii.gz`.
    Images have the input's own geometry. The array `probabilities` [C,z,y,x] in the npz has the oriented array order
    (that of nnU-Net's files for the same reader).
    """

    def __init__(self, folder: Path, file_ending: str, wanted: Wanted, n_folds: int) -> None:
        self.folder = Path(folder)
        self._file_ending = file_ending
        self._wanted = wanted
        self._n_folds = n_folds

    def label_map(self, case: str) -> Path:
        """The label map of a case."""
        return self.folder / f"{case}{self._file_ending}"

    def files(self, case: str) -> list[Path]:
        """All files of a case, the label map last."""
        names = []
        if self._wanted.probabilities:
            names.append(f"{case}.npz")
        if self._wanted.uncertainty:
            names.append(f"{case}_entropy{MAP_ENDING}")
            if self._n_folds > 1:
                names.append(f"{case}_disagreement{MAP_ENDING}")
        return [*(self.folder / name for name in names), self.label_map(case)]

    def is_complete(self, case: str) -> bool:
        """Whether all that is wanted is there."""
        return all(path.is_file() for path in self.files(case))

    def write(self, case: str, restored: Restored, geometry: Geometry) -> None:
        """Writes a case; a label map of before is removed first, so that old and new never stand side by side."""
        self.label_map(case).unlink(missing_ok=True)
        if restored.probabilities is not None:
            write_probabilities(self.folder / f"{case}.npz", restored.probabilities)
        if restored.entropy is not None:
            write_scalar_map(self.folder / f"{case}_entropy{MAP_ENDING}", restored.entropy, geometry)
        if restored.disagreement is not None:
            write_scalar_map(self.folder / f"{case}_disagreement{MAP_ENDING}", restored.disagreement, geometry)
        write_label_map(self.label_map(case), restored.label_map, geometry)


def write_probabilities(path: Path, probabilities: npt.NDArray[np.float32]) -> None:
    """An npz file with the key `probabilities`, as nnU-Net's `--save_probabilities`, compressed fast."""
    with (
        atomic_write(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=COMPRESSION_LEVEL) as archive,
        archive.open("probabilities.npy", "w", force_zip64=True) as entry,
    ):
        np.lib.format.write_array(entry, probabilities, allow_pickle=False)
