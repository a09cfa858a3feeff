"""A trained model on disk: the run folder that holds plans.json, dataset.json, run.json and fold_k."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autossl.data.description import DatasetDescription, read_description
from autossl.data.files import content_hash, read_json
from autossl.data.labels import LabelSchema
from autossl.data.locks import holder_of
from autossl.data.problems import InvalidInput, Problem
from autossl.data.runs import CHECKPOINT_FINAL, FoundRun, RunSpec, fold_lock, fold_state, read_run
from autossl.inference.checkpoint import read_trained_networks, separate_channels
from autossl.inference.predictor import Predictor, Window
from autossl.networks.prediction import PredictionSpec
from autossl.planners.plans import ConfigurationPlan, Plans, read_plans

logger = logging.getLogger(__name__)

PLANS_FILE = "plans.json"
DESCRIPTION_FILE = "dataset.json"
BENCHMARK_PREFIX = "benchmark-"
"""Splits whose folds saw different labels (see the page on splits)."""


@dataclass(frozen=True)
class TrainedModel:
    """What a run folder says about itself, read and checked."""

    folder: Path
    run: RunSpec
    plans: Plans
    description: DatasetDescription
    folds: tuple[str, ...]
    """Finished folds that will predict."""

    @property
    def plan(self) -> ConfigurationPlan:
        """Of the run's configuration."""
        return self.plans.configuration(self.run.configuration)

    @property
    def schema(self) -> LabelSchema:
        """Labels or regions."""
        return self.description.label_schema()

    def checkpoint(self, fold: str) -> Path:
        """The final weights of a fold."""
        return self.folder / f"fold_{fold}" / CHECKPOINT_FINAL

    def modality(self, name: str) -> tuple[int, ...]:
        """Numbers of the channels of a modality from which the model predicts alone.

        Raises:
            InvalidInput: dataset.json does not know it, or no network of the model sees just these channels.
        """
        named, path = self.description.channels, self.checkpoint(self.folds[0])
        wanted, there = named.find(name), self.separate_modalities()
        if frozenset(wanted) in there:
            return wanted
        if not there:
            found = f"every network of {self.run.method} sees all channels, none sees {named.name_of(wanted)} alone"
            expected = "a model with a network for this modality"
        else:
            found = f"no network of this model sees {named.name_of(wanted)} alone"
            expected = f"one of {named.listed(sorted(channels) for channels in there)}"
        fix = f"train semi_cml with it among its groups, or supervised with --set channels={named.name_of(wanted)}"
        raise InvalidInput(Problem(found, expected, fix, file=path))

    def separate_modalities(self) -> list[frozenset[int]]:
        """Sets of channels from which the model predicts alone."""
        return separate_channels(self.checkpoint(self.folds[0]))

    def load_predictor(self, window: Window, device: str = "cpu", channels: Collection[int] | None = None) -> Predictor:
        """All folds' networks on the device.

        Args:
            window: tiling and mirroring.
            device: where to predict.
            channels: of the modality to predict from alone; None: as the model is deployed.

        Raises:
            InvalidInput: a checkpoint is damaged, not ours, of another prediction or does not fit the plan.
        """
        trained = {fold: read_trained_networks(self.checkpoint(fold), channels) for fold in self.folds}
        specs = {fold: networks.spec for fold, networks in trained.items()}
        first = self.folds[0]
        differing = [fold for fold, spec in specs.items() if _kind(spec) != _kind(specs[first])]
        if differing:
            raise InvalidInput(
                Problem(
                    f"fold {differing[0]} predicts in another way than fold {first}",
                    "folds of one method with the same settings",
                    "predict with -f and one of them",
                    file=self.checkpoint(differing[0]),
                )
            )
        try:
            states = [networks.networks for networks in trained.values()]
            return Predictor.from_state_dicts(list(specs.values()), states, self.plan, self.schema, window, device)
        except InvalidInput as error:
            raise InvalidInput([replace(p, file=p.file or self.folder) for p in error.problems]) from error


def _kind(spec: PredictionSpec) -> PredictionSpec:
    """The spec without what folds of one run may decide for themselves: which channels, and so which networks."""
    members = (
        member.model_copy(update={"name": f"member {index}", "channels": None})
        for index, member in enumerate(spec.members)
    )
    return spec.model_copy(update={"members": tuple(members)})


