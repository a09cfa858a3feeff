"""Finds the postprocessing rules that the pooled folds speak for: pure functions of arrays.

Rules are tried one after the other on what those kept before have left: the largest component of all foreground, then
of each class the largest component, a smallest size (where not only the largest stays), and the filling of holes.

A rule is kept where it raises the mean Dice, no part of the paired interval of that lies below zero, and no class is
lowered beyond noise (its interval wholly at or below zero). Intervals are percentiles of a bootstrap over patients.
With fewer than 8 patients none is kept: noise cannot be told from effect there. All rules are judged on the cases that
they were chosen on; whoever states the gain of a final model has to repeat the choosing (the cases' Dice are kept).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import blosc2
import numpy as np
import numpy.typing as npt

from autossl.data.labels import LabelSchema
from autossl.data.parallel import parallel_map
from autossl.data.provenance import Written
from autossl.evaluation.metrics import confusion_per_class, dice
from autossl.evaluation.statistics import LEVEL, RESAMPLES, PairedSample, bootstrap_replicates, mean_difference
from autossl.inference.postprocess import Box, LabelMap, Rule, apply_rules, tight_box, voxel_size_mm3
from autossl.inference.postprocessing_plan import CaseDice, PostprocessingPlan, Trial

__all__ = [
    "HeldCase",
    "PostprocessingPlan",
    "Rule",
    "SearchOptions",
    "apply_rules",
    "find_rules",
    "judge_rule",
]

MIN_PATIENTS = 8
SIZE_SHARES = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Smallest sizes that are tried, as shares of the class's median volume in the references."""
ROUNDING = 1e-9
"""Up to so much below zero is zero: the bootstrap's sums are rounded."""

FloatArray = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]
Triple = tuple[LabelMap, LabelMap, Sequence[float]]


@dataclass(frozen=True)
class SearchOptions:
    """How rules are judged."""

    n_resamples: int = RESAMPLES
    level: float = LEVEL
    seed: int = 0
    min_patients: int = MIN_PATIENTS
    n_workers: int | None = 1
    """Processes; None takes one per CPU."""


@dataclass(frozen=True)
class HeldCase:
    """A case cut to its foreground and compressed, so that the rules can go over all cases again and again."""

    prediction: bytes
    reference: bytes
    spacing_zyx_mm: tuple[float, ...]

    @classmethod
    def of(cls, prediction: LabelMap, reference: LabelMap, spacing_zyx_mm: Sequence[float]) -> HeldCase:
        """From label maps [z,y,x] on one grid; raises ValueError where their shapes differ."""
        if prediction.shape != reference.shape:
            raise ValueError(f"prediction has shape {prediction.shape}, reference has {reference.shape}")
        box = _box_that_shows_the_same(np.logical_or(prediction != 0, reference != 0))
        return cls(_packed(prediction[box]), _packed(reference[box]), tuple(float(s) for s in spacing_zyx_mm))

    @property
    def label_map(self) -> LabelMap:
        """The prediction."""
        return _unpacked(self.prediction)

    @property
    def labels(self) -> LabelMap:
        """The reference."""
        return _unpacked(self.reference)

    def after(self, rules: Sequence[Rule], schema: LabelSchema) -> HeldCase:
        """The case with its prediction tidied."""
        tidied = apply_rules(self.label_map, rules, schema, self.spacing_zyx_mm)
        return replace(self, prediction=_packed(tidied))


