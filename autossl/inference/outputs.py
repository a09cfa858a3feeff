"""What prediction writes for a case, each file whole or not at all, the label map last: it says that a case is done."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from autossl.data.geometry import Geometry
from autossl.data.image_io import write_label_map, write_scalar_map
from autossl.data.probabilities import probabilities_file, write_probabilities_quantized
from autossl.data.problems import InvalidInput, Problem
from autossl.inference.restore import Restored, Wanted

MAP_ENDING = ".nii.gz"
NAMES = ("one name per file", "rename one of the cases, or predict without --save_uncertainty")


class OutputFolder:
    """Names and writes the results of cases.

    `CASE<file_ending>` label map; `probabilities/CASE.b2nd`; `CASE_entropy.nii.gz` and `CASE_disagreement.nii.gz`.
    All of them have the input's own geometry.
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
        files = []
        if self._wanted.probabilities:
            files.append(probabilities_file(self.folder, case))
        if self._wanted.uncertainty:
            files.append(self.folder / f"{case}_entropy{MAP_ENDING}")
            if self._n_folds > 1:
                files.append(self.folder / f"{case}_disagreement{MAP_ENDING}")
        return [*files, self.label_map(case)]

    def is_complete(self, case: str) -> bool:
        """Whether all that is wanted is there."""
        return all(path.is_file() for path in self.files(case))

    def check_names(self, cases: Iterable[str]) -> None:
        """Refuses cases of which one's label map would have the name of another's map of uncertainty."""
        label_maps = {self.label_map(case): case for case in cases}
        problems = [
            Problem(f"{path.name} would be the label map of {label_maps[path]}, and a map of uncertainty", *NAMES, case)
            for case in label_maps.values()
            for path in self.files(case)[:-1]
            if path in label_maps
        ]
        if problems:
            raise InvalidInput(problems)

    def write(self, case: str, restored: Restored, geometry: Geometry) -> None:
        """Writes a case; a label map of before is removed first, so that old and new never stand side by side."""
        self.label_map(case).unlink(missing_ok=True)
        if restored.probabilities is not None:
            write_probabilities_quantized(
                probabilities_file(self.folder, case), geometry.restore(restored.probabilities)
            )
        if restored.entropy is not None:
            write_scalar_map(self.folder / f"{case}_entropy{MAP_ENDING}", restored.entropy, geometry)
        if restored.disagreement is not None:
            write_scalar_map(self.folder / f"{case}_disagreement{MAP_ENDING}", restored.disagreement, geometry)
        write_label_map(self.label_map(case), restored.label_map, geometry)
