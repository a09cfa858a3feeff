"""The end of a fold: whole validation cases predicted in their original grid, and their Dice per class.

Nothing of this goes back into training. Everything is called full-volume, because a Dice of patches is another thing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autossl.data.files import read_json, write_json
from autossl.data.runs import CHECKPOINT_FINAL
from autossl.evaluation.evaluate import EvaluationOptions, evaluate_folder
from autossl.evaluation.out_of_fold import VALIDATION_FOLDER, write_missing
from autossl.inference.checkpoint import read_checkpoint
from autossl.inference.outputs import OutputFolder
from autossl.inference.predictor import Predictor, Window
from autossl.inference.preprocessed import restore_preprocessed
from autossl.inference.restore import Wanted
from autossl.networks.prediction import PredictionSpec
from autossl.trainers.base import SemiSupervisedTrainer
from autossl.trainers.setup import RunSetup

logger = logging.getLogger(__name__)

OnCase = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ValidationResult:
    """Full-volume results of a fold's validation cases."""

    summary: Path
    """summary.json of the deployed prediction."""
    dice: dict[str, float | None]
    """Class → mean full-volume Dice over the cases where it is defined."""
    mean_dice: float | None
    """Mean over the classes."""
    alternatives: dict[str, float | None]
    """Name → mean Dice of predictions that are not deployed (`alternative_predictions`)."""


def validate_fold(
    setup: RunSetup, fold: str, method: SemiSupervisedTrainer, folder: Path, on_case: OnCase | None = None
) -> ValidationResult:
    """Predicts with the final weights what is not predicted yet, and scores it.

    Writes `validation/CASE.<ending>`, `validation/summary.json`, and the same for each alternative prediction in
    `validation_<name>/`; where the request saves probabilities, `validation/probabilities/CASE.b2nd` as well, also of a
    fold that was scored before.
    """
    content = read_checkpoint(folder / CHECKPOINT_FINAL)
    networks, specs = content["networks"], {"": PredictionSpec.from_json(content["prediction"])}
    if "alternatives" in content:  # what the weights decided, a method that was just built does not know
        specs |= {name: PredictionSpec.from_json(spec) for name, spec in content["alternatives"].items()}
    else:
        specs |= method.alternative_predictions()
    n_cases = len(setup.folds[fold].validation)
    summaries = {}
    for index, (name, spec) in enumerate(specs.items()):
        target = folder / (f"{VALIDATION_FOLDER}_{name}" if name else VALIDATION_FOLDER)
        wanted = Wanted(probabilities=setup.request.save_probabilities and not name)
        outputs = OutputFolder(target, setup.description.file_ending, wanted, n_folds=1)
        scored = (target / "summary.json").is_file()
        if not scored or (wanted.probabilities and not all(map(outputs.is_complete, setup.folds[fold].validation))):
            predictor = _predictor(setup, spec, networks)
            for done, case in enumerate(setup.folds[fold].validation, 1):
                if not outputs.is_complete(case):
                    stored = (setup.store, case, setup.plans, setup.schema)
                    write_missing(outputs, case, *restore_preprocessed(predictor, *stored, wanted))
                if on_case is not None:
                    on_case(index * n_cases + done, len(specs) * n_cases, case)
        if not scored:
            _score(setup, fold, target)
        summaries[name] = read_json(target / "summary.json")
    deployed = summaries.pop("")
    return ValidationResult(
        summary=folder / VALIDATION_FOLDER / "summary.json",
        dice={name: entry["mean"]["dice"] for name, entry in deployed["classes"].items()},
        mean_dice=deployed["foreground_mean"]["dice"],
        alternatives={name: summary["foreground_mean"]["dice"] for name, summary in summaries.items()},
    )


def _predictor(setup: RunSetup, spec: PredictionSpec, networks: dict[str, Any]) -> Predictor:
    plan = setup.configuration
    return Predictor.from_state_dicts(spec, [networks], plan, setup.schema, Window.of(plan), setup.device)


def _score(setup: RunSetup, fold: str, folder: Path) -> None:
    cases = setup.folds[fold].validation
    evaluation = evaluate_folder(
        folder,
        setup.label_folder,
        setup.schema,
        EvaluationOptions(cases=cases, remap_references=setup.fingerprint.remap_labels),
    )
    summary = {"what": "full-volume metrics of the fold's validation cases, final weights", **evaluation.to_json()}
    write_json(folder / "summary.json", summary)
