"""The workspace: one root folder with raw/, preprocessed/ and results/, and the datasets in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autossl.data.problems import InvalidInput, Problem, nearest

WORKSPACE_VARIABLE = "AUTOSSL_WORKSPACE"
NNUNET_RAW_VARIABLE = "nnUNet_raw"
DEFAULT_ROOT = Path("autossl_workspace")
DATASET_NAME = re.compile(r"^Dataset(?P<number>\d{3,})_(?P<name>.+)$")


@dataclass(frozen=True)
class Workspace:
    """Where everything lies. Making one creates no folder."""

    root: Path

    @classmethod
    def locate(cls, root: str | Path | None = None) -> Workspace:
        """The workspace that was named, else that of $AUTOSSL_WORKSPACE, else ./autossl_workspace."""
        return cls(Path(root or os.environ.get(WORKSPACE_VARIABLE) or DEFAULT_ROOT).expanduser().absolute())

    @property
    def raw(self) -> Path:
        """Datasets as delivered."""
        return self.root / "raw"

    @property
    def preprocessed(self) -> Path:
        """Fingerprints, splits, plans and preprocessed cases."""
        return self.root / "preprocessed"

    @property
    def results(self) -> Path:
        """Runs."""
        return self.root / "results"

    def find_dataset(self, name: str | int) -> str:
        """The full name, as in Dataset004_Hippocampus, of a dataset named `4`, `004`, `Hippocampus` or in full.

        Looks into raw/, preprocessed/, results/, and $nnUNet_raw where that is set.

        Raises:
            InvalidInput: where no dataset or more than one fits; with the nearest names, or all that fit.
        """
        wanted = str(name).strip().rstrip("/")
        places = self._datasets()
        if wanted in places:
            return wanted
        fitting = sorted(full for full in places if _fits(wanted, full))
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise InvalidInput(
                Problem(
                    f"{len(fitting)} datasets fit '{wanted}': "
                    + ", ".join(f"{full} in {' and '.join(str(place) for place in places[full])}" for full in fitting),
                    "a name that fits one dataset",
                    "give the full name",
                )
            )
        known = {match["name"]: full for full in places if (match := DATASET_NAME.match(full))}
        suggestions = nearest(wanted, [*places] if wanted.startswith("Dataset") else known)
        raise InvalidInput(
            Problem(
                f"no dataset '{wanted}' in {', '.join(str(folder) for folder in self._search_folders())}",
                f"one of the datasets there ({suggestions}) by number, name or full name",
                f"put it into {self.raw} as DatasetXXX_Name, or name another workspace with --workspace or "
                f"${WORKSPACE_VARIABLE}",
            )
        )

    def raw_folder(self, dataset: str) -> Path:
        """Where the dataset's raw files lie: raw/, else $nnUNet_raw; raw/ where it is in neither."""
        candidates = [folder / dataset for folder in self._raw_folders()]
        return next((folder for folder in candidates if folder.is_dir()), candidates[0])

    def preprocessed_folder(self, dataset: str) -> Path:
        """The dataset's folder in preprocessed/."""
        return self.preprocessed / dataset

    def results_folder(self, dataset: str) -> Path:
        """The dataset's folder in results/."""
        return self.results / dataset

    def _raw_folders(self) -> list[Path]:
        other = os.environ.get(NNUNET_RAW_VARIABLE)
        return [self.raw, Path(other).expanduser().absolute()] if other else [self.raw]

    def _search_folders(self) -> list[Path]:
        raw, *others = self._raw_folders()
        return [raw, self.preprocessed, self.results, *others]

    def _datasets(self) -> dict[str, list[Path]]:
        """Full name → the folders that hold it."""
        places: dict[str, list[Path]] = {}
        for folder in self._search_folders():
            for entry in _folders_of(folder):
                if DATASET_NAME.match(entry.name):
                    places.setdefault(entry.name, []).append(folder)
        return places


def _folders_of(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(entry for entry in folder.iterdir() if entry.is_dir())


def _fits(wanted: str, full: str) -> bool:
    match = DATASET_NAME.match(full)
    if match is None:
        return False
    return wanted == match["name"] or (wanted.isdecimal() and int(wanted) == int(match["number"]))
