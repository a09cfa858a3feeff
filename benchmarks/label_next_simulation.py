"""Is it worth labeling what `autossl_label_next` names? A simulation on a data set that is labeled already.

For each draw a workspace of its own holds the data set as a user has it: 8 labeled training cases of a fold (the draw's
benchmark budget), the other training cases as unlabeled, the fold's validation cases as a test set. The supervised
method is trained on five folds of the 8, `label_next` ranks the rest, and 8 more are labeled in one of three ways:

- *ranking*: the first of the list;
- *random*: at random among the same candidates;
- *random_foreground*: at random among the candidates whose predicted foreground volume, by the vote of the same five
  networks and over all classes, is above the candidates' median (the baseline that is hard to beat, nnActive, arXiv
  2511.19183; there it chooses patches, here whole cases);
- *start*: nothing is added; for scale.

Then the data set is planned again as after labeling, and one network is trained from scratch on all labeled cases and
scored on the fold's validation cases. Everything of a draw (cases, seeds, steps, plan) is the same in all ways.

The script may be stopped and called again at any time: trainings are resumed, and scores that are there are kept.

    python benchmarks/label_next_simulation.py --workspace W -d Hippocampus --scratch S \\
        -o benchmarks/results/label_next_hippocampus_2d.json
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autossl.data.files import read_json, write_json
from autossl.data.provenance import Written
from autossl.data.raw_dataset import Case, RawDataset, read_raw_dataset
from autossl.data.splits import Fold, make_benchmark_split, make_default_split, read_split, split_cases
from autossl.data.workspace import Workspace
from autossl.evaluation.benchmark.provenance import machine
from autossl.evaluation.evaluate import EvaluationOptions, evaluate_folder
from autossl.evaluation.label_evidence import RESULT_FILE, LabelNextRequest, label_next
from autossl.evaluation.statistics import PairedSample, compare_paired
from autossl.inference.predict import predict
from autossl.inference.request import PredictRequest
from autossl.planners.fingerprint import read_fingerprint
from autossl.planners.plan_and_preprocess import FINGERPRINT, PlanRequest, plan_and_preprocess
from autossl.planners.plan_experiment import PlanOptions
from autossl.trainers.train import TrainRequest, train

WAYS = ("start", "ranking", "random", "random_foreground")
BASE = "base"
COPIED = ("dataset.json", "cases.csv")


@dataclass(frozen=True)
class Settings:
    """What every draw has in common."""

    dataset: str
    configuration: str
    preset: str
    fold: str
    start: int
    add: int
    steps: int
    scratch: Path
    device: str


def main(argv: Sequence[str] | None = None) -> int:
    """Does what is missing, and writes the figures after every draw."""
    arguments = _parser().parse_args(argv)
    source = Workspace.locate(arguments.workspace)
    dataset = source.find_dataset(arguments.dataset)
    settings = Settings(
        dataset=dataset,
        configuration=arguments.configuration,
        preset=arguments.preset,
        fold=arguments.fold,
        start=arguments.start,
        add=arguments.add,
        steps=arguments.steps,
        scratch=arguments.scratch.absolute(),
        device=arguments.device,
    )
    _check_scratch(settings, arguments.seeds)
    rows: list[dict[str, Any]] = []
    for draw in arguments.draws:
        rows += simulate(source, settings, draw, arguments.seeds)
        write_json(arguments.output, _content(settings, rows))
    for name, figures in _summary(rows).items():
        print(name, figures)
    return 0


def simulate(source: Workspace, settings: Settings, draw: int, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One draw: from the first training to the scores of all ways."""
    raw = read_raw_dataset(source.raw_folder(settings.dataset))
    cases = {case.id: case for case in raw.cases}
    fold = _fold_of(source, settings, raw, draw)
    pool = [case for case in fold.unlabeled if cases[case].pool == "labeled"]
    base = Workspace(settings.scratch / f"draw-{draw}" / BASE)
    _lay_out(base, settings, raw, fold, pool)
    _plan(base, settings)
    _train(base, settings, ("all_folds",), seed=0)
    listed = base.results_folder(settings.dataset) / "default" / RESULT_FILE
    if not listed.is_file():
        print(f"draw {draw}: ranking {len(pool)} cases", flush=True)
        label_next(LabelNextRequest(settings.dataset, settings.add, base.root, device=settings.device))
    ranking = read_json(listed)
    rows = []
    for way in WAYS:
        added = choose(way, ranking, settings.add, draw)
        workspace = Workspace(settings.scratch / f"draw-{draw}" / way)
        _label(base, workspace, settings, [cases[case] for case in added])
        for seed in seeds:
            dice = _dice_after(workspace, settings, seed)
            patients = {case: cases[case].patient for case in dice}
            rows.append(
                {"draw": draw, "way": way, "seed": seed, "added": added, "patients": patients, "dice": dice}
                | {"mean_dice": _mean(value for scores in dice.values() for value in scores.values())}
            )
            print(f"draw {draw}, seed {seed}, {way}: Dice {rows[-1]['mean_dice']:.4f}", flush=True)
    return rows


