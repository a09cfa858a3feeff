"""Names of BIDS files: entities and a suffix, as in sub-01_ses-2_acq-post_T1w.nii.gz."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autossl.data.problems import InvalidInput, Problem

NAME = re.compile(r"^(?P<entities>(?:[A-Za-z0-9]+-[A-Za-z0-9+]+_)*)(?P<suffix>[A-Za-z0-9]+)$")
IDENTITY = ("sub", "ses")


@dataclass(frozen=True)
class BidsFile:
    """An image or mask with a name of BIDS."""

    path: Path
    entities: Mapping[str, str]
    suffix: str


@dataclass(frozen=True)
class Selector:
    """Which files: those with this suffix and at least these entities."""

    entities: Mapping[str, str]
    suffix: str

    @classmethod
    def parse(cls, text: str) -> Selector:
        """From text such as T1w or acq-post_T1w.

        Raises:
            InvalidInput: where it is no such text.
        """
        match = NAME.match(text)
        if match is None:
            fix = "write entities and suffix as they stand in the file names"
            raise InvalidInput(Problem(f"'{text}' names no BIDS files", "text such as acq-post_T1w", fix))
        return cls(_entities(match["entities"]), match["suffix"])

    def fits(self, file: BidsFile) -> bool:
        """Whether a file is one of those."""
        return file.suffix == self.suffix and self.entities.items() <= file.entities.items()

    def __str__(self) -> str:
        return "_".join((*(f"{key}-{value}" for key, value in self.entities.items()), self.suffix))


def find_files(folder: Path, skip: Sequence[str] = ()) -> list[BidsFile]:
    """All NIfTI files of subjects below a folder, by name; hidden ones and those in the folders to skip left out."""
    found = []
    for path in sorted(folder.rglob("sub-*.nii*")):
        parts = path.relative_to(folder).parts
        if parts[0] in skip or any(part.startswith(".") for part in parts) or not path.is_file():
            continue
        match = NAME.match(path.name.removesuffix(".gz").removesuffix(".nii"))
        if match and path.name.endswith((".nii", ".nii.gz")):
            found.append(BidsFile(path, _entities(match["entities"]), match["suffix"]))
    return found


def session_id(file: BidsFile) -> str:
    """sub-01_ses-2, or sub-01 where there are no sessions."""
    return "_".join(f"{key}-{file.entities[key]}" for key in IDENTITY if key in file.entities)


def best_matches(selector: Selector, files: Sequence[BidsFile]) -> list[BidsFile]:
    """The files that fit; where one of them has no entity that was not named, that one alone."""
    fitting = [file for file in files if selector.fits(file)]
    exact = [file for file in fitting if set(file.entities) - set(IDENTITY) == set(selector.entities) - set(IDENTITY)]
    return exact if len(exact) == 1 else fitting


def _entities(text: str) -> dict[str, str]:
    pairs = (part.partition("-") for part in text.split("_") if part)
    return {key: value for key, _, value in pairs}
