"""From what was asked for to a run that can start: every check before anything is written."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from autossl.data.description import DatasetDescription
from autossl.data.labels import LabelSchema
from autossl.data.raw_dataset import Case, RawDataset, read_raw_dataset
from autossl.data.runs import RunSpec, run_folder, tag_for
from autossl.data.splits import Fold, Split, fold_cases, load_or_make_split, split_cases
from autossl.data.store import CaseStore
from autossl.data.workspace import Workspace
from autossl.networks.build import build_network
from autossl.networks.device import resolve_device
from autossl.planners.budget import BudgetStatistics, budget_statistics
from autossl.planners.fingerprint import Fingerprint, read_fingerprint
from autossl.planners.foreground import foreground_intensities
from autossl.planners.grown import read_basis
from autossl.planners.plan_and_preprocess import FINGERPRINT, find_plans, plans_file
from autossl.planners.plans import Architecture, ConfigurationPlan, Plans
from autossl.planners.semi_supervised import ema_decay_max
from autossl.trainers.base import Job, MethodSettings, SemiSupervisedTrainer, derive_seed
from autossl.trainers.batches import LabeledCase, Streams, UnlabeledCase
from autossl.trainers.checks import check_needs, check_numbers, check_planned_since
from autossl.trainers.compiling import CompileChoice
from autossl.trainers.components.losses import SupervisedLoss
from autossl.trainers.initial_weights import initial_identity
from autossl.trainers.memory_plan import MemoryPlan
from autossl.trainers.registry import make_settings, method_class
from autossl.version import __version__

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainRequest:
    """What `autossl_train` is asked for; None leaves a decision to the plan."""

    dataset: str
    configuration: str
    folds: tuple[str, ...]
    """Fold numbers, "all" (train on everything), or "all_folds" alone."""
    method: str = "supervised"
    workspace: Path | None = None
    preset: str | None = None
    steps: int | None = None
    hours: float | None = None
    """For all folds of this call together."""
    labeled: str | None = None
    """Budget: cases, or a fraction with a point."""
    draw: int = 0
    budget_kind: Literal["benchmark", "deployment"] = "benchmark"
    """What the budget means; see `autossl.data.splits`."""
    seed: int = 0
    device: str = "auto"
    settings: Mapping[str, str] = field(default_factory=dict)
    tag: str | None = None
    initial_weights: Path | None = None
    """A checkpoint, or the folder of a run: each fold then starts from the same fold of that run."""
    resume: bool = False
    overwrite: bool = False
    num_workers: int | None = None
    compile: str | None = None
    """One of `COMPILE`; None: as the run began, off for a new one."""
    deterministic: bool = False
    """On CUDA: only operations that give the same bits every time."""
    save_probabilities: bool = False
    """Of the validation cases, beside their label maps; also of folds that are finished."""


@dataclass(frozen=True)
class RunSetup:
    """A resolved request."""

    request: TrainRequest
    workspace: Workspace
    raw: RawDataset
    description: DatasetDescription
    fingerprint: Fingerprint
    plans: Plans
    split: Split
    method: type[SemiSupervisedTrainer]
    settings: MethodSettings
    folds: dict[str, Fold]
    device: str
    memory: MemoryPlan | None = None
    """What the method's memory asks for; None: not decided yet."""
    compile: CompileChoice | None = None
    """Whether networks are compiled; None: not decided yet."""

    @property
    def unlabeled_batch_size(self) -> int:
        """The plan's, or less where the device is too small for the method."""
        return self.memory.unlabeled_batch_size if self.memory else self.configuration.unlabeled_batch_size

    @property
    def configuration(self) -> ConfigurationPlan:
        """The plan of the chosen configuration."""
        return self.plans.configuration(self.request.configuration)

    @cached_property
    def schema(self) -> LabelSchema:
        """Of the dataset."""
        return self.description.label_schema()

    @property
    def store(self) -> CaseStore:
        """The preprocessed cases."""
        folder = self.workspace.preprocessed_folder(self.raw.name)
        return CaseStore(folder / "data" / self.plans.data_hash(self.request.configuration))

    @cached_property
    def _cases(self) -> dict[str, Case]:
        return {case.id: case for case in self.raw.cases}

    @property
    def label_folder(self) -> Path:
        """Raw labels; read after training, for the validation cases only."""
        return self.raw.folder / "labelsTr"

    def with_cases_of(self, spec: RunSpec) -> RunSetup:
        """The same setup with the cases that the run's folds were started with."""
        return replace(self, folds={fold: spec.folds[fold] for fold in self.folds})

    # --------------------------------------------------------------------------------------------------- one fold

    def statistics(self, fold: str) -> BudgetStatistics:
        """Class statistics of the fold's labeled training cases alone."""
        return budget_statistics(self.fingerprint, list(self.folds[fold].labeled), self.schema)

    def job(self, fold: str, total_steps: int) -> Job:
        """What the method may know of this fold."""
        plan, cases, semi = self.configuration, self.folds[fold], self.plans.semi_supervised
        statistics = self.statistics(fold)
        return Job(
            configuration=plan,
            schema=self.schema,
            n_labeled=len(cases.labeled),
            n_unlabeled=len(cases.unlabeled),
            total_steps=total_steps,
            seed=derive_seed(self.request.seed, "fold", fold),
            labeled_batch_size=plan.labeled_batch_size,
            unlabeled_batch_size=self.unlabeled_batch_size,
            ema_decay_max=ema_decay_max(total_steps),
            warm_up_fraction=semi.warm_up_fraction,
            channel_std=channel_stds(self.plans, plan),
            supervised_loss=SupervisedLoss(
                regions=self.schema.has_regions,
                batch_dice=plan.batch_dice,
                has_ignore=self.schema.ignore_label is not None,
            ),
            single_component_classes=statistics.single_component_classes,
            elliptic_classes=statistics.elliptic_classes,
            network_builder=NetworkBuilder(plan, self.schema.n_outputs),
            named_channels=self.description.channels,
            median_case_shape=median_case_shape(self.plans, plan),
            attribute_values=self._attribute_values(cases),
        )

    def _attributes(self, case: str) -> dict[str, str]:
        return {"patient": self._cases[case].patient, **self._cases[case].attributes}

    def _attribute_values(self, fold: Fold) -> dict[str, int]:
        """Different values of each attribute among the fold's training cases; blanks do not count."""
        rows = [self._attributes(case) for case in (*fold.labeled, *fold.unlabeled)]
        names = sorted({name for row in rows for name in row})
        return {name: len({row.get(name, "").strip() for row in rows} - {""}) for name in names}

    def streams(self, fold: str) -> Streams:
        """Paths of what the fold may see: no label path of an unlabeled case exists in here."""
        cases, masked = self.folds[fold], any(self.configuration.use_mask_for_norm)

        def nonzero(case: str) -> Path | None:
            return self.store.nonzero_path(case) if masked else None

        return Streams(
            labeled=tuple(
                LabeledCase(
                    id=case,
                    image=self.store.image_path(case),
                    label=self.store.label_path(case),
                    locations=self.store.locations_path(case),
                    nonzero=nonzero(case),
                    attributes=self._attributes(case),
                )
                for case in cases.labeled
            ),
            unlabeled=tuple(
                UnlabeledCase(case, self.store.image_path(case), nonzero(case), self._attributes(case))
                for case in cases.unlabeled
            ),
        )

    def spec(self, total_steps: int) -> RunSpec:
        """The whole specification of the run, for run.json."""
        request, plan = self.request, self.configuration
        settings = self.settings.model_dump(mode="json")
        defaults = type(self.settings)().model_dump(mode="json")
        changed = {key: value for key, value in settings.items() if value != defaults[key]}
        initial = request.initial_weights
        return RunSpec(
            dataset=self.raw.name,
            split=self.split.name,
            configuration=request.configuration,
            preset=self.plans.preset,
            method=self.method.name,
            tag=request.tag or tag_for(changed),
            seed=request.seed,
            plans_hash=self.plans.hash(),
            settings=settings,
            changed_settings=changed,
            total_steps=total_steps,
            labeled_batch_size=plan.labeled_batch_size,
            unlabeled_batch_size=self.unlabeled_batch_size,
            initial_weights=initial_identity(initial) if initial is not None else None,
            folds=self.folds,
            memory=self.memory.to_json() if self.memory else {},
            compile=self.compile.to_json() if self.compile else {},
            fold_facts={fold: self.statistics(fold).model_dump(mode="json") for fold in self.folds},
            threads=torch.get_num_threads(),
            device=self.device,
            deterministic=request.deterministic,
            versions={"autossl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        )

    def folder(self, spec: RunSpec) -> Path:
        """The run's folder."""
        return run_folder(self.workspace, spec)


@dataclass(frozen=True)
class NetworkBuilder:
    """Builds networks of a plan, or of the other architecture with the same stages."""

    plan: ConfigurationPlan
    n_outputs: int

    def __call__(
        self,
        seed: int,
        architecture: Architecture | None = None,
        in_channels: int | None = None,
        out_channels: int | None = None,
    ) -> torch.nn.Module:
        """A freshly initialized network in training mode, with deep supervision."""
        return build_network(
            architecture or self.plan.architecture,
            in_channels or self.plan.n_channels,
            out_channels or self.n_outputs,
            seed=seed,
        )


def median_case_shape(plans: Plans, plan: ConfigurationPlan) -> tuple[float, float, float]:
    """Voxels of the median stored case, slices first; in 2D these are not resampled, so their number is the image's."""
    slices, rows, columns = (float(plans.original_median_shape_after_transp[0]), *plan.median_image_size_in_voxels)[-3:]
    return slices, rows, columns


def channel_stds(plans: Plans, plan: ConfigurationPlan) -> tuple[float, ...]:
    """Standard deviation of each channel after normalization; 1 for schemes that make it so."""
    stds = []
    for index, scheme in enumerate(plan.normalization_schemes):
        found = plans.foreground_intensity_properties_per_channel.get(str(index))
        scale = 1.0
        if found is not None and scheme == "NoNormalization":
            scale = found.std
        elif found is not None and scheme == "RGBTo01Normalization":
            scale = found.std / 255
        elif found is not None and scheme == "RescaleTo01Normalization":
            scale = found.std / max(found.max - found.min, 1e-8)
        stds.append(scale)
    return tuple(stds)


def resolve(request: TrainRequest) -> RunSetup:
    """Looks up and checks everything that the request names; writes nothing but a split that is drawn the first time.

    Raises:
        InvalidInput: unknown dataset, configuration, preset, method, setting, fold or device; a budget that cannot be
            met; plans of another dataset.
    """
    check_numbers(request)
    workspace = Workspace.locate(request.workspace)
    dataset = workspace.find_dataset(request.dataset)
    folder = workspace.preprocessed_folder(dataset)
    plans = find_plans(folder, request.preset)
    _tell_changed_plans(folder, plans)
    plans.configuration(request.configuration)
    method = method_class(request.method)
    settings = make_settings(method, dict(request.settings))
    device = resolve_device(request.device)
    raw = read_raw_dataset(workspace.raw_folder(dataset))
    fingerprint = read_fingerprint(folder / FINGERPRINT)
    check_planned_since(raw, fingerprint, plans)
    split = load_or_make_split(
        folder,
        split_cases(raw),
        request.labeled,
        request.draw,
        request.budget_kind,
        duplicates=fingerprint.duplicates,
    )
    names = [str(n) for n in range(len(split.folds))] if request.folds == ("all_folds",) else list(request.folds)
    folds = {name: fold_cases(split, name) for name in names}
    plans = with_intensities_of(plans, split, folder)
    setup = RunSetup(
        request, workspace, raw, raw.description, fingerprint, plans, split, method, settings, folds, device
    )
    check_needs(setup)
    return setup


def with_intensities_of(plans: Plans, split: Split, preprocessed_folder: Path) -> Plans:
    """Plans for a budget split: CT is normalized by the foreground of the split's own labeled training cases.

    The numbers are those of all folds together, because a run has one plan. Other schemes look at no label, and the
    default split has all labels: there the plans stay as they are.
    """
    schemes = {scheme for plan in plans.configurations.values() for scheme in plan.normalization_schemes}
    if split.kind == "default" or "CTNormalization" not in schemes:
        return plans
    labeled = sorted({case for fold in split.folds for case in fold.labeled})
    found = foreground_intensities(preprocessed_folder, labeled)
    reason = f"foreground of the {len(labeled)} cases that split {split.name} trains on with labels, no others"
    return plans.model_copy(
        update={
            "foreground_intensity_properties_per_channel": found,
            "why": {**plans.why, "foreground_intensity_properties_per_channel": reason},
        }
    )


def _tell_changed_plans(folder: Path, plans: Plans) -> None:
    """Says where plans are not what was planned: an edit by hand is allowed, damage looks like one."""
    path = plans_file(folder, plans.preset)
    basis = read_basis(path)
    if basis is not None and basis.of(plans).plans_hash != plans.hash():
        logger.warning(
            "%s is not as it was planned: edited by hand, or damaged. autossl_plan_and_preprocess makes it anew, keeps "
            "this one beside it and says what differs",
            path,
        )
