"""A trained run as a model of nnU-Net v2 (2.8.1), for `nnUNetv2_predict` and whatever else reads such folders.

    OUT/DATASET/nnUNetTrainer__PLANS__CONFIGURATION/   OUT is a folder of nnU-Net's results
        plans.json, dataset.json
        fold_k/checkpoint_final.pth                    loads with weights_only=True
        postprocessing.json                            where rules belong to the model: `autossl_apply_postprocessing`
        autossl.json                                   what was trained, and how
    OUT/DATASET__PLANS__CONFIGURATION.zip              for `nnUNetv2_install_pretrained_model_from_zip`

No case of the training is named in it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autossl.data.files import replace_folder, write_json
from autossl.data.image_io import ITK_ENDINGS, NIFTI_ENDINGS, PICTURE_ENDINGS
from autossl.data.problems import InvalidInput, Problem
from autossl.data.provenance import Written
from autossl.data.runs import CHECKPOINT_FINAL, RunFilter
from autossl.inference.model_folder import DESCRIPTION_FILE, PLANS_FILE, TrainedModel
from autossl.inference.postprocessing_plan import POSTPROCESSING_FILE, PostprocessingPlan, write_postprocessing
from autossl.interop.deployed import shared_description
from autossl.interop.model_archive import write_zip
from autossl.interop.model_source import ModelSource, find_model
from autossl.interop.nnunet_weights import SingleNetwork, nnunet_state, single_network
from autossl.planners.plans import Plans

TRAINER = "nnUNetTrainer"
RECORD_FILE = "autossl.json"
TESTED_VERSION = "2.8.1"
NNUNET_DATASET = re.compile(r"Dataset\d{3}_\w+\Z")
UNUSED_INTENSITIES = {
    "mean": 0.0,
    "std": 1.0,
    "min": 0.0,
    "max": 0.0,
    "median": 0.0,
    "percentile_00_5": 0.0,
    "percentile_99_5": 0.0,
}
"""nnU-Net looks them up for every channel, and uses them for CT alone."""

OnFold = Callable[[str, int, int], None]
"""Told the fold that is being written, how many are done, and how many there are."""


@dataclass(frozen=True)
class NnunetExportRequest:
    """What to export, and where to."""

    model: str | Path
    """A run folder; or a dataset or a folder with inference_plan.json whose final model is a single run."""
    output: Path
    """A folder of nnU-Net's results, which may hold other models."""
    workspace: Path | None = None
    run: RunFilter = field(default_factory=RunFilter)
    """Which of the dataset's splits."""
    folds: tuple[str, ...] | None = None
    """None: all finished integer folds, or those of the inference plan."""
    member: str | None = None
    """One network in place of the deployed prediction; see `single_networks`."""
    archive: bool = False
    """Write the zip file too."""
    overwrite: bool = False
    """Replace what an earlier export wrote."""


@dataclass(frozen=True)
class NnunetExportResult:
    """What was written."""

    folder: Path
    """The model's own folder."""
    archive: Path | None
    dataset: str
    plans_name: str
    configuration: str
    folds: tuple[str, ...]
    has_rules: bool
    """Whether postprocessing.json lies in the folder."""
    notes: tuple[str, ...]
    """What the user should know."""

    @property
    def predict_arguments(self) -> tuple[str, ...]:
        """Of `nnUNetv2_predict`, without images and output; nnUNet_results must be the folder of the request."""
        named = ("-d", self.dataset, "-c", self.configuration, "-tr", TRAINER, "-p", self.plans_name)
        return (*named, "-f", *self.folds)


