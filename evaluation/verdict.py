"""Did the unlabeled cases help? A word, a figure with its interval, and what that interval does and does not contain.

The figure is the mean difference in Dice, with unlabeled cases minus without, over the classes and the out-of-fold
scores of the same patients. Its interval is that of `autossl.evaluation.resampling`: whole patients are resampled,
training variance enters as far as folds or seeds show it, and where several candidates stood for choice, choosing is
part of every resample. *helped* and *hurt* need an interval on one side of zero. Per class the same holds without a
correction for the number of classes. A table beside it compares every candidate with its own supervised twin
(Wilcoxon's signed-rank test over patients, Holm's correction over the candidates).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from autossl.evaluation.resampling import (
    Case,
    Interval,
    Resamples,
    choose_again,
    draw_resamples,
    interval_of,
    interval_of_chosen,
    spread_of,
)
from autossl.evaluation.statistics import LEVEL, RESAMPLES, FloatArray, PairedSample, holm

Word = Literal["helped", "no evidence", "hurt", "too few to tell"]
FEWEST_PATIENTS = 8
TIE_DICE = 0.001
"""A patient whose mean Dice differs by no more than this counts as a tie."""
CORRELATED = (
    "Out-of-fold scores are correlated: the networks of any two folds share most of their labeled cases. No interval "
    "from one cross-validation knows how large that effect is, so read this one as somewhat too narrow."
)
TWIN = "supervised twin"


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(_Schema):
    """A difference in Dice (0.01 is a point); None where there is nothing to say."""

    word: Word
    estimate: float | None
    """Without the luck of the choosing, where several candidates stood for choice."""
    low: float | None
    high: float | None
    observed: float | None
    """Mean difference as it is."""
    n_patients: int
    """With a pair of scores."""
    wins: int
    ties: int
    losses: int
    """Patients, by their mean difference; up to `TIE_DICE` is a tie."""


class TwinComparison(Figure):
    """One candidate beside one way without unlabeled cases; nothing was chosen here."""

    name: str
    against: str
    p_wilcoxon: float | None
    p_holm: float | None
    """Corrected over the candidates."""


class Verdict(Figure):
    """What `verdict.json` holds, besides where it comes from."""

    sentence: str
    notes: tuple[str, ...]
    """What the interval contains and what it does not, in sentences."""
    per_class: dict[str, Figure]
    chosen: str
    """The candidate that is judged."""
    against: str
    """What it is compared with."""
    recommended: str
    """What the final model should be made of: the candidate if it helped, else the one without unlabeled cases."""
    comparisons: tuple[TwinComparison, ...]
    """Every candidate against its twin."""
    equal_time: TwinComparison | None = None
    """What is judged against the supervised run of equal wall time."""
    n_folds: int
    n_seeds: int
    level: float = LEVEL
    n_resamples: int


@dataclass(frozen=True)
class Candidate:
    """A way to make the model: method, configuration, postprocessing."""

    name: str
    dice: FloatArray
    """[seeds, cases, classes] of out-of-fold cases; NaN where undefined."""
    twin: str = ""
    """Name of its partner without unlabeled cases; "" for the first one."""


@dataclass(frozen=True)
class Cohort:
    """Whose scores they are."""

    cases: tuple[Case, ...]
    """Fold and patient of each case."""
    classes: tuple[str, ...]


def judge(
    with_unlabeled: Sequence[Candidate],
    without: Sequence[Candidate],
    cohort: Cohort,
    equal_time: Candidate | None = None,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Verdict:
    """The verdict on the best candidate with unlabeled cases against the best one without.

    Args:
        with_unlabeled: One or more; the one with the highest mean Dice is judged, and chosen again in each resample.
        without: Their supervised twins; one or more, chosen likewise.
        cohort: The cases and classes of all of them.
        equal_time: A supervised run of equal wall time, for the comparison beside.
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap; the same seed gives the same figures.

    Raises:
        ValueError: no candidate on a side, or shapes that differ.
    """
    _check([*with_unlabeled, *without, *([equal_time] if equal_time else [])], cohort, with_unlabeled, without)
    n_seeds = with_unlabeled[0].dice.shape[0]
    resamples = draw_resamples(cohort.cases, n_seeds, n_resamples, seed)
    first, first_picks = choose_again([c.dice for c in with_unlabeled], cohort.cases, resamples)
    second, second_picks = choose_again([c.dice for c in without], cohort.cases, resamples)
    chosen, against = with_unlabeled[first], without[second]

    def interval(classes: slice) -> Interval:
        pairs = [
            [spread_of((one.dice - other.dice)[:, :, classes], cohort.cases) for other in without]
            for one in with_unlabeled
        ]
        return interval_of_chosen((first, second), (first_picks, second_picks), pairs, resamples)

    difference = chosen.dice - against.dice
    overall = _figure(interval(slice(None)), difference, cohort)
    notes = _notes(cohort, n_seeds, with_unlabeled, without)
    beside = None if equal_time is None else _compare(chosen, equal_time, cohort, resamples)
    if beside is not None:
        notes += (f"Against the supervised run of equal wall time: {_points(beside)}.",)
    return Verdict(
        **overall.model_dump(),
        sentence=_sentence(overall, chosen.name, against.name),
        notes=notes,
        per_class={
            name: _figure(interval(slice(n, n + 1)), difference[:, :, n : n + 1], cohort)
            for n, name in enumerate(cohort.classes)
        },
        chosen=chosen.name,
        against=against.name,
        recommended=chosen.name if overall.word == "helped" else against.name,
        comparisons=_compare_with_twins(with_unlabeled, without, cohort, resamples),
        equal_time=beside,
        n_folds=len({fold for fold, _ in cohort.cases}),
        n_seeds=n_seeds,
        n_resamples=n_resamples,
    )


def judge_pair(
    sample: PairedSample, classes: Sequence[str] = (), n_resamples: int = RESAMPLES, seed: int = 0
) -> Verdict:
    """The verdict on one way of training against its twin, from their differences.

    Args:
        sample: Differences, with unlabeled cases minus without. Trainings of a fold count as its seeds.
        classes: Their names; by default their numbers.
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    names = tuple(classes) or tuple(str(number) for number in range(sample.differences.shape[2]))
    stacked = by_seed(sample)
    zeros = Candidate(TWIN, np.where(np.isfinite(stacked), 0.0, math.nan))
    return judge([Candidate("method", stacked)], [zeros], Cohort(sample.cases, names), None, n_resamples, seed)


