"""Recomputes a table's Dice from the label maps that the runs kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from autossl.data.problems import InvalidInput
from autossl.evaluation.benchmark.request import BenchmarkPlan
from autossl.evaluation.benchmark.results import Dice, Training, dice_of
from autossl.evaluation.benchmark.tables import Row, build_rows
from autossl.evaluation.evaluate import EvaluationOptions, evaluate_folder

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Verification:
    """What came out."""

    n_runs: int
    n_label_maps: int
    disagreements: tuple[str, ...]
    """What differs between the table and the label maps; empty where all agree."""


def verify(
    plan: BenchmarkPlan,
    rows: Sequence[Row],
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Scores all kept validation label maps against the raw labels, builds the table's Dice anew, and compares."""
    trainings = [training for row in rows for training in row.trainings]
    rescored, disagreements = [], []
    for number, training in enumerate(trainings, 1):
        try:
            dice = _scores(plan, training)
        except InvalidInput as error:
            disagreements.append(f"{training.run}: {error}")
            continue
        finally:
            if on_progress is not None:
                on_progress("rescored runs", number, len(trainings))
        disagreements += _case_differences(training, dice)
        rescored.append(replace(training, dice=dice))
    again = build_rows({row.key: row.n_wanted for row in rows}, rescored, plan.classes, plan.patients)
    disagreements += [text for row, other in zip(rows, again, strict=True) for text in _row_differences(row, other)]
    return Verification(len(trainings), sum(len(training.dice) for training in rescored), tuple(disagreements))


def _scores(plan: BenchmarkPlan, training: Training) -> Dice:
    setup, run = plan.setups[0], training.run
    evaluation = evaluate_folder(
        run.summary.parent,
        setup.label_folder,
        setup.schema,
        EvaluationOptions(
            cases=training.spec.folds[run.fold].validation, remap_references=setup.fingerprint.remap_labels
        ),
    )
    return dice_of(evaluation.to_json())


def _case_differences(training: Training, dice: Dice) -> list[str]:
    """Cases whose stored score is not what the label map gives."""
    if set(dice) != set(training.dice):
        return [f"{training.run}: the summary has {len(training.dice)} cases, the label maps {len(dice)}"]
    return [
        f"{training.run}, {case}, {name}: {stored[name]:.6f} in the summary, {value:.6f} from the label map"
        for case, stored in training.dice.items()
        for name, value in dice[case].items()
        if not _equal(stored.get(name, math.nan), value)
    ]


def _row_differences(row: Row, other: Row) -> list[str]:
    pairs = {name: (value, other.dice[name]) for name, value in row.dice.items()}
    pairs["mean"] = row.mean_dice, other.mean_dice
    if row.to_twin is not None and other.to_twin is not None:
        pairs["difference to the twin"] = row.to_twin.comparison.estimate, other.to_twin.comparison.estimate
    return [
        f"{row.key}, {name}: {table:.6f} in the table, {again:.6f} from the label maps"
        for name, (table, again) in pairs.items()
        if not _equal(table, again)
    ]


def _equal(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE or (math.isnan(one) and math.isnan(other))
