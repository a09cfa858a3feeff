"""What the page shows: plain data, gathered from files by `gather` and drawn by `page`.

A part that is None is not there yet. Numbers are `Traced`; plain strings are names or the page's own words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autossl.evaluation.report.sources import Traced

Scores = Mapping[str, tuple[float, ...]]
"""What it is → its values, for a picture."""


@dataclass(frozen=True)
class Difference:
    """A line of a comparison: Dice of one minus that of another."""

    name: str
    against: str
    word: Traced | None
    estimate: Traced
    low: Traced
    high: Traced
    n_patients: Traced
    wins: Traced
    ties: Traced
    losses: Traced
    p: Traced | None = None
    p_holm: Traced | None = None


@dataclass(frozen=True)
class VerdictPart:
    """verdict.json."""

    word: Traced
    sentence: Traced
    notes: tuple[Traced, ...]
    level: Traced
    overall: Difference
    classes: tuple[Difference, ...]
    comparisons: tuple[Difference, ...]
    """Every candidate against its twin."""
    equal_time: Difference | None
    chosen: str
    against: str
    n_folds: Traced
    n_seeds: Traced
    n_resamples: Traced
    left_out: tuple[Traced, ...]
    per_case: Scores = field(default_factory=dict)
    """Case → mean difference in Dice of what is judged, for the picture."""
    per_case_source: str = ""


@dataclass(frozen=True)
class FinalModel:
    """inference_plan.json."""

    members: tuple[str, ...]
    combine: Traced
    why: Traced
    dice: Traced
    n_cases: Traced
    n_patients: Traced
    rules: tuple[Traced, ...]


@dataclass(frozen=True)
class HiddenModel:
    """A model on the hidden test set."""

    name: str
    is_final: bool
    mean: Traced
    classes: tuple[Traced, ...]


@dataclass(frozen=True)
class HiddenTest:
    """hidden_test.json."""

    what: Traced
    n_cases: Traced
    n_patients: Traced
    classes: tuple[str, ...]
    models: tuple[HiddenModel, ...]
    to_twin: tuple[Difference, ...]


@dataclass(frozen=True)
class RunScores:
    """Pooled out-of-fold scores of one run."""

    name: str
    folder: str
    """Relative to the workspace."""
    method: str
    is_final: bool
    n_folds: Traced
    n_cases: Traced
    mean: Traced
    """Foreground Dice: mean over the classes of the means over the cases."""
    classes: Mapping[str, Mapping[str, Traced]]
    """Class → metric → mean over the cases."""
    dice: Mapping[str, tuple[float, ...]]
    """Class → Dice of every case, for the picture."""


@dataclass(frozen=True)
class ScoresPart:
    """All runs of the split with scores."""

    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    """Names as in summary.json, in the order of the table."""
    runs: tuple[RunScores, ...]
    tolerances: tuple[Traced, ...]
    """Of NSD, per class in the order of `classes`; empty where no surface was measured."""
    surface_unit: str
    convention: str


@dataclass(frozen=True)
class CaseRow:
    """One labeled case as the pictured model predicted it out of fold."""

    case: str
    patient: str
    fold: str
    mean: Traced
    classes: tuple[Traced, ...]


@dataclass(frozen=True)
class CasesPart:
    """The cases of one model, the worst first."""

    model: str
    classes: tuple[str, ...]
    rows: tuple[CaseRow, ...]
    shown: Mapping[str, CaseRow]
    """ "worst", "median", "best" → the case to be pictured."""


@dataclass(frozen=True)
class CandidateRow:
    """A line of selection.json."""

    name: str
    chosen: bool
    observed: Traced
    low: Traced
    high: Traced


@dataclass(frozen=True)
class SelectionPart:
    """selection.json."""

    why: Traced
    candidates: tuple[CandidateRow, ...]
    advantage: Difference | None
    """Best ensemble minus best single model."""
    left_out: Mapping[str, Traced]


@dataclass(frozen=True)
class TrialRow:
    """A postprocessing rule that was tried."""

    rule: Traced
    kept: bool
    gain: Traced
    low: Traced
    high: Traced
    n_changed: Traced
    because: Traced


@dataclass(frozen=True)
class PostprocessingPart:
    """postprocessing.json."""

    n_cases: Traced
    n_patients: Traced
    trials: tuple[TrialRow, ...]


@dataclass(frozen=True)
class PoolRow:
    """A pool of the raw dataset in numbers."""

    name: str
    n_cases: Traced
    spacing: tuple[tuple[Traced, Traced, Traced], ...]
    """Per axis z, y, x: smallest, median, largest in mm."""
    shape: tuple[tuple[Traced, Traced, Traced], ...]
    """In voxels."""


@dataclass(frozen=True)
class Listed:
    """Names with what is said of each."""

    count: Traced
    lines: tuple[tuple[str, Traced], ...]


@dataclass(frozen=True)
class DataPart:
    """fingerprint.json and the split."""

    channels: tuple[str, ...]
    classes: tuple[str, ...]
    split_counts: tuple[tuple[str, Traced], ...]
    pools: tuple[PoolRow, ...]
    volumes: Mapping[str, tuple[Traced, Traced, Traced, Traced]]
    """Class → cases that show it, smallest, median and largest volume in voxels."""
    shift: Listed
    duplicates: Listed
    excluded: Listed
    without_label: Listed
    warnings: Listed
    intensities: Mapping[str, Scores]
    """Channel → "labeled", "unlabeled" → median of each case, for the picture."""
    source: str


@dataclass(frozen=True)
class Decision:
    """A decision of the plan and its reason."""

    name: str
    value: Traced
    why: Traced


@dataclass(frozen=True)
class PlanPart:
    """plans_<preset>.json."""

    preset: str
    source: str
    groups: Mapping[str, tuple[Decision, ...]]
    """Configuration, or "all configurations" → decisions."""


@dataclass(frozen=True)
class CurveRow:
    """How a run was trained."""

    name: str
    steps: Traced
    hours: Traced
    speed: Traced
    memory: Traced
    loss: Traced
    curves: Mapping[str, tuple[tuple[float, float], ...]]
    """Fold → (step, supervised loss), for the picture."""


@dataclass(frozen=True)
class NextRow:
    """A case worth labeling."""

    case: str
    rank: Traced
    score: Traced
    terms: Mapping[str, Traced]
    reasons: tuple[Traced, ...]


@dataclass(frozen=True)
class LabelNextPart:
    """label_next.json."""

    n_candidates: Traced
    rows: tuple[NextRow, ...]
    terms: tuple[str, ...]
    left_out: Mapping[str, Traced]


@dataclass(frozen=True)
class RunRecord:
    """How a run can be repeated."""

    name: str
    folder: str
    seed: Traced
    steps: Traced
    plans_hash: Traced
    device: Traced
    threads: Traced
    versions: Traced
    settings: str
    command: Traced | None


@dataclass(frozen=True)
class RepeatPart:
    """Commands, seeds, versions and files."""

    command: Traced | None
    why: Mapping[str, Traced]
    """What was decided for the experiment → the reason."""
    runs: tuple[RunRecord, ...]
    written: tuple[tuple[str, Traced, Traced, Traced], ...]
    """File, date, commit, version of the package."""


@dataclass(frozen=True)
class Report:
    """Everything."""

    dataset: str
    split: str
    verdict: VerdictPart | None
    final: FinalModel | None
    hidden: HiddenTest | None
    scores: ScoresPart | None
    cases: CasesPart | None
    selection: SelectionPart | None
    postprocessing: PostprocessingPart | None
    data: DataPart | None
    plan: PlanPart | None
    curves: tuple[CurveRow, ...]
    label_next: LabelNextPart | None
    repeat: RepeatPart
