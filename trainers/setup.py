"""From what was asked for to a run that can start: every check before anything is written."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from autossl.data.description import DatasetDescription
from autossl.data.labels import LabelSchema
from autossl.data.parallel import usable_cpus
from autossl.data.problems import InvalidInput, Problem
from autossl.data.raw_dataset import Case, RawDataset, read_raw_dataset
from autossl.data.runs import RunSpec, run_folder, tag_for
from autossl.data.splits import Fold, Split, fold_cases, load_or_make_split, split_cases
from autossl.data.store import CaseStore
from autossl.data.workspace import Workspace
from autossl.networks.build import build_network
from autossl.planners.budget import BudgetStatistics, budget_statistics
from autossl.planners.fingerprint import Fingerprint, read_fingerprint
from autossl.planners.foreground import foreground_intensities
from autossl.planners.grown import read_basis
from autossl.planners.plan_and_preprocess import FINGERPRINT, Progress, find_plans, plans_file, preprocess_planned
from autossl.planners.plans import Architecture, ConfigurationPlan, Plans
from autossl.planners.semi_supervised import ema_decay_max
from autossl.trainers.base import Job, MethodSettings, SemiSupervisedTrainer
from autossl.trainers.batches import LabeledCase, Streams, UnlabeledCase
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
            seed=self.request.seed,
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
    _check_numbers(request)
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
    _check_planned_since(raw, fingerprint, plans)
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
    _check_needs(setup)
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


def resolve_device(name: str) -> str:
    """ "auto" takes CUDA, else Apple's GPU, else the CPU; a named device must exist."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (index.isdigit() or not index) and available.get(kind, 0) > int(index or 0):
        return name
    there = ", ".join(f"{kind} ({count})" for kind, count in available.items() if count)
    found = f"device '{name}' does not exist here"
    raise InvalidInput(Problem(found, f"auto or one of: {there}", "choose one of these"))


def _check_numbers(request: TrainRequest) -> None:
    problems = []
    if request.steps is not None and request.hours is not None:
        problems.append(Problem("--steps and --hours together", "one of them", "leave one out"))
    if request.steps is not None and request.steps < 1:
        problems.append(Problem(f"--steps {request.steps}", "at least 1", "give a positive number"))
    if request.budget_kind == "deployment" and request.labeled is None:
        problems.append(Problem("--deployment without a budget", "--labeled N beside it", "give the number of labels"))
    if request.hours is not None and request.hours <= 0:
        problems.append(Problem(f"--hours {request.hours}", "more than 0", "give a positive number"))
    if request.num_workers is not None and not 0 <= request.num_workers <= 256:
        problems.append(Problem(f"--num_workers {request.num_workers}", "0 to 256", "give a number in this range"))
    if not request.folds:
        problems.append(Problem("no fold", "fold numbers, all_folds or all", "name at least one"))
    if "all_folds" in request.folds and len(request.folds) > 1:
        problems.append(Problem("all_folds beside other folds", "all_folds alone", "leave the others out"))
    if request.resume and request.overwrite:
        problems.append(Problem("--resume and --overwrite together", "one of them", "leave one out"))
    if request.initial_weights is not None and not request.initial_weights.exists():
        expected = "a checkpoint, or the folder of a run"
        problems.append(Problem("--init names no file", expected, "check the path", file=request.initial_weights))
    if problems:
        raise InvalidInput(problems)


