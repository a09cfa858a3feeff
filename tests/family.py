"""What the family tests share: toy plans, batches of every kind, and one way to run any method on them.

A method is asked for nothing but what `autossl.trainers.base` promises, so one that is added later runs here as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from tiny_weights import tiny_weights_file
from torch import Tensor, nn

from autossl.data.labels import LabelSchema
from autossl.planners.plans import ConfigurationPlan
from autossl.trainers.base import (
    Batch,
    BatchRequest,
    Progress,
    SemiSupervisedTrainer,
    StepOutput,
    StreamBatch,
    StreamRequest,
)
from autossl.trainers.components.geometry import signed_distance
from autossl.trainers.loop import SUPERVISED, LoopOptions, TrainingLoop
from autossl.trainers.phases import Timetable
from autossl.trainers.registry import all_methods
from toys import toy_architecture, toy_configuration, toy_job, toy_schema, toy_stream

METHODS = all_methods()
"""Ours, and those of installed packages."""
NAMES = tuple(METHODS)
SEED = 7
FEATURES = (4, 8, 8, 8)
"""Four stages: three levels of deep supervision, of which the lowest has weight 0."""


@dataclass(frozen=True)
class Kind:
    """A shape of plan."""

    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...] | None = None
    spacing: tuple[float, ...] | None = None
    batch: int = 2
    """Patches of each stream."""

    @property
    def dims(self) -> int:
        return len(self.patch)


KINDS = {
    "2d": Kind((64, 64)),
    "isotropic": Kind((16, 16, 16)),
    "anisotropic": Kind((8, 48, 40), ((1, 2, 2), (2, 2, 2), (2, 2, 2)), (4.0, 1.0, 1.0), batch=1),
}
TINY_2D = Kind((32, 32))
TINY_3D = Kind((16, 16, 16))
NEEDED: dict[str, Callable[[], dict[str, str]]] = {
    "m_and_n": lambda: {"weights": str(tiny_weights_file())},
    "ersr": lambda: {"force": "true"},
}
"""By method: what `needed_settings` gives."""


def add_channel(raw: Path) -> None:
    """Gives each image of a raw dataset of one channel a second one (mirrored in its values), for methods of two."""
    for path in sorted(raw.glob("images*/*_0000.nii.gz")):
        image = nibabel.load(path)
        values = image.get_fdata(dtype=np.float32)
        turned = nibabel.Nifti1Image(values.max() - values, image.affine, image.header)
        nibabel.save(turned, path.with_name(path.name.replace("_0000", "_0001")))
    description = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
    description["channel_names"] = {"0": "MR", "1": "MR turned"}
    (raw / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def tiny(method: type[SemiSupervisedTrainer]) -> Kind:
    """The smallest plan that the method takes."""
    return TINY_2D if 2 in method.needs.dims else TINY_3D


def configuration_name(method: type[SemiSupervisedTrainer]) -> str:
    """The configuration of a planned data set that the method takes."""
    return "2d" if 2 in method.needs.dims else "3d_fullres"


def needed_settings(name: str) -> dict[str, str]:
    """Settings, as text, without which the method refuses a toy task, such as local files that the tests make."""
    return NEEDED[name]() if name in NEEDED else {}


# ------------------------------------------------------------------------------------------------------------ methods


def make(
    method: type[SemiSupervisedTrainer],
    kind: Kind | None = None,
    total: int | None = None,
    *,
    n_unlabeled: int = 4,
    regions: bool = False,
    ignore: bool = False,
    **settings: Any,
) -> SemiSupervisedTrainer:
    """A method on a toy job; `total` None gives each phase at least one step, and three in all."""
    kind = kind or tiny(method)
    configuration = _configuration(kind, max(1, method.needs.modalities))
    schema = toy_schema(regions=regions, ignore=ignore)

    def built(steps: int) -> SemiSupervisedTrainer:
        job = toy_job(n_unlabeled=n_unlabeled, total_steps=steps, seed=SEED, configuration=configuration, schema=schema)
        given: dict[str, Any] = {**needed_settings(method.name), **settings}
        case = replace(
            job,
            single_component_classes=(1,),
            elliptic_classes=(2,),
            median_case_shape=(10.0 if kind.dims == 2 else 4.0 * kind.patch[0], *map(float, kind.patch[-2:])),
            attribute_values={"patient": 2, "phase": 2},
        )
        return method(case, method.Settings(**given))

    return built(total if total is not None else shortest(built(100), at_least=3))


def shortest(method: SemiSupervisedTrainer, at_least: int, per_phase: int = 1) -> int:
    """The smallest number of steps in which every phase gets so many, and refreshes fall on steps of their own."""
    phases = method.phases()
    for total in range(at_least, 1000):
        try:
            table = Timetable(phases, total)
        except ValueError:
            continue
        times = [at for at, _ in table.refreshes]
        if all(span.end - span.start >= per_phase for span in table.spans) and len(set(times)) == len(times):
            return total
    raise AssertionError(f"{method.name}: no length of up to 1000 steps suits its phases {phases}")


def _configuration(kind: Kind, n_channels: int) -> ConfigurationPlan:
    return toy_configuration(
        kind.dims,
        n_channels,
        patch_size=kind.patch,
        median_image_size_in_voxels=tuple(float(edge) for edge in kind.patch),
        spacing=kind.spacing or (1.0,) * kind.dims,
        architecture=toy_architecture(kind.dims, FEATURES, kind.strides is not None, kind.strides),
        batch_size=kind.batch,
        labeled_batch_size=kind.batch,
        unlabeled_batch_size=kind.batch,
    )


def zeroed(method: type[SemiSupervisedTrainer]) -> dict[str, float]:
    """Settings that leave the supervised loss alone."""
    return dict.fromkeys(method.unsupervised_weights, 0.0)


def weights_of(method: SemiSupervisedTrainer) -> dict[str, Tensor]:
    """Copies of all weights and buffers of trained parts and followers."""
    modules = {**method.parts.trained, **method.parts.followers}
    return {
        f"{part}.{name}": value.detach().clone()
        for part, module in modules.items()
        for name, value in module.state_dict().items()
    }


def trained_parameters(method: SemiSupervisedTrainer) -> dict[str, nn.Parameter]:
    """By dotted name."""
    return {
        f"{part}.{name}": parameter
        for part, module in method.parts.trained.items()
        for name, parameter in module.named_parameters()
    }


def never_supervised(method: SemiSupervisedTrainer) -> set[str]:
    """Parameters of segmentation heads at the lowest of several levels: their weight is 0 in every loss."""
    names = set()
    for part, module in method.parts.trained.items():
        for name, layers in module.named_modules():
            if name.endswith("seg_layers") and isinstance(layers, nn.ModuleList) and len(layers) > 1:
                names |= {f"{part}.{name}.0.{parameter}" for parameter, _ in layers[0].named_parameters()}
    return names


def without_effect(method: SemiSupervisedTrainer) -> set[str]:
    """Biases of convolutions: a normalization behind them takes them out again, their gradient is rounding alone."""
    return {
        f"{part}.{name}.bias" if name else f"{part}.bias"
        for part, module in method.parts.trained.items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d) and layer.bias is not None
    }


# ------------------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Condition:
    """What is odd about the batches."""

    background: bool = False
    """No label shows anything."""
    missing_class: bool = False
    """No label shows the last class."""
    small_images: bool = False
    """Images end inside the patch."""
    ignored: bool = False
    """A part of each labeled patch has the ignore label."""
    poison: bool = False
    """Targets and pseudo-labels say something else where they are not valid."""
    counts: tuple[int, int] | None = None
    """Patches of each stream, whatever the request says."""


USUAL = Condition()


def family_batch(
    method: SemiSupervisedTrainer, request: BatchRequest, step: int, condition: Condition = USUAL
) -> Batch:
    """The batch that the request asks for; a function of the step alone."""
    labeled, unlabeled = request.labeled, request.unlabeled
    if condition.counts is not None:
        n_labeled, n_unlabeled = condition.counts
        labeled = replace(labeled, count=min(labeled.count, n_labeled))
        unlabeled = replace(unlabeled, count=min(unlabeled.count, n_unlabeled))
    known = _labeled(method, labeled, step, condition)
    return Batch(known, _unlabeled(method, unlabeled, step, condition) if unlabeled.count else None)


def _labeled(method: SemiSupervisedTrainer, request: StreamRequest, step: int, condition: Condition) -> StreamBatch:
    job, schema = method.job, method.job.schema
    stream = _stream(method, request, step, labeled=True)
    targets = stream.targets or ()
    if condition.background:
        targets = tuple(torch.zeros_like(target) for target in targets)
    if condition.missing_class:
        targets = tuple(_without_last_class(target, schema) for target in targets)
    valids = stream.valids
    if condition.ignored:
        valids = tuple(valid & ~_corner(valid) for valid in valids)
        targets = tuple(torch.where(valid, target, 0) for target, valid in zip(targets, valids, strict=True))
    distances = _distances(targets[0], job.configuration, schema) if method.needs.signed_distance else None
    if condition.poison:
        targets = tuple(_poisoned(target, valid) for target, valid in zip(targets, valids, strict=True))
    return replace(stream, targets=targets, valids=valids, signed_distances=distances)


def _unlabeled(method: SemiSupervisedTrainer, request: StreamRequest, step: int, condition: Condition) -> StreamBatch:
    stream = _stream(method, request, step, labeled=False)
    if condition.small_images:
        valids = tuple(valid & ~_corner(valid) for valid in stream.valids)
        views = tuple(torch.where(valid, view, 0) for view, valid in zip(stream.views, valids, strict=True))
        stream = replace(stream, valids=valids, views=views)
    if request.store is None:
        return stream
    # labels of a store: what a labeled patch of the same draw would have
    labels = toy_stream(method.job, request.count, step, labeled=False, with_target=True).targets or ()
    labels = tuple(torch.where(valid, label, 0) for label, valid in zip(labels, stream.valids, strict=False))
    if condition.poison:
        labels = tuple(_poisoned(label, valid) for label, valid in zip(labels, stream.valids, strict=False))
    draw = torch.Generator().manual_seed(step)
    confidence = 0.4 + 0.6 * torch.rand(stream.valid.shape, generator=draw)
    return replace(
        stream,
        pseudo_labels=labels * request.views,
        pseudo_confidences=(confidence,) * request.views,
        **({"pseudo_weights": torch.ones(request.count)} if hasattr(stream, "pseudo_weights") else {}),
    )


def _stream(method: SemiSupervisedTrainer, request: StreamRequest, step: int, labeled: bool) -> StreamBatch:
    stream = toy_stream(method.job, request.count, step, labeled, request.views)
    attributes = tuple({"patient": f"p{index % 2}", "phase": f"{index % 2}"} for index in range(request.count))
    has_channel = torch.ones((request.count, method.job.configuration.n_channels), dtype=torch.bool)
    places = (torch.arange(request.count) + 0.5) / max(1, request.count)
    centers = torch.stack([places, torch.full_like(places, 0.5), torch.full_like(places, 0.5)], 1)
    return replace(stream, attributes=attributes, has_channel=has_channel, centers=centers)


def _without_last_class(target: Tensor, schema: LabelSchema) -> Tensor:
    if schema.has_regions:
        return torch.cat([target[:, :-1], torch.zeros_like(target[:, -1:])], 1)
    return torch.where(target == schema.n_outputs - 1, 0, target)


def _corner(valid: Tensor) -> Tensor:
    """True in the last third of every axis' range, in a shape that no axis shows alone."""
    inside = torch.ones_like(valid)
    for axis, edge in enumerate(valid.shape[2:], 2):
        index = torch.arange(edge).view([-1 if a == axis else 1 for a in range(valid.ndim)])
        inside = inside & (index < edge - edge // 3)
    return ~inside


def _poisoned(target: Tensor, valid: Tensor) -> Tensor:
    other = 1 - target if target.is_floating_point() else torch.where(target == 1, 2, 1)
    return torch.where(valid, target, other)


def _distances(target: Tensor, configuration: ConfigurationPlan, schema: LabelSchema) -> Tensor:
    if schema.has_regions:
        masks = target > 0.5
    else:
        masks = torch.cat([target == value for value in range(1, schema.n_outputs)], 1)
    made = torch.zeros(masks.shape)
    for sample in range(len(masks)):
        for index in range(masks.shape[1]):
            distance = signed_distance(masks[sample, index].numpy(), configuration.spacing)
            made[sample, index] = torch.from_numpy(distance)
    return made


# --------------------------------------------------------------------------------------------------------------- runs


@dataclass
class FamilySource:
    """Batches for the loop; a store may be asked for only after it was refreshed."""

    method: SemiSupervisedTrainer
    condition: Condition = USUAL
    on_batch: Callable[[Batch], None] | None = None
    stores: set[str] = field(default_factory=set)

    def batches(self, steps: Sequence[tuple[int, BatchRequest]]) -> _Stream:
        """One per step."""
        return _Stream(self._batch(step, request) for step, request in steps)

    def reload_store(self, store: str, step: int) -> None:
        """The store may be asked for from now on."""
        self.stores.add(store)

    def _batch(self, step: int, request: BatchRequest) -> Batch:
        wanted = request.unlabeled.store
        assert wanted is None or wanted in self.stores, f"store '{wanted}' is asked for before it was refreshed"
        batch = family_batch(self.method, request, step, self.condition)
        if self.on_batch is not None:
            self.on_batch(batch)
        return batch


class _Stream:
    """A closable iterator."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    def close(self) -> None:
        """Nothing to end."""


def loop_of(
    method: SemiSupervisedTrainer,
    folder: Path,
    condition: Condition = USUAL,
    on_batch: Any = None,
    share_every: int | None = None,
) -> TrainingLoop:
    """A loop over the method's whole run."""
    folder.mkdir(parents=True, exist_ok=True)
    options = LoopOptions(
        method.job.total_steps, log_every=1, checkpoint_every=10_000, seed=SEED, gradient_share_every=share_every
    )
    source = FamilySource(method, condition, on_batch)
    return TrainingLoop(method, source, folder, options, refresh=lambda refresh, step: None)


def run_soundly(method: SemiSupervisedTrainer, folder: Path, condition: Condition = USUAL) -> TrainingLoop:
    """Runs to the end; every step must be taken, with finite terms and gradients."""
    loop = loop_of(method, folder, condition)
    before = weights_of(method)
    loop.run()
    after = weights_of(method)
    assert loop.skipped_steps == 0, "a step was not taken"
    assert loop._dropped_terms == {}, "a term was not finite"
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after), "nothing was trained"
    return loop


def each_phase(method: SemiSupervisedTrainer) -> Iterator[tuple[Progress, Batch]]:
    """The last step of every phase with its batch, entered as the loop enters it; for calls of `losses` alone."""
    table = Timetable(method.phases(), method.job.total_steps, SEED)
    for span in table.spans:
        method.on_phase(span.phase, table.progress(span.start))
        at = table.progress(span.end - 1)
        yield at, family_batch(method, method.request(at), at.step)


def beyond_supervised(output: StepOutput) -> dict[str, Tensor]:
    """The terms that do not come from labels."""
    return {name: term for name, term in output.losses.items() if not name.startswith(SUPERVISED)}