def by_seed(sample: PairedSample) -> FloatArray:
    """[seeds, cases, classes]: the n-th training of each fold in one layer; NaN where a fold has fewer."""
    folds = [fold for _, fold in sample.trainings]
    layer = [folds[:n].count(fold) for n, fold in enumerate(folds)]
    stacked = np.full((max(layer, default=0) + 1, *sample.differences.shape[1:]), math.nan)
    for training, (seed, fold) in enumerate(zip(layer, folds, strict=True)):
        own = [number for number, (other, _) in enumerate(sample.cases) if other == fold]
        stacked[seed, own] = sample.differences[training, own]
    return stacked


def word_of(low: float, high: float, n_patients: int) -> Word:
    """The word for an interval; NaN bounds and fewer than `FEWEST_PATIENTS` patients are too few to tell."""
    if n_patients < FEWEST_PATIENTS or math.isnan(low) or math.isnan(high):
        return "too few to tell"
    return "helped" if low > 0 else "hurt" if high < 0 else "no evidence"


def patient_means(differences: FloatArray, cases: Sequence[Case]) -> FloatArray:
    """[patients] mean over the classes of the mean over seeds and cases; patients without a pair are left out."""
    patients = list(dict.fromkeys(cases))
    means = []
    for unit in patients:
        own = differences[:, [number for number, case in enumerate(cases) if case == unit]]
        columns = own.reshape(-1, own.shape[2])
        known = np.isfinite(columns)
        if known.any():
            sums, counts = np.where(known, columns, 0.0).sum(0), known.sum(0)
            means.append(float((sums[counts > 0] / counts[counts > 0]).mean()))
    return np.array(means)