def choose(way: str, ranking: Mapping[str, Any], n: int, draw: int) -> list[str]:
    """The cases that are labeled in one of the ways; random ones depend on the draw alone.

    Args:
        way: of `WAYS`.
        ranking: content of label_next.json.
        n: how many.
        draw: seeds the choice.
    """
    if way == "start":
        return []
    if way == "ranking":
        return [found["case"] for found in sorted(ranking["next"], key=lambda found: found["rank"])][:n]
    volumes = {
        found["case"]: sum(found["measured"]["volumes"].values()) for found in ranking["next"] + ranking["others"]
    }
    candidates = sorted(volumes)
    if way == "random_foreground":
        middle = float(np.median(list(volumes.values())))
        candidates = [case for case in candidates if volumes[case] > middle]
    return sorted(random.Random(f"{way}/{draw}").sample(candidates, min(n, len(candidates))))


def _fold_of(source: Workspace, settings: Settings, raw: RawDataset, draw: int) -> Fold:
    """The fold of the draw's benchmark split; nothing is written into the source."""
    folder = source.preprocessed_folder(settings.dataset)
    stored, fingerprint = folder / "splits" / "default.json", folder / FINGERPRINT
    duplicates = read_fingerprint(fingerprint).duplicates if fingerprint.is_file() else ()
    cases = split_cases(raw)
    default = read_split(stored) if stored.is_file() else make_default_split(cases, duplicates=duplicates)
    split = make_benchmark_split(default, cases, settings.start, draw, duplicates)
    return split.folds[int(settings.fold)]


def _lay_out(base: Workspace, settings: Settings, raw: RawDataset, fold: Fold, pool: Sequence[str]) -> None:
    """The data set of a user with few labels."""
    target = base.raw / settings.dataset
    if target.is_dir():
        return
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    by_id = {case.id: case for case in raw.cases}
    for case in fold.labeled:
        _copy(by_id[case], partial, "imagesTr", "labelsTr")
    for case in pool:
        _copy(by_id[case], partial, "imagesUn", None)
    for case in fold.validation:
        _copy(by_id[case], partial, "imagesTs", "labelsTs")
    for name in COPIED:
        if (raw.folder / name).is_file():
            shutil.copyfile(raw.folder / name, partial / name)
    partial.rename(target)


def _label(base: Workspace, workspace: Workspace, settings: Settings, added: Sequence[Case]) -> None:
    """A copy of the base in which these cases were labeled, planned again."""
    target = workspace.raw / settings.dataset
    if not target.is_dir():
        shutil.rmtree(workspace.root, ignore_errors=True)
        shutil.copytree(base.preprocessed, workspace.preprocessed)
        partial = target.with_name(f".partial-{target.name}")
        shutil.copytree(base.raw / settings.dataset, partial)
        for case in added:
            for image in case.images:
                (partial / "imagesUn" / image.name).unlink()
            _copy(case, partial, "imagesTr", "labelsTr")
        partial.rename(target)
    _plan(workspace, settings)


def _copy(case: Case, raw: Path, images: str, labels: str | None) -> None:
    files = {images: case.images, labels: (case.label,) if case.label else ()}
    for folder, paths in files.items():
        if folder is not None:
            (raw / folder).mkdir(parents=True, exist_ok=True)
            for path in paths:
                shutil.copyfile(path, raw / folder / path.name)


def _plan(workspace: Workspace, settings: Settings) -> None:
    options = PlanOptions(preset=settings.preset, configurations=(settings.configuration,))
    plan_and_preprocess(PlanRequest(settings.dataset, workspace.root, options, n_workers=1))


def _train(workspace: Workspace, settings: Settings, folds: tuple[str, ...], seed: int) -> Path:
    request = TrainRequest(
        dataset=settings.dataset,
        configuration=settings.configuration,
        folds=folds,
        workspace=workspace.root,
        preset=settings.preset,
        steps=settings.steps,
        seed=seed,
        device=settings.device,
        resume=True,
    )
    return train(request).folder


