"""From finished runs of a split to verdict.json: the function behind `autossl_verdict`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from autossl.data.files import read_json, write_json
from autossl.data.problems import InvalidInput, Problem, schema_faults
from autossl.data.provenance import Written
from autossl.data.raw_dataset import read_raw_dataset
from autossl.data.runs import FoundRun, RunFilter, RunSpec, find_runs
from autossl.data.splits import read_split
from autossl.data.workspace import Workspace
from autossl.evaluation.statistics import RESAMPLES, FloatArray
from autossl.evaluation.verdict import Candidate, Cohort, Verdict, judge

VERDICT_FILE = "verdict.json"
WITHOUT = "supervised"
EQUAL_TIME = ("equal_time", "equal-time")
"""Tags of supervised runs that took as long as a method; also at the end of a tag, after a '-'."""
Scores = Mapping[str, Mapping[str, float]]
"""Case → class → Dice."""
Role = Literal["method", "twin", "equal time"]
_Way = tuple[str, str, str, str]
"""Configuration, preset, method, tag."""


class JudgedRuns(BaseModel):
    """The runs of a candidate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Role
    folders: tuple[str, ...]
    """One per seed, relative to results/."""
    steps: int


class VerdictRecord(Verdict):
    """What verdict.json holds."""

    dataset: str
    split: str
    runs: dict[str, JudgedRuns]
    """Candidate → where its scores come from."""
    left_out: tuple[str, ...]
    """Runs of the split that could not take part, with the reason."""
    written: Written


@dataclass(frozen=True)
class Competitors:
    """Which runs stand for choice; None accepts all."""

    configurations: Sequence[str] | None = None
    presets: Sequence[str] | None = None
    methods: Sequence[str] | None = None
    """Besides supervised."""
    runs: Sequence[str] | None = None
    """Folder names."""
    postprocessed: Mapping[str, Scores] = field(default_factory=dict)
    """Folder name of a run → out-of-fold Dice with postprocessing. Such a run stands for choice twice, as it is and
    with its rules; give it for both sides, or the comparison is not fair."""

    def accept(self, run: FoundRun) -> bool:
        """Whether a run is asked for."""
        spec = run.spec
        wanted = ((self.configurations, spec.configuration), (self.presets, spec.preset), (self.runs, run.folder.name))
        methods = None if self.methods is None else {*self.methods, WITHOUT}
        return all(names is None or value in names for names, value in (*wanted, (methods, spec.method)))


