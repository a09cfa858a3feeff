"""What every layout is read into before a raw dataset is written: its cases, and how to write the files of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from autossl.data.case_files import id_fault
from autossl.data.problems import InvalidInput, Problem
from autossl.data.raw_dataset import Pool

Layout = Literal["msd", "bids", "h5"]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many are done, and how many there are."""
FILE_ENDING = ".nii.gz"


@dataclass(frozen=True)
class BidsOptions:
    """What only BIDS datasets need."""

    masks: Path | None = None
    """The derivative with the masks; None: the only one in derivatives/, else the dataset itself."""
    mask: str | None = None
    """Which masks, as desc-lesion_mask or dseg; None: all."""
    skip_incomplete: bool = False
    """Leaves sessions without one of the channels out."""


@dataclass(frozen=True)
class H5Options:
    """What only h5 files need, because they do not say it."""

    axes: str = "zyx"
    """Of the image arrays, slowest first; with a c for the channels where they have some."""
    spacing_zyx_mm: tuple[float, float, float] | None = None
    lists: Mapping[str, Path] = field(default_factory=dict)
    """ "train", "val", "test", "unlabeled" → list file; those not named are looked for."""
    budgets: tuple[int, ...] = ()
    """So many first cases of the training list become the labeled ones of `--labeled N`, draw 0."""
    patient: str | None = None
    """Regular expression; what its group (or all of it) matches in a case id is the patient."""


@dataclass(frozen=True)
class ConvertRequest:
    """Which dataset, and what to make of it."""

    layout: Layout
    source: Path
    dataset: str | None = None
    """Full name, as Dataset005_Prostate; None: from a folder named TaskXX_Name."""
    workspace: Path | None = None
    channels: tuple[str, ...] = ()
    """msd, h5: other names for the channels. bids: which images, in channel order, as T1w or acq-post_T1w."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """Name → value, without the background; empty: as the source says."""
    test_as_unlabeled: bool = False
    overwrite: bool = False
    n_workers: int | None = None
    bids: BidsOptions = BidsOptions()
    h5: H5Options = H5Options()


@dataclass(frozen=True)
class CaseFiles:
    """Where the files of a case belong."""

    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class SourceCase:
    """One case of a foreign dataset."""

    id: str
    pool: Pool
    has_label: bool
    write: Callable[[CaseFiles], None]
    """Writes the case's files; picklable."""
    patient: str = ""
    """Empty: a patient of its own."""
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PublishedLists:
    """Lists that come with a dataset; case ids in the order of the lists."""

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    budgets: tuple[int, ...] = ()


@dataclass(frozen=True)
class SourceDataset:
    """A foreign dataset whose names and headers were read and found in order."""

    channel_names: tuple[str, ...]
    labels: Mapping[str, int]
    """With the background."""
    cases: tuple[SourceCase, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What else goes into dataset.json: description, license, …"""
    lists: PublishedLists = PublishedLists(())


def with_background(labels: Mapping[str, int]) -> dict[str, int]:
    """The background first, then the classes by value."""
    classes = sorted(labels.items(), key=lambda entry: entry[1])
    return {"background": 0} | {name: value for name, value in classes if value != 0}


def renamed_channels(names: Sequence[str], wanted: Sequence[str], source: Path) -> tuple[str, ...]:
    """The channel names that the user wants, else those of the source.

    Raises:
        InvalidInput: another number of names than channels.
    """
    if wanted and len(wanted) != len(names):
        found = f"{len(wanted)} channel names ({', '.join(wanted)})"
        raise InvalidInput(Problem(found, f"{len(names)}, one per channel", "correct --channels", file=source))
    return tuple(wanted or names)


def case_faults(cases: Iterable[SourceCase], source: Path) -> list[Problem]:
    """Ids that occur twice or can be no file names; no labeled case at all."""
    problems, seen, labeled = [], set(), False
    for case in cases:
        fault = id_fault(case.id) or (f"the case id '{case.id}' occurs twice" if case.id.lower() in seen else None)
        if fault:
            expected = "ids that differ, also where upper and lower case are taken as equal, and can be file names"
            problems.append(Problem(fault, expected, "rename the file, or remove one", case=case.id))
        seen.add(case.id.lower())
        labeled |= case.has_label and case.pool == "labeled"
    if not labeled:
        expected = "at least one training case with its label"
        problems.append(Problem("no labeled case", expected, "check folder and options", file=source))
    return problems