def _check_needs(setup: RunSetup) -> None:
    needs, plan, name = setup.method.needs, setup.configuration, setup.method.name
    problems = []
    if plan.dims not in needs.dims:
        dims = " or ".join(f"{d}D" for d in needs.dims)
        problems.append(
            Problem(
                f"{setup.request.configuration} is {plan.dims}D", f"{dims}, which {name} needs", "choose another method"
            )
        )
    if needs.softmax_only and setup.schema.has_regions:
        problems.append(Problem("the labels are regions", f"plain labels, which {name} needs", "choose another method"))
    if needs.modalities > plan.n_channels:
        problems.append(
            Problem(
                f"the images have {plan.n_channels} channel(s)",
                f"at least {needs.modalities}, which {name} needs",
                "choose another method",
            )
        )
    levels = len(plan.architecture.cumulative_strides) - 1
    if needs.levels > levels:
        problems.append(
            Problem(
                f"the plan's network has {levels} level(s) of deep supervision",
                f"at least {needs.levels}, which {name} needs",
                "choose another method, or a plan with a larger patch",
            )
        )
    if setup.method.needs_initial_weights(setup.settings) and setup.request.initial_weights is None:
        found = f"these settings of {name} begin with a trained network"
        fix = "name a trained run with --init, or leave out the setting"
        problems.append(Problem(found, "its weights", fix))
    for fold, cases in setup.folds.items():
        if not cases.labeled:
            problems.append(
                Problem(f"fold {fold} has no labeled training case", "at least one", "choose another fold or budget")
            )
    if not problems:  # the same for all folds, or of one: said once
        refused = [setup.method.refusals(setup.job(fold, 1), setup.settings) for fold in setup.folds]
        problems = list({str(problem): problem for of_fold in refused for problem in of_fold}.values())
    if problems:
        raise InvalidInput(problems)


def _check_planned_since(raw: RawDataset, fingerprint: Fingerprint, plans: Plans) -> None:
    """Raises where labels came after the data set was planned: nothing is known of them yet."""
    known = fingerprint.of_pool("labeled")
    new = [case.id for case in raw.labeled if case.id not in known]
    if new:
        shown = ", ".join(new[:5]) + (f" and {len(new) - 5} more" if len(new) > 5 else "")
        raise InvalidInput(
            Problem(
                f"{len(new)} labeled cases came after {raw.name} was planned: {shown}",
                "a fingerprint that knows them",
                f"run autossl_plan_and_preprocess -d {raw.name} --preset {plans.preset}: it adds what is new",
            )
        )


def provide_cases(setup: RunSetup, on_progress: Progress | None = None) -> None:
    """Makes sure that all cases are preprocessed with the run's plans.

    Only a budget split on CT has numbers of its own and is preprocessed here; else what is missing is an error.

    Raises:
        InvalidInput: cases that autossl_plan_and_preprocess has not made.
    """
    folder, configuration = setup.workspace.preprocessed_folder(setup.raw.name), setup.request.configuration
    if setup.plans.data_hash(configuration) != find_plans(folder, setup.plans.preset).data_hash(configuration):
        logger.info("%s: CT is preprocessed with the intensities of its own labeled cases", setup.split.name)
        wanted = (configuration,)
        preprocess_planned(setup.raw, setup.fingerprint, setup.plans, wanted, folder, on_progress=on_progress)
    _check_preprocessed(setup)


def _check_preprocessed(setup: RunSetup) -> None:
    wanted = {case: True for cases in setup.folds.values() for case in (*cases.labeled, *cases.validation)}
    wanted = {case: False for cases in setup.folds.values() for case in cases.unlabeled} | wanted
    missing = sorted(case for case, labeled in wanted.items() if not setup.store.has(case, labeled))
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        configuration = setup.request.configuration
        command = f"autossl_plan_and_preprocess -d {setup.raw.name} --preset {setup.plans.preset}"
        raise InvalidInput(
            Problem(
                f"{len(missing)} of {len(wanted)} cases are not preprocessed for {configuration}: {shown}",
                f"all of them in {setup.store.folder}",
                f"run {command} -c {configuration}",
            )
        )
    _check_undamaged(setup, wanted)


def _check_undamaged(setup: RunSetup, wanted: Mapping[str, bool]) -> None:
    """Reads all that the folds will use and compares it with its checksums; the reading also fills the disk cache."""

    def damages(case: str) -> dict[Path, str]:
        return setup.store.damaged(case, wanted[case])

    with ThreadPoolExecutor(usable_cpus()) as threads:
        found = [item for of_case in threads.map(damages, sorted(wanted)) for item in of_case.items()]
    command = f"autossl_plan_and_preprocess -d {setup.raw.name} --preset {setup.plans.preset}"
    fix = f"run {command} -c {setup.request.configuration}: it makes what is damaged again"
    if found:
        expected = "a preprocessed file as it was written"
        raise InvalidInput([Problem(damage, expected, fix, file=path) for path, damage in found])
