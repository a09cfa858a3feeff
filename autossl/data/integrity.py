"""What can be wrong with the images and label maps of a dataset: pure checks of what was read.

Errors would give wrong results or a crash later: they stop the command, all together, before anything is written.
Warnings are read in the one sensible way, said and kept in the fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from autossl.data.geometry import Geometry
from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput, Problem

SAME = 1e-3
"""Relative difference of spacings, and difference of unit directions, that is rounding of a header."""
SPACING_ERROR = 0.01
DIRECTION_ERROR = 0.05
"""About 3 degrees between the same axes of two grids."""
SHIFT_WARNING = 0.05
SHIFT_ERROR = 0.5
"""In voxels: from half a voxel on, the voxels that lie at one place are others."""
SHEAR_WARNING = 0.01
"""Cosine of the angle between two axes, about half a degree."""
LARGEST_INTENSITY = 1e18
"""float32 holds its square; a scanner's numbers stay far below."""
NAMES_SHOWN = 8

LabelMap = npt.NDArray[np.integer]


@dataclass
class Findings:
    """What checks found, by severity."""

    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Takes over what another check found."""
        self.errors += other.errors
        self.warnings += other.warnings

    def raise_errors(self, name: str) -> None:
        """Raises `InvalidInput` that lists every error, where there is one."""
        if not self.errors:
            return
        counted = f"{len(self.errors)} problem{'s' if len(self.errors) > 1 else ''}"
        cases = len({problem.case for problem in self.errors if problem.case})
        in_cases = f" in {cases} case{'s' if cases > 1 else ''}" if cases else ""
        raise InvalidInput(self.errors, title=f"{name} has {counted}{in_cases}; nothing was written:")


def check_label_numbers(schema: LabelSchema, file: Path) -> Findings:
    """Gaps in the label numbers of dataset.json: output channels are counted, so must the labels be."""
    values = schema.values
    if values == tuple(range(len(values))):
        return Findings()
    moves = [(old, new) for new, old in enumerate(values) if old != new]
    fix = (
        f"number the labels {_listed(range(len(values)))} in dataset.json and read the old files with "
        f"--remap_labels {' '.join(f'{old}={new}' for old, new in moves)}"
    )
    missing = [str(v) for v in range(values[-1]) if v not in values][:NAMES_SHOWN]
    found = f"gaps in the label numbers: {_listed(values)} are declared, {_listed(missing)} not"
    return Findings([Problem(found, "consecutive numbers from 0 (background) on, ignore last", fix, file=file)])


def check_image(image: npt.NDArray[np.floating], files: Sequence[Path], case: str) -> Findings:
    """NaN, infinite values and constant images.

    Args:
        image: [C,z,y,x].
        files: one per channel, or one that holds all channels.
        case: id for the problems.
    """
    findings = Findings(check_finite(image, files, case))
    constant: list[Problem] = []
    for channel, voxels in enumerate(image):
        file = files[channel] if len(files) == len(image) else files[0]
        lowest, highest = float(voxels.min()), float(voxels.max())
        if lowest == highest:
            fix = "export the image again, or remove the case"
            constant.append(
                Problem(f"channel {channel}: every voxel is {lowest:g}", "an image with content", fix, case, file)
            )
    (findings.errors if len(constant) == len(image) else findings.warnings).extend(constant)
    return findings


def check_finite(image: npt.NDArray[np.floating], files: Sequence[Path], case: str | None = None) -> list[Problem]:
    """NaN, infinite values, and numbers so large that their squares are infinite; arguments as in `check_image`."""
    problems = []
    for channel, voxels in enumerate(image):
        lowest, highest = float(voxels.min()), float(voxels.max())
        if -LARGEST_INTENSITY <= lowest <= highest <= LARGEST_INTENSITY:
            continue
        with np.errstate(invalid="ignore"):
            bad = voxels.size - int(np.count_nonzero(np.abs(voxels) <= LARGEST_INTENSITY))
        problems.append(
            Problem(
                f"channel {channel}: {bad} of {voxels.size} voxels are NaN or infinite (beyond {LARGEST_INTENSITY:g})",
                "finite intensities",
                "replace them by the value of the background and write the file again",
                case,
                files[channel] if len(files) == len(image) else files[0],
            )
        )
    return problems


def check_shear(geometry: Geometry, case: str, file: Path) -> list[Problem]:
    """Axes that are not at right angles: read as they are stored, as nnU-Net does, so distances are slightly wrong."""
    directions = np.reshape(geometry.direction, (3, 3))
    skew = float(np.max(np.abs(directions.T @ directions - np.eye(3))))
    if skew <= SHEAR_WARNING:
        return []
    angle = float(np.degrees(np.arcsin(min(skew, 1.0))))
    fix = "nothing, or resample the images of the case onto a grid with right angles"
    return [Problem(f"sheared axes, {angle:.2g} degrees off a right angle", "axes at right angles", fix, case, file)]


def check_label_map(
    counts: Mapping[int, int], schema: LabelSchema, stored_dtype: str, case: str, file: Path
) -> Findings:
    """Undeclared values, numbers stored as float, and label maps without foreground.

    Args:
        counts: label value → voxels, after any mapping; see `count_labels`.
        schema: of dataset.json.
        stored_dtype: type of the numbers in the file.
        case: id for the problems.
        file: of the label map.
    """
    findings = Findings()
    undeclared = sorted(set(counts) - set(schema.values))
    if undeclared:
        shown = ", ".join(f"{value} ({counts[value]} voxels)" for value in undeclared[:NAMES_SHOWN])
        example = " ".join(f"{value}=NEW" for value in undeclared[:NAMES_SHOWN])
        more = f" and {len(undeclared) - NAMES_SHOWN} more" if len(undeclared) > NAMES_SHOWN else ""
        fix = (
            f"declare them in dataset.json, or map them on reading: --remap_labels {example} with NEW one of "
            f"{_listed(schema.values)}"
        )
        findings.errors.append(
            Problem(f"undeclared label values: {shown}{more}", f"only {_listed(schema.values)}", fix, case, file)
        )
    if stored_dtype.startswith("float"):
        findings.warnings.append(
            Problem(
                f"labels stored as {stored_dtype}, all of them whole numbers",
                "an integer type",
                "nothing, they are read as integers; store them as uint8 to be safe with other software",
                case,
                file,
            )
        )
    if not undeclared and not any(counts.get(value) for values in schema.foreground.values() for value in values):
        fix = "check that the annotation was saved; move the case to imagesUn where it was not annotated"
        findings.warnings.append(Problem("the label map has no foreground", "some labeled voxels", fix, case, file))
    return findings


def check_grids(reference: Geometry, other: Geometry, case: str, file: Path, reference_file: Path) -> Findings:
    """Shape, spacing, direction and origin of two images of a case, both as they are after reorientation.

    A difference that moves no voxel by half its size is a warning, any larger one an error: arrays are compared voxel
    by voxel from here on, so a grid elsewhere would be trained on at the wrong place.
    """
    expected = f"the grid of {reference_file.name}"
    fix = "resample it onto that grid; where only the header is wrong, copy the header of that file"
    severe: list[str] = []
    slight: list[str] = []
    if reference.shape_zyx != other.shape_zyx:
        severe.append(f"shape {_text(other.shape_zyx)} against {_text(reference.shape_zyx)} voxels (z,y,x)")
    ours, theirs = _oriented_affine(reference), _oriented_affine(other)
    spacing, other_spacing = (np.linalg.norm(affine[:, :3], axis=0) for affine in (ours, theirs))
    deviation = float(np.max(np.abs(other_spacing / spacing - 1)))
    if deviation > SAME:
        text = f"spacing {_text(other_spacing)} against {_text(spacing)} mm (z,y,x)"
        (severe if deviation > SPACING_ERROR else slight).append(text)
    turned = float(np.max(np.abs(theirs[:, :3] / other_spacing - ours[:, :3] / spacing)))
    if turned > SAME:
        angle = _largest_angle(ours[:, :3] / spacing, theirs[:, :3] / other_spacing)
        (severe if turned > DIRECTION_ERROR else slight).append(f"direction turned by {angle:.3g} degrees")
    apart = np.linalg.solve(ours[:, :3], theirs[:, 3] - ours[:, 3])
    if np.max(np.abs(apart)) > SHIFT_WARNING:
        text = f"origin shifted by {_text(apart * spacing)} mm, that is {_text(apart)} voxels (z,y,x)"
        (severe if np.max(np.abs(apart)) > SHIFT_ERROR else slight).append(text)
    return Findings(
        [Problem("; ".join([*severe, *slight]), expected, fix, case, file)] if severe else [],
        [Problem("; ".join(slight), expected, fix, case, file)] if slight and not severe else [],
    )


def count_labels(label_map: LabelMap) -> dict[int, int]:
    """Label value → number of voxels, slice by slice in bounded memory."""
    lowest, highest = int(label_map.min()), int(label_map.max())
    if lowest >= 0 and highest < 2**16:
        counts = np.zeros(highest + 1, dtype=np.int64)
        for part in label_map:
            counts += np.bincount(part.ravel(), minlength=highest + 1)
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    found: dict[int, int] = {}
    for part in label_map:
        for value, n in zip(*np.unique(part, return_counts=True), strict=True):
            found[int(value)] = found.get(int(value), 0) + int(n)
    return dict(sorted(found.items()))


def parse_remap_labels(texts: Sequence[str], schema: LabelSchema) -> dict[int, int]:
    """The mapping that `--remap_labels 4=3 255=0` asks for.

    Raises:
        InvalidInput: with every text that is no OLD=NEW, names an OLD twice, or a NEW that is not declared.
    """
    mapping: dict[int, int] = {}
    problems = []
    for text in texts:
        old, separator, new = text.partition("=")
        try:
            pair = (int(old), int(new))
        except ValueError:
            separator = ""
        if not separator:
            problems.append(Problem(f"--remap_labels {text}", "OLD=NEW, two whole numbers", "for example 4=3"))
        elif pair[0] in mapping:
            problems.append(Problem(f"--remap_labels {text}: {pair[0]} is mapped twice", "each OLD once", "remove one"))
        elif pair[1] not in schema.values:
            fix = "choose one of them, or declare it in dataset.json"
            declared = f"one of the declared values {_listed(schema.values)}"
            problems.append(Problem(f"--remap_labels {text}: {pair[1]} is not declared", declared, fix))
        else:
            mapping[pair[0]] = pair[1]
    if problems:
        raise InvalidInput(problems)
    return mapping


def remap_label_map(label_map: LabelMap, mapping: Mapping[int, int]) -> LabelMap:
    """The label map with each OLD replaced by its NEW, all at once (1=2 2=1 swaps); the input is not changed.

    Returns:
        The same array where nothing is to be mapped, else a new one; int32 where a NEW does not fit into its type.
    """
    present = {old: new for old, new in mapping.items() if old != new and (label_map == old).any()}
    if not present:
        return label_map
    limits = np.iinfo(label_map.dtype)
    fits = all(limits.min <= new <= limits.max for new in present.values())
    result = label_map.copy() if fits else label_map.astype(np.int32)
    for old, new in present.items():
        result[label_map == old] = new
    return result


def grouped(problems: Sequence[Problem]) -> list[str]:
    """Problems as lines for a log, those that differ only in case and file in one line with the cases' names."""
    cases: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        cases.setdefault((problem.found, problem.fix), []).append(problem.case or str(problem.file or ""))
    lines = []
    for (found, fix), names in cases.items():
        shown = ", ".join(names[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")
        lines.append(f"{len(names)} case{'s' if len(names) > 1 else ''} ({shown}): {found}. What to do: {fix}.")
    return lines


def _oriented_affine(geometry: Geometry) -> npt.NDArray[np.float64]:
    """3×4, from the oriented array's index (z,y,x) to mm in RAS."""
    stored = geometry.affine[:3]
    affine = np.empty((3, 4))
    affine[:, 3] = stored[:, 3]
    for i, (axis, flip) in enumerate(zip(geometry.axes, geometry.flips, strict=True)):
        column = stored[:, 2 - axis]
        affine[:, i] = -column if flip else column
        if flip:
            affine[:, 3] += column * (geometry.stored_shape_zyx[axis] - 1)
    return affine


def _largest_angle(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> float:
    return float(np.degrees(np.arccos(np.clip((ours * theirs).sum(0), -1, 1)).max()))


def _text(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{round(value, 6) + 0.0:.4g}" for value in values) + ")"


def _listed(values: Iterable[object]) -> str:
    texts = [str(value) for value in values]
    shown = texts if len(texts) <= 2 * NAMES_SHOWN else [*texts[: 2 * NAMES_SHOWN], "…"]
    return ", ".join(shown)
