"""Scores a folder of predicted label maps against a folder of references and writes summary.json."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autossl.data.files import write_json
from autossl.data.geometry import Geometry
from autossl.data.image_io import FILE_ENDINGS, file_ending_of, read_label
from autossl.data.integrity import remap_label_map
from autossl.data.labels import LabelSchema
from autossl.data.parallel import parallel_map
from autossl.data.probabilities import probabilities_file
from autossl.data.problems import InvalidInput, Problem
from autossl.evaluation.case_scores import Scoring, Voxel, score_all
from autossl.evaluation.metrics import ClassScores, mean_of_defined, undeclared_values
from autossl.evaluation.surfaces import DEFAULT_TOLERANCE, Convention

logger = logging.getLogger(__name__)

EMPTY_MASK_RULE = (
    "prediction and reference both empty: metric undefined (null), left out of the means and counted (n_both_empty); "
    "only the reference empty: Dice, IoU, NSD and lesion F1 0, relative volume error, HD95 and ASSD undefined "
    "(n_false_alarm); "
    "only the prediction empty: Dice, IoU, NSD and lesion F1 0, relative volume error -1, HD95 and ASSD undefined "
    "(n_missed); "
    "voxels with the ignore label in the reference count nowhere"
)
SIDE_MAP_SUFFIXES = ("_entropy", "_disagreement")
"""What predicting may write beside a case's label map."""


@dataclass(frozen=True)
class ClassSummary:
    """One class (or region) over all cases."""

    means: Mapping[str, float]
    """Metric name → mean over the cases where it is defined; NaN where it is nowhere."""
    n_defined: Mapping[str, int]
    """Metric name → number of cases in its mean."""
    n_both_empty: int
    n_false_alarm: int
    n_missed: int