def read_model(folder: Path, folds: Sequence[str] | None = None) -> TrainedModel:
    """Reads and checks a run folder; the weights are not touched yet.

    Args:
        folder: that holds fold_k.
        folds: "0", "1", …, "all"; None: all finished integer folds there, or "all" where that is the only one.

    Raises:
        InvalidInput: a file is missing or damaged, plans and dataset.json do not belong together, a fold is absent or
            unfinished, or several folds of a benchmark split are asked for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidInput(
            Problem("there is no such folder", "a run folder with fold_k in it", "check the path", file=folder)
        )
    if not any(folder.glob("fold_*")):
        raise InvalidInput(
            Problem("no fold_k in the folder", "the folder that holds fold_k", "name a run folder", file=folder)
        )
    run = read_run(folder)
    plans = read_plans(folder / PLANS_FILE)
    description = read_description(folder / DESCRIPTION_FILE)
    _check_belong_together(folder, run, plans, description)
    chosen = _choose_folds(folder, folds)
    if run.split.startswith(BENCHMARK_PREFIX) and len(chosen) > 1:
        raise InvalidInput(
            Problem(
                f"folds {', '.join(chosen)} of split {run.split} were trained with different labels",
                "one fold: together they would have seen more labels than the budget says",
                "choose one with -f, or train with a deployment budget (autossl_run --labeled)",
                file=folder,
            )
        )
    return TrainedModel(folder, run, plans, description, chosen)


def _check_belong_together(folder: Path, run: RunSpec, plans: Plans, description: DatasetDescription) -> None:
    plan = plans.configuration(run.configuration)
    problems = []
    if plans.dataset_name != run.dataset:
        problems.append(
            Problem(
                f"the plan is for {plans.dataset_name}, the run was trained on {run.dataset}",
                "the plans.json that the run was trained with",
                "restore it",
                file=folder / PLANS_FILE,
            )
        )
    if plan.n_channels != description.n_channels:
        problems.append(
            Problem(
                f"{description.n_channels} channels in dataset.json, {plan.n_channels} in the plan",
                "the same number",
                "restore the files that the run was trained with",
                file=folder / DESCRIPTION_FILE,
            )
        )
    if not problems and not _is_of_training(folder / PLANS_FILE, plans, run):
        problems.append(
            Problem(
                "not the plan that the run was trained with: damaged, or edited since",
                f"decisions with the hash {run.plans_hash}",
                "restore it from a copy, or go on with the run by autossl_train … --resume, which writes it again",
                file=folder / PLANS_FILE,
            )
        )
    if problems:
        raise InvalidInput(problems)


def _is_of_training(path: Path, plans: Plans, run: RunSpec) -> bool:
    """By the hash in run.json; of the file as well, which may be from before the plans had all their fields."""
    content = {key: value for key, value in read_json(path).items() if key != "why"}
    try:
        return run.plans_hash in (plans.hash(), content_hash(content))
    except ValueError:  # NaN or infinity, which no plan of ours holds
        return False


def _choose_folds(folder: Path, asked: Sequence[str] | None) -> tuple[str, ...]:
    there = FoundRun(folder, read_run(folder)).states
    finished = [fold for fold, state in there.items() if state == "finished"]
    if asked is None:
        numbers = sorted((fold for fold in finished if fold.isdecimal()), key=int)
        unfinished = sorted(set(there) - set(finished))
        if unfinished and finished:
            logger.warning("%s; only finished folds take part", "; ".join(_state(folder, fold) for fold in unfinished))
        asked = numbers or finished
        if not asked:
            raise InvalidInput(
                Problem(
                    "no fold is finished", "a fold with its final checkpoint", "train it with --resume", file=folder
                )
            )
    problems = [
        Problem(
            _state(folder, fold),
            f"one of the finished folds: {', '.join(finished) or 'none'}",
            "choose another with -f, or finish it with autossl_train --resume",
            file=folder,
        )
        for fold in asked
        if fold not in finished
    ]
    if problems:
        raise InvalidInput(problems)
    return tuple(dict.fromkeys(asked))


def _state(folder: Path, fold: str) -> str:
    """In words, with who trains it now."""
    holder = holder_of(fold_lock(folder, fold))
    being = "" if holder is None else f", {holder} works on it"
    return f"fold {fold} is {fold_state(folder / f'fold_{fold}')}{being}"