def judge_runs(
    workspace: Workspace,
    dataset: str,
    split: str = "default",
    competitors: Competitors | None = None,
    *,
    output: Path | None = None,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> VerdictRecord:
    """Judges the finished runs of a split and writes verdict.json beside them.

    A run takes part when all folds of the split are trained and scored. Runs with unlabeled cases need a supervised
    twin: same configuration, preset, plans and steps, with the same tag or none. Only seeds that all of them have are
    used.

    Args:
        workspace: Where the runs are.
        dataset: Full name.
        split: default, or that of a budget.
        competitors: Which runs; by default all.
        output: The file; by default results/DATASET/SPLIT/verdict.json.
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        InvalidInput: no run with unlabeled cases beside a finished twin, or scores that do not fit together.
    """
    competitors = competitors or Competitors()
    ways, left_out = _finished_ways(workspace, dataset, split, competitors)
    if not ways.pairs:
        listed = "".join(f"\n    {text}" for text in left_out)
        found = f"no method of split {split} is finished beside its supervised twin{listed and ':'}{listed}"
        fix = "train both on all folds with the same steps and seed"
        raise InvalidInput(
            Problem(found, "one method and its twin", fix, file=workspace.results_folder(dataset) / split)
        )
    seeds = _shared_seeds(ways, left_out)
    reader = _Reader(workspace, dataset, competitors.postprocessed)
    entries = {way: reader.candidates(ways.runs[way], seeds) for way in {**ways.pairs, **_twins(ways.pairs)}}
    equal = [reader.candidates(ways.runs[way], seeds)[0] for way in ways.equal_time if set(seeds) <= {*ways.runs[way]}]
    cohort, stack = reader.common([*(entry for found in entries.values() for entry in found), *equal])
    methods = [
        Candidate(entry.name, stack(entry), twin=entries[twin][min(n, len(entries[twin]) - 1)].name)
        for way, twin in ways.pairs.items()
        for n, entry in enumerate(entries[way])
    ]
    twins = [Candidate(entry.name, stack(entry)) for way in _twins(ways.pairs) for entry in entries[way]]
    verdict = judge(methods, twins, cohort, _equal_time(equal, stack), n_resamples, seed)
    record = VerdictRecord(
        **dict(verdict),
        dataset=dataset,
        split=split,
        runs={
            entry.name: _runs_json(entry, role, workspace)
            for role, found in (*((_role(way), of_way) for way, of_way in entries.items()), ("equal time", equal))
            for entry in found
        },
        left_out=tuple(left_out),
        written=Written.now(),
    )
    path = output or workspace.results_folder(dataset) / split / VERDICT_FILE
    write_json(path, record.model_dump(mode="json"))
    return record


def read_verdict(path: Path) -> VerdictRecord:
    """Reads and checks verdict.json.

    Raises:
        InvalidInput: it is missing, cut off or makes no sense.
    """
    content = read_json(path)
    try:
        return VerdictRecord.model_validate(content)
    except ValidationError as error:
        faults = "; ".join(schema_faults(error))
        wanted, fix = "what autossl_verdict writes", "run autossl_verdict again"
        raise InvalidInput(Problem(f"the verdict cannot be read: {faults}", wanted, fix, file=path)) from error


@dataclass(frozen=True)
class _Ways:
    """Finished runs by way of training, and which of them are compared."""

    runs: dict[_Way, dict[int, FoundRun]]
    """Way → seed → run."""
    pairs: dict[_Way, _Way]
    """Method → its twin."""
    equal_time: tuple[_Way, ...]


@dataclass(frozen=True)
class _Entry:
    """A candidate before the scores of all are brought into one shape."""

    name: str
    scores: tuple[Scores, ...]
    """Per seed."""
    folds: Mapping[str, str]
    """Case → fold."""
    folders: tuple[Path, ...]
    steps: int


def _role(way: _Way) -> Role:
    return "twin" if way[2] == WITHOUT else "method"


def _runs_json(entry: _Entry, role: Role, workspace: Workspace) -> JudgedRuns:
    folders = tuple(folder.relative_to(workspace.results).as_posix() for folder in entry.folders)
    return JudgedRuns(role=role, folders=folders, steps=entry.steps)


def _finished_ways(workspace: Workspace, dataset: str, split: str, competitors: Competitors) -> tuple[_Ways, list[str]]:
    """What can be compared, and why the rest cannot."""
    runs: dict[_Way, dict[int, FoundRun]] = {}
    left_out: list[str] = []
    there = find_runs(workspace, dataset, RunFilter(split=split))
    missing = sorted(set(competitors.runs or ()) - {run.folder.name for run in there})
    if missing:
        fix = f"name folders of {workspace.results_folder(dataset) / split}"
        raise InvalidInput(Problem(f"no run {', '.join(missing)} in split {split}", "runs that are there", fix))
    found = [run for run in there if competitors.accept(run)]
    n_folds = read_split(workspace.preprocessed_folder(dataset) / "splits" / f"{split}.json").n_folds
    for run in found:
        done = [fold for fold in _folds(run) if _summary(run, fold).is_file() and run.states.get(fold) == "finished"]
        spec = run.spec
        if len(done) < n_folds or not done:
            left_out.append(f"{run.folder.name}: {len(done)} of {n_folds} folds are finished and scored")
            continue
        way = (spec.configuration, spec.preset, spec.method, spec.tag or "")
        runs.setdefault(way, {})[spec.seed] = run
    pairs = {}
    for way, of_seeds in runs.items():
        tagged, plain = (*way[:2], WITHOUT, way[3]), (*way[:2], WITHOUT, "")
        twin = tagged if tagged in runs else plain
        if way[2] == WITHOUT:
            continue
        shared = [seed for seed in of_seeds if seed in runs.get(twin, {})]
        different = {text for seed in shared for text in _differences(of_seeds[seed].spec, runs[twin][seed].spec)}
        if not shared or different:
            reason = ", ".join(sorted(different)) if shared else "no finished supervised twin of the same seed"
            left_out += [f"{run.folder.name}: {reason}" for run in of_seeds.values()]
        else:
            pairs[way] = twin
    places = {way[:2] for way in pairs}
    equal = [way for way in runs if way[2] == WITHOUT and _is_equal_time(way[3]) and way[:2] in places]
    return _Ways(runs, pairs, tuple(equal)), left_out


def _is_equal_time(tag: str) -> bool:
    return tag in EQUAL_TIME or tag.endswith(tuple(f"-{name}" for name in EQUAL_TIME))


def _shared_seeds(ways: _Ways, left_out: list[str]) -> list[int]:
    """Seeds that all competitors have; where they share none, those of the first pair, and others are left out."""
    wanted = {*ways.pairs, *ways.pairs.values()}
    shared = set.intersection(*(set(ways.runs[way]) for way in wanted))
    if not shared:
        first = next(iter(ways.pairs))
        shared = set(ways.runs[first]) & set(ways.runs[ways.pairs[first]])
        for way in [w for w in ways.pairs if not shared <= set(ways.runs[w]) & set(ways.runs[ways.pairs[w]])]:
            del ways.pairs[way]
            left_out.append(f"{'__'.join(filter(None, way))}: no seed in common with {'__'.join(filter(None, first))}")
    for way in {*ways.pairs, *ways.pairs.values()}:
        unused = sorted(set(ways.runs[way]) - shared)
        left_out += [f"{ways.runs[way][seed].folder.name}: not all competitors have seed {seed}" for seed in unused]
    return sorted(shared)


def _twins(pairs: Mapping[_Way, _Way]) -> dict[_Way, None]:
    """The twins, each once."""
    return dict.fromkeys(pairs.values())


class _Reader:
    """Reads the out-of-fold scores of runs, and brings them into one shape."""

    def __init__(self, workspace: Workspace, dataset: str, postprocessed: Mapping[str, Scores]) -> None:
        self._postprocessed = postprocessed
        raw = read_raw_dataset(workspace.raw_folder(dataset))
        self._patients = {case.id: case.patient for case in raw.cases}

    def candidates(self, runs: Mapping[int, FoundRun], seeds: Sequence[int]) -> list[_Entry]:
        """The way as it is and, where there are scores for all seeds, with postprocessing."""
        chosen = [runs[seed] for seed in seeds]
        spec = chosen[0].spec
        name = " ".join([spec.configuration, spec.preset, spec.method, *([spec.tag] if spec.tag else [])])
        read = [_read_scores(run) for run in chosen]
        entry = _Entry(
            name, tuple(scores for scores, _ in read), read[0][1], tuple(run.folder for run in chosen), spec.total_steps
        )
        after = [self._postprocessed.get(run.folder.name) for run in chosen]
        if any(scores is None for scores in after):
            return [entry]
        filled = tuple(scores for scores in after if scores is not None)
        return [entry, replace(entry, name=f"{name}, postprocessed", scores=filled)]

    def common(self, entries: Sequence[_Entry]) -> tuple[Cohort, Callable[[_Entry], FloatArray]]:
        """Cases and classes of all, and what turns an entry into [seeds, cases, classes]."""
        first = entries[0]
        faults = [entry.name for entry in entries if entry.folds != first.folds]
        faults += [e.name for e in entries for scores in e.scores if set(scores) != set(first.folds)]
        if faults:
            found = f"{', '.join(dict.fromkeys(faults))}: other cases or folds than {first.name}"
            fix = "train them again on the split of today, or name those to judge with --runs"
            raise InvalidInput(Problem(found, "the same validation cases in every fold", fix))
        cases = sorted(first.folds)
        classes = list(dict.fromkeys(name for scores in first.scores for case in cases for name in scores[case]))

        def stack(entry: _Entry) -> FloatArray:
            return np.array(
                [[[scores[c].get(k, math.nan) for k in classes] for c in cases] for scores in entry.scores], dtype=float
            )

        units = tuple((first.folds[case], self._patients.get(case, case)) for case in cases)
        return Cohort(units, tuple(classes)), stack


def _equal_time(entries: Sequence[_Entry], stack: Callable[[_Entry], FloatArray]) -> Candidate | None:
    """The one with the highest mean where there are several; nothing is decided by it."""
    candidates = [Candidate(entry.name, stack(entry)) for entry in entries]
    return max(candidates, key=lambda candidate: float(np.nanmean(candidate.dice)), default=None)


def _read_scores(run: FoundRun) -> tuple[Scores, dict[str, str]]:
    """Dice of all validation cases, and the fold of each."""
    scores: dict[str, Mapping[str, float]] = {}
    folds: dict[str, str] = {}
    for fold in _folds(run):
        for case, classes in read_json(_summary(run, fold))["cases"].items():
            scores[case] = {
                name: math.nan if values["dice"] is None else float(values["dice"]) for name, values in classes.items()
            }
            folds[case] = fold
    return scores, folds


def _folds(run: FoundRun) -> list[str]:
    """That validate, of those that were started."""
    return sorted((fold for fold in run.states if fold != "all"), key=lambda fold: (len(fold), fold))


def _summary(run: FoundRun, fold: str) -> Path:
    return run.folder / f"fold_{fold}" / "validation" / "summary.json"


def _differences(method: RunSpec, twin: RunSpec) -> list[str]:
    names = ("plans_hash", "total_steps", "extended_at", "labeled_batch_size", "initial_weights")
    values = [(name, getattr(method, name), getattr(twin, name)) for name in names]
    return [f"{name} {one}, its twin has {other}" for name, one, other in values if one != other]
