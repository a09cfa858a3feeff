"""Which files of a folder belong to which case: CASE_0000.nii.gz, CASE_0001.nii.gz, … one file per channel."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autossl.data.image_io import PICTURE_ENDINGS, file_ending_of
from autossl.data.problems import InvalidInput, Problem

logger = logging.getLogger(__name__)

MAX_ID_BYTES = 180
"""A file system takes 255 for a name; what we add to a case id (endings, marks of unfinished files) takes up to 60."""
UNPRINTABLE = ("Cc", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode's control signs, halves of pairs (names that are not UTF-8), signs without a meaning, and line ends."""
CHANNEL_SUFFIX = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")
COLOR_CHANNELS = (3, 4)
"""What one color picture holds: RGB or RGBA."""


@dataclass
class FoundFiles:
    """What a folder holds, and what is wrong with it."""

    cases: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def case_files(folder: Path, file_ending: str, n_channels: int) -> dict[str, tuple[Path, ...]]:
    """The image files of each case, in channel order; cases in order of their names.

    Single-channel images and color pictures may leave out the channel number.

    Raises:
        InvalidInput: with all problems: missing or surplus channels, mixed file endings, subfolders, no images at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidInput(Problem("the folder does not exist", "a folder of images", "check the path", file=folder))
    found = find_case_files(folder, file_ending, n_channels)
    if not found.cases and not found.problems:
        found.problems.append(
            Problem(
                f"no file ends with {file_ending}",
                f"images named CASE_0000{file_ending}",
                "check the folder and the file ending in dataset.json",
                file=folder,
            )
        )
    if found.problems:
        raise InvalidInput(found.problems)
    return found.cases


def modality_files(folder: Path, file_ending: str, channels: Sequence[int]) -> dict[str, tuple[Path, ...]]:
    """The files of some of the channels of each case, in the order of `channels`; cases in order of their names.

    Files are numbered as in imagesTr (CASE_0001 is channel 1); of one channel they may be named CASE alone, where no
    file has a number. Files of other channels are passed over.

    Raises:
        InvalidInput: with all problems: a case without one of the channels, files with and without numbers, no images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidInput(Problem("the folder does not exist", "a folder of images", "check the path", file=folder))
    paths, problems = files_of(folder, file_ending)
    stems = {path.name[: -len(file_ending)]: path for path in paths}
    numbers = ", ".join(f"{channel:04d}" for channel in channels)
    names = f"files named {' and '.join(f'CASE_{channel:04d}{file_ending}' for channel in channels)}"
    matches = {stem: CHANNEL_SUFFIX.match(stem) for stem in stems}
    found: dict[str, dict[int, Path]] = {}
    plain = len(channels) == 1 and not any(matches.values())
    for stem, path in stems.items():
        match = matches[stem]
        if match:
            found.setdefault(match["case"], {})[int(match["channel"])] = path
        elif plain:
            found[stem] = {channels[0]: path}
        else:
            problems.append(Problem("no channel number in the file name", names, "rename the file", file=path))
    passed_over = 0
    for case, there in sorted(found.items()):
        if set(channels) <= set(there):
            passed_over += len(there) - len(channels)
            continue
        others = ", ".join(f"{channel:04d}" for channel in sorted(there))
        fix = "number the files by the channels of dataset.json, or name the modality that they show"
        problems.append(Problem(f"channels {others}, not all of {numbers}", names, fix, case=case, file=folder))
    if not stems and not problems:
        fix = "check the folder and the file ending in dataset.json"
        problems.append(Problem(f"no file ends with {file_ending}", names, fix, file=folder))
    if problems:
        raise InvalidInput(problems)
    if passed_over:
        logger.warning("%s: %d files of channels other than %s are passed over", folder, passed_over, numbers)
    return {case: tuple(there[channel] for channel in channels) for case, there in sorted(found.items())}


def find_case_files(folder: Path, file_ending: str, n_channels: int, labeled_ids: Collection[str] = ()) -> FoundFiles:
    """As `case_files`, with the problems beside what was found.

    Args:
        folder: one that exists.
        file_ending: as in dataset.json.
        n_channels: channels of a case.
        labeled_ids: names of label files; they tell CASE_0000 as a name from CASE with channel 0000.
    """
    paths, problems = files_of(folder, file_ending)
    stems = [path.name[: -len(file_ending)] for path in paths]
    may_leave_out = n_channels == 1 or _may_be_color(n_channels, file_ending)
    plain = may_leave_out and _without_channel_numbers(stems, labeled_ids)
    channels: dict[str, dict[int, Path]] = {}
    for path, stem in zip(paths, stems, strict=True):
        match = None if plain else CHANNEL_SUFFIX.match(stem)
        case = match["case"] if match else stem
        channel = int(match["channel"]) if match else 0 if may_leave_out else None
        if channel is None:
            problems.append(
                Problem(
                    "no channel number in the file name",
                    f"CASE_0000{file_ending} to CASE_{n_channels - 1:04d}{file_ending}, one file per channel",
                    "rename the file",
                    file=path,
                )
            )
        elif channel in channels.setdefault(case, {}):
            problems.append(
                Problem(
                    f"a second file for channel {channel}, beside {channels[case][channel].name}",
                    "one file per case and channel",
                    "remove one of the two",
                    case=case,
                    file=path,
                )
            )
        else:
            channels[case][channel] = path
    cases: dict[str, tuple[Path, ...]] = {}
    for case, by_channel in sorted(channels.items()):
        fault = _channel_fault(case, by_channel, n_channels, file_ending, folder)
        if fault:
            problems.append(fault)
        else:
            cases[case] = tuple(by_channel[channel] for channel in sorted(by_channel))
    return FoundFiles(cases, problems)