def find_rules(
    cases: Iterable[Triple | HeldCase],
    patients: Sequence[Hashable],
    schema: LabelSchema,
    options: SearchOptions | None = None,
    *,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> PostprocessingPlan:
    """The rules that are worth applying to predictions like these.

    Args:
        cases: (prediction [z,y,x], reference [z,y,x], spacing_zyx_mm) of cases that the predicting networks had not
            seen; gone through once, never all in memory. Or what `HeldCase.of` made of them.
        patients: of each case; the interval resamples patients.
        schema: what the label values mean.
        options: how rules are judged.
        names: of the cases, for `PostprocessingPlan.cases`; None: their numbers.
        progress: called with (rules tried, rules in all).

    Raises:
        ValueError: shapes differ, a value is not declared, no case, or not one patient and name per case.
    """
    options = options or SearchOptions()
    held = [case if isinstance(case, HeldCase) else HeldCase.of(*case) for case in cases]
    names = [str(number) for number in range(len(held))] if names is None else list(names)
    if not held or not len(held) == len(patients) == len(names):
        raise ValueError(f"{len(held)} cases, {len(patients)} patients, {len(names)} names: expected as many of each")
    search = _Search(held, tuple(patients), schema, options)
    before = search.dice
    groups = _candidates(held, schema)
    for number, group in enumerate(groups):
        if progress is not None:
            progress(number, len(groups))
        search.try_group(group)
    if progress is not None:
        progress(len(groups), len(groups))
    return PostprocessingPlan(
        rules=tuple(search.rules),
        found_on={"n_cases": len(held), "n_patients": len(set(patients))},
        why=tuple(search.trials),
        labels={name: tuple(values) for name, values in schema.names.items()},
        regions_class_order=schema.regions_class_order,
        cases=_case_dice(names, list(schema.foreground), before, search.dice),
        written=Written.now(),
    )


class _Search:
    """The cases as the rules that were kept so far have left them."""

    def __init__(
        self, held: list[HeldCase], patients: tuple[Hashable, ...], schema: LabelSchema, options: SearchOptions
    ) -> None:
        self._held, self._patients, self._schema, self._options = held, patients, schema, options
        self.rules: list[Rule] = []
        self.trials: list[Trial] = []
        self.dice = self._map(partial(_dice_after, rules=(), schema=schema))[:, 0]
        """[cases, classes], with the rules that were kept."""

    def try_group(self, group: Sequence[Rule]) -> None:
        """Tries rules of which one at most may be kept: that of the largest gain among those that pass."""
        if any(rule.kind == "min_size_mm3" and _keeps_largest(self.rules, rule.class_name) for rule in group):
            return
        after = self._map(partial(_dice_after, rules=tuple(group), schema=self._schema))
        trials = [
            judge_rule(rule, self.dice, after[:, number], self._patients, list(self._schema.foreground), self._options)
            for number, rule in enumerate(group, start=1)
        ]
        passing = [number for number, trial in enumerate(trials) if trial.kept]
        best = max(passing, key=lambda number: trials[number].gain, default=None)
        for number in set(passing) - {best}:
            because = f"passes, but {group[best or 0]} gains more or as much"
            trials[number] = trials[number].model_copy(update={"kept": False, "because": because})
        self.trials += trials
        if best is not None:
            self.rules.append(group[best])
            self.dice = after[:, best + 1]
            tidy = partial(_tidied, rule=group[best], schema=self._schema)
            self._held = list(parallel_map(tidy, self._held, self._options.n_workers, name_of=_nameless))

    def _map(self, function: Callable[[HeldCase], FloatArray]) -> FloatArray:
        """[cases, 1 + rules, classes]."""
        return np.stack(list(parallel_map(function, self._held, self._options.n_workers, name_of=_nameless)))


def judge_rule(
    rule: Rule,
    before: FloatArray,
    after: FloatArray,
    patients: Sequence[Hashable],
    class_names: Sequence[str],
    options: SearchOptions | None = None,
) -> Trial:
    """Whether a rule is kept, from the Dice [cases, classes] without and with it (see the module's text)."""
    options = options or SearchOptions()
    differences = after - before
    sample = _sample(differences, patients)
    n_changed = int((differences != 0).any(1).sum())
    gains = {name: float(gain) for name, gain in zip(class_names, differences.mean(0), strict=True)}
    trial = Trial(rule=rule, kept=False, because="", gain=mean_difference(sample), class_gains=gains)
    trial = trial.model_copy(update={"n_cases_changed": n_changed})
    if not n_changed:
        return trial.model_copy(update={"because": "changes the Dice of no case"})
    if trial.gain <= ROUNDING:
        return trial.model_copy(update={"because": f"mean Dice {_points(trial.gain)}, no gain"})
    if sample.n_patients < max(2, options.min_patients):
        few = f"{sample.n_patients} patients are too few to tell noise from effect (at least {options.min_patients})"
        return trial.model_copy(update={"because": few})
    low, high = _interval(sample, options)
    text = f"mean Dice {_points(trial.gain)} ({_points(low)} to {_points(high)}), {n_changed} of {len(after)} cases"
    trial = trial.model_copy(update={"low": low, "high": high})
    if low < -ROUNDING:
        return trial.model_copy(update={"because": f"{text}: within noise"})
    lowered = _lowered_beyond_noise(differences, patients, class_names, options)
    if lowered:
        return trial.model_copy(update={"because": f"{text}, but lowered beyond noise: {', '.join(lowered)}"})
    return trial.model_copy(update={"kept": True, "because": text})


def _lowered_beyond_noise(
    differences: FloatArray, patients: Sequence[Hashable], class_names: Sequence[str], options: SearchOptions
) -> list[str]:
    found = []
    for number, name in enumerate(class_names):
        own = differences[:, [number]]
        if own.mean() < -ROUNDING:
            low, high = _interval(_sample(own, patients), options)
            if high <= ROUNDING:
                found.append(f"{name} {_points(float(own.mean()))} ({_points(low)} to {_points(high)})")
    return found


def _sample(differences: FloatArray, patients: Sequence[Hashable]) -> PairedSample:
    """One training, patients pooled over the folds."""
    return PairedSample(differences[None], (("all", "all"),), tuple(("all", patient) for patient in patients))


def _interval(sample: PairedSample, options: SearchOptions) -> tuple[float, float]:
    replicates = bootstrap_replicates(sample, options.n_resamples, options.seed)
    low, high = np.percentile(replicates, [50 * (1 - options.level), 50 * (1 + options.level)])
    return float(low), float(high)


def _candidates(held: Sequence[HeldCase], schema: LabelSchema) -> list[list[Rule]]:
    """Groups of rules in the order in which they are tried; of each group one at most is kept."""
    classes = list(schema.foreground)
    groups = [[Rule(kind="keep_largest_foreground")]] if len(classes) > 1 else []
    groups += [[Rule(kind="keep_largest", class_name=name)] for name in classes]
    volumes = _median_volumes(held, schema)
    for name in classes:
        sizes = sorted({_two_digits(share * volumes[name]) for share in SIZE_SHARES if volumes[name] > 0})
        if sizes:
            groups.append([Rule(kind="min_size_mm3", class_name=name, value=size) for size in sizes])
    return groups + [[Rule(kind="fill_holes", class_name=name)] for name in classes]


def _median_volumes(held: Sequence[HeldCase], schema: LabelSchema) -> dict[str, float]:
    """Of each class in the references that hold it, in mm³ (see `voxel_size_mm3`); 0 where none does."""
    volumes: dict[str, list[float]] = {name: [] for name in schema.foreground}
    for case in held:
        labels = case.labels
        voxel = voxel_size_mm3(labels.shape, case.spacing_zyx_mm)
        for name, mask in schema.class_masks(labels).items():
            if mask.any():
                volumes[name].append(float(np.count_nonzero(mask)) * voxel)
    return {name: float(np.median(own)) if own else 0.0 for name, own in volumes.items()}


def _dice_after(case: HeldCase, rules: Sequence[Rule], schema: LabelSchema) -> FloatArray:
    """Dice [1 + rules, classes] of the case as it is and after each of the rules alone."""
    prediction, reference = case.label_map, case.labels
    before = _dice_row(prediction, reference, schema)
    rows = [before]
    for rule in rules:
        tidied = apply_rules(prediction, [rule], schema, case.spacing_zyx_mm)
        same = np.array_equal(tidied, prediction)
        rows.append(before if same else _dice_row(tidied, reference, schema))
    return np.array(rows)


def _dice_row(prediction: LabelMap, reference: LabelMap, schema: LabelSchema) -> list[float]:
    values = [dice(counts) for counts in confusion_per_class(prediction, reference, schema).values()]
    return [1.0 if math.isnan(value) else value for value in values]


def _case_dice(
    names: Sequence[str], classes: Sequence[str], before: FloatArray, after: FloatArray
) -> dict[str, dict[str, CaseDice]]:
    return {
        case: {
            name: CaseDice(before=float(before[row, column]), after=float(after[row, column]))
            for column, name in enumerate(classes)
        }
        for row, case in enumerate(names)
    }


def _tidied(case: HeldCase, rule: Rule, schema: LabelSchema) -> HeldCase:
    return case.after([rule], schema)


def _keeps_largest(rules: Sequence[Rule], name: str | None) -> bool:
    return any(rule.kind == "keep_largest" and rule.class_name == name for rule in rules)


def _box_that_shows_the_same(foreground: npt.NDArray[np.bool_]) -> Box:
    """A box around the foreground in which rules do what they do in the whole image.

    Along an axis with several voxels it keeps two at least, because an image with one slice is another thing.
    """
    tight = tight_box(foreground) or (slice(0, 1),) * foreground.ndim
    return tuple(
        part if part.stop - part.start > 1 or size == 1 else slice(max(part.stop - 2, 0), max(part.stop, 2))
        for part, size in zip(tight, foreground.shape, strict=True)
    )


def _packed(array: LabelMap) -> bytes:
    return bytes(blosc2.pack_tensor(np.ascontiguousarray(array)))


def _unpacked(packed: bytes) -> LabelMap:
    array: LabelMap = np.asarray(blosc2.unpack_tensor(packed))
    return array


def _nameless(_: HeldCase) -> str:
    return "a case"


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"
