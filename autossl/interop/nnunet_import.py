"""Imports a trained nnU-Net v2 model as a run of ours: the function behind `autossl_import_nnunet`.

Everything is checked in a folder of its own, then one rename puts the run into its place. The run predicts
(`autossl_predict`), starts trainings (`autossl_train --init`), and can be round 0 of self_training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from autossl.data.description import read_description
from autossl.data.files import content_hash, file_hash, read_json, replace_folder, write_json
from autossl.data.problems import InvalidInput, Problem
from autossl.data.runs import CHECKPOINT_FINAL, RUN_FILE, RunSpec, read_run, run_folder
from autossl.data.workspace import DATASET_NAME, Workspace
from autossl.inference.model_folder import DESCRIPTION_FILE, PLANS_FILE, TrainedModel, read_model
from autossl.interop.deployed import check_weights, shared_description
from autossl.interop.foreign_checkpoint import read_foreign_checkpoint
from autossl.interop.model_install import staging_folder
from autossl.interop.nnunet_plans import imported_plans
from autossl.interop.nnunet_source import CHECKPOINT, LocalModel, open_model
from autossl.interop.nnunet_splits import folds_of_splits
from autossl.networks.prediction import Member, PredictionSpec
from autossl.planners.plans import Plans, write_plans
from autossl.trainers.checkpoints import write_checkpoint
from autossl.version import __version__

METHOD = "nnunet"
SPLIT = "imported"
"""Of results/DATASET; apart from the runs that were trained here, because its folds are nnU-Net's own."""
NETWORK = "network"
"""Name of the part; what most methods call theirs, so that weights go where they belong."""
DEFAULT_TRAINER = "nnUNetTrainer"
STEPS_PER_EPOCH = 250
"""nnU-Net's default."""
WRAPPERS = ("module.", "_orig_mod.")
KEY = "nnunet"
"""Of run.json: where the model came from."""
EXPECTED = "a checkpoint of nnU-Net v2"
FIX = "name another checkpoint with --checkpoint, or another model"
OnFold = Callable[[str, int, int], None]
"""(fold, folds done, folds in all)."""


@dataclass(frozen=True)
class ImportRequest:
    """Which model, and what it will be."""

    source: Path
    """Folder of a model, one that holds several, or a zip file."""
    dataset: str
    """That the run will belong to; a full name of a dataset that is not in the workspace will do."""
    workspace: Path | None = None
    folds: tuple[str, ...] | None = None
    """None: all there are."""
    select: str | None = None
    """Part of the name of the model's folder, where there are several."""
    checkpoint: str = CHECKPOINT
    """Name of the file in each fold."""
    splits: Path | None = None
    """nnU-Net's splits_final.json: which cases each fold was trained on; without it nobody knows."""
    tag: str | None = None
    """Of the run; None: the trainer's name where it is not nnU-Net's default one."""
    overwrite: bool = False


@dataclass(frozen=True)
class ImportResult:
    """The run that was made."""

    model: TrainedModel
    trainer: str
    origin: str
    """Name of the dataset it was trained on, as its plans say."""
    already: bool = False
    """It was there, from the same files."""


@dataclass(frozen=True)
class _Trained:
    """What a fold's checkpoint says."""

    configuration: str
    trainer: str
    mirror_axes: tuple[int, ...]
    epochs: int
    weights: Mapping[str, Tensor]