def wilcoxon_p(patients: FloatArray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; 1 where nothing differs, NaN without patients."""
    if not len(patients):
        return math.nan
    return 1.0 if not patients.any() else float(stats.wilcoxon(patients).pvalue)


def _check(
    everything: Sequence[Candidate], cohort: Cohort, with_unlabeled: Sequence[Candidate], without: Sequence[Candidate]
) -> None:
    if not with_unlabeled or not without:
        raise ValueError(
            f"{len(with_unlabeled)} candidates with and {len(without)} without unlabeled cases, need 1 each"
        )
    wanted = (with_unlabeled[0].dice.shape[0], len(cohort.cases), len(cohort.classes))
    for candidate in everything:
        if candidate.dice.shape != wanted:
            raise ValueError(f"{candidate.name} has Dice of shape {candidate.dice.shape}, expected {wanted}")
        if not np.isfinite(candidate.dice).any():
            raise ValueError(f"{candidate.name} has no defined Dice, expected at least one")


def _figure(interval: Interval, differences: FloatArray, cohort: Cohort) -> Figure:
    means = patient_means(differences, cohort.cases)
    wins, losses = int((means > TIE_DICE).sum()), int((means < -TIE_DICE).sum())
    return Figure(
        word=word_of(interval.low, interval.high, len(means)),
        estimate=_plain(interval.estimate),
        low=_plain(interval.low) if len(means) > 1 else None,
        high=_plain(interval.high) if len(means) > 1 else None,
        observed=_plain(interval.observed),
        n_patients=len(means),
        wins=wins,
        ties=len(means) - wins - losses,
        losses=losses,
    )


def _compare(one: Candidate, other: Candidate, cohort: Cohort, resamples: Resamples) -> TwinComparison:
    difference = one.dice - other.dice
    figure = _figure(interval_of(spread_of(difference, cohort.cases), resamples), difference, cohort)
    p = _plain(wilcoxon_p(patient_means(difference, cohort.cases)))
    return TwinComparison(**figure.model_dump(), name=one.name, against=other.name, p_wilcoxon=p, p_holm=p)


def _compare_with_twins(
    with_unlabeled: Sequence[Candidate], without: Sequence[Candidate], cohort: Cohort, resamples: Resamples
) -> tuple[TwinComparison, ...]:
    by_name = {candidate.name: candidate for candidate in without}
    found = [_compare(one, by_name.get(one.twin, without[0]), cohort, resamples) for one in with_unlabeled]
    corrected = holm([math.nan if entry.p_wilcoxon is None else entry.p_wilcoxon for entry in found])
    return tuple(entry.model_copy(update={"p_holm": _plain(p)}) for entry, p in zip(found, corrected, strict=True))


def _sentence(figure: Figure, chosen: str, against: str) -> str:
    said = f"{chosen} against {against}: {_points(figure)}, {figure.n_patients} patients"
    model = f"The final model is the supervised ensemble ({against}) unless you name a method."
    if figure.word == "helped":
        return f"The unlabeled cases helped. {said}."
    if figure.word == "hurt":
        return f"The unlabeled cases hurt. {said}. {model}"
    if figure.word == "no evidence":
        return f"No evidence that the unlabeled cases helped. {said}; the interval contains zero. {model}"
    few = f"an interval needs at least {FEWEST_PATIENTS} labeled patients"
    return f"Too few to tell whether the unlabeled cases helped: {few}. {said}. {model}"


def _points(figure: Figure) -> str:
    if figure.estimate is None:
        return "no pair of scores"
    text = f"{100 * figure.estimate:+.2f} Dice points"
    if figure.low is not None and figure.high is not None:
        text += f" ({LEVEL:.0%} interval {100 * figure.low:+.2f} to {100 * figure.high:+.2f})"
    return text


def _notes(
    cohort: Cohort, n_seeds: int, with_unlabeled: Sequence[Candidate], without: Sequence[Candidate]
) -> tuple[str, ...]:
    n_folds = len({fold for fold, _ in cohort.cases})
    if n_seeds > 1:
        training = f"{n_seeds} seeds: the variance between trainings that they show is in the interval."
    elif n_folds > 1:
        training = (
            "One seed: training variance was not measured and is not in the interval, except for differences between "
            f"the {n_folds} folds that exceed what their patients explain. Another seed may give another figure."
        )
    else:
        training = "One seed and one fold: training variance is not in the interval. Another seed may move it anywhere."
    notes = [training, CORRELATED] if n_folds > 1 else [training]
    if len(with_unlabeled) > 1 or len(without) > 1:
        notes.append(
            f"Chosen among {len(with_unlabeled)} with and {len(without)} without unlabeled cases by their mean Dice; "
            "each resample chose again, and the luck of the choosing is taken off the figure."
        )
    return tuple(notes)


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