@dataclass(frozen=True)
class Evaluation:
    """What a folder of predictions reached."""

    predictions: Path
    references: Path
    cases: Mapping[str, Mapping[str, ClassScores]]
    """Case id → class name → scores, sorted by case id."""
    without_prediction: tuple[str, ...] = ()
    """References that were left out because they have no prediction; only where the caller allowed it."""
    scoring: Scoring = field(default_factory=Scoring)
    """What was measured beside overlap and volume, and how."""

    @property
    def class_names(self) -> list[str]:
        """Foreground classes or regions, in output order."""
        return list(next(iter(self.cases.values())))

    def class_summary(self, name: str) -> ClassSummary:
        """Means and counts of one class."""
        scores = [case[name] for case in self.cases.values()]
        names = dict.fromkeys(metric for s in scores for metric in s.metrics)  # not every case has every metric
        means = {metric: mean_of_defined(s.metrics.get(metric, math.nan) for s in scores) for metric in names}
        kinds = Counter((s.confusion.n_prediction > 0, s.confusion.n_reference > 0) for s in scores)
        return ClassSummary(
            means={metric: mean for metric, (mean, _) in means.items()},
            n_defined={metric: number for metric, (_, number) in means.items()},
            n_both_empty=kinds[False, False],
            n_false_alarm=kinds[True, False],
            n_missed=kinds[False, True],
        )

    @property
    def foreground_mean(self) -> dict[str, float]:
        """Metric name → mean over the classes of the means over cases; NaN where no class has one."""
        summaries = [self.class_summary(name) for name in self.class_names]
        return {metric: mean_of_defined(s.means[metric] for s in summaries)[0] for metric in summaries[0].means}

    @property
    def surface_settings(self) -> dict[str, Any]:
        """Convention, unit and the tolerance of NSD per class; empty where no surface was measured."""
        units = [unit for unit in ("mm", "px") if f"hd95_{unit}" in self.foreground_mean]
        if not units:
            return {}
        tolerances = {name: self.scoring.tolerance_of(name) for name in self.class_names}
        return {
            "convention": self.scoring.surface_convention,
            "unit": " and ".join(units),
            "nsd_tolerance": tolerances,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values as summary.json holds them; what is undefined is null."""
        return {
            "predictions": str(self.predictions),
            "references": str(self.references),
            "empty_mask_rule": EMPTY_MASK_RULE,
            "surfaces": self.surface_settings or None,
            "n_cases": len(self.cases),
            "references_without_prediction": list(self.without_prediction),
            "foreground_mean": _plain(self.foreground_mean),
            "classes": {name: _summary_json(self.class_summary(name)) for name in self.class_names},
            "cases": {
                case: {name: _scores_json(scores) for name, scores in classes.items()}
                for case, classes in self.cases.items()
            },
        }


@dataclass(frozen=True)
class EvaluationOptions:
    """What is scored, and how the files are read."""

    cases: Collection[str] | None = None
    """Score exactly these, whatever else lies in the folders; None: every case that has a reference."""
    only_predicted: bool = False
    """Leave out references that have no prediction (named in the result) instead of refusing."""
    remap_references: Mapping[int, int] = field(default_factory=dict)
    """OLD → NEW label values of the references, as the dataset was planned with."""
    n_workers: int | None = 1
    """Processes; None takes one per CPU."""
    surfaces: bool = True
    """HD95, ASSD and NSD."""
    tolerance_mm: Mapping[str, float] = field(default_factory=dict)
    """Of NSD, class → mm (pixels for pictures); `DEFAULT_TOLERANCE` of the others."""
    surface_convention: Convention = "surface_elements"
    """"border_voxels" gives MedPy's figures, as most papers show them."""
    lesions: bool = False
    """Lesion-wise F1, for classes that come in pieces."""

    @property
    def scoring(self) -> Scoring:
        """What is measured beside overlap and volume."""
        return Scoring(self.surfaces, self.tolerance_mm, self.surface_convention, self.lesions)


def evaluate_folder(
    predictions: Path,
    references: Path,
    schema: LabelSchema,
    options: EvaluationOptions | None = None,
    *,
    output: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Scores segmentations against references; both folders hold CASE.<ending>, endings may differ.

    Where probabilities lie with a prediction (`probabilities/CASE.b2nd`), its calibration error is scored, too.

    Args:
        predictions: Folder of predicted label maps; uncertainty maps in it are passed over.
        references: Folder of reference label maps.
        schema: What the label values mean.
        options: Which cases, and how.
        output: Where summary.json is written, atomically; None writes nothing.
        progress: Called with (cases done, cases in all) after each case.

    Raises:
        InvalidInput: Cases missing on either side, grids that differ, undeclared values, unreadable files, tolerances
            of unknown classes: all of them.
    """
    options = options or EvaluationOptions()
    _check_tolerances(options.tolerance_mm, schema)
    pairs, without = _match_cases(Path(predictions), Path(references), options)
    scored: dict[str, Mapping[str, ClassScores]] = {}
    problems: list[Problem] = []
    score = partial(_score_pair, schema=schema, remap_references=options.remap_references, scoring=options.scoring)
    results = parallel_map(score, pairs, options.n_workers, name_of=lambda pair: pair.case)
    for number, (pair, result) in enumerate(zip(pairs, results, strict=True), start=1):
        if isinstance(result, list):
            problems += result
        else:
            scored[pair.case] = result
        if progress is not None:
            progress(number, len(pairs))
    if problems:
        raise InvalidInput(problems, title=f"{len(problems)} problems in {predictions} against {references}:")
    evaluation = Evaluation(Path(predictions), Path(references), scored, without, options.scoring)
    if output is not None:
        write_json(Path(output), evaluation.to_json())
    return evaluation


def label_files(folder: Path) -> dict[str, Path]:
    """Label maps of a folder, case id → file, sorted; uncertainty maps beside them are passed over.

    Raises:
        InvalidInput: The folder does not exist, holds no label map, or a case twice (with different endings).
    """
    if not folder.is_dir():
        raise InvalidInput(
            Problem("the folder does not exist", "a folder of label maps", "check the path", file=folder)
        )
    files: dict[str, Path] = {}
    twice: list[Problem] = []
    for path in sorted(folder.iterdir()):
        ending = file_ending_of(path)
        case = path.name[: len(path.name) - len(ending)]
        if not ending or path.name.startswith("."):
            continue
        if case in files:
            fix = "remove the one that does not belong here"
            twice.append(Problem(f"also there as {files[case].name}", "one file per case", fix, case=case, file=path))
        files[case] = path
    if twice:
        raise InvalidInput(twice)
    for side_map in [f"{case}{suffix}" for case in files for suffix in SIDE_MAP_SUFFIXES]:
        files.pop(side_map, None)
    if not files:
        wanted = f"files CASE{{ending}} with an ending of {', '.join(FILE_ENDINGS)}"
        raise InvalidInput(Problem("no label map in the folder", wanted, "check the path", file=folder))
    return files


@dataclass(frozen=True)
class _Pair:
    case: str
    prediction: Path
    reference: Path


def _match_cases(
    predictions: Path, references: Path, options: EvaluationOptions
) -> tuple[list[_Pair], tuple[str, ...]]:
    """Pairs by case id, and the references without a prediction (empty unless they are allowed)."""
    predicted, referenced = label_files(predictions), label_files(references)
    if (cases := options.cases) is not None:
        predicted = {case: path for case, path in predicted.items() if case in cases}
        absent = sorted(set(cases) - set(referenced))
        if absent:
            wanted = f"a label map of each in {references}"
            raise InvalidInput(Problem(f"no reference of {', '.join(absent)}", wanted, "add them", file=references))
        referenced = {case: path for case, path in referenced.items() if case in cases}
    extra = [case for case in predicted if case not in referenced]
    missing = [case for case in referenced if case not in predicted]
    problems = [
        Problem(
            "predicted, but has no reference",
            f"a label map of this case in {references}",
            "move the prediction elsewhere or add its reference",
            case=case,
            file=predicted[case],
        )
        for case in extra
    ]
    if missing and options.only_predicted:
        logger.warning("%d references have no prediction and are left out: %s", len(missing), ", ".join(missing))
    else:
        problems += [
            Problem(
                "has a reference, but was not predicted",
                f"a label map of this case in {predictions}",
                "predict it, or pass --only_predicted to leave such cases out",
                case=case,
                file=referenced[case],
            )
            for case in missing
        ]
    if problems:
        raise InvalidInput(problems, title=f"{len(problems)} cases of {predictions} and {references} have no partner:")
    pairs = [_Pair(case, path, referenced[case]) for case, path in predicted.items()]
    return pairs, tuple(missing)


def _check_tolerances(tolerances: Mapping[str, float], schema: LabelSchema) -> None:
    expected = f"0 or more, for one of {', '.join(schema.foreground)}"
    fix = f"correct it, or leave it out (the default is {DEFAULT_TOLERANCE:g})"
    problems = [
        Problem(f"a tolerance of {value:g} for {name}", expected, fix)
        for name, value in tolerances.items()
        if name not in schema.foreground or not 0 <= value < math.inf
    ]
    if problems:
        raise InvalidInput(problems)


def _score_pair(
    pair: _Pair, schema: LabelSchema, remap_references: Mapping[int, int], scoring: Scoring
) -> dict[str, ClassScores] | list[Problem]:
    """The scores of a case, or all that keeps it from being scored."""
    maps, problems = [], []
    for path in (pair.prediction, pair.reference):
        try:
            maps.append(read_label(path, "native"))
        except InvalidInput as error:
            problems += [Problem(p.found, p.expected, p.fix, case=pair.case, file=p.file) for p in error.problems]
    if problems:
        return problems
    (prediction, _, geometry), (reference, spacing, reference_geometry) = maps
    reference = remap_label_map(reference, remap_references)
    for path, label_map in ((pair.prediction, prediction), (pair.reference, reference)):
        unknown = undeclared_values(label_map, schema)
        if unknown:
            expected = f"the declared values {', '.join(str(value) for value in schema.values)}"
            fix = "evaluate with the dataset that the label map belongs to"
            problems.append(Problem(f"label values {unknown[:10]}", expected, fix, case=pair.case, file=path))
    differences = geometry.differences(reference_geometry)
    if differences:
        found = f"another grid than its reference: {'; '.join(differences)}"
        expected = f"the grid of {pair.reference}"
        fix = "predict from the image that the reference was drawn on, or resample the label map"
        problems.append(Problem(found, expected, fix, case=pair.case, file=pair.prediction))
    if problems:
        return problems
    voxel = Voxel(spacing if reference_geometry.kind != "natural" else None, _voxel_volume_mm3(reference_geometry))
    stored = probabilities_file(pair.prediction.parent, pair.case)
    try:
        return score_all(prediction, reference, schema, voxel, scoring, stored if stored.is_file() else None)
    except InvalidInput as error:
        return [Problem(p.found, p.expected, p.fix, case=pair.case, file=p.file) for p in error.problems]


def _voxel_volume_mm3(geometry: Geometry) -> float | None:
    """None where a voxel has no volume: pictures, and images with two axes only."""
    if geometry.kind == "natural" or len(geometry.size_xyz) < 3:
        return None
    axes = np.reshape(geometry.direction, (3, 3)) * np.asarray(geometry.spacing_xyz)
    return float(abs(np.linalg.det(axes)))  # sheared axes span less than the product of the spacings


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _summary_json(summary: ClassSummary) -> dict[str, Any]:
    return {
        "mean": _plain(summary.means),
        "n_defined": dict(summary.n_defined),
        "n_both_empty": summary.n_both_empty,
        "n_false_alarm": summary.n_false_alarm,
        "n_missed": summary.n_missed,
    }


def _scores_json(scores: ClassScores) -> dict[str, Any]:
    counts = scores.confusion
    return _plain(scores.metrics) | {
        "n_prediction": counts.n_prediction,
        "n_reference": counts.n_reference,
        "true_positive": counts.true_positive,
        "false_positive": counts.false_positive,
        "false_negative": counts.false_negative,
    }
