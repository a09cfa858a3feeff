"""BIDS datasets whose masks lie in a derivative: every session becomes a case, every subject a patient.

File names follow the specification: entities (`sub-01_ses-2_acq-post_`) and a suffix (`T1w`). Masks are `dseg` files
(one number per class; names from a dseg.tsv with the columns index and name) or binary `mask` files, one per class,
whose class is their `label` entity, else their `desc` entity.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from autossl.data.files import read_json
from autossl.data.image_io import read_geometry, read_label, write_label_map
from autossl.data.problems import InvalidInput, Problem, nearest
from autossl.interop.convert.bids_names import BidsFile, Selector, best_matches, find_files, session_id
from autossl.interop.convert.nifti_files import copy_nifti, volume_fault
from autossl.interop.convert.source import (
    BidsOptions,
    CaseFiles,
    ConvertRequest,
    SourceCase,
    SourceDataset,
    case_faults,
    with_background,
)

logger = logging.getLogger(__name__)

MASK_SUFFIXES = ("mask", "dseg")
NOT_IMAGES = ("derivatives", "sourcedata", "code", "stimuli")
ONLY_CLASS = "foreground"
NAMING = "sub-01[_ses-2][_acq-post]_T1w.nii.gz"
NARROW = "say which with more entities, as in acq-post_T1w or space-T1w_desc-lesion_mask"
Sessions = dict[str, list[BidsFile]]


@dataclass(frozen=True)
class _Masks:
    """The masks of one session."""

    discrete: Path | None = None
    binary: tuple[tuple[Path, int], ...] = ()
    """Binary masks and the values that they stand for."""

    @property
    def files(self) -> list[Path]:
        return [self.discrete] if self.discrete else [path for path, _ in self.binary]


def read_bids(request: ConvertRequest) -> SourceDataset:
    """Reads the names of all files and the headers of those that are needed.

    Raises:
        InvalidInput: with all problems: no BIDS folder, channels or masks that are not named though there are several,
            sessions without a channel or with several files for one, masks without an image or on another grid.
    """
    folder = Path(request.source)
    mask_folder = _mask_folder(folder, request.bids)
    images = _images(folder, mask_folder)
    masks = _sessions(
        [f for f in find_files(mask_folder, skip=() if mask_folder != folder else NOT_IMAGES) if _is_mask(f)]
    )
    channels = _channels(folder, images, request.channels)
    wanted = _wanted_masks(mask_folder, masks, request)
    labels = _labels(mask_folder, wanted, request)
    people = _participants(folder)
    cases: list[SourceCase] = []
    problems: list[Problem] = []
    incomplete = []
    for session, files in sorted(images.items()):
        chosen, faults = _choose_channels(session, files, channels)
        if request.bids.skip_incomplete and len(chosen) < len(channels) and not faults:
            incomplete.append(session)
            continue
        faults += [] if len(chosen) == len(channels) or faults else [_missing(session, files, channels)]
        found, mask_faults = _choose_masks(session, wanted.get(session, []), labels)
        faults += mask_faults or _header_faults(session, chosen, found)
        problems += faults
        if not faults:
            cases.append(_case(session, files[0], chosen, found, people))
    for session in sorted(set(wanted) - set(images)):
        fix = "add the images, or name their folder as the source"
        problems.append(Problem("masks without an image", NAMING, fix, case=session, file=wanted[session][0].path))
    problems = problems or case_faults(cases, folder)
    if problems:
        raise InvalidInput(problems)
    if incomplete:
        logger.warning("%d sessions lack a channel and are left out: %s", len(incomplete), ", ".join(incomplete))
    return SourceDataset(tuple(map(str, channels)), with_background(labels), tuple(cases), _notes(folder))


def _mask_folder(folder: Path, options: BidsOptions) -> Path:
    """Where the masks lie."""
    if not folder.is_dir():
        raise InvalidInput(Problem("the folder does not exist", "a BIDS dataset", "check the path", file=folder))
    if options.masks is not None:
        if not options.masks.is_dir():
            expected = "a BIDS derivative with masks"
            raise InvalidInput(Problem("the folder does not exist", expected, "correct --masks", file=options.masks))
        return options.masks
    derivatives = sorted(path for path in (folder / "derivatives").glob("*") if path.is_dir())
    with_masks = [path for path in derivatives if any(_is_mask(file) for file in find_files(path))]
    if len(with_masks) > 1:
        names = ", ".join(path.name for path in with_masks)
        expected = "one derivative with masks"
        fix = "name one: --masks SOURCE/derivatives/NAME"
        raise InvalidInput(Problem(f"masks in several derivatives: {names}", expected, fix, file=folder))
    return with_masks[0] if with_masks else folder


def _is_mask(file: BidsFile) -> bool:
    return file.suffix in MASK_SUFFIXES


def _images(folder: Path, mask_folder: Path) -> Sessions:
    files = [f for f in find_files(folder, skip=NOT_IMAGES) if not _is_mask(f)]
    if mask_folder != folder:
        files = [f for f in files if not f.path.is_relative_to(mask_folder)]
    if not files:
        expected = f"images named {NAMING}"
        raise InvalidInput(Problem("no image with a BIDS name", expected, "name the dataset's own folder", file=folder))
    return _sessions(files)


def _sessions(files: Sequence[BidsFile]) -> Sessions:
    sessions: Sessions = {}
    for file in files:
        sessions.setdefault(session_id(file), []).append(file)
    return sessions


def _channels(folder: Path, images: Sessions, wanted: Sequence[str]) -> list[Selector]:
    if wanted:
        return [Selector.parse(text) for text in wanted]
    suffixes = sorted({file.suffix for files in images.values() for file in files})
    if len(suffixes) > 1:
        found = f"images of several kinds: {', '.join(suffixes)}"
        fix = "name them in order, as --channels T1w FLAIR"
        raise InvalidInput(Problem(found, "one kind, or the channels' names", fix, file=folder))
    return [Selector.parse(suffixes[0])]


def _wanted_masks(mask_folder: Path, masks: Sessions, request: ConvertRequest) -> Sessions:
    """The masks that the user asked for, all of one kind."""
    if request.bids.mask is not None:
        selector = Selector.parse(request.bids.mask)
        wanted = {session: [f for f in files if selector.fits(f)] for session, files in masks.items()}
        masks = {session: files for session, files in wanted.items() if files}
    suffixes = {file.suffix for files in masks.values() for file in files}
    if len(suffixes) == 1:
        return masks
    if not suffixes:
        found = "no mask" + (f" that fits {request.bids.mask}" if request.bids.mask else "")
        expected = "files with the suffix mask or dseg, named as BIDS says"
        raise InvalidInput(Problem(found, expected, "correct --masks or --mask", file=mask_folder))
    found, expected = "masks of both kinds, dseg and mask", "masks of one kind"
    raise InvalidInput(Problem(found, expected, "choose: --mask dseg or --mask mask", file=mask_folder))


def _class_name(file: BidsFile) -> str:
    return file.entities.get("label") or file.entities.get("desc") or ONLY_CLASS


def _labels(mask_folder: Path, masks: Sessions, request: ConvertRequest) -> dict[str, int]:
    """Class → value."""
    if any(file.suffix == "dseg" for files in masks.values() for file in files):
        return dict(request.labels) or _lookup_table(mask_folder)
    classes = sorted({_class_name(file) for files in masks.values() for file in files})
    unknown = sorted(set(request.labels) - set(classes))
    if unknown:
        found, expected = f"no mask is named {', '.join(unknown)}", f"one of {nearest(unknown[0], classes)}"
        raise InvalidInput(Problem(found, expected, "correct --label", file=mask_folder))
    if len(classes) > 1 and not request.labels:
        found = f"masks of {len(classes)} classes: {', '.join(classes)}"
        fix = f"name them with their values, as --label {classes[0]}=1, or choose one, as --mask {_example(masks)}"
        raise InvalidInput(Problem(found, "to be told which become classes", fix, file=mask_folder))
    return dict(request.labels) or {classes[0]: 1}


def _example(masks: Sessions) -> str:
    file = next(iter(masks.values()))[0]
    entity = "label" if "label" in file.entities else "desc"
    return f"{entity}-{file.entities[entity]}_mask" if entity in file.entities else "mask"


def _lookup_table(mask_folder: Path) -> dict[str, int]:
    """Names of the values of dseg files; all tables of the derivative must agree."""
    tables: list[dict[str, int]] = []
    for path in sorted(mask_folder.rglob("*dseg.tsv")):
        try:
            rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(), delimiter="\t"))
            table = {row["name"].strip(): int(row["index"]) for row in rows}
        except (KeyError, ValueError, AttributeError, UnicodeDecodeError) as error:
            found = f"the table of classes cannot be read ({error!r})"
            fix = "correct it, or name the classes with --label NAME=VALUE"
            raise InvalidInput(Problem(found, "the columns index and name", fix, file=path)) from error
        tables += [] if table in tables else [table]
    named = {name: value for table in tables for name, value in table.items() if value != 0}
    if len(tables) != 1 or not named:
        found = f"{len(tables) or 'no'} different tables dseg.tsv" if len(tables) != 1 else "no class in dseg.tsv"
        fix = "name the classes: --label NAME=VALUE"
        raise InvalidInput(Problem(found, "one that names the values of the masks", fix, file=mask_folder))
    return named


def _choose_channels(session: str, files: list[BidsFile], channels: list[Selector]) -> tuple[list[Path], list[Problem]]:
    """The file of each channel; channels without one are left out."""
    chosen, problems = [], []
    for channel in channels:
        fitting = best_matches(channel, files)
        if len(fitting) > 1:
            problems.append(_several(session, str(channel), fitting))
        elif fitting:
            chosen.append(fitting[0].path)
    return chosen, problems


def _several(session: str, what: str, fitting: Sequence[BidsFile]) -> Problem:
    names = ", ".join(file.path.name for file in fitting)
    return Problem(f"{len(fitting)} files fit {what}: {names}", "one per session", NARROW, case=session)


def _missing(session: str, files: Sequence[BidsFile], channels: Sequence[Selector]) -> Problem:
    missing = [str(channel) for channel in channels if not best_matches(channel, files)]
    fix = "add the files, name other --channels, or leave such sessions out with --skip_incomplete"
    return Problem(f"no {' and no '.join(missing)}", "every channel in every session", fix, case=session)


def _choose_masks(session: str, files: list[BidsFile], labels: dict[str, int]) -> tuple[_Masks, list[Problem]]:
    """The masks of a session; none where it is unlabeled."""
    if not files:
        return _Masks(), []
    if files[0].suffix == "dseg":
        fitting = best_matches(Selector({}, "dseg"), files)
        return (_Masks(fitting[0].path), []) if len(fitting) == 1 else (_Masks(), [_several(session, "dseg", fitting)])
    binary, problems = [], []
    for name, value in labels.items():
        fitting = [file for file in files if _class_name(file) == name]
        if len(fitting) > 1:
            problems.append(_several(session, f"the class {name}", fitting))
        binary += [(file.path, value) for file in fitting]
    if binary and len(binary) < len(labels) and not problems:
        there = {value for _, value in binary}
        absent = ", ".join(name for name, value in labels.items() if value not in there)
        fix = "add the mask (empty where the class is not there), or remove the others of this session"
        problems.append(Problem(f"no mask of {absent}", "a mask of every class, or none at all", fix, case=session))
    return _Masks(binary=tuple(binary)), problems


def _header_faults(session: str, images: Sequence[Path], masks: _Masks) -> list[Problem]:
    faults = [fault for path in (*images, *masks.files) if (fault := volume_fault(path, 1))]
    if faults or not images:
        return faults
    first = read_geometry(images[0], "native")
    for path in (*images[1:], *masks.files):
        differences = first.differences(read_geometry(path, "native"))
        if differences:
            found = f"not on the grid of {images[0].name}: {'; '.join(differences)}"
            fix = "resample it onto that grid, or choose images and masks of the same space"
            faults.append(Problem(found, "channels and masks on one grid", fix, case=session, file=path))
    return faults


def _case(
    session: str, file: BidsFile, images: list[Path], masks: _Masks, people: dict[str, dict[str, str]]
) -> SourceCase:
    subject = f"sub-{file.entities['sub']}"
    attributes = dict(people.get(subject, {}))
    if "ses" in file.entities:
        attributes["session"] = file.entities["ses"]
    labeled = bool(masks.files)
    write = partial(_write, tuple(images), masks)
    return SourceCase(session, "labeled" if labeled else "unlabeled", labeled, write, subject, attributes)


def _write(images: Sequence[Path], masks: _Masks, files: CaseFiles) -> None:
    for source, target in zip(images, files.images, strict=True):
        copy_nifti(source, target)
    if files.label is None:
        return
    if masks.discrete is not None:
        copy_nifti(masks.discrete, files.label)
    else:
        _write_combined(masks.binary, files.label)


def _write_combined(masks: Sequence[tuple[Path, int]], target: Path) -> None:
    """One label map of several binary masks.

    Raises:
        InvalidInput: a mask has more than one value besides 0, or two masks overlap.
    """
    first, _, geometry = read_label(masks[0][0], "native")
    values = [value for _, value in masks]
    combined = np.zeros(first.shape, np.uint8 if max(values) < 256 else np.int32)
    for path, value in masks:
        voxels = read_label(path, "native")[0]
        inside = voxels != 0
        kinds = np.unique(voxels[inside])
        if len(kinds) > 1:
            found = f"a mask with the values {', '.join(str(kind) for kind in kinds[:5])}"
            fix = "name it dseg where the values are classes, or make it binary"
            raise InvalidInput(Problem(found, "0 and one other value", fix, file=path))
        n_overlapping = np.count_nonzero(combined[inside])
        if n_overlapping:
            fix = (
                "choose masks that exclude each other, or write regions by hand (labels as lists, docs/data_layout.md)"
            )
            found = f"{n_overlapping} voxels belong to another class too"
            raise InvalidInput(Problem(found, "masks that do not overlap", fix, file=path))
        combined[inside] = value
    write_label_map(target, combined, geometry)


def _participants(folder: Path) -> dict[str, dict[str, str]]:
    """sub-01 → what participants.tsv says of it; empty where there is no such file."""
    path = folder / "participants.tsv"
    if not path.is_file():
        return {}
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(), delimiter="\t"))
        return {row.pop("participant_id"): {k: v for k, v in row.items() if k and v and v != "n/a"} for row in rows}
    except (KeyError, UnicodeDecodeError) as error:
        fix = "correct or remove it"
        raise InvalidInput(
            Problem(f"it cannot be read ({error!r})", "a column participant_id", fix, file=path)
        ) from error


def _notes(folder: Path) -> dict[str, str]:
    path = folder / "dataset_description.json"
    content = read_json(path) if path.is_file() else {}
    keys = {"Name": "name", "License": "licence", "ReferencesAndLinks": "reference"}
    return {ours: content[theirs] for theirs, ours in keys.items() if isinstance(content, dict) and content.get(theirs)}
