"""What the ranking of `label_next` is made from: the runs' predictions of the unlabeled cases, and their fingerprints.

Files in between, so that an interrupted call goes on where it was: every network's label maps in
results/DATASET/SPLIT/label_next/RUN/fold_k/, made again where the weights changed; the result is label_next.json.
No label of a candidate is read, and no figure of a case that the split keeps as unlabeled.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autossl.data.files import file_hash, read_json, write_json
from autossl.data.image_io import read_label, write_label_map
from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput, Problem
from autossl.data.provenance import Written
from autossl.data.raw_dataset import RawDataset, read_raw_dataset
from autossl.data.runs import FoundRun, RunFilter, find_runs
from autossl.data.splits import Split, read_split
from autossl.data.store import CaseStore
from autossl.data.workspace import Workspace
from autossl.evaluation.label_next import (
    CaseEvidence,
    LabeledPool,
    LabelMap,
    RankedCase,
    Weights,
    disagreement,
    majority_vote,
    rank_cases,
)
from autossl.inference.model_folder import TrainedModel, read_model
from autossl.inference.predictor import Window
from autossl.inference.preprocessed import predict_preprocessed
from autossl.networks.device import resolve_device
from autossl.planners.budget import budget_statistics, voxel_volume
from autossl.planners.case_scan import QUANTILES, CaseFingerprint
from autossl.planners.fingerprint import Fingerprint, read_fingerprint
from autossl.planners.plan_and_preprocess import FINGERPRINT

logger = logging.getLogger(__name__)

FOLDER = "label_next"
RESULT_FILE = "label_next.json"
SOURCE_FILE = "source.json"
MEDIAN, LOW, HIGH = QUANTILES.index(0.5), QUANTILES.index(0.05), QUANTILES.index(0.95)

OnCase = Callable[[str, int, int], None]
"""(what, cases done, cases in all)."""


@dataclass(frozen=True)
class LabelNextRequest:
    """What `label_next` is asked for."""

    dataset: str
    n: int = 10
    workspace: Path | None = None
    runs: RunFilter = field(default_factory=RunFilter)
    """Which runs vote; of one split. None of the fields given: all of the default split, or of the only one."""
    methods: tuple[str, ...] = ()
    """Of the runs; empty: any."""
    device: str = "auto"


@dataclass(frozen=True)
class LabelNextResult:
    """The ranking, and the file that holds it."""

    ranked: tuple[RankedCase, ...]
    """All candidates; the first `n` have a rank."""
    models: dict[str, tuple[str, ...]]
    """Run → its folds that voted."""
    left_out: dict[str, str]
    """Case → why it is no candidate."""
    file: Path


@dataclass(frozen=True)
class _Pool:
    """Everything of the data set that the ranking looks at."""

    raw: RawDataset
    split: Split
    fingerprint: Fingerprint
    schema: LabelSchema
    candidates: tuple[str, ...]
    left_out: dict[str, str]


def label_next(request: LabelNextRequest, on_case: OnCase | None = None) -> LabelNextResult:
    """Ranks the unlabeled cases by what labeling them promises; writes label_next.json into the split's results.

    Raises:
        InvalidInput: no unlabeled case, fewer than two trained networks, several splits to choose from, or cases that
            are not planned and preprocessed as the runs were. Nothing is written then.
    """
    if request.n < 1:
        raise InvalidInput(Problem(f"{request.n} cases asked for", "at least 1", "give a positive number with -n"))
    workspace = Workspace.locate(request.workspace)
    dataset = workspace.find_dataset(request.dataset)
    runs = _chosen_runs(workspace, dataset, request)
    pool = _pool(workspace, dataset, runs[0].spec.split)
    models = [read_model(run.folder, (fold,)) for run in runs for fold in _folds(run)]
    stores = _stores(workspace, dataset, models, pool.candidates)
    device = resolve_device(request.device)
    target = workspace.results_folder(dataset) / pool.split.name
    folders = [target / FOLDER / model.folder.name / f"fold_{model.folds[0]}" for model in models]
    for number, (model, store, folder) in enumerate(zip(models, stores, folders, strict=True), 1):
        predict_pool(model, store, pool.candidates, folder, device, _named(on_case, f"network {number}/{len(models)}"))
    orientation = models[0].plans.orientation
    evidence = []
    for done, case in enumerate(pool.candidates, 1):
        maps = [read_label(folder / f"{case}{pool.raw.description.file_ending}", orientation)[0] for folder in folders]
        evidence.append(_evidence(case, maps, [model.folder.name for model in models], pool))
        if on_case is not None:
            on_case("comparing", done, len(pool.candidates))
    alike = {frozenset((pair.first, pair.second)) for pair in pool.fingerprint.duplicates}
    ranked = rank_cases(evidence, _labeled_pool(pool), request.n, Weights(), alike)
    named = {run.folder.name: _folds(run) for run in runs}
    result = LabelNextResult(tuple(ranked), named, pool.left_out, target / RESULT_FILE)
    write_json(result.file, _to_json(dataset, pool, result))
    return result


def predict_pool(
    model: TrainedModel,
    store: CaseStore,
    cases: Sequence[str],
    folder: Path,
    device: str = "cpu",
    on_case: Callable[[int, int], None] | None = None,
) -> None:
    """Label maps of one network in the images' own geometry, CASE.<ending>; those that are there are kept.

    What other weights predicted before is removed. Mirrored views are left out: members that disagree without them
    are not made to agree by averaging.
    """
    source = {"checkpoint": file_hash(model.checkpoint(model.folds[0])), "mirroring": False}
    path = folder / SOURCE_FILE
    if folder.exists() and (not path.is_file() or read_json(path) != source):
        shutil.rmtree(folder)
    write_json(path, source)
    ending = model.description.file_ending
    todo = [case for case in cases if not (folder / f"{case}{ending}").is_file()]
    predictor = model.load_predictor(Window.of(model.plan, mirror=False), device) if todo else None
    for done, case in enumerate(todo, 1):
        if predictor is not None:
            label_map, geometry = predict_preprocessed(predictor, store, case, model.plans, model.schema)
            write_label_map(folder / f"{case}{ending}", label_map, geometry)
        if on_case is not None:
            on_case(done, len(todo))


def appearance(case: CaseFingerprint, volumes: Sequence[float]) -> dict[str, tuple[float, ...]]:
    """Groups of numbers that describe a scan: logarithms of spacing and size, intensities, volumes of its classes.

    Args:
        case: of the fingerprint; its label is not looked at.
        volumes: per class in mm³, predicted or labeled.
    """
    size = [step * n for step, n in zip(case.spacing_zyx_mm, case.shape_after_crop_zyx, strict=True)]
    levels, shapes = [], []
    for quantiles in case.intensity_quantiles:
        spread = quantiles[HIGH] - quantiles[LOW]
        levels += [quantiles[MEDIAN], spread]
        shapes += [(value - quantiles[MEDIAN]) / spread if spread > 0 else 0.0 for value in quantiles]
    return {
        "spacing": tuple(math.log(step) for step in case.spacing_zyx_mm),
        "size": tuple(math.log(edge) for edge in size),
        "intensity level": tuple(levels),
        "intensity distribution": tuple(shapes),
        "volumes": tuple(math.log1p(volume) for volume in volumes),
    }


def _chosen_runs(workspace: Workspace, dataset: str, request: LabelNextRequest) -> list[FoundRun]:
    """The runs of one split with finished folds."""
    found = [run for run in find_runs(workspace, dataset, request.runs) if _folds(run)]
    if request.methods:
        found = [run for run in found if run.spec.method in request.methods]
    splits = sorted({run.spec.split for run in found})
    split = "default" if "default" in splits else splits[0] if len(splits) == 1 else None
    if split is None and splits:
        raise InvalidInput(
            Problem(
                f"there are runs of {len(splits)} splits: {', '.join(splits)}",
                "runs of one split",
                "say which with --labeled and --draw",
            )
        )
    chosen = [run for run in found if run.spec.split == split]
    networks = sum(len(_folds(run)) for run in chosen)
    if networks < 2:
        raise InvalidInput(
            Problem(
                f"{networks} trained networks of {dataset} fit ({request.runs})",
                "at least two, since the ranking asks where they disagree",
                f"train more folds: autossl_train {dataset} 2d all_folds",
            )
        )
    return chosen


def _folds(run: FoundRun) -> tuple[str, ...]:
    """Finished integer folds, else "all" where that is finished."""
    finished = [fold for fold, state in run.states.items() if state == "finished"]
    numbers = sorted((fold for fold in finished if fold.isdecimal()), key=int)
    return tuple(numbers or finished)


def _pool(workspace: Workspace, dataset: str, split_name: str) -> _Pool:
    folder = workspace.preprocessed_folder(dataset)
    raw = read_raw_dataset(workspace.raw_folder(dataset))
    fingerprint = read_fingerprint(folder / FINGERPRINT)
    split = read_split(folder / "splits" / f"{split_name}.json")
    there = {case.id for case in raw.cases if case.pool != "test"}
    labeled_now = {case.id for case in raw.labeled} if split.budget is None else set(split.everything.labeled)
    unlabeled = [case for case in split.everything.unlabeled if case in there and case not in labeled_now]
    left_out = {case: why for case, why in split.everything.excluded.items() if case not in labeled_now}
    for pair in fingerprint.duplicates:
        for case, twin in ((pair.first, pair.second), (pair.second, pair.first)):
            if pair.kind == "identical" and case in unlabeled and twin in labeled_now:
                left_out[case] = f"the same image as labeled case {twin}"
    candidates = tuple(sorted(set(unlabeled) - set(left_out)))
    if not candidates:
        raise InvalidInput(
            Problem(
                f"no unlabeled case of {dataset} can be labeled next ({len(left_out)} left out)",
                "cases in imagesUn, or in imagesTr without a label file",
                "add some and run autossl_plan_and_preprocess",
                file=raw.folder,
            )
        )
    return _Pool(raw, split, fingerprint, raw.description.label_schema(), candidates, left_out)


def _stores(
    workspace: Workspace, dataset: str, models: Sequence[TrainedModel], cases: Sequence[str]
) -> list[CaseStore]:
    """Of each model the cases preprocessed as it was trained."""
    data = workspace.preprocessed_folder(dataset) / "data"
    stores = {model.folder: CaseStore(data / model.plans.data_hash(model.run.configuration)) for model in models}
    problems = []
    for folder, store in stores.items():
        missing = [case for case in cases if not store.has(case, labeled=False)]
        if missing:
            model = next(model for model in models if model.folder == folder)
            problems.append(
                Problem(
                    f"{len(missing)} of {len(cases)} unlabeled cases are not preprocessed as {folder.name} was trained "
                    f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''})",
                    f"all of them in {store.folder}",
                    f"run autossl_plan_and_preprocess -d {dataset} --preset {model.run.preset} -c "
                    f"{model.run.configuration}; if the plans changed since, train again or leave this run out with -m",
                )
            )
    if problems:
        raise InvalidInput(problems)
    return [stores[model.folder] for model in models]


def _evidence(case: str, maps: Sequence[LabelMap], run_of_map: Sequence[str], pool: _Pool) -> CaseEvidence:
    by_run: dict[str, list[LabelMap]] = {}
    for run, label_map in zip(run_of_map, maps, strict=True):
        by_run.setdefault(run, []).append(label_map)
    within = [disagreement(own, pool.schema) for own in by_run.values() if len(own) > 1]
    known = [value for value in within if value is not None]
    votes = [majority_vote(own) for own in by_run.values()]
    entry = pool.fingerprint.cases[case]
    masks = pool.schema.class_masks(majority_vote(maps))
    volumes = {name: float(mask.sum()) * voxel_volume(entry) for name, mask in masks.items()}
    patients = {one.id: one.patient for one in pool.raw.cases}
    return CaseEvidence(
        case=case,
        patient=patients[case],
        fold_disagreement=sum(known) / len(known) if known else None,
        run_disagreement=disagreement(votes, pool.schema) if len(votes) > 1 else None,
        volumes=volumes,
        features=appearance(entry, list(volumes.values())),
    )


def _labeled_pool(pool: _Pool) -> LabeledPool:
    known = pool.fingerprint.of_pool("labeled")
    cases = tuple(case for case in pool.split.everything.labeled if case in known)
    statistics = budget_statistics(pool.fingerprint, list(cases), pool.schema)
    patients = {case.id: case.patient for case in pool.raw.cases}
    return LabeledPool(
        cases=cases,
        patients=frozenset(patients.get(case, case) for case in cases),
        features=tuple(appearance(known[case], _labeled_volumes(known[case], pool.schema)) for case in cases),
        median_volumes={name: found.volume_median for name, found in statistics.classes.items()},
    )


def _labeled_volumes(entry: CaseFingerprint, schema: LabelSchema) -> list[float]:
    return [entry.class_voxels[name] * voxel_volume(entry) for name in schema.foreground]


def _to_json(dataset: str, pool: _Pool, result: LabelNextResult) -> dict[str, Any]:
    chosen = [case.to_json() for case in result.ranked if case.rank is not None]
    others = [case.to_json() for case in result.ranked if case.rank is None]
    return {
        "what": "unlabeled cases worth labeling next, the best first; see the module label_next for the terms",
        "dataset": dataset,
        "split": pool.split.name,
        "models": {run: list(folds) for run, folds in result.models.items()},
        "n_labeled": len(pool.split.everything.labeled),
        "n_candidates": len(pool.candidates),
        "weights": asdict(Weights()),
        "next": chosen,
        "others": others,
        "left_out": result.left_out,
        "written": Written.now().model_dump(mode="json"),
    }


def _named(on_case: OnCase | None, what: str) -> Callable[[int, int], None] | None:
    return None if on_case is None else lambda done, total: on_case(what, done, total)