def export_nnunet(request: NnunetExportRequest, on_fold: OnFold | None = None) -> NnunetExportResult:
    """Writes a run as a model folder of nnU-Net v2; label maps of `nnUNetv2_predict` are those of `autossl_predict`.

    Up to rounding: nnU-Net sums its logits in half precision.

    Raises:
        InvalidInput: no such model; several networks, runs, a channel or labels that nnU-Net cannot have; or the output
            is there already. Nothing is written then.
    """
    source = find_model(request.model, request.workspace, request.run, request.folds)
    model = _only_member(source)
    networks = {fold: single_network(model.checkpoint(fold), model.plan, request.member) for fold in model.folds}
    _check_fits(model, networks)
    plans_name = plans_name_of(model, request.member)
    names = f"{plans_name}__{model.run.configuration}"
    output = Path(request.output)
    folder = output / model.run.dataset / f"{TRAINER}__{names}"
    archive = output / f"{model.run.dataset}__{names}.zip" if request.archive else None
    _check_output(folder, archive, request.overwrite)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output) as staging:
        staged = Path(staging) / folder.name
        _write_folder(staged, source, networks, plans_name, on_fold)
        if archive is not None:
            inside = f"{model.run.dataset}/{folder.name}"
            files = {f"{inside}/{p.relative_to(staged).as_posix()}": p for p in _files(staged)}
            write_zip(archive, files)
        replace_folder(staged, folder, staged.with_name("former"))
    return NnunetExportResult(
        folder=folder,
        archive=archive,
        dataset=model.run.dataset,
        plans_name=plans_name,
        configuration=model.run.configuration,
        folds=model.folds,
        has_rules=bool(source.plan.postprocessing),
        notes=tuple(_notes(model, networks)),
    )


def plans_name_of(model: TrainedModel, member: str | None = None) -> str:
    """A name that tells runs apart; without double underscores, at which nnU-Net splits the names of folders."""
    run = model.run
    parts = ("autossl", run.preset, run.method, run.tag, member, f"seed-{run.seed}")
    return re.sub(r"_{2,}", "_", re.sub(r"[^A-Za-z0-9.-]", "_", "_".join(part for part in parts if part)))


def reader_of(plans: Plans, file_ending: str) -> str:
    """nnU-Net's reader that gives the arrays that the networks were trained on."""
    if plans.orientation == "RAS":
        return "NibabelIOWithReorient" if file_ending in NIFTI_ENDINGS else "SimpleITKIOWithReorient"
    return "NaturalImage2DIO" if file_ending in PICTURE_ENDINGS else "SimpleITKIO"


def nnunet_plans(model: TrainedModel, network: SingleNetwork, plans_name: str) -> dict[str, Any]:
    """plans.json with the run's configuration alone, and the architecture that was trained."""
    content = model.plans.to_nnunet_json()
    configuration = content["configurations"][model.run.configuration]
    configuration["architecture"] = network.member.architecture.model_dump(mode="json", by_alias=True)
    configuration.pop("next_stage", None)
    known = content["foreground_intensity_properties_per_channel"]
    return content | {
        "plans_name": plans_name,
        "image_reader_writer": reader_of(model.plans, model.description.file_ending),
        "configurations": {model.run.configuration: configuration},
        "foreground_intensity_properties_per_channel": {
            str(channel): known.get(str(channel), UNUSED_INTENSITIES) for channel in range(model.plan.n_channels)
        },
    }


def nnunet_description(model: TrainedModel) -> dict[str, Any]:
    """dataset.json; an ignore label that does not follow the others right away is left out, nnU-Net wants no other."""
    content = shared_description(model.description).to_json()
    ignore = model.schema.ignore_label
    others = {value for name, values in model.schema.names.items() if name != "ignore" for value in values}
    if ignore is not None and ignore != max(others) + 1:
        content["labels"] = {name: value for name, value in content["labels"].items() if name != "ignore"}
    return content


def _only_member(source: ModelSource) -> TrainedModel:
    if len(source.members) == 1:
        return source.members[0]
    folders = ", ".join(str(member.folder) for member in source.members)
    raise InvalidInput(
        Problem(
            f"the final model is the mean of the probabilities of {len(source.members)} runs",
            "one run: folds of nnU-Net share one plan, and their logits are averaged",
            f"export each of them ({folders}); nnUNetv2_ensemble averages the probabilities of their predictions",
        )
    )