def _dice_after(workspace: Workspace, settings: Settings, seed: int) -> dict[str, dict[str, float | None]]:
    """Case → class → Dice on the held-out cases, of one network that was trained on all labeled ones."""
    scores = workspace.root / f"scores_seed-{seed}.json"
    if not scores.is_file():
        run = _train(workspace, settings, ("all",), seed)
        raw = workspace.raw / settings.dataset
        output = workspace.root / f"predictions_seed-{seed}"
        predict(
            PredictRequest(raw / "imagesTs", output, model=run, folds=("all",), resume=True, device=settings.device)
        )
        schema = read_raw_dataset(raw).description.label_schema()
        remap = read_fingerprint(workspace.preprocessed_folder(settings.dataset) / FINGERPRINT).remap_labels
        options = EvaluationOptions(remap_references=remap, surfaces=False)
        evaluate_folder(output, raw / "labelsTs", schema, options, output=scores)
    cases: Mapping[str, Mapping[str, Mapping[str, float | None]]] = read_json(scores)["cases"]
    return {case: {name: found["dice"] for name, found in classes.items()} for case, classes in cases.items()}


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean Dice of each way with its spread over draws, and paired differences to the ranking's rivals."""
    result: dict[str, Any] = {}
    for way in WAYS:
        by_draw: dict[int, list[float]] = {}
        for row in rows:
            if row["way"] == way:
                by_draw.setdefault(row["draw"], []).append(row["mean_dice"])
        means = [float(np.mean(values)) for values in by_draw.values()]
        result[way] = {"mean_dice": round(float(np.mean(means)), 4), "per_draw": [round(mean, 4) for mean in means]}
    for rival in WAYS:
        if rival != "ranking":
            result[f"ranking - {rival}"] = _difference(rows, rival)
    return result


def _difference(rows: Sequence[Mapping[str, Any]], rival: str) -> dict[str, Any]:
    """Mean paired difference with the 95 % interval over patients and draws (and seeds where there are several)."""
    found = {(row["way"], row["draw"], row["seed"]): row for row in rows}
    pairs = [
        (row, found[rival, row["draw"], row["seed"]])
        for row in rows
        if row["way"] == "ranking" and (rival, row["draw"], row["seed"]) in found
    ]
    patients = {case: patient for row, _ in pairs for case, patient in row["patients"].items()}
    cases, classes = sorted(patients), list(next(iter(pairs[0][0]["dice"].values())))
    ours, theirs = (np.array([_table(pair[side]["dice"], cases, classes) for pair in pairs]) for side in (0, 1))
    trainings = tuple((row["draw"], "fold") for row, _ in pairs)
    sample = PairedSample(ours - theirs, trainings, tuple(("fold", patients[case]) for case in cases))
    compared = compare_paired(sample)
    numbers = {"estimate": compared.estimate, "low": compared.low, "high": compared.high}
    return {key: None if math.isnan(value) else round(value, 4) for key, value in numbers.items()} | {
        "n_patients": sample.n_patients,
        "resampled": list(sample.resampled),
    }


def _table(
    dice: Mapping[str, Mapping[str, float | None]], cases: Sequence[str], classes: Sequence[str]
) -> list[list[float]]:
    """[cases, classes]; NaN where a class is in neither prediction nor reference."""
    rows = [[dice[case][name] for name in classes] for case in cases]
    return [[math.nan if value is None else value for value in row] for row in rows]


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def _content(settings: Settings, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "random_foreground": "random among the candidates whose predicted foreground volume is above their median",
        "settings": _plain(settings),
        "summary": _summary(rows),
        "runs": list(rows),
        "machine": machine(settings.device),
        "written": Written.now().model_dump(mode="json"),
    }


def _plain(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in vars(settings).items() if name != "scratch"}


def _check_scratch(settings: Settings, seeds: Sequence[int]) -> None:
    """A scratch folder belongs to one group of settings."""
    path = settings.scratch / "settings.json"
    if path.is_file() and read_json(path) != _plain(settings):
        raise SystemExit(f"{path} holds other settings: {read_json(path)}; choose another --scratch")
    if len(set(seeds)) < len(seeds):
        raise SystemExit("a seed is named twice")
    write_json(path, _plain(settings))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--workspace", type=Path, required=True, help="holds the labeled data set")
    parser.add_argument("-d", "--dataset", required=True)
    parser.add_argument("-c", "--configuration", default="2d")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--fold", default="0", help="whose validation cases are scored")
    parser.add_argument("--start", type=int, default=8, help="labeled at first")
    parser.add_argument("--add", type=int, default=8, help="labeled then")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the last training")
    parser.add_argument("--steps", type=int, default=1000, help="of every training")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for workspaces; kept")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