def import_nnunet(request: ImportRequest, on_fold: OnFold | None = None) -> ImportResult:
    """Makes a run of a trained nnU-Net v2 model; nothing of the model is executed.

    Raises:
        InvalidInput: the model is damaged, hostile, or does what does not exist here; or another run lies in its place.
            Nothing is left behind then.
    """
    home = Workspace.locate(request.workspace)
    dataset = _dataset(home, request.dataset)
    place = home.results_folder(dataset) / SPLIT
    with staging_folder(place, 0) as staging:
        (staging / "unpacked").mkdir()
        staged = staging / "new" / "run"
        with (
            _told_of(request.source, staging),
            open_model(
                request.source, staging / "unpacked", request.select, request.folds, request.checkpoint
            ) as local,
        ):
            identity = _identity(local)
            trained = {fold: _read(path) for fold, path in local.checkpoints.items()}
            first = _agreeing(trained, request.source)
            plans = _plans(local, first, dataset)
            spec = _spec(request, local, first, plans, identity)
            spec = spec.model_copy(update={"folds": folds_of_splits(request.splits, list(trained), home, dataset)})
            target = run_folder(home, spec)
            if _is_there(target, identity, request.overwrite):
                return _result(target, already=True)
            _write(staged, local, plans, spec, trained, on_fold)
            _check(staged)
        replace_folder(staged, target, staging / "replaced")
    return _result(target)


def _dataset(home: Workspace, name: str) -> str:
    """A dataset of the workspace, or a full name for one that is not there (yet)."""
    try:
        return home.find_dataset(name)
    except InvalidInput:
        if DATASET_NAME.match(name):
            return name
        raise


def _identity(local: LocalModel) -> str:
    files = {fold: file_hash(path) for fold, path in local.checkpoints.items()}
    return content_hash([file_hash(local.plans), file_hash(local.description), files], 16)


def _read(path: Path) -> _Trained:
    """A checkpoint as `nnUNetTrainer.save_checkpoint` writes it; of a hand-written one what prediction needs."""
    content = read_foreign_checkpoint(path)
    weights, arguments = content.get("network_weights"), content.get("init_args")
    faults = []
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        faults.append(("no network_weights in it", "a dictionary of tensors"))
    configuration = arguments.get("configuration") if isinstance(arguments, dict) else None
    if not isinstance(configuration, str):
        faults.append(("no configuration in its init_args", "the configuration that it was trained with"))
    if not isinstance(content.get("trainer_name"), str):
        faults.append(("no trainer_name in it", "the name of nnU-Net's trainer"))
    axes = content.get("inference_allowed_mirroring_axes")
    if axes is not None and not (isinstance(axes, list | tuple) and all(isinstance(axis, int) for axis in axes)):
        faults.append((f"inference_allowed_mirroring_axes is {axes!r}", "numbers of axes, or None"))
    if faults:
        raise InvalidInput([Problem(found, f"{EXPECTED}: {what}", FIX, file=path) for found, what in faults])
    epochs = content.get("current_epoch")
    return _Trained(
        str(configuration),
        content["trainer_name"],
        tuple(axes or ()),
        epochs if isinstance(epochs, int) and epochs > 0 else 0,
        _unwrapped(weights or {}),
    )


def _unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = dict(weights)
    for prefix in WRAPPERS:
        result = {name.removeprefix(prefix): value for name, value in result.items()}
    return result


def _agreeing(trained: Mapping[str, _Trained], source: Path) -> _Trained:
    """The first fold, where the others are of its kind."""
    (first_fold, first), *others = trained.items()
    problems = [
        Problem(f"fold {fold}: {key} is {getattr(other, key)!r}", f"{getattr(first, key)!r}, as in fold {first_fold}",
                "choose folds of one training with -f", file=source)
        for fold, other in others
        for key in ("configuration", "trainer", "mirror_axes")
        if getattr(other, key) != getattr(first, key)
    ]  # fmt: skip
    if problems:
        raise InvalidInput(problems)
    return first


def _plans(local: LocalModel, trained: _Trained, dataset: str) -> Plans:
    content = read_json(local.plans)
    named = content.get("plans_name") if isinstance(content, dict) else None
    return imported_plans(
        content,
        trained.configuration,
        trained.mirror_axes,
        dataset,
        _name_part(named if isinstance(named, str) else "nnUNetPlans"),
        max(1, trained.epochs * STEPS_PER_EPOCH),
        local.plans,
    )


def _name_part(text: str) -> str:
    """As a part of a run folder's name."""
    return re.sub("_+", "_", re.sub(r"[^A-Za-z0-9._-]", "-", text)).strip("._-")[:80] or "unnamed"


