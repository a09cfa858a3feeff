"""What a semi-supervised trainer class is: it says what a step computes, and touches no file, device or loop.

The training loop (`autossl.trainers.loop`) decides when and where. A method is built from a `Job`, hands over its
`Parts`, asks for batches with `request`, and turns each batch into named losses. Everything else has a default.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from autossl.data.channels import ImageChannels
from autossl.data.labels import LabelSchema
from autossl.data.problems import Problem
from autossl.networks.prediction import Member, PredictionSpec
from autossl.planners.plans import ConfigurationPlan
from autossl.trainers.components.losses import SupervisedLoss


def derive_seed(*parts: int | str) -> int:
    """One 63-bit seed from any parts, such as (seed, rank, stream, step, sample); the same on every platform."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# ---------------------------------------------------------------------------------------------------------- progress


@dataclass(frozen=True)
class Progress:
    """Where a run is. Every schedule is a function of this, so that a resumed run equals an unbroken one."""

    step: int
    """From 0, over all phases."""
    total: int
    """Steps of the whole run, over all phases and rounds."""
    phase: str = "train"
    phase_start: int = 0
    phase_end: int = 0
    pool_passes: float = 0.0
    """How often the unlabeled pool has been gone through: unlabeled patches drawn so far / unlabeled cases."""
    seed: int = 0
    rank: int = 0

    @property
    def fraction(self) -> float:
        """r = step / total, in [0, 1]."""
        return self.step / max(1, self.total)

    @property
    def phase_fraction(self) -> float:
        """The same within the phase."""
        return (self.step - self.phase_start) / max(1, self.phase_end - self.phase_start)

    def generator(self, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator that depends on (seed, rank, stream, step) alone; for every draw that a method makes."""
        return torch.Generator(device=device).manual_seed(derive_seed(self.seed, self.rank, stream, self.step))


# ----------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class StreamRequest:
    """What a step wants of one stream."""

    count: int
    """Patches; 0 gives none."""
    views: int = 1
    """Independently augmented versions of each patch."""
    shared_geometry: bool = True
    """True: the views of a patch differ in intensity only, so that voxels correspond."""
    sampler: Literal["foreground", "uniform", "pseudo_foreground"] = "uniform"
    """foreground: nnU-Net's oversampling (labeled only); pseudo_foreground: the same, guided by the named store."""
    store: str | None = None
    """Name of the pseudo-label store whose label maps and confidences come along with the patches."""
    includes_labeled: bool = False
    """Patches of labeled cases as well, as if they had no label (unlabeled stream only)."""
    unmirrored_axes: tuple[int, ...] = ()
    """Axes of the patch (0 = first) that are not mirrored, though the plan mirrors them."""


@dataclass(frozen=True)
class BatchRequest:
    """What a step wants to see."""

    labeled: StreamRequest
    unlabeled: StreamRequest


@dataclass
class StreamBatch:
    """Patches of one stream. B patches, Ci channels, spatial grid S (2 or 3 axes, transposed order).

    Per-view tuples have one entry per view; with shared geometry the entries after the first are the same tensors.
    """

    views: tuple[Tensor, ...]
    """Images, float32 [B, Ci, *S] each."""
    valids: tuple[Tensor, ...]
    """Boolean [B, 1, *S]: labeled, not the ignore label; unlabeled, inside the image."""
    case_ids: tuple[str, ...]
    centers: Tensor
    """Patch centers relative to the case, float32 [B, 3], 0..1 along each axis of the stored case."""
    targets: tuple[Tensor, ...] | None = None
    """Full-resolution targets: int64 [B, 1, *S], or float32 0/1 [B, C, *S] for regions. None where unlabeled."""
    pseudo_labels: tuple[Tensor, ...] | None = None
    """From the requested store: like `targets`."""
    pseudo_confidences: tuple[Tensor, ...] | None = None
    """From the requested store: float32 [B, 1, *S] in 0..1."""
    pseudo_weights: Tensor | None = None
    """From the requested store: float32 [B], what a patch of this case counts."""
    signed_distances: Tensor | None = None
    """Float32 [B, F, *S] in -1..1 of the first view, where the method's `needs` ask for them."""
    attributes: tuple[Mapping[str, str], ...] = ()
    """Per patch: patient, phase, site, … from cases.csv."""
    has_channel: Tensor | None = None
    """Boolean [B, Ci]: which channels the case really has; a channel of one value throughout is none. None: all."""

    @property
    def image(self) -> Tensor:
        """The first view."""
        return self.views[0]

    @property
    def weak(self) -> Tensor:
        """The first view, by the name that methods with a strong view use."""
        return self.views[0]

    @property
    def second(self) -> Tensor:
        """The second view."""
        return self.views[1]

    @property
    def valid(self) -> Tensor:
        """Valid voxels of the first view."""
        return self.valids[0]

    @property
    def target(self) -> Tensor:
        """Target of the first view; raises where there is none."""
        if self.targets is None:
            raise ValueError("this stream has no targets: it is unlabeled")
        return self.targets[0]

    def __len__(self) -> int:
        return len(self.case_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StreamBatch:
        """The same batch with its tensors on the device."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            return tuple(move(entry) for entry in value) if isinstance(value, tuple) else value

        return replace(self, **{name: move(value) for name, value in vars(self).items()})


@dataclass
class Batch:
    """What a step sees; a stream is None where nothing of it was requested or there is none."""

    labeled: StreamBatch
    unlabeled: StreamBatch | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on the device."""
        moved = self.unlabeled.to(device, non_blocking) if self.unlabeled is not None else None
        return Batch(self.labeled.to(device, non_blocking), moved)


# ------------------------------------------------------------------------------------------------- parts and phases


@dataclass
class Parts:
    """What a method consists of. All of it is in every checkpoint; only `trained` gets gradients."""

    trained: dict[str, nn.Module]
    followers: dict[str, nn.Module] = field(default_factory=dict)
    """Copies that follow a trained part, such as EMA teachers: saved, never optimized."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Banks, moments, counters: modules with buffers only, tensors, numbers, strings and lists of them."""


def poly_over_run(at: Progress) -> float:
    """(1 - r) ** 0.9, nnU-Net's schedule over the whole run."""
    return float((1 - at.fraction) ** 0.9)


def poly_over_phase(at: Progress) -> float:
    """The same, starting again in each phase."""
    return float((1 - at.phase_fraction) ** 0.9)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters whose dotted name in `Parts.trained` starts with the prefix, and how they are optimized.

    Defaults are nnU-Net's: SGD with Nesterov momentum, weight decay 3e-5, gradient norm clipped at 12.
    """

    prefix: str
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float | None = None
    """At the start; None: the plan's, which is meant for SGD: adamw needs one of its own."""
    weight_decay: float = 3e-5
    factor: Callable[[Progress], float] = poly_over_run
    """The rate at a step is learning_rate × factor(at)."""
    clip: float | None = 12.0
    """The gradient norm of this group is clipped at this value; None: not at all."""

    def __post_init__(self) -> None:
        if self.optimizer == "adamw" and self.learning_rate is None:
            raise ValueError(f"group '{self.prefix}': adamw takes a learning rate of its own, the plan's is for SGD")


@dataclass(frozen=True)
class PseudoLabelRules:
    """Which pseudo-labels of a refresh are used. Without rules all of them are, with their plain confidence."""

    kept_share: float
    """Share of the voxels predicted as a class, over all unlabeled cases, that keep their label."""
    smallest_threshold: float = 0.5
    """No confidence below this is kept, whatever the share asks for."""
    reliable_share: float = 1.0
    """Share of the cases that is used, the most stable ones."""
    plausibility: bool = True
    """Largest components of single-component classes only; cases with missing classes or odd volumes are rejected."""
    voxel_filter: Literal["ignore", "weight"] = "ignore"
    """ignore: confidence 0 below the threshold of the class; weight: no threshold, the confidence is a soft weight."""
    stop_agreement: float | None = None
    """The run ends at the refresh where its pseudo-labels agree better than this (mean Dice) with those of the refresh
    before, or where no case can be used. None: it never ends before its last step."""


@dataclass(frozen=True)
class Refresh:
    """At a fraction of the run the loop predicts all unlabeled cases with a part, into the named store.

    Refreshes at the first step of a phase come before it is entered: they see the weights that the phase before left.
    """

    at: float | None
    """Fraction of the run; None: when the phase begins."""
    part: str
    store: str
    stability_parts: tuple[str, ...] = ()
    """With rules: a case is stable where these parts predict the same; none: where mirroring changes nothing."""
    rules: PseudoLabelRules | None = None
    mirrored: bool = True
    """Predict with mirroring. Without it is as many times faster: enough where the store only guides crops."""


@dataclass(frozen=True)
class Phase:
    """A stretch of the run. Shares are normalized over the phases; borders fall on whole steps."""

    name: str
    share: float = 1.0
    groups: tuple[ParameterGroup, ...] | None = None
    """None: one default group per trained part. Equal groups in consecutive phases keep their optimizer state."""
    reinitialize: tuple[str, ...] = ()
    """Trained parts that get fresh weights (and optimizer state) when the phase begins."""
    refreshes: tuple[Refresh, ...] = ()


@dataclass
class StepOutput:
    """What a step gives back: weighted loss terms to be added, and detached values to be logged."""

    losses: dict[str, Tensor]
    measures: dict[str, Tensor | float] = field(default_factory=dict)
    trains: tuple[str, ...] | None = None
    """Trained parts that take an optimizer step now; None: all that got a gradient."""


# ---------------------------------------------------------------------------------------------------------- settings


class MethodSettings(BaseModel):
    """Base of every method's `Settings`: frozen, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def setting(default: Any, meaning: str, source: str, **limits: Any) -> Any:
    """A field of `Settings`: its default, what it means, where the default comes from, and pydantic's limits."""
    return Field(default, description=meaning, json_schema_extra={"source": source}, **limits)


@dataclass(frozen=True)
class Needs:
    """What a method asks of loader, planner and data set."""

    networks: int = 1
    teacher: bool = False
    views: int = 1
    strong_view: bool = False
    modalities: int = 1
    meta_labels: bool = False
    signed_distance: bool = False
    levels: int = 1
    """Resolutions of deep supervision that the plan's network must have."""
    softmax_only: bool = False
    dims: tuple[int, ...] = (2, 3)


# --------------------------------------------------------------------------------------------------------- the class


@dataclass(frozen=True)
class Job:
    """All that a method may know of its task: numbers, the label schema, and how to build networks. No paths."""

    configuration: ConfigurationPlan
    schema: LabelSchema
    n_labeled: int
    n_unlabeled: int
    total_steps: int
    seed: int
    """Of the run and the fold: folds that began with the same weights would succeed or fail together, and a verdict
    could not see from them how much trainings differ (measured: 20 short trainings that differ in the seed alone,
    standard deviation 15 points of Dice between runs and 3 between the folds of a run)."""
    labeled_batch_size: int
    unlabeled_batch_size: int
    ema_decay_max: float
    warm_up_fraction: float
    channel_std: tuple[float, ...]
    """Standard deviation of each normalized channel: the unit of noise and intensity shifts."""
    supervised_loss: SupervisedLoss
    single_component_classes: tuple[int, ...] = ()
    elliptic_classes: tuple[int, ...] = ()
    network_builder: Callable[..., nn.Module] | None = None
    named_channels: ImageChannels | None = None
    median_case_shape: tuple[float, float, float] | None = None
    """Voxels of the median case at the plan's spacing, slices first also in 2D; None: not known."""
    attribute_values: Mapping[str, int] = field(default_factory=dict)
    """How many different values the training cases have of each attribute: patient, and the columns of cases.csv."""

    @property
    def has_unlabeled(self) -> bool:
        """False: a method trains its labeled-only objective."""
        return self.n_unlabeled > 0

    @property
    def channels(self) -> ImageChannels:
        """The image channels by name; by number where they have none."""
        return self.named_channels or ImageChannels.numbered(self.configuration.n_channels)

    def build_network(self, stream: str = "network", **options: Any) -> nn.Module:
        """A network of the plan with deep supervision; `stream` names its initialization draw.

        Options: `architecture` ("plain" | "resenc" | an Architecture), `in_channels`, `out_channels`.
        """
        if self.network_builder is None:
            raise ValueError("this job has no network builder")
        return self.network_builder(seed=derive_seed(self.seed, stream), **options)

    def probabilities(self, z: Tensor) -> Tensor:
        """Float32 probabilities of full-resolution logits [N, C, *S]: softmax, or sigmoid for regions."""
        return torch.sigmoid(z.float()) if self.schema.has_regions else torch.softmax(z.float(), 1)

    def single_network_prediction(self, name: str, channels: tuple[int, ...] | None = None) -> PredictionSpec:
        """The prediction of one network of the plan's own architecture, as most methods deploy it.

        `channels`: those that it sees, in its order; None: all.
        """
        member = Member(name=name, architecture=self.configuration.architecture, channels=channels)
        activation: Literal["sigmoid", "softmax"] = "sigmoid" if self.schema.has_regions else "softmax"
        return PredictionSpec(members=(member,), activation=activation, combine="single")


class SemiSupervisedTrainer:
    """One method. Subclasses define the attributes, `build`, `losses` and `prediction`; the rest has defaults."""

    name: ClassVar[str]
    title: ClassVar[str]
    citation: ClassVar[str]
    needs: ClassVar[Needs] = Needs()
    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    reduces_to_supervised: ClassVar[bool] = False
    """True: without unlabeled cases the run is bit for bit that of `supervised`."""
    unsupervised_weights: ClassVar[tuple[str, ...]] = ()
    """Settings that weigh what a step adds to its supervised loss: with all of them 0 nothing of it is left."""
    changes_supervised: ClassVar[bool] = False
    """True: the supervised terms are not those of `supervised` (mixed images, further decoders), so that weights of 0
    do not give the twin. False: with the weights 0, and `reduces_to_supervised`, a step is the twin's bit for bit."""
    ablation: ClassVar[Mapping[str, str]] = {}
    """Settings that switch off what makes the method itself, as text: the row beside it in a comparison."""

    def __init__(self, job: Job, settings: MethodSettings) -> None:
        self.job = job
        self.settings = settings
        self.parts = self.build()

    @classmethod
    def refusals(cls, job: Job, settings: MethodSettings) -> list[Problem]:
        """What this task lacks, beyond `needs`, with the setting that overrides it where one exists; none: it runs.

        Asked before any work and for each fold. Looks at the task and the settings alone, and builds nothing.
        """
        return []

    @classmethod
    def total_steps(cls, steps: int, settings: MethodSettings) -> int:
        """Steps of the whole run where `steps` were asked for or planned; more only where a setting asks for it."""
        return steps

    @classmethod
    def needs_initial_weights(cls, settings: MethodSettings) -> bool:
        """Whether these settings begin with a trained network: --init must name one that fits with all weights."""
        return False

    def build(self) -> Parts:
        """Networks, followers and memory, on the CPU; the loop moves them."""
        raise NotImplementedError(f"{type(self).__name__} must say what it consists of")

    def phases(self) -> list[Phase]:
        """The stretches of the run, in order."""
        return [Phase("train")]

    def request(self, at: Progress) -> BatchRequest:
        """What the step wants to see; a pure function of `at`, also called ahead of time."""
        unlabeled = self.job.unlabeled_batch_size if self.job.has_unlabeled else 0
        return BatchRequest(
            labeled=StreamRequest(self.job.labeled_batch_size, sampler="foreground"),
            unlabeled=StreamRequest(unlabeled, views=self.needs.views),
        )

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        """The weighted loss terms of a step."""
        raise NotImplementedError(f"{type(self).__name__} must say what a step computes")

    def after_step(self, at: Progress) -> None:
        """Called after each optimizer step that was taken; followers are updated here."""

    def on_phase(self, phase: Phase, at: Progress) -> None:
        """Called before the first step of each phase."""

    def prediction(self) -> PredictionSpec:
        """Which parts predict, and how; member names are keys of `Parts.trained` or `Parts.followers`."""
        raise NotImplementedError(f"{type(self).__name__} must say what predicts")

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        """Further predictions that the end-of-run validation reports beside the deployed one (name → spec)."""
        return {}