def _check_fits(model: TrainedModel, networks: dict[str, SingleNetwork]) -> None:
    """What nnU-Net can have."""
    schema, ending = model.schema, model.description.file_ending
    problems = []
    if len({network.member.architecture.model_dump_json() for network in networks.values()}) > 1:
        fix = "export them one by one with -f, to folders of their own"
        problems.append(Problem("folds of different architectures", "the same in all folds", fix, file=model.folder))
    if not schema.has_regions and schema.written_values != tuple(range(schema.n_outputs)):
        found = f"the label values {', '.join(map(str, schema.written_values))}"
        expected = "0, 1, 2, … without gaps: nnU-Net writes the number of the output"
        fix = "number the labels that way and train again, or predict with autossl_predict"
        problems.append(Problem(found, expected, fix, file=model.folder / DESCRIPTION_FILE))
    if ending in ITK_ENDINGS and model.plans.orientation == "RAS" and max(schema.values) > 255:
        found = f"label values up to {max(schema.values)} in {ending} files"
        fix = "convert the images to .nii.gz and train on these"
        problems.append(Problem(found, "at most 255, which nnU-Net's reorienting reader can write", fix))
    if problems:
        raise InvalidInput(problems)


def _check_output(folder: Path, archive: Path | None, overwrite: bool) -> None:
    problems = []
    if folder.exists() and not (folder / RECORD_FILE).is_file():
        fix = "choose another output folder; this one is never replaced"
        problems.append(Problem("a model that was not exported by autossl", "a new folder", fix, file=folder))
    elif folder.exists() and not overwrite:
        problems.append(
            Problem("it is there already", "a new folder", "add --overwrite, or choose another", file=folder)
        )
    if archive is not None and archive.exists() and not overwrite:
        problems.append(
            Problem("it is there already", "a new file", "add --overwrite, or choose another", file=archive)
        )
    if problems:
        raise InvalidInput(problems)


def _write_folder(
    folder: Path, source: ModelSource, networks: dict[str, SingleNetwork], plans_name: str, on_fold: OnFold | None
) -> None:
    (model,) = source.members
    write_json(folder / PLANS_FILE, nnunet_plans(model, networks[model.folds[0]], plans_name))
    write_json(folder / DESCRIPTION_FILE, nnunet_description(model))
    for done, fold in enumerate(model.folds):
        if on_fold is not None:
            on_fold(fold, done, len(model.folds))
        (folder / f"fold_{fold}").mkdir()
        content = _checkpoint(model, fold, networks[fold])
        torch.save(content, folder / f"fold_{fold}" / CHECKPOINT_FINAL)
    if source.plan.postprocessing:
        schema = model.schema
        rules = PostprocessingPlan(
            rules=source.plan.postprocessing,
            labels=dict(schema.names),
            regions_class_order=schema.regions_class_order,
            written=Written.now(),
        )
        write_postprocessing(folder / POSTPROCESSING_FILE, rules)
    write_json(folder / RECORD_FILE, _record(source, networks))


def _checkpoint(model: TrainedModel, fold: str, network: SingleNetwork) -> dict[str, Any]:
    return {
        "network_weights": nnunet_state(model.checkpoint(fold), network, model.plan.n_channels, model.schema.n_outputs),
        "trainer_name": TRAINER,
        "init_args": {"configuration": model.run.configuration},
        "inference_allowed_mirroring_axes": model.plan.mirror_axes or None,  # nnU-Net stops at an empty one
    }


def _record(source: ModelSource, networks: dict[str, SingleNetwork]) -> dict[str, Any]:
    """autossl.json; nnU-Net does not read it."""
    (model,) = source.members
    run = model.run
    return {
        "tested_with": f"nnunetv2 {TESTED_VERSION}",
        "preset": run.preset,
        "method": run.method,
        "tag": run.tag,
        "seed": run.seed,
        "split": run.split,
        "total_steps": run.total_steps,
        "labels": source.plan.labels.model_dump(mode="json"),
        "networks": {fold: network.member.name for fold, network in networks.items()},
        "written": Written.now().model_dump(mode="json"),
    }


def _notes(model: TrainedModel, networks: dict[str, SingleNetwork]) -> list[str]:
    first = networks[model.folds[0]]
    notes = []
    if not NNUNET_DATASET.match(model.run.dataset):
        notes.append(f"nnU-Net finds no dataset of the name {model.run.dataset}; use nnUNetv2_predict_from_modelfolder")
    if first.activation == "dirichlet":
        notes.append("label maps agree; nnU-Net's probabilities are the softmax of what here is evidence")
    if any(network.member.channels is not None for network in networks.values()):
        notes.append("the network heeds some of the channels; nnU-Net needs the files of all, as autossl_predict does")
    return notes


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