def files_of(folder: Path, file_ending: str) -> tuple[list[Path], list[Problem]]:
    """The files with the ending, by name; images of other endings, subfolders and unusable names are problems.

    Hidden files and files that are no images (notes, JSON) are passed over.
    """
    paths, problems = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            problems.append(
                Problem(
                    "a folder among the images, so that case ids would hold path separators",
                    "all files of a pool directly in one folder",
                    "move its files up and make their names distinct",
                    file=path,
                )
            )
        elif path.name.endswith(file_ending) and (file_ending != ".nii" or not path.name.endswith(".nii.gz")):
            fault = id_fault(path.name[: -len(file_ending)])
            paths.append(path)
            if fault:
                problems.append(Problem(fault, "letters, digits, '-', '_' and '.'", "rename the file", file=path))
        elif file_ending_of(path):
            problems.append(
                Problem(
                    f"mixed file endings: {path.name}",
                    f"only {file_ending}, as dataset.json says",
                    "convert or remove the file",
                    file=path,
                )
            )
        else:
            logger.debug("%s is no image and is passed over", path)
    return paths, problems


def id_fault(case: str) -> str | None:
    """Why a case id cannot be used as a file name everywhere, or None."""
    if any(sign in case for sign in "/\\"):
        return f"the case id '{case}' holds a path separator"
    unusable = any(unicodedata.category(sign) in UNPRINTABLE or sign in ':*?"<>|' for sign in case)
    if not case.strip(".") or case != case.strip() or unusable:
        return f"the case id {case!a} cannot be a file name on every system"
    if len(case.encode()) > MAX_ID_BYTES:
        return f"the case id '{case[:40]}…' has {len(case.encode())} bytes, more than {MAX_ID_BYTES}"
    return None


def links_out(folder: Path, names: Iterable[str]) -> list[Problem]:
    """Symbolic links of a data set that lead out of it; a folder that is linked as a whole is no fault.

    Args:
        folder: of the data set.
        names: of its files and folders; of a folder its own entries are looked at too.
    """
    root = _target(folder)
    problems = []
    for path in (folder / name for name in names):
        entries = sorted(path.iterdir()) if path.is_dir() and _target(path).is_relative_to(root) else []
        for entry in (path, *entries):
            if entry.is_symlink() and not _target(entry).is_relative_to(root):
                found = f"a symbolic link that leads out of the data set, to {_target(entry)}"
                fix = "put the file itself there (a hard link will do)"
                problems.append(Problem(found, f"files and folders below {folder.name}", fix, file=entry))
    return problems


def _target(path: Path) -> Path:
    """Where a path leads; links in a circle end where it closes (`Path.resolve` raises for them)."""
    return Path(os.path.realpath(path))


def _without_channel_numbers(stems: list[str], labeled_ids: Collection[str]) -> bool:
    """Whether a folder leaves the channel numbers out, where that is allowed: then a last _0007 belongs to the name.

    So it is where no file is channel 0000, or where a label has the same whole name.
    """
    return not any(stem.endswith("_0000") for stem in stems) or any(
        stem in labeled_ids and CHANNEL_SUFFIX.match(stem) for stem in stems
    )


def _channel_fault(
    case: str, by_channel: dict[int, Path], n_channels: int, file_ending: str, folder: Path
) -> Problem | None:
    present = sorted(by_channel)
    if present == list(range(n_channels)) or (present == [0] and _may_be_color(n_channels, file_ending)):
        return None
    missing = [f"{channel:04d}" for channel in range(n_channels) if channel not in by_channel]
    surplus = [f"{channel:04d}" for channel in present if channel >= n_channels]
    parts = [
        f"{word} {', '.join(channels)}" for word, channels in (("missing", missing), ("surplus", surplus)) if channels
    ]
    fix = "add or remove files, or correct channel_names in dataset.json"
    if n_channels == 1:
        whole = f"{case}_{present[0]:04d}"
        fix += f"; where {whole} is itself a case id, name the file {whole}_0000{file_ending}"
    return Problem(
        f"channels {' and '.join(parts)}", f"{n_channels} channels, from 0000 on", fix, case=case, file=folder
    )


def _may_be_color(n_channels: int, file_ending: str) -> bool:
    return n_channels in COLOR_CHANNELS and file_ending in PICTURE_ENDINGS