def _spec(request: ImportRequest, local: LocalModel, trained: _Trained, plans: Plans, identity: str) -> RunSpec:
    tag = request.tag or (None if trained.trainer == DEFAULT_TRAINER else _name_part(trained.trainer))
    content = read_json(local.plans)
    origin = {
        "model": local.folder_name,
        "trainer": trained.trainer,
        "dataset": str(content.get("dataset_name", "unknown")),
        "plans": plans.plans_name,
        "checkpoint": request.checkpoint,
        "epochs": trained.epochs,
        "identity": identity,
    }
    return RunSpec.model_validate(
        {
            "dataset": plans.dataset_name,
            "split": SPLIT,
            "configuration": trained.configuration,
            "preset": plans.preset,
            "method": METHOD,
            "tag": tag,
            "seed": 0,
            "plans_hash": plans.hash(),
            "total_steps": plans.semi_supervised.total_steps,
            "versions": {"autossl": __version__},
            KEY: origin,
        }
    )


def _is_there(target: Path, identity: str, overwrite: bool) -> bool:
    """Whether this very model is there; raises where something else is that may not be replaced."""
    if not target.exists():
        return False
    before = None
    if (target / RUN_FILE).is_file():
        before = getattr(read_run(target), KEY, None)
    ours = isinstance(before, dict)
    if isinstance(before, dict) and before.get("identity") == identity and not overwrite:
        return True
    if ours and overwrite:
        return False
    found = "another model was imported there" if ours else "the folder is there and holds no imported model"
    fix = "give this one a --tag" + (", or replace the other with --overwrite" if ours else "")
    raise InvalidInput(Problem(found, "a folder that is free", fix, file=target))


def _write(
    folder: Path,
    local: LocalModel,
    plans: Plans,
    spec: RunSpec,
    trained: Mapping[str, _Trained],
    on_fold: OnFold | None,
) -> None:
    description = shared_description(read_description(local.description))
    regions = description.label_schema().has_regions
    member = Member(name=NETWORK, architecture=plans.configuration(spec.configuration).architecture)
    prediction = PredictionSpec(members=(member,), activation="sigmoid" if regions else "softmax")
    folder.mkdir(parents=True)
    write_plans(folder / PLANS_FILE, plans)
    write_json(folder / DESCRIPTION_FILE, description.to_json())
    write_json(folder / RUN_FILE, spec.model_dump(mode="json"))
    for done, (fold, of) in enumerate(trained.items()):
        if on_fold is not None:
            on_fold(fold, done, len(trained))
        content = {"networks": {NETWORK: dict(of.weights)}, "prediction": prediction.to_json(), "alternatives": {}}
        write_checkpoint(folder / f"fold_{fold}" / CHECKPOINT_FINAL, content)


def _check(folder: Path) -> None:
    """What predicting would stumble over.

    Raises:
        InvalidInput: files that do not belong together, or weights that are not those of the plan's network.
    """
    model = read_model(folder, [path.name.removeprefix("fold_") for path in sorted(folder.glob("fold_*"))])
    for fold in model.folds:
        check_weights(model.checkpoint(fold), model.plan, model.schema.n_outputs)


def _result(target: Path, already: bool = False) -> ImportResult:
    model = read_model(target)
    origin = getattr(model.run, KEY)
    return ImportResult(model, origin["trainer"], origin["dataset"], already)


@contextmanager
def _told_of(source: Path, staging: Path) -> Iterator[None]:
    """Faults of files that were unpacked or made here are told as the source's."""
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput([_told(problem, Path(source), staging) for problem in error.problems]) from error


def _told(problem: Problem, source: Path, staging: Path) -> Problem:
    file = None if problem.file is None else Path(problem.file)
    if file is None or not file.is_relative_to(staging):
        return problem
    name = "/".join(part for part in file.relative_to(staging).parts[-2:] if part not in ("run", "unpacked"))
    fix = FIX if "autossl" in problem.fix or "install" in problem.fix else problem.fix
    return replace(problem, file=source, found=f"{name}: {problem.found}", fix=fix)
